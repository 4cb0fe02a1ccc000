"""Regression on the teacher's embedding with both norms, compared with sums in plain Python."""

import math

import pytest
import torch
from papers import (
    apply_linear,
    build_method,
    dot,
    gradient_is_exact,
    make_batch,
    mean,
    normalize,
    student_outputs,
    take_step,
)

W = 2


def run_step(spec: str) -> tuple[list[list[float]], list[list[float]], float]:
    """(teacher vectors, projected student vectors, loss) of one step."""
    method, batch, out = build_method(spec), make_batch(0, w=W), student_outputs(0, w=W)
    t = batch.teacher["embedding"].flatten(0, 1).tolist()
    s = [apply_linear(method.head, z) for z in out["embedding"].flatten(0, 1).tolist()]
    return t, s, take_step(method, batch, [out])[0]


def test_norm_l2_is_two_minus_two_cosines() -> None:
    t, s, loss = run_step("regression")
    pairs = [(normalize(a), normalize(b)) for a, b in zip(t, s, strict=True)]
    assert loss == pytest.approx(mean(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) for a, b in pairs))
    assert loss == pytest.approx(mean(2 - 2 * dot(a, b) for a, b in pairs))


def test_norm_batch_is_the_mean_squared_difference_of_standardised_dimensions() -> None:
    t, s, loss = run_step("regression:norm=batch")

    def standardised(rows: list[list[float]]) -> list[list[float]]:
        columns = []
        for column in zip(*rows, strict=True):
            centre = mean(column)
            variance = mean((x - centre) ** 2 for x in column)
            columns.append([(x - centre) / math.sqrt(variance + 1e-5) for x in column])
        return columns

    squares = [
        (x - y) ** 2 for a, b in zip(standardised(s), standardised(t), strict=True) for x, y in zip(a, b, strict=True)
    ]
    assert loss == pytest.approx(mean(squares))


@pytest.mark.parametrize("norm", ["l2", "batch"])
def test_the_gradient_is_exact(norm: str) -> None:
    method, batch = build_method(f"regression:norm={norm}"), make_batch(0, w=W)
    assert gradient_is_exact(method, batch, student_outputs(0, w=W))
    assert gradient_is_exact(method.requires_grad_(False), batch, student_outputs(1, w=W))


@pytest.mark.parametrize(("norm", "close"), [("l2", 1e-9), ("batch", 1e-4)])
def test_the_loss_is_invariant_to_the_scale_of_the_teacher(norm: str, close: float) -> None:
    method, batch, out = build_method(f"regression:norm={norm}"), make_batch(0, w=W), student_outputs(0, w=W)
    (before,) = take_step(method, batch, [out])
    batch.teacher["embedding"] = batch.teacher["embedding"] * 7
    assert take_step(method, batch, [out])[0] == pytest.approx(before, rel=close)


def test_a_student_equal_to_the_teacher_has_loss_zero() -> None:
    method, batch, out = build_method("regression"), make_batch(0), student_outputs(0)
    with torch.no_grad():
        method.head.weight.zero_()
        method.head.bias.copy_(batch.teacher["embedding"][0, 0])
    batch.teacher["embedding"] = batch.teacher["embedding"][:1].expand(4, 1, -1)
    assert take_step(method, batch, [out])[0] == pytest.approx(0, abs=1e-12)
