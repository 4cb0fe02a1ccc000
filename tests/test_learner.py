"""A learner's step and the diagnostics that it logs, compared with plain loops."""

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
from compress_ssl.pipeline.training.learner import Diverged, Learner
from compress_ssl.pipeline.training.schedule import Schedule
from compress_ssl.pipeline.training.settings import TrainingSettings
from compress_ssl.pipeline.training.student import Student

B, SIZE = 6, 8


pytestmark = pytest.mark.usefixtures("one_thread")


class Squares(Method):
    """The loss is the mean square of the embedding: the simplest that shows what a step does."""

    def forward(self, batch: Batch, outputs: Any) -> list[Tensor]:
        return [outputs[0]["embedding"].float().pow(2).mean()]


def make_settings(**changes: Any) -> TrainingSettings:
    default = {
        "optimizer": "sgd", "lr": 0.5, "momentum": 0.9, "weight_decay": 0.1, "norm_decay": True,
        "schedule": Schedule("constant"), "clip": None, "ema": None, "precision": "fp32", "seed": 0,
    }  # fmt: skip
    return TrainingSettings(**{**default, **changes})


def build_student(spec: str = "convnet:channels=4+5") -> Embedder:
    torch.manual_seed(0)
    return build(spec, image_size=SIZE)


def make_batch(step: int = 0) -> Batch:
    images = torch.rand(B, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(step))
    numbers = torch.zeros(B, 1, dtype=torch.int64)
    return Batch(step, torch.arange(B), numbers, numbers, {"embedding": images.flatten(1)[:, None, :7]}, [images])


def make_learner(folder: Path, spec: str = "convnet:channels=4+5", **changes: Any) -> Learner:
    settings = make_settings(**changes)
    return Learner([Student(folder, build_student(spec), settings.ema)], Squares(), settings)


# ---------------------------------------------------------------- a step


def test_a_step_uses_the_schedules_learning_rate(tmp_path: Path) -> None:
    learner = make_learner(tmp_path, schedule=Schedule("cosine"))
    assert learner.step(make_batch(), 0.5, measure=True)[0]["lr"] == pytest.approx(0.25)


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_a_gradient_above_the_clip_norm_is_scaled_to_it_and_one_below_is_not(clip: float, tmp_path: Path) -> None:
    clipped, free = (make_learner(tmp_path, clip=value, momentum=0.0, weight_decay=0.0) for value in (clip, None))
    before = nn.utils.parameters_to_vector(clipped.models.parameters()).detach().clone()
    moves = []
    for learner in (clipped, free):
        learner.step(make_batch(), 0.0)
        moves.append(before - nn.utils.parameters_to_vector(learner.models.parameters()).detach())
    gradient_norm = float(moves[1].norm()) / 0.5  # divided by the learning rate
    torch.testing.assert_close(moves[0], moves[1] * min(1.0, clip / gradient_norm), rtol=1e-3, atol=1e-7)


def test_the_randomness_of_a_step_is_a_function_of_seed_step_and_student(tmp_path: Path) -> None:
    def drawn(step: int, **changes: Any) -> float:
        learner = make_learner(tmp_path, **changes)
        torch.manual_seed(99)
        learner.step(make_batch(step), 0.0)
        return float(torch.rand(()))

    assert drawn(3) == drawn(3)
    others = [drawn(4), drawn(3, seed=1), drawn(3, seed=2**63), drawn(3, spec="convnet:channels=4+6")]
    assert len({drawn(3), *others}) == 5


def test_the_random_numbers_of_a_method_do_not_depend_on_those_of_its_students(tmp_path: Path) -> None:
    drawn: list[float] = []

    class Draws(Squares):
        def forward(self, batch: Batch, outputs: Any) -> list[Tensor]:
            drawn.append(float(torch.rand(())))
            return super().forward(batch, outputs)

    for drop_path in (0.0, 0.5):
        student = Student(tmp_path, build_student(f"cifar-resnet:8,width=2,drop_path={drop_path}"))

        def drawing_forward(images: Tensor, names: list[str], forward: Any = student.forward) -> Any:
            drawn.append(float(torch.rand(())))
            return forward(images, names)

        student.forward = drawing_forward
        learner = Learner([student], Draws(), make_settings())
        learner.seed = 5  # otherwise it depends on the student's spec
        learner.step(make_batch(), 0.0)
    (by_student, by_method), again = drawn[:2], drawn[2:]
    assert again == [by_student, by_method] and by_student != by_method


