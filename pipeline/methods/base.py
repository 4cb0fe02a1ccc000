"""The seam between the one training loop and every method.

The loop builds students and a method, hands over a `Batch` and what the students made of it, and
steps on the losses that come back. A method owns its heads and banks; both are checkpointed as
its `state_dict`. One method serves one student, or all students of a run if it needs `peers`.
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
from compress_ssl.pipeline.runtime.artifact import UserError


@dataclass(frozen=True)
class Needs:
    """What a method asks of the store and the loop.

    `arrays` are read from the store for every (i, v) of a batch, `local_*` ones for every local crop.
    `outputs` of the students: embedding, regions, local_embedding, local_regions. Class attributes
    `views`, `pairings`, `peers` and `independent` are looked at before a method is built; `arrays`,
    `outputs` and `crops` may be set by its `__init__`.
    """

    arrays: tuple[str, ...] = ("embedding",)
    outputs: tuple[str, ...] = ("embedding",)
    views: int = 1  # views per step that each student sees, at least
    pairings: tuple[str, ...] = ("same", "fresh", "cross")
    peers: bool = False  # all students of the run in one method
    independent: bool = False  # each of the peers sees views of its own
    crops: int = 0  # local crops per image of a step that students alone see, drawn afresh


@dataclass(frozen=True)
class Recipe:
    """The published training recipe; every field has a flag that overrides it."""

    optimizer: str = "sgd"
    lr: float = 0.01  # at 256 images per step; scaled linearly with the batch
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch_size: int = 256
    epochs: int = 130
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    drops: tuple[tuple[float, float], ...] = ((90 / 130, 0.2), (120 / 130, 0.04))
    norm_decay: bool = True  # norms and biases decay too
    clip: float | None = None  # largest norm of the gradient


@dataclass
class MethodContext:
    """What a method is built for."""

    students: Sequence[Embedder]
    widths: dict[str, tuple[int, ...]]  # of the store's arrays: {"embedding": (D,)}
    rows: np.ndarray  # good rows of the data
    view: int  # a stored view whose features are in memory when training begins
    seed: int
    notes: list[str] = field(default_factory=list)  # for the user: choices the method made
    heads: Mapping[str, Tensor] = field(default_factory=dict)  # the teacher's frozen heads, by their names in its file
    images: int = 0  # of the data, the unusable ones too: rows are numbers below this

    @property
    def teacher_width(self) -> int:
        return self.widths["embedding"][-1]


@dataclass
class Batch:
    """B images in W views and L local crops. Everything is on the device.

    `images` and `local_images` are inputs of the students, in their order. Where peers see views
    of their own, W is that of all together, and student p sees columns p * W / P to (p + 1) * W / P.
    """

    step: int
    rows: Tensor  # (B,) int64
    student_views: Tensor  # (B, W) int64
    teacher_views: Tensor  # (B, W) int64
    teacher: dict[str, Tensor]  # name: (B, W, ...) float32, not normalised; local_*: (B, L, ...)
    images: list[Tensor]  # per student: (B * W, 3, S, S) float, normalised
    local_images: list[Tensor] = field(default_factory=list)  # per student: (B * L, 3, s, s)
    local_views: Tensor | None = None  # (B, L) int64


Outputs = dict[str, Tensor]  # "embedding": (B, W, d), "regions": (B, W, R, d), "local_embedding": (B, L, d), ...


class Method(nn.Module, ABC):
    """Subclass, say what you need and what was published, return one loss per student.

    `__init__` takes `setting` and keyword-only hyper-parameters: these are the keys of the method
    on the command line.
    """

    needs: Needs = Needs()
    recipe: ClassVar[Recipe] = Recipe()

    @classmethod
    def for_spec(cls, argument: str) -> "type[Method]":
        """The class itself; `argument` is what follows its kind on the command line."""
        return cls

    @abstractmethod
    def forward(self, batch: Batch, outputs: Sequence[Outputs]) -> list[Tensor]:
        """One scalar loss per student."""

    def after_step(self, batch: Batch) -> None:
        """Called after the optimiser's step: banks and momentum encoders move here."""

    def exported_head(self) -> LinearHead | None:
        """A classifier on the student's embedding, kept beside it as head.safetensors; most methods have none."""
        return None

    def check_inputs(self, name: str, arrays: Container[str], pairing: str) -> None:
        """Raises UserError if it needs what is not there; `name` is what the user calls it."""
        require_arrays(name, self.needs.arrays, arrays)
        if pairing not in self.needs.pairings:
            raise UserError(f"{name} needs --pairing {' or '.join(self.needs.pairings)}, not {pairing}")

    def refill_banks(self, read: Read) -> None:
        """Called before the first step of a run and of a resumed run: read anchors from the store."""
        for module in self.modules():
            if isinstance(module, MemoryBank):
                module.refill(read)


def require_arrays(name: str, wanted: Sequence[str], arrays: Container[str]) -> None:
    """Raises UserError if the store lacks one of the arrays wanted, with the flags that put it there."""
    for array in wanted:
        if array in arrays:
            continue
        output = array.removeprefix("local_")
        flags = ["--local-views 6"] if output != array else []
        flags += [f"--keep embedding,{output}"] if output != "embedding" else []
        flags += ["(and the head's name in the teacher's file, as head=fc)"] if output == "projection" else []
        raise UserError(
            f"{name} needs {array!r} of the teacher, which the store lacks; export with {' '.join(flags) or 'it'} "
            "into a new --out"
        )


def require_positive(**values: float) -> None:
    """Hyper-parameters that must be more than 0. Raises UserError."""
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"{name}={value} was asked, but must be more than 0")


def require_fractions(**values: float) -> None:
    """Hyper-parameters that must be from 0 to 1. Raises UserError."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name}={value} was asked, but must be from 0 to 1")


Target = Literal["auto", "projection", "embedding"]


def choose_target(context: MethodContext, asked: Target, method: str) -> str:
    """Which vectors of the teacher a method compares with: `auto` is its projection where the store keeps one."""
    if asked != "auto":
        return asked
    if "projection" in context.widths:
        return "projection"
    context.notes.append(
        f"{method}: the store keeps no projection; the teacher's {context.teacher_width}-d embedding is the target"
    )
    return "embedding"


def bank_size(asked: int | None, published: int, context: MethodContext) -> int:
    """Slots of a bank: as asked, else as published but at most half the images.

    A longer one would hold older views of the very images of the batch. Raises UserError if more
    slots than images are asked for.
    """
    n = len(context.rows)
    if asked is not None:
        if not 0 < asked <= n:
            raise UserError(f"bank={asked} was asked, but must be from 1 to the {n} usable images; take bank={n // 2}")
        return asked
    size = min(published, max(1, n // 2))
    if size < published:
        context.notes.append(f"bank of {size} anchors instead of the published {published}: half of {n} images")
    return size


def initial_rows(context: MethodContext, size: int) -> Tensor:
    """(size,) distinct rows to start a bank with, a function of the seed."""
    order = philox.permutation(context.seed, philox.BANK, 0, len(context.rows))
    return torch.from_numpy(context.rows[order[:size]])
