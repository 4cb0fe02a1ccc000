"""Data set -> views -> frozen model -> store: the one loop behind every export of features."""

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch

from compress_ssl.pipeline.datasets.decode import GOOD, NOT_FINITE, REASONS, UNREADABLE
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.models.precision import autocast
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.store import integrity
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.shards import Shard, batch_spans, done_key, is_local
from compress_ssl.pipeline.views.augment import ViewSpec
from compress_ssl.pipeline.views.loader import ViewDataset, ViewRequest, iterate_views, split_rows
from compress_ssl.pipeline.views.numbering import LOCAL, view_name

MIN_UNREADABLE = 8  # images of one shard, all of them unreadable
WRITE_ATTEMPTS = 6  # times a shard is written that does not read back as it should


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
class FeatureExtractor:
    """A frozen model on a device: (B, 3, S, S) uint8 -> {output: (B, ...) float32 on the host}."""

    embedder: Embedder
    device: torch.device
    precision: str = "fp32"
    batch_size: int = 64
    names: Sequence[str] = ("embedding",)  # what is wanted of it, see Embedder.forward_outputs

    def __post_init__(self) -> None:
        self.embedder.enable_outputs(self.names)
        self.embedder.eval().requires_grad_(False).to(self.device).to(memory_format=torch.channels_last)

    @property
    def ahead(self) -> int:
        """Batches of rows that may be on the device while the host looks at an earlier one."""
        return 1 if self.device.type == "cuda" else 0

    def __call__(self, pixels: torch.Tensor) -> dict[str, np.ndarray]:
        return {name: out.cpu().numpy() for name, out in self.start(pixels).items()}

    def start(self, pixels: torch.Tensor, names: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """The same, left on the device: a GPU may still be at it.

        A ragged batch is padded to the full one, so that every row meets the same arithmetic.
        """
        n = len(pixels)
        if n < self.batch_size:
            pixels = torch.cat([pixels, pixels.new_zeros((self.batch_size - n, *pixels.shape[1:]))])
        with torch.inference_mode(), autocast(self.device, self.precision):
            images = self.embedder.prepare(pixels.to(self.device, non_blocking=True))
            images = images.contiguous(memory_format=torch.channels_last)
            made = self.embedder.forward_outputs(images, names or self.names)
            return {name: out[:n].float() for name, out in made.items()}


def embed(
    store: FeatureStore,
    dataset: Any,
    spec: ViewSpec,
    forward: FeatureExtractor,
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
    plan = [(shard, a, b) for shard in shards for a, b in batch_spans(shard, forward.batch_size)]
    size, how = forward.embedder.preprocessing.size, forward.embedder.preprocessing.interpolation
    small = store.identity.get("local", {}).get("size", 0)
    cut = [split_rows(a, b, *_kinds(shard.views, size, small)) for shard, a, b in plan]
    requests = [request for part in cut for request in part]
    view_dataset = ViewDataset(dataset, spec, store.table("view_key"), [(size, how)], requests, [(small, how)])
    loading = closing(iterate_views(view_dataset, workers, threads, pin=forward.device.type == "cuda"))
    cost, began = Cost(), time.monotonic()
    rows: list[_Rows] = []
    flight: deque[tuple[Shard, int, Callable[[], _Rows]]] = deque()
    with loading as view_batches, ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
        writing: Future[None] | None = None

        def land(shard: Shard, stop: int, made: Callable[[], _Rows]) -> None:
            nonlocal rows, writing
            rows.append(made())
            cost.images += len(rows[-1].status)
            cost.views += rows[-1].status.size * len(shard.views)
            progress(len(rows[-1].status))
            if stop == shard.stop:
                writing = writer.submit(_write, store, shard, rows)
                rows = []

        for (shard, _, b), part in zip(plan, cut, strict=True):
            if stopped():
                break
            if writing and (writing.done() or b == shard.stop):  # so a kill finds one finished shard unwritten at most
                writing.result()
                writing = None
            asked = time.monotonic()
            seen = [next(view_batches) for _ in part]
            cost.waited += time.monotonic() - asked
            flight.append((shard, b, _launch(store, forward, part, seen)))
            if len(flight) > forward.ahead:
                land(*flight.popleft())
        while flight:
            land(*flight.popleft())
        if writing:
            writing.result()
    cost.seconds = time.monotonic() - began
    return cost


def _kinds(views: Sequence[int], size: int, small: int) -> tuple[list[int], int, list[int], int]:
    """(global views, their side, local crops, their side)"""
    return [v for v in views if not v & LOCAL], size, [v for v in views if v & LOCAL], small


Stored = tuple[np.ndarray, np.ndarray | None]  # (n, V, ...) as the codec keeps it, and its scales


@dataclass
class _Rows:
    """One batch of rows, encoded: what a shard is made of."""

    stored: dict[str, Stored]  # by array
    status: np.ndarray
    content: np.ndarray
    bad: dict[int, str]


def _launch(
    store: FeatureStore, forward: FeatureExtractor, part: list[ViewRequest], seen: list[Any]
) -> Callable[[], _Rows]:
    """Set the device to work on a batch of rows; the function returned waits for it and encodes what it made."""
    made = _outputs(store, forward, "", [s.pixels[0] for s in seen])
    if part[0].local is not None:
        made |= _outputs(store, forward, "local_", [s.local[0] for s in seen])
    made = {name: out.to("cpu", non_blocking=True) for name, out in made.items()}  # from a GPU into pinned memory
    copied = torch.cuda.Event() if forward.device.type == "cuda" else None
    if copied:
        copied.record(torch.cuda.current_stream(forward.device))

    def land() -> _Rows:
        if copied:
            copied.synchronize()
        return _rows(store, part, seen, {name: out.numpy() for name, out in made.items()})

    return land


def _rows(store: FeatureStore, part: list[ViewRequest], seen: list[Any], features: dict[str, np.ndarray]) -> _Rows:
    """Features as they are stored, rows that cannot be used told apart."""
    numbers = np.concatenate([request.rows for request in part])
    status, content = np.concatenate([s.status for s in seen]), np.concatenate([s.content for s in seen])
    bad: dict[int, str] = {i: why for s in seen for i, why in s.bad.items()}
    for name, values in features.items():
        codec, views = store.codecs[name], part[0].local if is_local(name) else part[0].views
        fits = (np.abs(values) <= codec.limit) & np.isfinite(values)  # NaN and infinity compare false or too large
        fits = fits.all(tuple(range(2, values.ndim)))  # (n, V)
        for j in np.flatnonzero((status == GOOD) & ~fits.all(-1)):
            status[j] = NOT_FINITE
            assert views is not None
            view = views[0][np.flatnonzero(~fits[j])[0]]
            bad[int(numbers[j])] = f"{REASONS[NOT_FINITE]} ({name}, {view_name(view)}, as {codec.name})"
    stored = {}
    for name, values in features.items():
        values[status != GOOD] = 0
        stored[name] = store.codecs[name].encode(values)
    return _Rows(stored, status, content, bad)


def _outputs(
    store: FeatureStore, forward: FeatureExtractor, kind: str, seen: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """{array: (n, V, ...) float32 on the device} of the global views, or the `local_` crops, whose pixels these are."""
    there = [pixels.to(forward.device, non_blocking=True) for pixels in seen]  # whole: parts would be copied first
    pixels = there[0] if len(there) == 1 else torch.cat(there)  # (n, V, 3, S, S)
    arrays = [name for name in store.arrays if is_local(name) == bool(kind)]
    if not arrays or not pixels.shape[1]:
        return {name: torch.zeros((len(pixels), 0, *store.arrays[name])) for name in arrays}
    names = [name.removeprefix("local_") for name in arrays]
    views = [forward.start(pixels[:, j], names) for j in range(pixels.shape[1])]
    return {f"{kind}{name}": torch.stack([made[name] for made in views], 1) for name in names}


def _write(store: FeatureStore, shard: Shard, rows: list[_Rows]) -> None:
    """Store a shard and read it back. Of two writers who meet in it by mistake the last to write makes it whole."""
    features: dict[str, Stored] = {}
    for name in rows[0].stored:
        parts = [r.stored[name] for r in rows]
        scales = [scale for _, scale in parts if scale is not None]
        features[name] = np.concatenate([p for p, _ in parts]), np.concatenate(scales) if scales else None
    bad = {i: why for r in rows for i, why in r.bad.items()}
    status, content = np.concatenate([r.status for r in rows]), np.concatenate([r.content for r in rows])
    if (
        len(status) >= MIN_UNREADABLE and (status == UNREADABLE).all()
    ):  # a disk that went away is no thousand bad images
        why = f"none of the images of rows {shard.start} to {shard.stop - 1} can be read, the first: {bad[shard.start]}"
        raise UserError(f"{why}; is their disk still there? What is done is kept, repeat the command to continue")
    why = ""
    for attempt in range(WRITE_ATTEMPTS):
        spans = store.write(shard, features, status, content, bad)
        why = next(filter(None, (integrity.find_fault(store, shard.block, span) for span in spans)), "")
        if not why:
            return
        for span in spans:  # pending again, whatever becomes of us
            store.storage.delete(done_key(shard.block, *span))
        time.sleep(random.uniform(0, 0.05 * 2**attempt))  # two writers in step would meet again
    raise UserError(
        f"{store.storage}: rows {shard.start} to {shard.stop - 1} read back otherwise than they were written, "
        f"{WRITE_ATTEMPTS} times ({why}); end whatever else writes there, check the disk, and repeat the command"
    )
