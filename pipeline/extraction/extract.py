"""`extract`: the one way to run a model over views of images.

It loads views ahead of the model, runs the model on batches of one view, and yields features with what is known of
their images. What becomes of the features is up to the caller: a store, an array, a comparison.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress_ssl.pipeline.datasets.decode import GOOD
from compress_ssl.pipeline.extraction.feature_extractor import FeatureExtractor
from compress_ssl.pipeline.extraction.view_batches import Batch, GroupPixels, group_pixels, request_batch
from compress_ssl.pipeline.views.loader import ViewBatch, ViewDataset, iterate_views


@dataclass(frozen=True)
class LoaderSettings:
    """How views are loaded ahead of the model."""

    workers: int = 0  # processes, or threads if `threads`; 0: load in the thread that asks for a batch
    threads: bool = False  # for programs that may not have processes of their own, such as a dask worker


@dataclass(frozen=True)
class FeatureSource:
    """A model and the views that it is run over: features[i, v] of a data set that are computed when asked for."""

    extractor: FeatureExtractor
    views: ViewDataset  # images, view spec, keys and sizes; `extract` gives it the requests
    loader: LoaderSettings = LoaderSettings()

    def batches(self, rows: np.ndarray, views: Sequence[int]) -> list[Batch]:
        """Rows (n,) in the same views, in batches of the extractor's size; the last one may be smaller."""
        size = self.extractor.batch_size
        return [request_batch(self.views, rows[start : start + size], views) for start in range(0, len(rows), size)]


@dataclass
class FeatureBatch:
    """The features of n rows in the views that a batch asked for."""

    rows: np.ndarray  # (n,) int64
    views: dict[str, np.ndarray]  # {array: (n, V) int64}: the view numbers of its features
    features: dict[str, np.ndarray]  # {array: (n, V, ...) float32}; of a bad image they mean nothing. Copy what you
    # keep: features from a GPU lie in pinned memory
    status: np.ndarray  # (n,) uint8: datasets.decode.GOOD or a key of REASONS
    content: np.ndarray  # (n,) uint64: hashes of the images; 0 where the image is bad
    bad: dict[int, str]  # {row: why the image cannot be used}
    waited: float  # seconds that the model waited for the pixels


def extract(
    source: FeatureSource, batches: Sequence[Batch], proceed: Callable[[int], bool] = lambda number: True
) -> Generator[FeatureBatch, None, None]:
    """Yield the features of all batches, in order. While a GPU computes a batch, the caller has the one before it.

    A feature depends on its image, view, model and batch size (see `FeatureExtractor.padded`), and not on the number of
    loaders or of views. A batch has at most as many rows as the extractor's batch size.

    proceed: called with the number of each batch before it is loaded; when it returns False, extraction ends with the
    batches that were started. Use the generator under `contextlib.closing`: loaders live, and the model is in
    evaluation mode, until it is closed.
    """
    extractor, loader = source.extractor, source.loader
    view_dataset = source.views.with_requests([request for batch in batches for request in batch])
    loading = iterate_views(view_dataset, loader.workers, loader.threads, pin=extractor.device.type == "cuda")
    in_progress: deque[Callable[[], FeatureBatch]] = deque()
    with extractor.evaluation_mode(), closing(loading) as view_batches:
        for number, batch in enumerate(batches):
            if not proceed(number):
                break
            in_progress.append(_start_batch(extractor, batch, view_batches))
            if len(in_progress) > extractor.batches_ahead:
                yield in_progress.popleft()()
        while in_progress:
            yield in_progress.popleft()()


def _start_batch(
    extractor: FeatureExtractor, batch: Batch, view_batches: Iterator[ViewBatch]
) -> Callable[[], FeatureBatch]:
    """Load a batch and start its forward passes; the function returned waits for the device and copies the features."""
    began = time.monotonic()
    loaded = [next(view_batches) for _ in batch]
    waited = time.monotonic() - began
    status = np.concatenate([part.status for part in loaded])
    content = np.concatenate([part.content for part in loaded])
    bad = {row: why for part in loaded for row, why in part.bad.items()}
    views: dict[str, np.ndarray] = {}
    on_device: dict[str, Tensor] = {}
    for group in group_pixels(extractor.names, batch, loaded):
        views |= {name: group.views for name in group.arrays}
        on_device |= _forward_views(extractor, group, status == GOOD)
    fetch = _start_copy(extractor, on_device)
    rows = np.concatenate([request.rows for request in batch])
    return lambda: FeatureBatch(rows, views, fetch(), status, content, bad, waited)


def _forward_views(extractor: FeatureExtractor, group: GroupPixels, good: np.ndarray) -> dict[str, Tensor]:
    """{array: float32 (n, V, ...) on the device}. good: (n,) bool, which of the n images can be used."""
    # copy whole tensors: a part of a pinned tensor would first be copied to memory that is not pinned
    on_device = [pixels.to(extractor.device, non_blocking=True) for pixels in group.pixels]
    pixels = on_device[0] if len(on_device) == 1 else torch.cat(on_device)  # (n, V, 3, S, S)
    used = None if extractor.padded else torch.from_numpy(np.flatnonzero(good)).to(extractor.device)
    if used is not None:
        pixels = pixels[used]
    if not group.arrays or not len(pixels) or not pixels.shape[1]:
        shapes = {name: extractor.embedder.shapes[output] for name, output in group.arrays.items()}
        return {name: torch.zeros((*group.views.shape, *shape)) for name, shape in shapes.items()}
    passes = [extractor.start(pixels[:, v], list(group.arrays.values())) for v in range(pixels.shape[1])]
    stacked = {name: torch.stack([one[output] for one in passes], 1) for name, output in group.arrays.items()}
    if used is None:
        return stacked
    empty = {name: values.new_zeros((len(good), *values.shape[1:])) for name, values in stacked.items()}
    return {name: empty[name].index_copy(0, used, values) for name, values in stacked.items()}


def _start_copy(extractor: FeatureExtractor, on_device: dict[str, Tensor]) -> Callable[[], dict[str, np.ndarray]]:
    """Start to copy features to the host; the function returned waits for them. The one way from torch to numpy."""
    # from a GPU into pinned memory: the copy is asynchronous, and the event below marks its end
    on_host = {name: features.to("cpu", non_blocking=True) for name, features in on_device.items()}
    copied = torch.cuda.Event() if extractor.device.type == "cuda" else None
    if copied:
        copied.record(torch.cuda.current_stream(extractor.device))

    def fetch() -> dict[str, np.ndarray]:
        if copied:
            copied.synchronize()
        return {name: features.numpy() for name, features in on_host.items()}

    return fetch
