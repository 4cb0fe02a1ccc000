"""Seconds of a training step with a live teacher, against a step that reads stored features; bf16 and --compile.

Both steps have the same student, method, pixels and batch size. The step with a live teacher is computed as the sum of
the other step and of the teacher's forward pass on the same number of views at the teacher's size. Decoding and
rendering are left out of both. The runs alternate in one process. The step with stored features is also measured in
bfloat16 (bf16) and with --compile, against float32 (fp32).
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.photographs import prepare_images
from compress_ssl.pipeline.extraction.feature_extractor import FeatureExtractor
from compress_ssl.pipeline.models import build
from compress_ssl.pipeline.runtime.device import choose_device
from compress_ssl.pipeline.store.source_images import open_store_images
from compress_ssl.pipeline.training.sampler import make_sampler
from compress_ssl.stages import distill, export_teacher

TEACHER, SIZE, STUDENT, STUDENT_SIZE, BATCH, ROUNDS = "timm:resnet50", 224, "timm:resnet18", 64, 32, 3


def measure() -> dict[str, Any]:
    """Median seconds of a step and of the teacher's forward pass, and their ratios."""
    device = choose_device("auto")
    forward = FeatureExtractor(build(f"{TEACHER},pretrained=false", image_size=SIZE), device, batch_size=BATCH)
    views = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    variants: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"precision": "bf16"}, "compiled": {"compile": True}}
    with tempfile.TemporaryDirectory() as folder:
        images = str(prepare_images(Path(folder) / "images"))
        store = Path(folder) / "store"
        export_teacher.run(
            export_teacher.Config(
                data=images, teacher="convnet:channels=8+16,pretrained=false", out=str(store), views=2, image_size=32
            )
        )
        steps = {name: _make_step(store, Path(folder) / name, flags) for name, flags in variants.items()}
        steps["teacher"] = lambda: forward.start(views)["embedding"].cpu()
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(ROUNDS + 1):
            for name, call in steps.items():
                began = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    return {
        "what": f"{STUDENT} at {STUDENT_SIZE} pixels, compress-1q, {TEACHER} at {SIZE}, batch {BATCH}, {device}",
        "cached step s": round(medians["fp32"], 3),
        "teacher forward s": round(medians["teacher"], 3),
        "live / cached": round((medians["fp32"] + medians["teacher"]) / medians["fp32"], 2),
        "bf16 / fp32": round(medians["bf16"] / medians["fp32"], 2),
        "compiled / not": round(medians["compiled"] / medians["fp32"], 2),
    }


def _make_step(store: Path, out: Path, flags: dict[str, Any]) -> Callable[[], object]:
    """A function that runs one training step, always on the same pixels; `flags` are further flags of `distill`."""
    from compress_ssl.pipeline.runtime.storage import Folder
    from compress_ssl.pipeline.store.feature_store import FeatureStore

    config = distill.Config(
        store=str(store), student=(STUDENT,), method="compress-1q", out=out, steps=10, batch_size=BATCH,
        image_size=STUDENT_SIZE, lr=0.01, **flags,
    )  # fmt: skip
    opened = FeatureStore(Folder(store))
    job = distill.resolve(config)
    sampler = make_sampler(opened, job.sampling, config.store)
    training_run = distill.prepare([job], opened, open_store_images(opened, config.data), sampler)
    view_batch = next(training_run.load_views(0))
    return lambda: training_run.step(0, view_batch, False)
