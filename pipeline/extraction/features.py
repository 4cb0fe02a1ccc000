"""Features of one view in memory, and the quick check made while training."""

from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress_ssl.pipeline.datasets.decode import GOOD
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.models.precision import autocast
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.views.augment import ViewSpec
from compress_ssl.pipeline.views.loader import ViewDataset, ViewRequest, iterate_views


@torch.no_grad()
def view_features(
    embedder: Embedder,
    dataset: Any,
    spec: ViewSpec,
    device: torch.device,
    precision: str = "fp32",
    view: int = 0,
    rows: np.ndarray | None = None,
    workers: int = 0,
    batch: int = 256,
) -> tuple[Tensor, np.ndarray]:
    """One view of some rows (all unless given), in evaluation mode.

    -> ((n, d) float32 features on the device, (n,) the rows they belong to); bad images are left out.
    """
    was_training, size = embedder.training, embedder.preprocessing.size
    embedder.eval()
    wanted = np.arange(len(dataset)) if rows is None else rows
    step = max(1, min(batch, 32_000_000 // (3 * size * size)))
    requests = [
        ViewRequest(part := wanted[a : a + step], np.full((len(part), 1), view)) for a in range(0, len(wanted), step)
    ]
    view_dataset = ViewDataset(
        dataset, spec, np.arange(len(dataset)), [(size, embedder.preprocessing.interpolation)], requests
    )
    features, seen = [], []
    with closing(iterate_views(view_dataset, workers)) as view_batches:
        for request, view_batch in zip(requests, view_batches, strict=True):
            good = view_batch.status == GOOD
            if good.any():
                with autocast(device, precision):
                    pixels = view_batch.pixels[0][torch.from_numpy(good), 0].to(device)
                    features.append(embedder(embedder.prepare(pixels)).float())
                seen.append(request.rows[good])
    embedder.train(was_training)
    if not seen:
        raise UserError(f"none of {len(wanted)} images can be used")
    return torch.cat(features), np.concatenate(seen)
