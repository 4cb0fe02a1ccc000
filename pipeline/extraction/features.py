"""`view_features`: features of one view, kept in memory and not in a store."""

from collections.abc import Iterator
from contextlib import closing, contextmanager

import numpy as np
import torch
from torch import Tensor

from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.datasets.decode import GOOD
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.models.precision import autocast
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.views.augment import ViewSpec
from compress_ssl.pipeline.views.groups import group_of
from compress_ssl.pipeline.views.loader import ViewDataset, ViewRequest, iterate_views

MAX_BATCH_BYTES = 32_000_000
"""Bytes of uint8 pixels in one batch: large images are embedded in smaller batches (212 of 224 x 224)."""


@torch.no_grad()
def view_features(
    embedder: Embedder,
    dataset: Dataset,
    spec: ViewSpec,
    device: torch.device,
    precision: str = "fp32",
    view: int = 0,
    rows: np.ndarray | None = None,
    workers: int = 0,
    batch: int = 256,
) -> tuple[Tensor, np.ndarray]:
    """Embed one view of some rows (default: all), in evaluation mode, for validation and augmented probes.

    Returns (features (n, d) float32 on the device, their rows (n,)). Images that cannot be used are left out, so n
    may be smaller than the number of rows. batch: images per forward pass at most; unlike in an export, batches are
    not padded. Raises UserError if no image can be used.
    """
    size, interpolation = embedder.preprocessing.size, embedder.preprocessing.interpolation
    wanted = np.arange(len(dataset)) if rows is None else rows
    step = max(1, min(batch, MAX_BATCH_BYTES // (3 * size * size)))
    parts = [wanted[start : start + step] for start in range(0, len(wanted), step)]
    group = group_of(view).name
    requests = [ViewRequest(part, {group: np.full((len(part), 1), view)}) for part in parts]
    view_dataset = ViewDataset(dataset, spec, np.arange(len(dataset)), {group: [(size, interpolation)]}, requests)
    features, used = [], []
    with _evaluation_mode(embedder), closing(iterate_views(view_dataset, workers)) as view_batches:
        for request, view_batch in zip(requests, view_batches, strict=True):
            good = view_batch.status == GOOD
            if good.any():
                with autocast(device, precision):
                    pixels = view_batch.pixels[group][0][torch.from_numpy(good), 0].to(device)
                    features.append(embedder(embedder.prepare(pixels)).float())
                used.append(request.rows[good])
    if not used:
        raise UserError(f"none of {len(wanted)} images can be used; are they readable, and are they images?")
    return torch.cat(features), np.concatenate(used)


@contextmanager
def _evaluation_mode(embedder: Embedder) -> Iterator[None]:
    was_training = embedder.training
    embedder.eval()
    try:
        yield
    finally:
        embedder.train(was_training)
