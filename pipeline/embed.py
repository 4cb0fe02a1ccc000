"""Data set -> views -> frozen model -> store: the one loop behind every export of features."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch

from pipeline.images import GOOD, NOT_FINITE, REASONS
from pipeline.loader import Eyes, Piece, feed, pieces_of
from pipeline.model import Embedder
from pipeline.store import FeatureStore, Shard, batches
from pipeline.views import ViewSpec

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Cost:
    """What an export took, for the store's history."""

    images: int = 0
    views: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # seconds the model waited for pixels

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass
class Forward:
    """A frozen model on a device: (B, 3, S, S) uint8 -> (B, D) float32 on the host."""

    embedder: Embedder
    device: torch.device
    precision: str = "fp32"
    batch_size: int = 64
    channels_last: bool = True

    def __post_init__(self) -> None:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        self.embedder.eval().requires_grad_(False).to(self.device).to(memory_format=layout)

    def __call__(self, pixels: torch.Tensor) -> np.ndarray:
        """A ragged batch is padded to the full one, so that every row meets the same arithmetic."""
        n = len(pixels)
        if n < self.batch_size:
            pixels = torch.cat([pixels, pixels.new_zeros((self.batch_size - n, *pixels.shape[1:]))])
        with torch.inference_mode(), autocast(self.device, self.precision):
            images = self.embedder.prepare(pixels.to(self.device, non_blocking=True))
            if self.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            return self.embedder(images)[:n].float().cpu().numpy()


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The autocast context of a precision; fp32 is none at all."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def embed(
    store: FeatureStore,
    dataset: Any,
    spec: ViewSpec,
    forward: Forward,
    *,
    shards: Sequence[Shard] | None = None,
    workers: int,
    threads: bool = False,
    progress: Callable[[int], None] = lambda images: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Cost:
    """Compute these shards, else all the store lacks. Forward batches are consecutive rows of one view, within a shard.

    So a feature depends on nothing but its image, view, model and batch size: not on workers,
    on where a run was stopped, or on how many views the store has.
    """
    shards = store.pending() if shards is None else shards
    plan = [(shard, a, b) for shard in shards for a, b in batches(shard, forward.batch_size)]
    size, how = forward.embedder.preprocessing.size, forward.embedder.preprocessing.interpolation
    cut = [pieces_of(a, b, shard.views, size) for shard, a, b in plan]
    pieces = [piece for part in cut for piece in part]
    sights = feed(Eyes(dataset, spec, store.table("view_key"), [(size, how)], pieces), workers, threads)
    cost, began = Cost(), time.monotonic()
    rows: list[_Rows] = []
    with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
        writing: Future[None] | None = None
        for (shard, _, b), part in zip(plan, cut, strict=True):
            if stopped():
                break
            asked = time.monotonic()
            seen = [next(sights) for _ in part]
            cost.waited += time.monotonic() - asked
            rows.append(_embed_rows(store, forward, part, seen))
            cost.images += len(rows[-1].status)
            cost.views += rows[-1].status.size * len(shard.views)
            progress(len(rows[-1].status))
            if b == shard.stop:
                if writing:
                    writing.result()
                writing = writer.submit(_write, store, shard, rows)
                rows = []
        if writing:
            writing.result()
    cost.seconds = time.monotonic() - began
    return cost


@dataclass
class _Rows:
    """One batch of rows, encoded: what a shard is made of."""

    stored: np.ndarray  # (n, V, D)
    scale: np.ndarray | None  # (n, V)
    status: np.ndarray
    content: np.ndarray
    bad: dict[int, str]


def _embed_rows(store: FeatureStore, forward: Forward, part: list[Piece], seen: list[Any]) -> _Rows:
    pixels = seen[0].pixels[0] if len(seen) == 1 else torch.cat([s.pixels[0] for s in seen])  # (n, V, 3, S, S)
    numbers = np.concatenate([piece.rows for piece in part])
    status, content = np.concatenate([s.status for s in seen]), np.concatenate([s.content for s in seen])
    bad: dict[int, str] = {i: why for s in seen for i, why in s.bad.items()}
    features = np.stack([forward(pixels[:, j]) for j in range(pixels.shape[1])], axis=1)  # (n, V, D)
    codec = store.codecs["embedding"]
    fits = (np.abs(features) <= codec.limit).all(-1)  # NaN and infinity compare false or too large
    fits &= np.isfinite(features).all(-1)
    for j in np.flatnonzero((status == GOOD) & ~fits.all(-1)):
        status[j] = NOT_FINITE
        views = np.flatnonzero(~fits[j])
        bad[int(numbers[j])] = f"{REASONS[NOT_FINITE]} (view {part[0].views[0][views[0]]}, as {codec.name})"
    features[status != GOOD] = 0
    stored, scale = codec.encode(features)
    return _Rows(stored, scale, status, content, bad)


def _write(store: FeatureStore, shard: Shard, rows: list[_Rows]) -> None:
    scale = None if rows[0].scale is None else np.concatenate([r.scale for r in rows if r.scale is not None])
    features: Mapping[str, Any] = {"embedding": (np.concatenate([r.stored for r in rows]), scale)}
    bad = {i: why for r in rows for i, why in r.bad.items()}
    status, content = np.concatenate([r.status for r in rows]), np.concatenate([r.content for r in rows])
    store.write(shard, features, status, content, bad)
