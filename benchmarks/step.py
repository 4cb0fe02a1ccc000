"""A distillation step with stored features against a step of the same student without a teacher, on the same pixels.

Taught: features from memory as the store keeps them, student, similarity loss over two banks of 4096, optimiser,
bank push. Alone: the same student, its embedding's mean square as the loss, the same optimiser. CPU, no loader.
"""

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
    """Medians over alternating steps, ratios over neighbouring ones; shares are of the taught step."""
    pixels = torch.randint(0, 256, (B, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    alone, taught = student(), student()
    context = MethodContext([taught], {"embedding": (D,)}, np.arange(IMAGES), 0, 0)
    method = METHODS.build(METHOD, context=context)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9) for model in (alone, taught)]
    with tempfile.TemporaryDirectory() as folder:
        features = TeacherFeatures(hydrate.made(Path(folder) / "store", IMAGES, 1, D))
        features.read(np.arange(1), np.zeros(1, np.int64))  # the view of an epoch is read once, outside the measurement
        rounds = []
        for step in range(ROUNDS + 1):
            parts = dict.fromkeys(PARTS, 0.0)
            bare = _seconds(lambda: step_alone(alone, optimizers[0], pixels))
            whole = _seconds(lambda n=step, p=parts: step_taught(taught, method, features, optimizers[1], pixels, n, p))
            rounds.append({"alone": bare, "taught": whole, **parts})
    rounds = rounds[1:]
    return {
        "seconds": {name: _median(one[name] for one in rounds) for name in ("alone", "taught")},
        "taught / alone": _median(one["taught"] / one["alone"] for one in rounds),
        "parts / alone": {name: _median(one[name] / one["alone"] for one in rounds) for name in PARTS},
    }


def student() -> Embedder:
    torch.manual_seed(0)
    return build(STUDENT, image_size=SIDE).train()


def step_alone(model: Embedder, optimizer: torch.optim.Optimizer, pixels: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    model(model.prepare(pixels)).square().mean().backward()
    optimizer.step()


def step_taught(
    model: Embedder,
    method: Method,
    features: TeacherFeatures,
    optimizer: torch.optim.Optimizer,
    pixels: Tensor,
    step: int,
    parts: dict[str, float],
) -> None:
    """As the training loop does it; adds to `parts` the seconds of what a student alone does not need."""
    rows = (np.arange(B) * 61 + step * B) % IMAGES  # scattered, as a shuffled epoch is
    views = np.zeros(B, np.int64)
    with _added(parts, "features"):
        teacher = torch.from_numpy(features.read(rows, views))[:, None]  # (B, 1, D)
    optimizer.zero_grad(set_to_none=True)
    i, v = torch.from_numpy(rows), torch.from_numpy(views)[:, None]
    batch = Batch(step, i, v, v, {"embedding": teacher}, [model.prepare(pixels)])
    z = model(batch.images[0])
    with _added(parts, "loss"):  # finds the gradient too: what is left of its backward pass is a product
        (loss,) = method(batch, [{"embedding": z[:, None]}])
    loss.backward()
    optimizer.step()
    with _added(parts, "bank"):
        method.after_step(batch)


@contextmanager
def _added(parts: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    parts[name] += time.perf_counter() - began


def _seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _median(numbers: Iterator[float]) -> float:
    return round(statistics.median(numbers), 4)
