"""`embed`: data set -> views -> frozen model -> store. Every export of features runs this loop."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass

import torch

from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.extraction.encoded_rows import EncodedRows, encode_rows
from compress_ssl.pipeline.extraction.feature_extractor import FeatureExtractor
from compress_ssl.pipeline.extraction.shard_writer import ShardWriter
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.shards import Shard, batch_spans
from compress_ssl.pipeline.views.augment import ViewSpec
from compress_ssl.pipeline.views.groups import GLOBAL_VIEWS, LOCAL_CROPS, by_group, group_of_array
from compress_ssl.pipeline.views.loader import ViewBatch, ViewDataset, ViewRequest, iterate_views, split_rows


@dataclass
class Cost:
    """What an export computed and how long it took, for the store's history."""

    images: int = 0
    views: int = 0  # image-view pairs
    seconds: float = 0.0
    waited: float = 0.0  # seconds the main thread waited for pixels from the loader

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class _RowBatch:
    """Consecutive rows of one shard, `batch_size` at most: one forward batch in each view of the shard."""

    shard: Shard
    last: bool  # whether the shard is complete with it
    requests: list[ViewRequest]  # to the loader; several, if the pixels of all rows and views need too much memory


# ---------------------------------------------------------------- the loop


def embed(
    store: FeatureStore,
    dataset: Dataset,
    spec: ViewSpec,
    extractor: FeatureExtractor,
    *,
    shards: Sequence[Shard] | None = None,
    workers: int,
    threads: bool = False,
    progress: Callable[[int], None] = lambda images: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Cost:
    """Compute features (i, v) and write them to the store: of `shards`, else of all that are pending.

    A forward batch consists of consecutive rows of one shard in one view. So a feature depends only on its image,
    view, model and batch size, and not on the number of workers, on where an earlier run was stopped, or on the
    number of views of the store.

    workers: loader processes, or threads if `threads`; 0: load in this thread. progress: called with numbers of
    images that were computed. stopped: called before each batch; if it returns true, the shard in progress is not
    written. Raises UserError if a shard cannot be written.
    """
    batches = _split_into_batches(store, extractor, store.pending() if shards is None else shards)
    view_dataset = _view_dataset(store, dataset, spec, extractor, batches)
    loading = closing(iterate_views(view_dataset, workers, threads, pin=extractor.device.type == "cuda"))
    cost, began = Cost(), time.monotonic()
    in_progress: deque[tuple[_RowBatch, Callable[[], EncodedRows]]] = deque()
    with loading as view_batches, ShardWriter(store) as writer:

        def finish_oldest() -> None:
            batch, fetch = in_progress.popleft()
            rows = fetch()
            cost.images += len(rows.status)
            cost.views += len(rows.status) * len(batch.shard.views)
            progress(len(rows.status))
            writer.add(batch.shard, rows, last=batch.last)

        for batch in batches:
            if stopped():
                break
            if batch.last:  # so that at most one complete shard is not yet written if the process is killed
                writer.wait()
            else:
                writer.raise_error()
            waiting_since = time.monotonic()
            loaded = [next(view_batches) for _ in batch.requests]
            cost.waited += time.monotonic() - waiting_since
            in_progress.append((batch, _start_batch(store, extractor, batch.requests, loaded)))
            if len(in_progress) > extractor.batches_ahead:
                finish_oldest()
        while in_progress:
            finish_oldest()
        writer.wait()
    cost.seconds = time.monotonic() - began
    return cost


# ---------------------------------------------------------------- planning


def _split_into_batches(store: FeatureStore, extractor: FeatureExtractor, shards: Sequence[Shard]) -> list[_RowBatch]:
    sizes, batches = _sizes(store, extractor), []
    for shard in shards:
        views = by_group(shard.views)
        for start, stop in batch_spans(shard, extractor.batch_size):
            batches.append(_RowBatch(shard, stop == shard.stop, split_rows(start, stop, views, sizes)))
    return batches


def _view_dataset(
    store: FeatureStore, dataset: Dataset, spec: ViewSpec, extractor: FeatureExtractor, batches: Sequence[_RowBatch]
) -> ViewDataset:
    """The pixels of all requests, in order, at the model's size and interpolation."""
    interpolation = extractor.embedder.preprocessing.interpolation
    return ViewDataset(
        dataset,
        spec,
        store.table("view_key"),
        {group: [(size, interpolation)] for group, size in _sizes(store, extractor).items()},
        [request for batch in batches for request in batch.requests],
    )


def _sizes(store: FeatureStore, extractor: FeatureExtractor) -> dict[str, int]:
    """Side in pixels of each group's views; 0 if the store has none."""
    size = extractor.embedder.preprocessing.size
    return {GLOBAL_VIEWS.name: size, LOCAL_CROPS.name: store.identity.get("local", {}).get("size", 0)}


# ---------------------------------------------------------------- one batch


def _start_batch(
    store: FeatureStore, extractor: FeatureExtractor, requests: list[ViewRequest], loaded: list[ViewBatch]
) -> Callable[[], EncodedRows]:
    """Start the forward passes of a batch of rows; the function returned waits for the device and encodes the rows."""
    outputs: dict[str, torch.Tensor] = {}
    for group in requests[0].views:
        outputs |= _forward_views(store, extractor, group, [batch.pixels[group][0] for batch in loaded])
    # from a GPU into pinned memory: the copy is asynchronous, and the event below marks its end
    on_host = {name: out.to("cpu", non_blocking=True) for name, out in outputs.items()}
    copied = torch.cuda.Event() if extractor.device.type == "cuda" else None
    if copied:
        copied.record(torch.cuda.current_stream(extractor.device))

    def fetch() -> EncodedRows:
        if copied:
            copied.synchronize()
        features = {name: out.numpy() for name, out in on_host.items()}
        return encode_rows(store, requests, loaded, features)

    return fetch


def _forward_views(
    store: FeatureStore, extractor: FeatureExtractor, group: str, loaded: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """{array: float32 (n, V, ...) on the device} of the arrays of one group of views.

    loaded: pixels of the group's views, uint8 (., V, 3, S, S), n rows in all.
    """
    # copy whole tensors: a part of a pinned tensor would first be copied to memory that is not pinned
    on_device = [pixels.to(extractor.device, non_blocking=True) for pixels in loaded]
    pixels = on_device[0] if len(on_device) == 1 else torch.cat(on_device)  # (n, V, 3, S, S)
    groups = {name: group_of_array(name) for name in store.arrays}
    names = {name: of.output(name) for name, of in groups.items() if of.name == group}
    views = [extractor.start(pixels[:, v], list(names.values())) for v in range(pixels.shape[1])]
    return {array: torch.stack([outputs[name] for outputs in views], 1) for array, name in names.items()}
