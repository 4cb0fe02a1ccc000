"""Seconds of a distillation step with stored features, against a step of the same student without a teacher.

The step "taught" decodes stored features in memory, runs the student, computes the similarity loss over two banks of
4096 anchors, and updates weights and banks. The step "alone" has the same student, pixels and optimiser; its loss is
the mean square of the embedding. Both run on the CPU, without a loader.
"""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import hydrate
from compress_ssl.pipeline.methods import METHODS
from compress_ssl.pipeline.methods.base import Batch, Method, MethodContext
from compress_ssl.pipeline.models import build
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.training.teacher_features import TeacherFeatures

STUDENT, SIDE, B, D, METHOD = "timm:resnet18", 64, 256, 2048, "compress-2q:bank=4096,start=random"
IMAGES, ROUNDS = 16_384, 11
PARTS = ("features", "loss", "bank")


def measure() -> dict[str, object]:
    """Medians over ROUNDS rounds in which the steps alternate; a ratio is formed within each round.

    "parts / alone" are the seconds of the parts of the step "taught" over those of the step "alone".
    """
    pixels = torch.randint(0, 256, (B, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    alone, taught = build_student(), build_student()
    context = MethodContext([taught], {"embedding": (D,)}, np.arange(IMAGES), 0, 0)
    method = METHODS.build(METHOD, context=context)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9) for model in (alone, taught)]
    with tempfile.TemporaryDirectory() as folder:
        features = TeacherFeatures(hydrate.create_store(Path(folder) / "store", IMAGES, 1, D))
        features.read(np.arange(1), np.zeros(1, np.int64))  # the view of an epoch is read once, outside the measurement
        rounds = []
        for step in range(ROUNDS + 1):
            parts = dict.fromkeys(PARTS, 0.0)
            alone_seconds = _seconds(functools.partial(step_without_teacher, alone, optimizers[0], pixels))
            distill = functools.partial(step_with_teacher, taught, method, features, optimizers[1], pixels, step, parts)
            rounds.append({"alone": alone_seconds, "taught": _seconds(distill), **parts})
    rounds = rounds[1:]  # the first round is a warm-up
    return {
        "seconds": {name: _median(one[name] for one in rounds) for name in ("alone", "taught")},
        "taught / alone": _median(one["taught"] / one["alone"] for one in rounds),
        "parts / alone": {name: _median(one[name] / one["alone"] for one in rounds) for name in PARTS},
    }


def build_student() -> Embedder:
    torch.manual_seed(0)
    return build(STUDENT, image_size=SIDE).train()


def step_without_teacher(model: Embedder, optimizer: torch.optim.Optimizer, pixels: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    model(model.prepare(pixels)).square().mean().backward()
    optimizer.step()


def step_with_teacher(
    model: Embedder,
    method: Method,
    features: TeacherFeatures,
    optimizer: torch.optim.Optimizer,
    pixels: Tensor,
    step: int,
    parts: dict[str, float],
) -> None:
    """Take step number `step` as in the training loop; add to `parts` the seconds that only this step needs."""
    rows = (np.arange(B) * 61 + step * B) % IMAGES  # scattered, as a shuffled epoch is
    views = np.zeros(B, np.int64)
    with _add_seconds(parts, "features"):
        teacher = torch.from_numpy(features.read(rows, views))[:, None]  # (B, 1, D)
    optimizer.zero_grad(set_to_none=True)
    i, v = torch.from_numpy(rows), torch.from_numpy(views)[:, None]
    batch = Batch(step, i, v, v, {"embedding": teacher}, [model.prepare(pixels)])
    z = model(batch.images[0])
    with _add_seconds(parts, "loss"):  # includes the gradient: the backward pass of the loss only scales it
        (loss,) = method(batch, [{"embedding": z[:, None]}])
    loss.backward()
    optimizer.step()
    with _add_seconds(parts, "bank"):
        method.after_step(batch)


@contextmanager
def _add_seconds(parts: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of the block to parts[name]."""
    began = time.perf_counter()
    yield
    parts[name] += time.perf_counter() - began


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _median(numbers: Iterator[float]) -> float:
    return round(statistics.median(numbers), 4)
