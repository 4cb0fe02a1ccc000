"""Batches of views: which pixels are asked of the loader, and which of the loaded pixels go through the model together.

Global views and local crops are rendered at different sizes, and what is computed of them has names of its own. This
file alone tells them apart; to the rest of the room a view is a number, and features are arrays with names.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.views.augment import ViewSpec
from compress_ssl.pipeline.views.loader import ViewBatch, ViewDataset, ViewRequest
from compress_ssl.pipeline.views.numbering import LOCAL

REQUEST_BYTES = 32_000_000
"""Bytes of uint8 pixels per request to the loader; bounds the memory of a batch in flight."""

LOCAL_OUTPUTS = ("embedding", "projection")
"""The outputs that are computed of local crops: those that are vectors and not a classifier's."""

Batch = Sequence[ViewRequest]
"""The requests for the rows of one batch. All ask for the same views of their rows: one forward pass each."""


@dataclass(frozen=True)
class GroupPixels:
    """The pixels of those views of a batch that have one size, and what is to be computed of them."""

    arrays: dict[str, str]  # {name of the array: output of the model that it holds}
    views: np.ndarray  # (n, V) int64: view numbers
    pixels: list[Tensor]  # per request: uint8 (., V, 3, S, S), n rows in all


# ---------------------------------------------------------------- which views there are


def model_views(
    dataset: Dataset, spec: ViewSpec, embedder: Embedder, keys: np.ndarray | None = None, local_size: int = 0
) -> ViewDataset:
    """The views of a data set at a model's size and interpolation.

    keys: (N,) view key of each row, see `augment.draw_variates`; None: the number of the row. local_size: side of
    local crops in pixels; 0 if there are none.
    """
    interpolation = embedder.preprocessing.interpolation
    view_key = np.arange(len(dataset)) if keys is None else keys
    local_sizes = [(local_size, interpolation)]
    return ViewDataset(dataset, spec, view_key, [(embedder.preprocessing.size, interpolation)], (), local_sizes)


def stored_views(store: FeatureStore, dataset: Dataset, embedder: Embedder) -> ViewDataset:
    """The views that a store holds features of, at a model's size: those of its own view spec, keys and local size."""
    spec, local_size = ViewSpec(**store.identity["views"]), int(store.identity.get("local", {}).get("size", 0))
    return model_views(dataset, spec, embedder, store.table("view_key"), local_size)


def array_name(view: int, output: str = "embedding") -> str:
    """The name of the array that holds an output of the model for this view."""
    return f"local_{output}" if view & LOCAL else output


def views_of_group(store: FeatureStore, view: int) -> Sequence[int]:
    """The numbers of all stored views of this view's kind: all local crops for a local crop, else all other views."""
    return store.local if view & LOCAL else store.stored_views


# ---------------------------------------------------------------- one batch


def request_batch(view_dataset: ViewDataset, rows: np.ndarray, views: Sequence[int]) -> Batch:
    """Requests for the same views of rows (n,), each with at most REQUEST_BYTES of pixels or with one row."""
    whole = [view for view in views if not view & LOCAL]
    local = [view for view in views if view & LOCAL]
    sizes = [(whole, view_dataset.sizes[0][0]), (local, view_dataset.local_sizes[0][0])]
    row_bytes = sum(3 * len(numbers) * size * size for numbers, size in sizes)
    step = max(1, REQUEST_BYTES // row_bytes)
    parts = [rows[start : start + step] for start in range(0, len(rows), step)]
    return [ViewRequest(part, _repeat(whole, part), _repeat(local, part) if local else None) for part in parts]


def _repeat(views: Sequence[int], rows: np.ndarray) -> np.ndarray:
    """(n, V) int64 with the same views in each row, without a copy per row."""
    return np.broadcast_to(np.array(views, np.int64), (len(rows), len(views)))


def group_pixels(outputs: Sequence[str], batch: Batch, loaded: Sequence[ViewBatch]) -> list[GroupPixels]:
    """The loaded pixels of a batch by the size of the views: of global views, and of local crops if any were asked for.

    outputs: those of the model that are computed of global views; see LOCAL_OUTPUTS for local crops.
    """
    views = np.concatenate([request.views for request in batch])
    groups = [GroupPixels({name: name for name in outputs}, views, [part.pixels[0] for part in loaded])]
    local = [request.local for request in batch if request.local is not None]
    if local:
        arrays = {f"local_{name}": name for name in outputs if name in LOCAL_OUTPUTS}
        groups.append(GroupPixels(arrays, np.concatenate(local), [part.local[0] for part in loaded]))
    return groups
