"""A step of a lesson and what is measured on the way, against plain loops."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from compress_ssl.pipeline.methods.base import Batch, Method, Needs
from compress_ssl.pipeline.models import build
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.training.diagnostics import agreement, spread
from compress_ssl.pipeline.training.learner import Diverged, Learner, TrainingSettings
from compress_ssl.pipeline.training.schedule import Schedule
from compress_ssl.pipeline.training.student import Student

B, SIZE = 6, 8


pytestmark = pytest.mark.usefixtures("one_thread")


class Squares(Method):
    """The loss is the mean square of the embedding: enough to see what a step does."""

    def forward(self, batch: Batch, outputs: Any) -> list[Tensor]:
        return [outputs[0]["embedding"].float().pow(2).mean()]


def training(**said: Any) -> TrainingSettings:
    default = {
        "optimizer": "sgd", "lr": 0.5, "momentum": 0.9, "weight_decay": 0.1, "norm_decay": True,
        "schedule": Schedule("constant"), "clip": None, "ema": None, "precision": "fp32", "seed": 0,
    }  # fmt: skip
    return TrainingSettings(**{**default, **said})


def student(spec: str = "convnet:channels=4+5") -> Embedder:
    torch.manual_seed(0)
    return build(spec, image_size=SIZE)


def batch(step: int = 0) -> Batch:
    images = torch.rand(B, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(step))
    numbers = torch.zeros(B, 1, dtype=torch.int64)
    return Batch(step, torch.arange(B), numbers, numbers, {"embedding": images.flatten(1)[:, None, :7]}, [images])


def learner(folder: Path, spec: str = "convnet:channels=4+5", **said: Any) -> Learner:
    how = training(**said)
    return Learner([Student(folder, student(spec), how.ema)], Squares(), how)


# ---------------------------------------------------------------- a step


def test_a_step_at_a_part_of_the_run_uses_the_schedules_rate(tmp_path: Path) -> None:
    one = learner(tmp_path, schedule=Schedule("cosine"))
    assert one.step(batch(), 0.5, measure=True)[0]["lr"] == pytest.approx(0.25)


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_a_gradient_longer_than_the_clip_is_cut_to_it_and_a_shorter_one_is_not(clip: float, tmp_path: Path) -> None:
    clipped, free = (learner(tmp_path, clip=value, momentum=0.0, weight_decay=0.0) for value in (clip, None))
    before = nn.utils.parameters_to_vector(clipped.models.parameters()).detach().clone()
    moves = []
    for one in (clipped, free):
        one.step(batch(), 0.0)
        moves.append(before - nn.utils.parameters_to_vector(one.models.parameters()).detach())
    length = float(moves[1].norm()) / 0.5  # lr
    torch.testing.assert_close(moves[0], moves[1] * min(1.0, clip / length), rtol=1e-3, atol=1e-7)


def test_the_randomness_of_a_step_is_a_function_of_seed_step_and_student(tmp_path: Path) -> None:
    def drawn(step: int, **said: Any) -> float:
        one = learner(tmp_path, **said)
        torch.manual_seed(99)
        one.step(batch(step), 0.0)
        return float(torch.rand(()))

    assert drawn(3) == drawn(3)
    others = [drawn(4), drawn(3, seed=1), drawn(3, seed=2**63), drawn(3, spec="convnet:channels=4+6")]
    assert len({drawn(3), *others}) == 5


def test_a_method_draws_the_same_whatever_its_students_drew_and_not_what_they_drew(tmp_path: Path) -> None:
    drawn: list[float] = []

    class Draws(Squares):
        def forward(self, batch: Batch, outputs: Any) -> list[Tensor]:
            drawn.append(float(torch.rand(())))
            return super().forward(batch, outputs)

    for drop_path in (0.0, 0.5):
        one = Student(tmp_path, student(f"cifar-resnet:8,width=2,drop_path={drop_path}"))

        def looks(images: Tensor, names: list[str], give: Any = one.forward) -> Any:
            drawn.append(float(torch.rand(())))
            return give(images, names)

        one.forward = looks
        taught = Learner([one], Draws(), training())
        taught.seed = 5  # the student's name is part of it
        taught.step(batch(), 0.0)
    (look, draw), again = drawn[:2], drawn[2:]
    assert again == [look, draw] and look != draw


def test_the_average_moves_by_one_minus_its_decay_and_copies_batch_norm_statistics(tmp_path: Path) -> None:
    one = learner(tmp_path, ema=0.75)
    (student,) = one.students
    assert student.final_model is student.average
    want = [p.detach().clone() for p in student.model.parameters()]
    for step in range(3):
        one.step(batch(step), 0.0)
        moved = zip(want, student.model.parameters(), strict=True)
        want = [0.75 * old + 0.25 * new.detach() for old, new in moved]
    for got, expected in zip(student.final_model.parameters(), want, strict=True):
        torch.testing.assert_close(got, expected)
    for got, theirs in zip(student.final_model.buffers(), student.model.buffers(), strict=True):
        assert torch.equal(got, theirs)


def test_without_an_average_the_student_itself_is_kept(tmp_path: Path) -> None:
    (student,) = learner(tmp_path).students
    assert student.final_model is student.model and student.parts()["average"] is None


def test_bf16_steps_keep_the_weights_in_single_precision(tmp_path: Path) -> None:
    one = learner(tmp_path, precision="bf16")
    (row,) = one.step(batch(), 0.0, measure=True)
    assert {p.dtype for p in one.models.parameters()} == {torch.float32}
    assert all(math.isfinite(value) for value in row.values())


# ---------------------------------------------------------------- peers


class Rivals(Method):
    """Each peer wants the other's embedding: the loss of one needs both."""

    needs = Needs(arrays=(), views=1, peers=True, independent=True)

    def forward(self, batch: Batch, outputs: Any) -> list[Tensor]:
        a, b = (out["embedding"].float() for out in outputs)
        return [(a - b.detach()).pow(2).mean(), (b - a.detach()).pow(2).mean()]


