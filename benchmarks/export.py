"""An export of views from JPEG files against the bare teacher's forward on ready tensors.

Same model, batch, precision and memory format, in one process, each export between two bare runs and compared with
their mean: a processor's speed drifts. By the clock, and in processor seconds of the process and its loaders. The
images are whole batches, as all are but the last of a large set.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.photographs import photographs
from compress_ssl.pipeline.datasets import DATASETS
from compress_ssl.pipeline.extraction.embed import embed
from compress_ssl.pipeline.extraction.feature_extractor import FeatureExtractor
from compress_ssl.pipeline.models import build
from compress_ssl.pipeline.runtime.device import choose_device, loader_workers
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.shards import shard_rows
from compress_ssl.pipeline.views.augment import ViewSpec

TEACHER, SIZE, VIEWS, BATCH, IMAGES, ROUNDS = "timm:resnet18,pretrained=false", 224, 8, 50, 250, 5
BARE = 800  # views of a bare run


def measure() -> dict[str, Any]:
    """views/s of both, and their ratios; medians."""
    device = choose_device("auto")
    forward = FeatureExtractor(build(TEACHER, image_size=SIZE), device, batch_size=BATCH)
    with tempfile.TemporaryDirectory() as folder:
        dataset = DATASETS.build(str(photographs(Path(folder) / "images"))).subset(IMAGES)
        bare, ours = [_bare(forward)], []
        for number in range(ROUNDS):
            ours.append(_export(forward, dataset, Path(folder) / str(number), device))
            bare.append(_bare(forward))
    beside = (np.array(bare)[:-1] + np.array(bare)[1:]) / 2
    ratios = np.array(ours) / beside
    return {
        "teacher": f"{TEACHER} at {SIZE}, batch {BATCH}, {VIEWS} views, {len(dataset)} images, {device}",
        "bare forward views/s": [round(rate, 1) for rate, _ in bare],
        "export views/s": [round(rate, 1) for rate, _ in ours],
        "ratios": [round(float(ratio), 3) for ratio in ratios[:, 0]],
        "ratio": round(float(np.median(ratios[:, 0])), 3),
        "ratio, views per processor second": round(float(np.median(ratios[:, 1])), 3),
    }


def _bare(forward: FeatureExtractor) -> tuple[float, float]:
    pixels = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    forward(pixels)
    count = BARE // BATCH
    return _rates(count * BATCH, lambda: [forward(pixels) for _ in range(count)])


def _export(forward: FeatureExtractor, dataset: Any, out: Path, device: torch.device) -> tuple[float, float]:
    arrays = {"embedding": [forward.embedder.width]}
    identity = {
        "data": {"images": len(dataset), "fingerprint": dataset.fingerprint},
        "arrays": arrays,
        "codec": "int8",
        "shard_rows": shard_rows(len(dataset), BATCH, arrays, 1),
    }
    tables = {"sample_id": dataset.ids, "label": dataset.label, "view_key": range(len(dataset))}
    store = FeatureStore.create(Folder(out), identity, {"views": VIEWS}, tables)
    spec = ViewSpec("crop-flip", 0, 0.875)
    workers = loader_workers(None, device)
    return _rates(len(dataset) * VIEWS, lambda: embed(store, dataset, spec, forward, workers=workers))


def _rates(views: int, act: Callable[[], object]) -> tuple[float, float]:
    """Views a second by the clock, and a second of processor, loader processes included."""
    clock, processor = time.perf_counter(), sum(os.times()[:4])
    act()
    return views / (time.perf_counter() - clock), views / (sum(os.times()[:4]) - processor)
