"""What each step looks at: [(i, v_student, v_teacher), ...] as a function of (seed, step).

Positions run through one permutation of the good rows after another, so batches never run short:
one that reaches an epoch's end goes on into the next. An epoch uses the same W views for all
images, in turns, so that it reads only these from the store.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from compress_ssl.pipeline.datasets.decode import GOOD
from compress_ssl.pipeline.distributed import collectives
from compress_ssl.pipeline.methods.base import Needs
from compress_ssl.pipeline.runtime import philox
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.formatting import pluralize
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.views.loader import ViewRequest
from compress_ssl.pipeline.views.numbering import FRESH, LOCAL

PAIRINGS = ("same", "fresh", "cross")


@dataclass(frozen=True)
class StepSampler:
    """The order of a run. rows: the good rows; views: stored views used; B images, W views a step.

    local: stored local crops, all of which every step shows; crops: or so many fresh ones of each image.
    `at`, `local_at` and the pieces are this rank's share, b = B / size images.
    """

    seed: int
    rows: np.ndarray
    views: tuple[int, ...]
    batch: int
    views_per_step: int
    pairing: str
    steps: int
    reads: bool = True  # whether the stored views are looked at, or only their images
    first: int = 0  # step that piece 0 is
    local: tuple[int, ...] = ()
    crops: int = 0
    rank: int = 0  # of `size` that share a step: this one has images rank, rank + size, ...
    size: int = 1

    def __post_init__(self) -> None:
        if self.pairing not in PAIRINGS:
            raise UserError(f"--pairing is {self.pairing}, but must be one of {', '.join(PAIRINGS)}")
        need = self.views_per_step + (1 if self.pairing == "cross" and self.views_per_step == 1 else 0)
        if len(self.views) < need and (self.reads or self.pairing != "fresh"):
            fresh = "" if self.reads else ", or take --pairing fresh"
            raise UserError(
                f"{pluralize(len(self.views), 'view')} to train on, but --pairing {self.pairing} with "
                f"--views-per-step {self.views_per_step} needs {need}; give a larger --views if the store has more, "
                f"repeat the command that made it with --views {need + 1} or more{fresh}"
            )

    def __len__(self) -> int:
        """Steps from `first` to the end, as pieces for the loader."""
        return self.steps - self.first

    def __getitem__(self, number: int) -> ViewRequest:
        step = self.first + number
        rows, student, _ = self.at(step)
        return ViewRequest(rows, student, self.local_at(step))

    @property
    def has_local(self) -> bool:
        """Whether students see local crops."""
        return bool(self.local or self.crops)

    def local_at(self, step: int) -> np.ndarray | None:
        """(b, L) local crops of a step, int64; None if there are none."""
        if self.local:
            return np.tile(np.array(self.local), (self.batch // self.size, 1))
        if not self.crops:
            return None
        return (FRESH | LOCAL) + self._places(step)[0][:, None] * self.crops + np.arange(self.crops)

    def with_crops(self, store: FeatureStore, needs: Sequence[Needs]) -> "StepSampler":
        """The plan with the local crops that methods look at: the stored ones, or fresh ones.

        Raises UserError if stored ones are not there yet, or if methods want different ones.
        """
        stored = any(name.startswith("local_") for need in needs for name in need.arrays)
        fresh = {need.crops for need in needs if need.crops}
        if len(fresh) + stored > 1:
            raise UserError("the methods look at different local crops, so they cannot share a pass; train them apart")
        if stored:
            store.require_complete(store.local)
        return replace(self, local=store.local if stored else (), crops=max(fresh, default=0))

    def _places(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs (b,), places in the epoch (b,)) of a step's images."""
        return np.divmod(step * self.batch + np.arange(self.rank, self.batch, self.size), len(self.rows))

    def at(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rows (b,), student views (b, W), teacher views (b, W)) of a step, int64."""
        epochs, places = self._places(step)
        rows: list[np.ndarray] = []
        student: list[np.ndarray] = []
        teacher: list[np.ndarray] = []
        for epoch in np.unique(epochs):
            mine = places[epochs == epoch]
            rows.append(self.rows[_shuffled(self.seed, int(epoch), len(self.rows))[mine]])
            for out, views in zip((student, teacher), self.epoch_views(int(epoch)), strict=True):
                out.append(np.tile(views, (len(mine), 1)))
        return np.concatenate(rows), np.concatenate(student), np.concatenate(teacher)

    def epoch_views(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(student (W,), teacher (W,)) views of an epoch: every stored view in turn, in shuffled rounds."""
        count, w = len(self.views), self.views_per_step
        turn = epoch * w + np.arange(w)
        places = _turns(self.seed, epoch // count, count, w)[epoch % count]
        stored = np.array(self.views)[places]
        if self.pairing == "same":
            return stored, stored
        if self.pairing == "fresh":
            return FRESH + turn, stored
        if w > 1:
            return stored, np.roll(stored, 1)
        shift = 1 + int(philox.words(self.seed, philox.PAIRING, epoch, 2**31, 1)[0]) % (count - 1)
        return stored, np.array(self.views)[(places + shift) % count]


def make_sampler(
    store: FeatureStore, views: Sequence[int], *, seed: int, batch: int, views_per_step: int, pairing: str,
    epochs: float, steps: int | None, reads: bool = True,
) -> StepSampler:  # fmt: skip
    """The plan of this rank over the usable images of a store: `steps` of them, or as many as `epochs` take.

    batch: of all ranks together; all the usable images if they are fewer. reads: whether the method looks at
    the teacher's features; fresh views without them want no stored ones. Raises UserError for views that are not
    there, fewer than two usable images, and a batch that the ranks cannot share evenly.
    """
    store.require_complete(views)
    rows, size = np.flatnonzero(store.table("status") == GOOD), collectives.world_size()
    if len(rows) < 2:
        raise UserError(f"{store.storage} has {len(rows)} usable images; at least 2 are needed to train")
    batch = min(batch, len(rows))
    if batch % size:
        each = max(1, round(min(batch, len(rows) - size / 2) / size))
        raise UserError(
            f"a batch of {batch} images cannot be shared by {size} ranks; give each --batch-size {each}, "
            f"{each * size} in all, or start another number of them"
        )
    steps = steps or max(1, round(epochs * len(rows) / batch))
    return StepSampler(
        seed, rows, tuple(views), batch, views_per_step, pairing, steps, reads, rank=collectives.rank(), size=size
    )


@lru_cache(maxsize=2)
def _shuffled(seed: int, epoch: int, n: int) -> np.ndarray:
    return philox.permutation(seed, philox.ORDER, epoch, n)


@lru_cache(maxsize=2)
def _turns(seed: int, cycle: int, count: int, w: int) -> np.ndarray:
    """(count, W) places: a cycle of `count` epochs goes round all views W times; no epoch sees one twice."""
    order: list[int] = []
    for number in range(cycle * w, cycle * w + w):
        begun = order[len(order) - len(order) % w :]  # seen already by the epoch in which this round begins
        order += sorted(philox.permutation(seed, philox.PAIRING, number, count).tolist(), key=begun.__contains__)
    return np.array(order).reshape(count, w)
