"""The network whose features a store holds, built and checked."""

import torch

from compress_ssl.pipeline.models import build
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.views.preprocessing import Preprocessing


def build_teacher(spec: str, image_size: int | None, recorded: Preprocessing | None = None) -> Embedder:
    """The network of a spec. Seeds torch's default generator: random weights are the same ones in every run.

    recorded: the preprocessing with which a store was begun; see `models.build`.
    """
    torch.manual_seed(0)
    return build(spec, image_size=image_size, pretrained_default=True, recorded=recorded)


def load_live_teacher(store: FeatureStore, spec: str | None = None) -> Embedder:
    """Build the network whose features a store holds, from the store's own spec or from `spec`.

    Raises UserError if its weights are not those that the store was made with.
    """
    spec, teacher = spec or store.export.teacher, store.identity.teacher
    embedder = build_teacher(spec, teacher.preprocessing.size, teacher.preprocessing)
    if embedder.digest() != teacher.weights:
        raise UserError(f"{spec} has other weights here than when {store.storage} was made; restore them")
    return embedder
