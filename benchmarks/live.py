"""A step that reads the teacher from the store against one that runs the teacher, and formats of the student's step.

Both in our own code, same student, method, pixels and batch, alternating in one process. What the live
step has more is the teacher's forward on the same views at the teacher's size, decode and render left out
on both sides.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.photographs import photographs
from compress_ssl.pipeline.extraction.feature_extractor import FeatureExtractor
from compress_ssl.pipeline.models import build
from compress_ssl.pipeline.runtime.device import choose_device
from compress_ssl.stages import distill, export_teacher

TEACHER, SIZE, STUDENT, STUDENT_SIZE, BATCH, ROUNDS = "timm:resnet50", 224, "timm:resnet18", 64, 32, 3


def measure() -> dict[str, Any]:
    """Seconds a step, medians, and ratios."""
    device = choose_device("auto")
    forward = FeatureExtractor(build(f"{TEACHER},pretrained=false", image_size=SIZE), device, batch_size=BATCH)
    views = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    ways: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"precision": "bf16"}, "compiled": {"compile": True}}
    with tempfile.TemporaryDirectory() as folder:
        images = str(photographs(Path(folder) / "images"))
        store = Path(folder) / "store"
        export_teacher.run(
            export_teacher.Config(
                data=images, teacher="convnet:channels=8+16,pretrained=false", out=store, views=2, image_size=32
            )
        )
        steps = {name: _step(store, Path(folder) / name, how) for name, how in ways.items()}
        times: dict[str, list[float]] = {name: [] for name in [*steps, "teacher"]}
        for _ in range(ROUNDS + 1):
            for name, act in {**steps, "teacher": lambda: forward(views)}.items():
                began = time.perf_counter()
                act()
                times[name].append(time.perf_counter() - began)
    found = {name: statistics.median(each[1:]) for name, each in times.items()}
    return {
        "what": f"{STUDENT} at {STUDENT_SIZE} pixels, compress-1q, {TEACHER} at {SIZE}, batch {BATCH}, {device}",
        "cached step s": round(found["fp32"], 3),
        "teacher forward s": round(found["teacher"], 3),
        "live / cached": round((found["fp32"] + found["teacher"]) / found["fp32"], 2),
        "bf16 / fp32": round(found["bf16"] / found["fp32"], 2),
        "compiled / not": round(found["compiled"] / found["fp32"], 2),
    }


def _step(store: Path, out: Path, how: dict[str, Any]) -> Callable[[], object]:
    """One training step on the same pixels, over and over."""
    from compress_ssl.pipeline.runtime.storage import Folder
    from compress_ssl.pipeline.store.feature_store import FeatureStore

    config = distill.Config(
        store=store, student=(STUDENT,), method="compress-1q", out=out, steps=10, batch_size=BATCH,
        image_size=STUDENT_SIZE, lr=0.01, **how,
    )  # fmt: skip
    opened = FeatureStore(Folder(store))
    plan = distill.build_sampler(config, opened)
    training_run = distill.prepare([config], opened, distill.open_images(config, opened), plan)
    view_batch = next(training_run.load_views(0))
    return lambda: training_run.step(0, view_batch, False)
