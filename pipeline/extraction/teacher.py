"""The live network behind a store's features."""

from collections.abc import Callable

import torch

from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.store.feature_store import FeatureStore


def live_teacher(store: FeatureStore, build: Callable[..., Embedder], spec: str | None = None) -> Embedder:
    """The network whose features a store holds, built as the store says or as `spec` does.

    Raises UserError if it has other weights here.
    """
    spec, teacher = spec or store.about["teacher"], store.identity["teacher"]
    torch.manual_seed(0)  # one with random weights is the same every time
    embedder = build(spec, image_size=teacher["preprocessing"]["size"], pretrained_default=True)
    if embedder.digest() != teacher["weights"]:
        raise UserError(f"{spec} has other weights here than when {store.storage} was made; restore them")
    return embedder