def test_the_average_moves_by_one_minus_its_decay_and_copies_batch_norm_statistics(tmp_path: Path) -> None:
    learner = make_learner(tmp_path, ema=0.75)
    (student,) = learner.students
    assert student.final_model is student.average
    expected = [p.detach().clone() for p in student.model.parameters()]
    for step in range(3):
        learner.step(make_batch(step), 0.0)
        moved = zip(expected, student.model.parameters(), strict=True)
        expected = [0.75 * old + 0.25 * new.detach() for old, new in moved]
    for parameter, value in zip(student.final_model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter, value)
    for buffer, copied in zip(student.final_model.buffers(), student.model.buffers(), strict=True):
        assert torch.equal(buffer, copied)


def test_without_an_average_the_final_model_is_the_student_itself(tmp_path: Path) -> None:
    (student,) = make_learner(tmp_path).students
    assert student.final_model is student.model and student.checkpoint_parts()["average"] is None


def test_bf16_steps_keep_the_weights_in_single_precision(tmp_path: Path) -> None:
    learner = make_learner(tmp_path, precision="bf16")
    (row,) = learner.step(make_batch(), 0.0, measure=True)
    assert {p.dtype for p in learner.models.parameters()} == {torch.float32}
    assert all(math.isfinite(value) for value in row.values())


# ---------------------------------------------------------------- peers


class MutualMethod(Method):
    """Each peer is trained towards the other's embedding, so the loss of one needs both."""

    needs = Needs(arrays=(), views=1, peers=True, independent=True)

    def forward(self, batch: Batch, outputs: Any) -> list[Tensor]:
        a, b = (out["embedding"].float() for out in outputs)
        return [(a - b.detach()).pow(2).mean(), (b - a.detach()).pow(2).mean()]


def make_peers(folder: Path) -> Learner:
    models = [build_student("convnet:channels=4+5"), build_student("convnet:channels=3+5")]
    students = [Student(folder / str(n), model) for n, model in enumerate(models)]
    return Learner(students, MutualMethod(), make_settings(lr=0.05))


def make_peer_batch(step: int) -> Batch:
    one, two = make_batch(step), make_batch(step + 100)
    views = torch.zeros(B, 2, dtype=torch.int64)
    return Batch(step, one.rows, views, views, {}, [*one.images, *two.images])


def test_peers_killed_between_their_saves_resume_from_the_last_step_that_both_saved(tmp_path: Path) -> None:
    whole, cut = make_peers(tmp_path / "whole"), make_peers(tmp_path / "cut")
    for step in range(4):
        whole.step(make_peer_batch(step), 0.0)
    for step in range(3):
        cut.step(make_peer_batch(step), 0.0)
        if step == 1:
            cut.save(2)
    cut.save(3)
    (cut.students[1].folder / "checkpoints" / "step-00000003.pt").unlink()  # killed before the second peer was saved
    resumed = make_peers(tmp_path / "cut")
    resumed.restore()
    assert resumed.start == 2
    for step in range(2, 4):
        resumed.step(make_peer_batch(step), 0.0)
    for parameter, value in zip(resumed.models.parameters(), whole.models.parameters(), strict=True):
        assert torch.equal(parameter, value)


def test_peers_fail_together(tmp_path: Path) -> None:
    pair = make_peers(tmp_path)
    with torch.no_grad():
        next(pair.models[1].parameters()).fill_(float("nan"))
    with pytest.raises(Diverged, match=r"0 and .*1: the loss is nan at step 0"):
        pair.step(make_peer_batch(0), 0.0)


# ---------------------------------------------------------------- diagnostics


def unit_rows(rows: Tensor) -> list[list[float]]:
    return [[v / math.hypot(*row) for v in row] for row in rows.tolist()]


@given(st.integers(2, 9), st.integers(1, 6), st.integers(0, 999))
def test_spread_is_the_deviation_of_unit_embeddings_from_their_mean(n: int, d: int, seed: int) -> None:
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    u = unit_rows(z)
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
        u = unit_rows(rows)
        return max((j for j in range(n) if j != i), key=lambda j: sum(a * b for a, b in zip(u[i], u[j], strict=True)))

    slow = 100 * sum(nearest(z, i) == nearest(t, i) for i in range(n)) / n
    assert agreement(z, t) == pytest.approx(slow)
    assert agreement(t * 7, t) == 100
