"""Validation of a student while it trains, by its nearest neighbours: needs no training of a classifier."""

import numpy as np
import torch
from torch.nn import functional as F

from compress_ssl.pipeline.datasets import DATASETS
from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.extraction.extract import FeatureSource, LoaderSettings
from compress_ssl.pipeline.extraction.feature_extractor import FeatureExtractor
from compress_ssl.pipeline.extraction.features import view_features
from compress_ssl.pipeline.extraction.view_batches import model_views
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.views.augment import ViewSpec

CHUNK = 1024  # queries per matrix product: bounds the scores in memory to (1024, N) float32


def open_labelled(spec: str) -> Dataset:
    """The labelled images of --val. Raises UserError if none of them has a label."""
    dataset: Dataset = DATASETS.build(spec)
    if (dataset.label < 0).all():
        raise UserError(f"--val {spec} has no labels, so nearest neighbours cannot be scored; leave --val out")
    return dataset


def leave_one_out(
    embedder: Embedder,
    dataset: Dataset,
    spec: ViewSpec,
    device: torch.device,
    precision: str = "fp32",
    workers: int = 0,
) -> float:
    """Share of labelled images, in percent, whose nearest other labelled image by cosine has the same label.

    Images without a label count neither as queries nor as neighbours. Only view 0 is used.
    """
    extractor = FeatureExtractor.unpadded(embedder, device, precision)
    source = FeatureSource(extractor, model_views(dataset, spec, embedder), LoaderSettings(workers))
    embedded, rows = view_features(source, np.arange(len(dataset)))
    features = torch.from_numpy(embedded).to(device)
    label = torch.from_numpy(dataset.label[rows]).to(device)
    known = label >= 0
    unit = F.normalize(features[known], dim=1)  # (N, d)
    label = label[known]
    hits = 0
    for start in range(0, len(unit), CHUNK):
        scores = unit[start : start + CHUNK] @ unit.T  # (chunk, N) cosines
        own = torch.arange(len(scores), device=device)
        scores[own, own + start] = -2.0  # below every cosine: an image is not its own neighbour
        hits += int((label[scores.argmax(1)] == label[start : start + CHUNK]).sum())
    return 100.0 * hits / max(1, len(unit))
