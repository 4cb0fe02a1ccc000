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
from compress_ssl.pipeline.store.shards import Shard, batch_spans, is_local
from compress_ssl.pipeline.views.augment import ViewSpec
from compress_ssl.pipeline.views.loader import ViewBatch, ViewDataset, ViewRequest, iterate_views, split_rows
from compress_ssl.pipeline.views.numbering import LOCAL


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
    size, local_size = extractor.embedder.preprocessing.size, _local_size(store)
    batches = []
    for shard in shards:
        global_views = [view for view in shard.views if not view & LOCAL]
        local_views = [view for view in shard.views if view & LOCAL]
        for start, stop in batch_spans(shard, extractor.batch_size):
            requests = split_rows(start, stop, global_views, size, local_views, local_size)
            batches.append(_RowBatch(shard, stop == shard.stop, requests))
    return batches


def _view_dataset(
    store: FeatureStore, dataset: Dataset, spec: ViewSpec, extractor: FeatureExtractor, batches: Sequence[_RowBatch]
) -> ViewDataset:
    """The pixels of all requests, in order, at the model's size and interpolation."""
    preprocessing = extractor.embedder.preprocessing
    return ViewDataset(
        dataset,
        spec,
        store.table("view_key"),
        [(preprocessing.size, preprocessing.interpolation)],
        [request for batch in batches for request in batch.requests],
        [(_local_size(store), preprocessing.interpolation)],
    )


def _local_size(store: FeatureStore) -> int:
    """Side of local crops in pixels; 0 if the store has none."""
    return store.identity.local_size


# ---------------------------------------------------------------- one batch


def _start_batch(
    store: FeatureStore, extractor: FeatureExtractor, requests: list[ViewRequest], loaded: list[ViewBatch]
) -> Callable[[], EncodedRows]:
    """Start the forward passes of a batch of rows; the function returned waits for the device and encodes the rows."""
    outputs = _forward_views(store, extractor, "", [batch.pixels[0] for batch in loaded])
    if requests[0].local is not None:
        outputs |= _forward_views(store, extractor, "local_", [batch.local[0] for batch in loaded])
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
    store: FeatureStore, extractor: FeatureExtractor, prefix: str, loaded: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """{array: float32 (n, V, ...) on the device} of the arrays of one group of views.

    prefix: "" for global views, "local_" for local crops. loaded: their pixels, uint8 (., V, 3, S, S), n rows in all.
    """
    # copy whole tensors: a part of a pinned tensor would first be copied to memory that is not pinned
    on_device = [pixels.to(extractor.device, non_blocking=True) for pixels in loaded]
    pixels = on_device[0] if len(on_device) == 1 else torch.cat(on_device)  # (n, V, 3, S, S)
    arrays = [name for name in store.arrays if is_local(name) == bool(prefix)]
    if not arrays or not pixels.shape[1]:
        return {name: torch.zeros((len(pixels), 0, *store.arrays[name])) for name in arrays}
    names = [name.removeprefix("local_") for name in arrays]
    views = [extractor.start(pixels[:, v], names) for v in range(pixels.shape[1])]
    return {f"{prefix}{name}": torch.stack([outputs[name] for outputs in views], 1) for name in names}
