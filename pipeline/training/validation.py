"""The quick score of a student while it trains."""

import torch

from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.extraction.features import view_features
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.views.augment import ViewSpec


def leave_one_out(
    embedder: Embedder,
    dataset: Dataset,
    spec: ViewSpec,
    device: torch.device,
    precision: str = "fp32",
    workers: int = 0,
) -> float:
    """Share of labelled images, in percent, whose nearest other image by cosine has their label."""
    features, rows = view_features(embedder, dataset, spec, device, precision, workers=workers)
    label = torch.from_numpy(dataset.label[rows]).to(device)
    known = label >= 0
    unit, label = features[known] / features[known].norm(dim=1, keepdim=True).clamp_min(1e-12), label[known]
    hits = 0
    for start in range(0, len(unit), 1024):
        scores = unit[start : start + 1024] @ unit.T
        own = torch.arange(len(scores), device=device)
        scores[own, own + start] = -2.0
        hits += int((label[scores.argmax(1)] == label[start : start + 1024]).sum())
    return 100.0 * hits / max(1, len(unit))