def rivals(home: Path) -> Learner:
    students = [student("convnet:channels=4+5"), student("convnet:channels=3+5")]
    students = [Student(home / str(n), each) for n, each in enumerate(students)]
    return Learner(students, Rivals(), training(lr=0.05))


def both(step: int) -> Batch:
    one, two = batch(step), batch(step + 100)
    views = torch.zeros(B, 2, dtype=torch.int64)
    return Batch(step, one.rows, views, views, {}, [*one.images, *two.images])


def test_peers_stopped_between_their_saves_go_back_to_the_step_they_share(tmp_path: Path) -> None:
    whole, cut = rivals(tmp_path / "whole"), rivals(tmp_path / "cut")
    for step in range(4):
        whole.step(both(step), 0.0)
    for step in range(3):
        cut.step(both(step), 0.0)
        if step == 1:
            cut.save(2)
    cut.save(3)
    (cut.students[1].folder / "checkpoints" / "step-00000003.pt").unlink()  # killed before the second was saved
    again = rivals(tmp_path / "cut")
    again.restore()
    assert again.start == 2
    for step in range(2, 4):
        again.step(both(step), 0.0)
    for mine, theirs in zip(again.models.parameters(), whole.models.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_peers_fail_together(tmp_path: Path) -> None:
    pair = rivals(tmp_path)
    with torch.no_grad():
        next(pair.models[1].parameters()).fill_(float("nan"))
    with pytest.raises(Diverged, match=r"0 and .*1: the loss is nan at step 0"):
        pair.step(both(0), 0.0)


# ---------------------------------------------------------------- what is measured


def unit(rows: Tensor) -> list[list[float]]:
    return [[v / math.hypot(*row) for v in row] for row in rows.tolist()]


@given(st.integers(2, 9), st.integers(1, 6), st.integers(0, 999))
def test_spread_is_the_deviation_of_unit_embeddings_from_their_mean(n: int, d: int, seed: int) -> None:
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    u = unit(z)
    centre = [sum(row[j] for row in u) / n for j in range(d)]
    slow = math.sqrt(sum((row[j] - centre[j]) ** 2 for row in u for j in range(d)) / n)
    assert spread(z) == pytest.approx(slow, abs=1e-5)


def test_spread_is_zero_for_a_collapsed_student_and_near_one_for_a_full_sphere() -> None:
    assert spread(torch.ones(8, 3) * torch.arange(1.0, 9.0)[:, None]) == pytest.approx(0, abs=1e-6)
    assert spread(torch.randn(4000, 64)) == pytest.approx(1, abs=0.01)


@given(st.integers(2, 9), st.integers(0, 999))
def test_agreement_is_the_share_of_rows_with_the_same_nearest_other_row(n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, t = torch.randn(n, 3, generator=generator), torch.randn(n, 5, generator=generator)

    def nearest(rows: Tensor, i: int) -> int:
        u = unit(rows)
        return max((j for j in range(n) if j != i), key=lambda j: sum(a * b for a, b in zip(u[i], u[j], strict=True)))

    slow = 100 * sum(nearest(z, i) == nearest(t, i) for i in range(n)) / n
    assert agreement(z, t) == pytest.approx(slow)
    assert agreement(t * 7, t) == 100
