"""Batches of views: which pixels are asked of the loader, and which of the loaded pixels go through the model together.

The views of one group have one size, so they are what goes through the model together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.views.augment import ViewSpec
from compress_ssl.pipeline.views.groups import GLOBAL_VIEWS, ViewGroup, by_group, named_group
from compress_ssl.pipeline.views.loader import ViewBatch, ViewDataset, ViewRequest

REQUEST_BYTES = 32_000_000
"""Bytes of uint8 pixels per request to the loader; bounds the memory of a batch in flight."""

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
    dataset: Dataset,
    spec: ViewSpec,
    embedder: Embedder,
    keys: np.ndarray | None = None,
    groups: Sequence[ViewGroup] | None = None,
) -> ViewDataset:
    """The views of a data set at a model's interpolation.

    keys: (N,) view key of each row, see `augment.draw_variates`; None: the number of the row. groups: of views, with
    their sizes; None: global views at the model's size.
    """
    interpolation = embedder.preprocessing.interpolation
    view_key = np.arange(len(dataset)) if keys is None else keys
    shown = groups or [replace(GLOBAL_VIEWS, size=embedder.preprocessing.size)]
    return ViewDataset(
        dataset,
        spec,
        view_key,
        {group.name: [(group.size, interpolation)] for group in shown},
    )


def stored_views(store: FeatureStore, dataset: Dataset, embedder: Embedder) -> ViewDataset:
    """The views that a store holds features of: those of its own view spec, keys and groups."""
    return model_views(dataset, store.identity.views, embedder, store.table("view_key"), store.groups)


# ---------------------------------------------------------------- one batch


def request_batch(view_dataset: ViewDataset, rows: np.ndarray, views: Sequence[int]) -> Batch:
    """Requests for the same views of rows (n,), each with at most REQUEST_BYTES of pixels or with one row."""
    numbers = {group: np.array(of_group, np.int64) for group, of_group in by_group(views).items()}
    row_bytes = sum(3 * len(of_group) * view_dataset.sizes[group][0][0] ** 2 for group, of_group in numbers.items())
    step = max(1, REQUEST_BYTES // row_bytes)
    parts = [rows[start : start + step] for start in range(0, len(rows), step)]
    return [
        ViewRequest(part, {group: np.broadcast_to(views, (len(part), len(views))) for group, views in numbers.items()})
        for part in parts
    ]


def group_pixels(outputs: Sequence[str], batch: Batch, loaded: Sequence[ViewBatch]) -> list[GroupPixels]:
    """The loaded pixels of a batch, group by group. outputs: those of the model, of which a group may keep a part."""
    return [
        GroupPixels(
            named_group(group).arrays(outputs),
            np.concatenate([request.views[group] for request in batch]),
            [part.pixels[group][0] for part in loaded],
        )
        for group in batch[0].views
    ]
