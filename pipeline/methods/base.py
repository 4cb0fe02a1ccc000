"""Base class of methods, and the data that the training loop and a method exchange.

The training loop builds the students and a method. At each step it passes a `Batch` and the students'
outputs to `Method.forward`, back-propagates the sum of the losses that are returned, takes an optimizer
step and calls `Method.after_step`. A method owns its heads and memory banks; its `state_dict` is part
of the checkpoint. One method object trains one student, or all students of a run if it needs `peers`.

Shapes in this package: N images, B images of a batch, W views per image and step, L local crops per
image, S side in pixels, R regions, D teacher dims, d student dims, K anchors.
"""

from abc import ABC, abstractmethod
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from compress_ssl.pipeline.methods.memory_bank import MemoryBank, Read
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.models.linear_head import LinearHead
from compress_ssl.pipeline.runtime import philox
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.options import Option
from compress_ssl.pipeline.views.groups import ViewGroup, group_of_array


@dataclass(frozen=True)
class Needs:
    """What a method requires of the store and of the training loop.

    `arrays` are names of stored teacher arrays: embedding, projection, logits, regions are read for every
    (i, v) of a batch; local_embedding, local_projection, local_regions for every local crop. `outputs` are
    names of student outputs: embedding, regions, local_embedding, local_regions. The training loop reads
    `views`, `pairings`, `peers` and `independent` from the class, before a method is built; `__init__` may
    replace `arrays`, `outputs` and `crops` on the instance.
    """

    arrays: tuple[str, ...] = ("embedding",)
    outputs: tuple[str, ...] = ("embedding",)
    views: int = 1  # smallest number of views per image and step, for each student
    pairings: tuple[str, ...] = ("same", "fresh", "cross")  # values of --pairing that the loss is defined for
    peers: bool = False  # one method object trains all students of the run
    independent: bool = False  # every peer is given different views of the images
    crops: int = 0  # local crops per image, drawn anew at each step, without a stored teacher feature


@dataclass(frozen=True)
class Recipe:
    """The published training recipe of a method. Every field but `drops` is a flag's default in `compress distill`."""

    optimizer: str = "sgd"
    lr: float = 0.01  # for 256 images per step; scaled linearly with the batch size
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch_size: int = 256  # images per step, over all ranks
    epochs: int = 130
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    # For schedule "step": (fraction of the training, factor on lr from there on). These are CompRess's.
    drops: tuple[tuple[float, float], ...] = ((90 / 130, 0.2), (120 / 130, 0.04))
    norm_decay: bool = True  # apply weight decay to normalisation layers and biases as well
    clip: float | None = None  # largest L2 norm of a student's gradient; None does not clip


@dataclass
class MethodContext:
    """What a method's `__init__` needs to know about the students and the store."""

    students: Sequence[Embedder]
    widths: dict[str, tuple[int, ...]]  # shape per (i, v) of each stored array: {"embedding": (D,), "regions": (R, D)}
    rows: np.ndarray  # (n,) int64, ascending: rows of the usable images
    view: int  # a stored view whose features are already in memory when training begins
    seed: int
    notes: list[str] = field(default_factory=list)  # the method appends choices that the user should know about
    heads: Mapping[str, Tensor] = field(default_factory=dict)  # the teacher's frozen heads, named as in its file
    images: int = 0  # N, unusable images included: every row is below this
    # The method appends what an option that was left open (None, "auto") stands for; the run's record keeps it.
    resolved: dict[str, Option] = field(default_factory=dict)

    @property
    def teacher_width(self) -> int:
        """D, the width of the teacher's stored embedding."""
        return self.widths["embedding"][-1]


@dataclass
class Batch:
    """B images in W views and L local crops. All tensors are on the training device.

    `images` and `local_images` hold one tensor per student. If the method needs `independent` views for
    its P peers, W counts the views of all peers together, and the views of student p are the columns
    p * W / P to (p + 1) * W / P.
    """

    step: int
    rows: Tensor  # (B,) int64
    student_views: Tensor  # (B, W) int64
    teacher_views: Tensor  # (B, W) int64
    teacher: dict[str, Tensor]  # by array: (B, W, ...) float32, not L2-normalised; local_*: (B, L, ...)
    images: list[Tensor]  # per student: (B * W, 3, S, S) float, with the student's mean and std applied
    local_images: list[Tensor] = field(default_factory=list)  # per student: (B * L, 3, s, s), s smaller than S
    local_views: Tensor | None = None  # (B, L) int64

    def set_views(self, group: ViewGroup, views: Tensor) -> None:
        """Set the (B, V) view numbers of a group: `local_views` of local crops, and likewise of any further group."""
        setattr(self, group.array("views"), views)

    def set_images(self, group: ViewGroup, images: list[Tensor]) -> None:
        """Set a group's images, one tensor per student: `images`, `local_images`, and likewise of any further group."""
        setattr(self, group.array("images"), images)

    def images_of(self, group: ViewGroup) -> list[Tensor]:
        """The images of a group, one tensor per student."""
        images: list[Tensor] = getattr(self, group.array("images"))
        return images


