"""Views per second of an export from JPEG files, against the teacher's forward pass alone on tensors in memory.

Both use the same model, batch size, precision and memory format, in one process. Each export is measured between two
runs of the forward pass and compared with their mean, because the speed of a processor drifts. The rates are views per
second of wall-clock time, and per second of processor time of this process and its loaders. The number of images is a
multiple of the batch size; in a large data set, too, only the last batch is smaller.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.photographs import prepare_images
from benchmarks.store_records import plain_record
from compress_ssl.pipeline.datasets import DATASETS
from compress_ssl.pipeline.extraction.embed import embed, store_source
from compress_ssl.pipeline.extraction.extract import LoaderSettings
from compress_ssl.pipeline.extraction.feature_extractor import FeatureExtractor
from compress_ssl.pipeline.models import build
from compress_ssl.pipeline.runtime.device import choose_device, loader_workers
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.shards import shard_rows

TEACHER, SIZE, VIEWS, BATCH, IMAGES, ROUNDS = "timm:resnet18,pretrained=false", 224, 8, 50, 250, 5
FORWARD_VIEWS = 800  # views per run of the forward pass alone


def measure() -> dict[str, Any]:
    """Views/s of the forward pass alone and of the exports, and medians of export / forward pass."""
    device = choose_device("auto")
    forward = FeatureExtractor(build(TEACHER, image_size=SIZE), device, batch_size=BATCH)
    with tempfile.TemporaryDirectory() as folder:
        dataset = DATASETS.build(str(prepare_images(Path(folder) / "images"))).subset(IMAGES)
        forward_rates, export_rates = [_measure_forward(forward)], []
        for number in range(ROUNDS):
            export_rates.append(_measure_export(forward, dataset, Path(folder) / str(number), device))
            forward_rates.append(_measure_forward(forward))
    around = (np.array(forward_rates)[:-1] + np.array(forward_rates)[1:]) / 2  # mean of the runs before and after
    ratios = np.array(export_rates) / around  # (ROUNDS, 2): wall-clock and processor time
    return {
        "teacher": f"{TEACHER} at {SIZE}, batch {BATCH}, {VIEWS} views, {len(dataset)} images, {device}",
        "bare forward views/s": [round(rate, 1) for rate, _ in forward_rates],
        "export views/s": [round(rate, 1) for rate, _ in export_rates],
        "ratios": [round(float(ratio), 3) for ratio in ratios[:, 0]],
        "ratio": round(float(np.median(ratios[:, 0])), 3),
        "ratio, views per processor second": round(float(np.median(ratios[:, 1])), 3),
    }


def _measure_forward(forward: FeatureExtractor) -> tuple[float, float]:
    pixels = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    forward.start(pixels)["embedding"].cpu()
    count = FORWARD_VIEWS // BATCH
    return _rates(count * BATCH, lambda: [forward.start(pixels)["embedding"].cpu() for _ in range(count)])


def _measure_export(forward: FeatureExtractor, dataset: Any, out: Path, device: torch.device) -> tuple[float, float]:
    width = forward.embedder.width
    rows = shard_rows(len(dataset), BATCH, {"embedding": (width,)}, 1)
    tables = {"sample_id": dataset.ids, "label": dataset.label, "view_key": range(len(dataset))}
    store = FeatureStore.create(Folder(out), plain_record(len(dataset), VIEWS, width, "int8", rows), tables)
    source = store_source(store, dataset, forward, LoaderSettings(loader_workers(None, device)))
    return _rates(len(dataset) * VIEWS, lambda: embed(store, source, store.pending()))


def _rates(views: int, call: Callable[[], object]) -> tuple[float, float]:
    """(views per second of wall-clock time, views per second of processor time, loader processes included) of a call"""
    clock, processor = time.perf_counter(), sum(os.times()[:4])
    call()
    return views / (time.perf_counter() - clock), views / (sum(os.times()[:4]) - processor)
