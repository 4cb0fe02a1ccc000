"""What every method must keep, tried on made-up data: for methods of your own too.

from compress_ssl.pipeline.testing import check_method

def test_mine_keeps_the_contract():
    check_method(Mine, strength=2.0)
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress_ssl.pipeline.methods.base import Batch, Method, MethodContext
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.models.linear_head import LinearHead
from compress_ssl.pipeline.models.network import Network
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.training import checkpoint
from compress_ssl.pipeline.training.learner import Learner
from compress_ssl.pipeline.training.schedule import Schedule
from compress_ssl.pipeline.training.settings import TrainingSettings
from compress_ssl.pipeline.training.student import Student
from compress_ssl.pipeline.views.numbering import LOCAL
from compress_ssl.pipeline.views.preprocessing import IMAGENET

IMAGES, VIEWS, CROPS, B, STEPS = 40, 9, 2, 8, 6
SIZE, SMALL = 16, 8
WIDTHS: dict[str, tuple[int, ...]] = {
    "embedding": (6,), "projection": (5,), "logits": (4,), "regions": (9, 6), "local_embedding": (6,),
    "local_projection": (5,),
}  # fmt: skip


def check_method(
    build: Callable[..., Method], /, *, students: int = 1, heads: Mapping[str, Tensor] | None = None, **options: Any
) -> None:
    """Raises AssertionError, saying what is wrong, unless a method can be trusted with a training run.

    It gives one finite loss per student; it moves each student and all that it says it trains; a
    classifier that it delivers fits the student; run again it is the same to the bit; stopped and
    restored into a new one it goes on to the bit; a checkpoint that lacks something is refused.
    build: the class; options: its keys; heads: what the teacher's frozen heads would be called in
    the store.
    """
    with tempfile.TemporaryDirectory() as folder:
        one = _lesson(build, options, students, heads, Path(folder), seed=0)
        name = type(one.method).__name__
        before = [p.detach().clone() for p in one.models.parameters()]
        whole = [_step(one, step, name) for step in range(STEPS)]
        _require_moved(one, before, name)
        _require_head(one, name)

        again = _lesson(build, options, students, heads, Path(folder), seed=0)
        for step in range(STEPS // 2):
            assert _step(again, step, name) == whole[step], f"{name} is not the same to the bit when run again"
        again.save(STEPS // 2)

        other = _lesson(build, options, students, heads, Path(folder), seed=1)
        other.restore()
        other.method.refill_banks(_read)
        for step in range(STEPS // 2, STEPS):
            assert _step(other, step, name) == whole[step], (
                f"{name} goes on differently when it is stopped and restored: something that changes from step to step "
                "is no buffer, no parameter and not in get_extra_state, or randomness does not come from torch"
            )
        _require_strict(other, name)


def _lesson(
    build: Callable[..., Method],
    options: Mapping[str, Any],
    students: int,
    heads: Mapping[str, Tensor] | None,
    folder: Path,
    seed: int,
) -> Learner:
    torch.manual_seed(seed)
    group = [Student(folder / str(number), _student()) for number in range(students)]
    context = MethodContext(
        [student.model for student in group], WIDTHS, np.arange(IMAGES), 1, 0, heads=heads or {}, images=IMAGES
    )
    method = build(context=context, **options)
    method.refill_banks(_read)
    for student in group:
        student.model.enable_outputs([name.removeprefix("local_") for name in method.needs.outputs])
    schedule = Schedule("constant")
    return Learner(group, method, TrainingSettings("sgd", 0.05, 0.9, 0.0, True, schedule, None, None, "fp32", 0))


def _student() -> Embedder:
    body = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(6, 7, 3, 2, 1)
    )
    return Embedder(Network(body, "student", replace(IMAGENET, size=SIZE)))


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _table(name: str) -> Tensor:
    """(N, V, ...): what a store would hold."""
    shape = WIDTHS[name]
    return _noise(sum(map(ord, name)), IMAGES, CROPS if name.startswith("local_") else VIEWS, *shape)


def _read(rows: Tensor, views: Tensor, array: str = "embedding") -> Tensor:
    return _table(array)[rows, views & ~LOCAL]


def _batch(learner: Learner, step: int) -> Batch:
    needs, count = learner.method.needs, len(learner.students)
    w = needs.views * (count if needs.independent else 1)
    rows = (torch.arange(B) + step * B) % IMAGES
    teacher = (1 + (torch.arange(w) + step) % (VIEWS - 1)).expand(B, w)
    student = {"same": teacher, "cross": teacher % (VIEWS - 1) + 1, "fresh": teacher + 2**31}[needs.pairings[0]]
    local = (LOCAL + torch.arange(CROPS)).expand(B, CROPS)
    seen = {
        name: _table(name)[rows[:, None], local & ~LOCAL if name.startswith("local_") else teacher]
        for name in needs.arrays
    }
    each = needs.views
    images = [_noise(1000 + 10 * step + n, B * each, 3, SIZE, SIZE) for n in range(count)]
    crops = [_noise(2000 + 10 * step + n, B * CROPS, 3, SMALL, SMALL) for n in range(count)]
    return Batch(step, rows, student, teacher, seen, images, crops, local)


def _step(learner: Learner, step: int, name: str) -> list[float]:
    count = len(learner.students)
    forward = type(learner.method).forward

    def watched(self: Any, batch: Batch, outputs: Any) -> list[Tensor]:
        losses = forward(self, batch, outputs)
        assert len(losses) == count, f"{name} gives {len(losses)} losses for {count} students"
        shapes = [tuple(loss.shape) for loss in losses if loss.dim()]
        assert not shapes, f"{name} gives a loss of shape {shapes[0]}, not a scalar"
        return losses

    learner.method.forward = watched.__get__(learner.method)  # type: ignore[method-assign]
    try:
        rows = learner.step(_batch(learner, step), step / STEPS)
    except UserError as wrong:
        raise AssertionError(f"{name}: {wrong}") from None
    return [row["loss"] for row in rows]


def _require_moved(learner: Learner, before: list[Tensor], name: str) -> None:
    moved = [not torch.equal(p, old) for p, old in zip(learner.models.parameters(), before, strict=True)]
    assert all(moved), f"{name} leaves {moved.count(False)} of {len(moved)} tensors of the students as they were"
    idle = [key for key, p in learner.method.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle, f"{name} never trains {', '.join(idle)}; use it, or say requires_grad_(False)"


def _require_head(learner: Learner, name: str) -> None:
    head, width = learner.method.exported_head(), learner.students[0].model.width
    assert head is None or isinstance(head, LinearHead), f"{name} delivers a {type(head).__name__}, not a LabelHead"
    assert head is None or head.width == width, f"{name} delivers a head for {head.width} dimensions, not {width}"


def _require_strict(learner: Learner, name: str) -> None:
    home = learner.students[0].folder / "checkpoints"
    saved = checkpoint.load(home / f"step-{STEPS // 2:08d}.pt")
    for key in (key for key in saved["method"] if not key.endswith("num_batches_tracked")):  # torch fills that in
        less = {**saved, "method": {k: v for k, v in saved["method"].items() if k != key}}
        torch.save(less, home / "less.pt")
        try:
            checkpoint.restore(home / "less.pt", learner.checkpoint_parts(learner.students[0]))
        except UserError:
            continue
        raise AssertionError(f"{name} is restored from a checkpoint that lacks {key}")
