"""The network whose features a store holds, built and checked."""

import torch

from compress_ssl.pipeline.models import build
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.store.feature_store import FeatureStore


def load_live_teacher(store: FeatureStore, spec: str | None = None) -> Embedder:
    """Build the network whose features a store holds, from the store's own spec or from `spec`.

    It sets the global seed of torch to 0, as the export does, so that a teacher with random weights is the same
    network. Raises UserError if its weights are not those that the store was made with.
    """
    spec, teacher = spec or store.export.teacher, store.identity.teacher
    torch.manual_seed(0)
    recorded = teacher.preprocessing
    embedder = build(spec, image_size=recorded.size, pretrained_default=True, recorded=recorded)
    if embedder.digest() != teacher.weights:
        raise UserError(f"{spec} has other weights here than when {store.storage} was made; restore them")
    return embedder