Outputs = dict[str, Tensor]
"""A student's outputs by name: embedding (B, W, d), regions (B, W, R, d), local_embedding (B, L, d), local_regions."""


class Method(nn.Module, ABC):
    """Base class of all methods, for your own too: set `needs` and `recipe`, write `__init__` and `forward`.

    `__init__` takes `context` (a MethodContext) and further keyword-only arguments, the hyper-parameters:
    their names are the method's keys on the command line. Whatever changes from step to step must be a
    buffer, a parameter or part of `get_extra_state`, so that it is in the checkpoint; randomness must come
    from torch's default generator, which is seeded anew at each step. `compress_ssl.pipeline.testing.check_method`
    tests both. docs/methods.md shows a complete method.
    """

    needs: Needs = Needs()
    recipe: ClassVar[Recipe] = Recipe()

    @classmethod
    def for_spec(cls, argument: str) -> "type[Method]":
        """The class whose `needs` and `recipe` apply. `argument` is the spec's text between its kind and its keys."""
        return cls

    @abstractmethod
    def forward(self, batch: Batch, outputs: Sequence[Outputs]) -> list[Tensor]:
        """One scalar loss per student, in the students' order. Runs under autocast if --precision asks for it."""

    def after_step(self, batch: Batch) -> None:
        """Called after the optimizer step. Update memory banks and momentum encoders here."""

    def exported_head(self) -> LinearHead | None:
        """A linear classifier on the student's embedding, saved as head.safetensors; None for most methods."""
        return None

    def check_inputs(self, name: str, arrays: Container[str], pairing: str) -> None:
        """Raise UserError if the store's `arrays` or the `pairing` do not suffice. `name` is shown in it."""
        require_arrays(name, self.needs.arrays, arrays)
        if pairing not in self.needs.pairings:
            allowed = " or ".join(self.needs.pairings)
            raise UserError(f"{name} needs --pairing {allowed}, not {pairing}")

    def refill_banks(self, read: Read) -> None:
        """Read anchors that the checkpoint lacks from the store. Called before the first step after every start."""
        for module in self.modules():
            if isinstance(module, MemoryBank):
                module.refill(read)


def require_arrays(name: str, wanted: Sequence[str], arrays: Container[str]) -> None:
    """Raise UserError if the store lacks one of the `wanted` arrays. The error names the export flags that add it."""
    for array in wanted:
        if array in arrays:
            continue
        group = group_of_array(array)
        output = group.output(array)
        flags = [group.flags] if group.flags else []
        flags += [f"--keep embedding,{output}"] if output != "embedding" else []
        flags += ["(and the head's name in the teacher's file, as head=fc)"] if output == "projection" else []
        raise UserError(
            f"{name} needs {array!r} of the teacher, which the store lacks; export with {' '.join(flags) or 'it'} "
            "into a new --out"
        )


def require_positive(**values: float) -> None:
    """Raise UserError unless every hyper-parameter is more than 0."""
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"{name}={value} was asked, but must be more than 0")


def require_fractions(**values: float) -> None:
    """Raise UserError unless every hyper-parameter is from 0 to 1."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name}={value} was asked, but must be from 0 to 1")


Target = Literal["auto", "projection", "embedding"]
"""Key `target`: the stored teacher array that the student is compared with."""


def choose_target(context: MethodContext, asked: Target, method: str) -> str:
    """The stored array to compare with: as `asked`; `auto` is the projection if it is stored, else the embedding."""
    if asked != "auto":
        return asked
    context.resolved["target"] = "projection" if "projection" in context.widths else "embedding"
    if "projection" in context.widths:
        return "projection"
    context.notes.append(
        f"{method}: the store keeps no projection; the teacher's {context.teacher_width}-d embedding is the target"
    )
    return "embedding"


def bank_size(asked: int | None, published: int, context: MethodContext) -> int:
    """Number of slots K of a memory bank: as asked, else as published, but at most half the usable images.

    A longer queue would often hold an older view of an image of the batch, an anchor that is no negative.
    A size that is not asked is recorded in `context`; if it is cut, a note is appended. Raises UserError if `asked`
    is not from 1 to the number of usable images.
    """
    n = len(context.rows)
    if asked is not None:
        if not 0 < asked <= n:
            raise UserError(f"bank={asked} was asked, but must be from 1 to the {n} usable images; take bank={n // 2}")
        return asked
    size = context.resolved["bank"] = min(published, max(1, n // 2))
    if size < published:
        context.notes.append(f"bank of {size} anchors instead of the published {published}: half of {n} images")
    return size


def initial_rows(context: MethodContext, size: int) -> Tensor:
    """(size,) int64 distinct usable rows with which a bank starts, a function of the seed."""
    order = philox.permutation(context.seed, philox.BANK, 0, len(context.rows))
    return torch.from_numpy(context.rows[order[:size]])
