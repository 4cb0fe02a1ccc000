"""An export of views from JPEG files against the bare teacher's forward on ready tensors.

Same model, batch, precision and memory format, alternating in one process.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.photographs import photographs
from pipeline.datasets import DATASETS
from pipeline.device import choose, loader_workers
from pipeline.embed import Forward, embed
from pipeline.models import build
from pipeline.storage import Folder
from pipeline.store import FeatureStore, shard_rows
from pipeline.views import ViewSpec

TEACHER, SIZE, VIEWS, BATCH, IMAGES, ROUNDS = "timm:resnet18,pretrained=false", 224, 8, 32, 96, 3


def measure() -> dict[str, Any]:
    """views/s of both, and their ratio, in pairs."""
    device = choose("auto")
    forward = Forward(build(TEACHER, image_size=SIZE), device, batch_size=BATCH)
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        dataset = DATASETS.order(str(photographs(Path(folder) / "images"))).subset(IMAGES)
        for number in range(ROUNDS):
            bare = _bare(forward)
            pairs.append((bare, _export(forward, dataset, Path(folder) / str(number), device)))
    ratios = [ours / bare for bare, ours in pairs]
    return {
        "teacher": f"{TEACHER} at {SIZE}, batch {BATCH}, {VIEWS} views, {len(dataset)} images, {device}",
        "bare forward views/s": [round(bare, 1) for bare, _ in pairs],
        "export views/s": [round(ours, 1) for _, ours in pairs],
        "ratio": round(float(np.median(ratios)), 3),
    }


def _bare(forward: Forward) -> float:
    pixels = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    forward(pixels)
    began = time.perf_counter()
    count = IMAGES * VIEWS // BATCH
    for _ in range(count):
        forward(pixels)
    return count * BATCH / (time.perf_counter() - began)


def _export(forward: Forward, dataset: Any, out: Path, device: torch.device) -> float:
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
    began = time.perf_counter()
    embed(store, dataset, spec, forward, workers=loader_workers(None, device))
    return len(dataset) * VIEWS / (time.perf_counter() - began)
