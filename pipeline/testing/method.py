"""check_method: a test of the requirements that the training loop has of every method, for your own methods too."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from compress_ssl.pipeline.methods.base import Batch, Method, MethodContext, Outputs
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.models.linear_head import LinearHead
from compress_ssl.pipeline.models.network import Network
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.training import checkpoint
from compress_ssl.pipeline.training.learner import Learner
from compress_ssl.pipeline.training.schedule import Schedule
from compress_ssl.pipeline.training.settings import TrainingSettings
from compress_ssl.pipeline.training.student import Student
from compress_ssl.pipeline.views.groups import GLOBAL_VIEWS, LOCAL_CROPS, group_of_array
from compress_ssl.pipeline.views.preprocessing import IMAGENET

IMAGES, VIEWS, CROPS = 40, 9, 2
"""N images of the artificial store, their views V (view 0 included) and their local crops L."""

B, STEPS = 8, 6
"""Images of a batch, and steps of a run; the run that is resumed stops after half of them. B * STEPS is more than
IMAGES, so that images come a second time."""

SIZE, SMALL = 16, 8
"""Sides of views and of local crops in pixels."""

WIDTHS: dict[str, tuple[int, ...]] = {
    "embedding": (6,), "projection": (5,), "logits": (4,), "regions": (9, 6), "local_embedding": (6,),
    "local_projection": (5,),
}  # fmt: skip
"""Shape per (i, v) of every array of the artificial store. The width of the embedding differs from the student's 7."""

# ---------------------------------------------------------------- the public check


