"""Seconds of training several students in one pass, against training them one after the other and a lower bound.

The lower bound is the time of one loader alone plus the time of all students' steps alone.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.photographs import prepare_images
from compress_ssl.pipeline.runtime.device import choose_device, loader_workers
from compress_ssl.pipeline.store.source_images import open_store_images
from compress_ssl.pipeline.training.sampler import make_sampler
from compress_ssl.stages import distill, export_teacher

SIZE, BATCH, STEPS, ROUNDS = 96, 32, 24, 3
STUDENTS = ("timm:lcnet_035", "timm:mobilenetv3_small_050", "convnet:channels=16+32+64", "convnet:channels=8+16+32")


def measure() -> dict[str, Any]:
    """Median seconds of training, without the time to build models and stores, and their ratios."""
    with tempfile.TemporaryDirectory() as folder:
        images = str(prepare_images(Path(folder) / "images"))
        store, teacher = Path(folder) / "store", "convnet:channels=8+16,pretrained=false"
        export_teacher.run(
            export_teacher.Config(
                data=images, teacher=teacher, out=str(store), views=4, image_size=32, batch_size=BATCH
            )
        )
        rounds = []
        for number in range(ROUNDS + 1):  # the first round is a warm-up and is dropped
            out = Path(folder) / str(number)
            together = _train(store, STUDENTS, out / "together")
            alone = sum(_train(store, (student,), out / student.replace(":", "-")) for student in STUDENTS)
            loader, steps = _measure_parts(store, out / "parts")
            rounds.append((together, alone, loader, steps))
    together, alone, loader, steps = (sorted(column)[ROUNDS // 2] for column in zip(*rounds[1:], strict=True))
    return {
        "students": list(STUDENTS),
        "what": f"{STEPS} steps of {BATCH} images at {SIZE} pixels, medians of {ROUNDS} rounds, seconds",
        "one pass": round(together, 2),
        "one after the other": round(alone, 2),
        "one loader alone": round(loader, 2),
        "the students' bare steps": round(steps, 2),
        "one pass / one after the other": round(together / alone, 3),
        "one pass / (loader + steps)": round(together / (loader + steps), 3),
    }


def _prepare_run(store: Path, students: Sequence[str], out: Path) -> tuple[distill.Config, Any]:
    """(the config, the `TrainingRun`) of a run of STEPS steps, ready to train."""
    from compress_ssl.pipeline.runtime.storage import Folder
    from compress_ssl.pipeline.store.feature_store import FeatureStore

    config = distill.Config(
        store=str(store), student=tuple(students), method="compress-1q", out=out, steps=STEPS, batch_size=BATCH,
        image_size=SIZE, lr=0.01,
    )  # fmt: skip
    opened = FeatureStore(Folder(store))
    job = distill.resolve(config)
    sampler = make_sampler(opened, job.sampling, config.store)
    return config, distill.prepare([job], opened, open_store_images(opened, config.data), sampler)


def _train(store: Path, students: Sequence[str], out: Path) -> float:
    """Seconds of training these students in one pass."""
    config, training_run = _prepare_run(store, students, out)
    began = time.perf_counter()
    distill.train(config, training_run, None)
    return time.perf_counter() - began


def _measure_parts(store: Path, out: Path) -> tuple[float, float]:
    """(seconds of the loader alone, seconds of all steps on pixels that are already loaded)"""
    _, training_run = _prepare_run(store, STUDENTS, out)
    began = time.perf_counter()
    view_batches = list(training_run.load_views(loader_workers(None, choose_device("auto"))))
    loader = time.perf_counter() - began
    training_run.step(0, view_batches[0], False)  # the first step allocates
    began = time.perf_counter()
    for step, view_batch in enumerate(view_batches):
        training_run.step(step, view_batch, False)
    return loader, time.perf_counter() - began
