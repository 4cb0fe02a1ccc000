"""An export of views from JPEG files against the bare teacher's forward on ready tensors.

Same model, batch, precision and memory format, alternating in one process. By the clock, and in processor seconds of
the process and its loaders, which other work on the machine disturbs less: what the export does besides the forward.
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
from pipeline.datasets import DATASETS
from pipeline.device import choose, loader_workers
from pipeline.embed import Forward, embed
from pipeline.models import build
from pipeline.shelf import shard_rows
from pipeline.storage import Folder
from pipeline.store import FeatureStore
from pipeline.views import ViewSpec

TEACHER, SIZE, VIEWS, BATCH, IMAGES, ROUNDS = "timm:resnet18,pretrained=false", 224, 8, 32, 96, 5


def measure() -> dict[str, Any]:
    """views/s of both, and their ratios, in pairs; medians."""
    device = choose("auto")
    forward = Forward(build(TEACHER, image_size=SIZE), device, batch_size=BATCH)
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        dataset = DATASETS.order(str(photographs(Path(folder) / "images"))).subset(IMAGES)
        for number in range(ROUNDS):
            bare = _bare(forward)
            pairs.append((bare, _export(forward, dataset, Path(folder) / str(number), device)))
    return {
        "teacher": f"{TEACHER} at {SIZE}, batch {BATCH}, {VIEWS} views, {len(dataset)} images, {device}",
        "bare forward views/s": [round(bare[0], 1) for bare, _ in pairs],
        "export views/s": [round(ours[0], 1) for _, ours in pairs],
        "ratio": round(float(np.median([ours[0] / bare[0] for bare, ours in pairs])), 3),
        "ratio, views per processor second": round(float(np.median([ours[1] / bare[1] for bare, ours in pairs])), 3),
    }


def _bare(forward: Forward) -> tuple[float, float]:
    pixels = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    forward(pixels)
    count = IMAGES * VIEWS // BATCH
    return _rates(count * BATCH, lambda: [forward(pixels) for _ in range(count)])


def _export(forward: Forward, dataset: Any, out: Path, device: torch.device) -> tuple[float, float]:
    arrays = {"embedding": [forward.embedder.width]}
    identity = {
        "data": {"images": len(dataset), "fingerprint": dataset.fingerprint},
        "arrays": arrays,
        "codec": "int8",
        "shard_rows": shard_rows(len(dataset), BATCH, arrays, 1),
    }
    tables = {"sample_id": dataset.ids, "label": dataset.label, "view_key": range(len(dataset))}
    store = FeatureStore.make(Folder(out), identity, {"views": VIEWS}, tables)
    spec = ViewSpec("crop-flip", 0, 0.875)
    workers = loader_workers(None, device)
    return _rates(len(dataset) * VIEWS, lambda: embed(store, dataset, spec, forward, workers=workers))


def _rates(views: int, act: Callable[[], object]) -> tuple[float, float]:
    """Views a second by the clock, and a second of processor, loader processes included."""
    clock, processor = time.perf_counter(), sum(os.times()[:4])
    act()
    return views / (time.perf_counter() - clock), views / (sum(os.times()[:4]) - processor)
