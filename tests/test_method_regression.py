"""Regression on the teacher's embedding, both norms, against plain sums."""

import math

import pytest
import torch
from papers import batch, dot, gradients_check, learner, looks, losses, mean, norm, through

W = 2


def sides(order: str) -> tuple[list[list[float]], list[list[float]], float]:
    """(teacher, student through the head, the loss)"""
    made, now, out = learner(order), batch(0, w=W), looks(0, w=W)
    t = now.teacher["embedding"].flatten(0, 1).tolist()
    s = [through(made.head, z) for z in out["embedding"].flatten(0, 1).tolist()]
    return t, s, losses(made, now, [out])[0]


def test_with_unit_vectors_it_is_two_minus_two_cosines() -> None:
    t, s, loss = sides("regression")
    pairs = [(norm(a), norm(b)) for a, b in zip(t, s, strict=True)]
    assert loss == pytest.approx(mean(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) for a, b in pairs))
    assert loss == pytest.approx(mean(2 - 2 * dot(a, b) for a, b in pairs))


def test_with_batch_norm_it_is_the_mean_square_of_standardised_dimensions() -> None:
    t, s, loss = sides("regression:norm=batch")

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
def test_its_gradient_is_the_losses(norm: str) -> None:
    made, now = learner(f"regression:norm={norm}"), batch(0, w=W)
    assert gradients_check(made, now, looks(0, w=W))
    assert gradients_check(made.requires_grad_(False), now, looks(1, w=W))


@pytest.mark.parametrize(("norm", "close"), [("l2", 1e-9), ("batch", 1e-4)])
def test_the_scale_of_the_teacher_does_not_matter(norm: str, close: float) -> None:
    made, now, out = learner(f"regression:norm={norm}"), batch(0, w=W), looks(0, w=W)
    (before,) = losses(made, now, [out])
    now.teacher["embedding"] = now.teacher["embedding"] * 7
    assert losses(made, now, [out])[0] == pytest.approx(before, rel=close)


def test_a_student_that_has_arrived_has_no_loss() -> None:
    made, now, out = learner("regression"), batch(0), looks(0)
    with torch.no_grad():
        made.head.weight.zero_()
        made.head.bias.copy_(now.teacher["embedding"][0, 0])
    now.teacher["embedding"] = now.teacher["embedding"][:1].expand(4, 1, -1)
    assert losses(made, now, [out])[0] == pytest.approx(0, abs=1e-12)