def check_method(
    build: Callable[..., Method], /, *, students: int = 1, heads: Mapping[str, Tensor] | None = None, **options: object
) -> None:
    """Train a method for six steps on artificial data and raise AssertionError if it breaks a requirement.

    The data are random features of 40 images and a student with batch norm and dropout, on the CPU; it takes about a
    second. The assertions, in their order, and what each protects:

    - `forward` returns one loss per student, each a scalar, and each is finite: the loop sums and back-propagates
      them.
    - Every parameter of every student has changed, and every trainable parameter of the method has had a gradient:
      otherwise part of the model is cut off from the loss.
    - `exported_head` returns None or a LinearHead of the student's width: otherwise the exported file is useless.
    - A second run from the same seed has the same losses, bit for bit: the method draws from torch's generator only.
    - A run that is stopped after three steps, saved and restored into newly built objects continues with the same
      losses, bit for bit: whatever changes from step to step is in the checkpoint.
    - A checkpoint from which one entry of the method's state is removed is refused with UserError: the method does
      not load partial states.

    build: the method's class, called as build(context=..., **options). options: its keys. students: number of
    students, more than one for a method that needs `peers`. heads: tensors of the teacher's frozen heads, named as
    in the teacher's file. A method that reads an array which its `needs` does not name raises KeyError.

    Example, in a file of tests (the class Cosine is in docs/methods.md):
        from compress_ssl.pipeline.testing import check_method
        from mine import Cosine

        def test_cosine_meets_the_requirements_of_a_method():
            check_method(Cosine, power=2.0)
    """
    with tempfile.TemporaryDirectory() as folder:
        learner = _build_learner(build, options, students, heads, Path(folder), seed=0)
        name = type(learner.method).__name__
        before = [p.detach().clone() for p in learner.models.parameters()]
        losses = [_take_step(learner, step, name) for step in range(STEPS)]
        _require_trained(learner, before, name)
        _require_head(learner, name)

        repeated = _build_learner(build, options, students, heads, Path(folder), seed=0)
        for step in range(STEPS // 2):
            assert _take_step(repeated, step, name) == losses[step], (
                f"{name} has different losses when it is run again from the same seed; draw from torch's generator only"
            )
        repeated.save(STEPS // 2)

        # Another seed: what the restored objects have in common with the saved ones comes from the checkpoint.
        restored = _build_learner(build, options, students, heads, Path(folder), seed=1)
        restored.restore()
        restored.method.refill_banks(_read)
        for step in range(STEPS // 2, STEPS):
            assert _take_step(restored, step, name) == losses[step], (
                f"{name} has different losses after it is saved and restored; keep whatever changes from step to step "
                "in buffers, parameters or get_extra_state, and draw from torch's generator only"
            )
        _require_strict_loading(restored, name)


# ---------------------------------------------------------------- artificial data


def _build_learner(
    build: Callable[..., Method],
    options: Mapping[str, object],
    students: int,
    heads: Mapping[str, Tensor] | None,
    folder: Path,
    seed: int,
) -> Learner:
    """Students, method and optimizer, as the training loop builds them; `seed` is that of torch."""
    torch.manual_seed(seed)
    group = [Student(folder / str(number), _build_student()) for number in range(students)]
    models = [student.model for student in group]
    context = MethodContext(models, WIDTHS, np.arange(IMAGES), 1, 0, heads=heads or {}, images=IMAGES)
    method = build(context=context, **options)
    method.refill_banks(_read)
    for student in group:
        student.enable_outputs(method.needs.outputs)
    schedule = Schedule("constant")
    return Learner(group, method, TrainingSettings("sgd", 0.05, 0.9, 0.0, True, schedule, None, None, "fp32", 0))


def _build_student() -> Embedder:
    """A convolutional network of 7 outputs, with batch norm and dropout: both depend on state of the run."""
    body = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(6, 7, 3, 2, 1)
    )
    return Embedder(Network(body, "student", replace(IMAGENET, size=SIZE)))


def _noise(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers, a function of the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _table(name: str) -> Tensor:
    """(N, V, ...), or (N, L, ...) of local crops: an array of the artificial store, whose seed is its name."""
    views = {GLOBAL_VIEWS: VIEWS, LOCAL_CROPS: CROPS}
    return _noise(sum(map(ord, name)), IMAGES, views[group_of_array(name)], *WIDTHS[name])


def _read(rows: Tensor, views: Tensor, array: str = "embedding") -> Tensor:
    """A `memory_bank.Read` of the artificial store."""
    return _table(array)[rows, views - group_of_array(array).first]


def _batch(learner: Learner, step: int) -> Batch:
    """The batch of a step: the next B images, whose views change with the step."""
    needs, count = learner.method.needs, len(learner.students)
    w = needs.views * (count if needs.independent else 1)
    rows = (torch.arange(B) + step * B) % IMAGES
    teacher = (1 + (torch.arange(w) + step) % (VIEWS - 1)).expand(B, w)
    student = {"same": teacher, "cross": teacher % (VIEWS - 1) + 1, "fresh": teacher + 2**31}[needs.pairings[0]]
    local = (LOCAL_CROPS.first + torch.arange(CROPS)).expand(B, CROPS)
    views = {GLOBAL_VIEWS: teacher, LOCAL_CROPS: local}
    features = {name: _read(rows[:, None], views[group_of_array(name)], name) for name in needs.arrays}
    images = [_noise(1000 + 10 * step + n, B * needs.views, 3, SIZE, SIZE) for n in range(count)]
    crops = [_noise(2000 + 10 * step + n, B * CROPS, 3, SMALL, SMALL) for n in range(count)]
    return Batch(step, rows, student, teacher, features, images, crops, local)


# ---------------------------------------------------------------- assertions


def _take_step(learner: Learner, step: int, name: str) -> list[float]:
    """The students' losses of one training step, whose number, shape and finiteness are asserted."""
    count = len(learner.students)
    forward = type(learner.method).forward

    def checked_forward(self: Method, batch: Batch, outputs: Sequence[Outputs]) -> list[Tensor]:
        losses = forward(self, batch, outputs)
        assert len(losses) == count, f"{name}.forward returned {len(losses)} losses for {count} students"
        shapes = [tuple(loss.shape) for loss in losses if loss.dim()]
        assert not shapes, f"{name}.forward returned a loss of shape {shapes[0]}, not a scalar"
        return losses

    learner.method.forward = checked_forward.__get__(learner.method)  # type: ignore[method-assign]
    try:
        rows = learner.step(_batch(learner, step), step / STEPS)
    except UserError as error:  # the loop's own error for a loss that is not finite
        raise AssertionError(f"{name}: {error}") from None
    return [row["loss"] for row in rows]


def _require_trained(learner: Learner, before: list[Tensor], name: str) -> None:
    """Assert that all students' parameters differ from `before` and that no trainable parameter lacks a gradient."""
    changed = [not torch.equal(p, old) for p, old in zip(learner.models.parameters(), before, strict=True)]
    assert all(changed), f"{name} left {changed.count(False)} of {len(changed)} parameters of the students unchanged"
    idle = [key for key, p in learner.method.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle, (
        f"{name} has parameters without a gradient: {', '.join(idle)}; use them, or call requires_grad_(False)"
    )


def _require_head(learner: Learner, name: str) -> None:
    """Assert that the exported head is None or a LinearHead of the student's width."""
    head, width = learner.method.exported_head(), learner.students[0].model.width
    assert head is None or isinstance(head, LinearHead), (
        f"{name}.exported_head returned a {type(head).__name__}, not a LinearHead"
    )
    assert head is None or head.width == width, (
        f"{name}.exported_head returned a head for {head.width} dimensions, but the student has {width}"
    )


def _require_strict_loading(learner: Learner, name: str) -> None:
    """Assert that a checkpoint without one of the entries of the method's state is refused, for each entry."""
    folder = learner.students[0].folder / "checkpoints"
    saved = checkpoint.load(folder / f"step-{STEPS // 2:08d}.pt")
    method = saved["method"]
    assert isinstance(method, dict)  # the state of an nn.Module
    for key in method:
        if key.endswith("num_batches_tracked"):  # torch sets it to 0 where it is missing
            continue
        state = {k: v for k, v in method.items() if k != key}
        torch.save({**saved, "method": state}, folder / "incomplete.pt")
        try:
            checkpoint.restore(folder / "incomplete.pt", learner.checkpoint_parts(learner.students[0]))
        except UserError:
            continue
        raise AssertionError(f"{name} was restored from a checkpoint that lacks {key}; load the state with strict=True")
