"""Which images and views each step shows: [(i, v_student, v_teacher), ...] as a function of (seed, step).

The run goes through one permutation of the usable images after another. Every batch is full: one that reaches an
epoch's end takes its remaining images from the next epoch. Within an epoch all images use the same W views, so that
an epoch reads only W views from the store. Nothing has to be saved in order to resume.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import get_args

import numpy as np

from compress_ssl.pipeline.datasets.decode import GOOD
from compress_ssl.pipeline.distributed import collectives
from compress_ssl.pipeline.methods.base import Needs
from compress_ssl.pipeline.runtime import philox
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.formatting import pluralize
from compress_ssl.pipeline.runtime.progress import echo
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.training.choices import Pairing
from compress_ssl.pipeline.views.groups import GLOBAL_VIEWS, LOCAL_CROPS, ViewGroup, group_of_array
from compress_ssl.pipeline.views.loader import ViewRequest

PAIRINGS: tuple[Pairing, ...] = get_args(Pairing)


@dataclass(frozen=True)
class StepSampler:
    """The images and views of every step of a run, for one of `size` ranks.

    A rank's share of a step is b = batch / size images: those at positions rank, rank + size, ... of the global batch.
    As a sequence, the sampler holds the loader's requests of steps `first` to `steps` - 1.
    """

    seed: int
    rows: np.ndarray  # (n,) int64: i of the usable images
    views: tuple[int, ...]  # stored views to train on
    batch: int  # images per step of all ranks together
    views_per_step: int  # W
    pairing: Pairing
    steps: int
    reads_features: bool = True  # whether teacher features are read; if not, the stored views need not suffice
    first: int = 0  # step of request 0
    beside: tuple[ViewGroup, ...] = ()  # groups of views that every step shows in full beside the paired ones
    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if self.pairing not in PAIRINGS:
            raise UserError(f"--pairing is {self.pairing}, but must be one of {', '.join(PAIRINGS)}")
        need = self.views_per_step + (1 if self.pairing == "cross" and self.views_per_step == 1 else 0)
        if len(self.views) < need and (self.reads_features or self.pairing != "fresh"):
            fresh = "" if self.reads_features else ", or take --pairing fresh"
            raise UserError(
                f"{pluralize(len(self.views), 'view')} to train on, but --pairing {self.pairing} with "
                f"--views-per-step {self.views_per_step} needs {need}; give a larger --views if the store has more "
                f"views, or repeat the command that made it with --views {need + 1} or more{fresh}"
            )

    # ---------------------------------------------------------------- a sequence of requests for the loader

    def __len__(self) -> int:
        """Number of requests: steps from `first` to the end."""
        return self.steps - self.first

    def __getitem__(self, number: int) -> ViewRequest:
        epochs, positions = self._positions(self.first + number)
        rows, student_views, _ = self._indices(epochs, positions)
        return ViewRequest(rows, {GLOBAL_VIEWS.name: student_views, **self._views_beside(epochs)})

    # ---------------------------------------------------------------- groups of views beside the paired ones

    def with_needs(self, store: FeatureStore, needs: Sequence[Needs]) -> "StepSampler":
        """The same sampler with the local crops that methods need: stored ones, or ones drawn for each step.

        Raises UserError if the stored ones are incomplete, or if the methods need different local crops.
        """
        beside = dict.fromkeys(group for need in needs for group in _groups_beside(need, store.groups))
        for group in beside:
            if any(group.name == other.name and group != other for other in beside):
                raise UserError(
                    f"the methods need different {group.noun}s, so they cannot share a pass over the images; "
                    "train them with separate commands"
                )
            if group.stored:
                store.require_complete(group.numbers)
        return replace(self, beside=tuple(beside))

    def step_views_beside(self, step: int) -> dict[str, np.ndarray]:
        """{name of a group: (b, V) int64 view numbers} of the views that a step shows beside the paired ones."""
        return self._views_beside(self._positions(step)[0])

    def _views_beside(self, epochs: np.ndarray) -> dict[str, np.ndarray]:
        return {group.name: group.numbers_in(epochs) for group in self.beside}

    # ---------------------------------------------------------------- images and views

    def step_indices(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rows (b,), student views (b, W), teacher views (b, W)) of a step, int64."""
        return self._indices(*self._positions(step))

    def _indices(self, epochs: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows: list[np.ndarray] = []
        student: list[np.ndarray] = []
        teacher: list[np.ndarray] = []
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            in_epoch = positions[epochs == epoch]
            rows.append(self.rows[_epoch_order(self.seed, epoch, len(self.rows))[in_epoch]])
            for out, views in zip((student, teacher), self.epoch_views(epoch), strict=True):
                out.append(np.tile(views, (len(in_epoch), 1)))
        return np.concatenate(rows), np.concatenate(student), np.concatenate(teacher)

    def epoch_views(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(student views (W,), teacher views (W,)) of an epoch. Over len(views) epochs, each view is used equally."""
        count, w = len(self.views), self.views_per_step
        positions = _view_cycle(self.seed, epoch // count, count, w)[epoch % count]
        stored = np.array(self.views)[positions]
        if self.pairing == "same":
            return stored, stored
        if self.pairing == "fresh":
            return self._fresh.numbers_in(np.array(epoch)), stored
        if w > 1:
            return stored, np.roll(stored, 1)
        # cross with one view: the teacher's is any other stored view, at a random distance from 1 to count - 1
        shift = 1 + int(philox.words(self.seed, philox.PAIRING, epoch, 2**31, 1)[0]) % (count - 1)
        return stored, np.array(self.views)[(positions + shift) % count]

    @cached_property
    def _fresh(self) -> ViewGroup:
        """The W views of an epoch that no store keeps."""
        return GLOBAL_VIEWS.fresh(self.views_per_step)

    def _positions(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs (b,), positions within these epochs (b,)) of a step's images."""
        return np.divmod(step * self.batch + np.arange(self.rank, self.batch, self.size), len(self.rows))


def _groups_beside(needs: Needs, stored: Sequence[ViewGroup]) -> list[ViewGroup]:
    """The groups of views that a method needs beside the global ones: of `stored`, or fresh ones drawn alike."""
    arrays = {group_of_array(name).name for name in needs.arrays} - {GLOBAL_VIEWS.name}
    found = [group for group in stored if group.name in arrays]
    if needs.crops:
        crops = next((group for group in stored if group.name == LOCAL_CROPS.name), LOCAL_CROPS)
        found.append(crops.fresh(needs.crops))
    return found


@dataclass(frozen=True)
class Sampling:
    """Which images and views a command asks to see, and for how long; commands that share a pass have equal ones."""

    seed: int
    batch: int  # images per step of all ranks together
    views: int | None  # only stored views below this number; None: all
    views_per_step: int  # W
    pairing: Pairing
    epochs: float | None  # length of the run; None if `steps` is given
    steps: int | None
    reads_features: bool = True  # whether a method reads teacher features; if not, the stored views need not suffice


def make_sampler(store: FeatureStore, asked: Sampling, name: str) -> StepSampler:
    """The sampler of this rank over the usable images of a store; `name` is that of the store in messages.

    The batch is cut to the number of usable images. Raises UserError for views that the store lacks, for fewer than
    two usable images, and for a batch that cannot be divided evenly among the ranks.
    """
    views = select_views(store, asked.views, name)
    store.require_complete(views)
    rows, size = np.flatnonzero(store.table("status") == GOOD), collectives.world_size()
    if len(rows) < 2:
        raise UserError(f"{store.storage} has {len(rows)} usable images; at least 2 are needed to train")
    batch = min(asked.batch, len(rows))
    if batch % size:
        per_rank = max(1, round(min(batch, len(rows) - size / 2) / size))
        raise UserError(
            f"a batch of {batch} images cannot be shared by {size} ranks; give each --batch-size {per_rank}, "
            f"{per_rank * size} in all, or start a number of ranks that divides {batch}"
        )
    if batch < asked.batch:
        echo(f"batch of {batch} instead of {asked.batch}: that is all the usable images")
    steps = asked.steps or max(1, round((asked.epochs or 0) * len(rows) / batch))
    return StepSampler(
        asked.seed, rows, views, batch, asked.views_per_step, asked.pairing, steps, asked.reads_features,
        rank=collectives.rank(), size=size,
    )  # fmt: skip


def select_views(store: FeatureStore, total: int | None, name: str) -> tuple[int, ...]:
    """Numbers of the stored views to train on: the random views 1, 2, ... if there are any, otherwise view 0.

    total: only views below this number are used; None for all that the store has. name: of the store in messages.
    Raises UserError for more views than the store has, and if it holds none below `total`.
    """
    total = total or store.views
    if total > store.views:
        raise UserError(f"--views {total} was asked, but {name} has {store.views}; export more, or use fewer")
    stored = tuple(range(store.stored_views.start, total))
    if not stored:
        raise UserError(f"--views {total} was asked, but {name} holds views from {store.stored_views.start} on")
    return tuple(v for v in stored if v) or stored


@lru_cache(maxsize=2)  # a batch that crosses an epoch's end needs two epochs
def _epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """(n,) permutation of the usable images in an epoch."""
    return philox.permutation(seed, philox.ORDER, epoch, n)


@lru_cache(maxsize=2)  # a batch that crosses a cycle's end needs two cycles
def _view_cycle(seed: int, cycle: int, count: int, w: int) -> np.ndarray:
    """(count, W) positions in `views`, one row per epoch of a cycle of `count` epochs.

    W shuffled rounds over all `count` views fill the rows one after another. An epoch in which a round begins has
    views of the round before: the new round puts these last, so that no epoch has a view twice.
    """
    order: list[int] = []
    for number in range(cycle * w, cycle * w + w):
        used = order[len(order) - len(order) % w :]  # views of the row that the round before left incomplete
        order += sorted(philox.permutation(seed, philox.PAIRING, number, count).tolist(), key=used.__contains__)
    return np.array(order).reshape(count, w)
