"""Seconds of a student's forward and backward pass in the contiguous memory format, against channels-last.

`distill --channels-last` selects the format. STUDENTS lists (network, pixels, batch size).
"""

import statistics
import time
from collections.abc import Callable

import torch

from compress_ssl.pipeline.models import build
from compress_ssl.pipeline.runtime.device import choose_device

STUDENTS = (("timm:resnet18", 64, 32), ("timm:resnet18", 96, 64), ("timm:mobilenetv3_large_100", 96, 64))
FORMATS = {"channels last": torch.channels_last, "contiguous": torch.contiguous_format}
ROUNDS = 9


def measure() -> dict[str, object]:
    """Medians over ROUNDS rounds in which the formats alternate; a ratio is formed within one round."""
    device = choose_device("auto")
    results: dict[str, object] = {"device": str(device)}
    for spec, size, batch in STUDENTS:
        steps = {name: _make_step(spec, size, batch, layout, device) for name, layout in FORMATS.items()}
        rounds = [{name: _seconds(step, device) for name, step in steps.items()} for _ in range(ROUNDS + 1)][1:]
        ratio = statistics.median(one["contiguous"] / one["channels last"] for one in rounds)
        results[f"{spec} at {size}, batch {batch}"] = {
            "channels last s": round(statistics.median(one["channels last"] for one in rounds), 3),
            "contiguous / channels last": round(ratio, 2),
        }
    return results


def _make_step(
    spec: str, size: int, batch: int, layout: torch.memory_format, device: torch.device
) -> Callable[[], None]:
    """A function that runs one forward and backward pass on random images, prepared as those of the loader are."""
    student = build(spec, image_size=size, pretrained_default=False).to(device).to(memory_format=layout).train()
    images = student.prepare(torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8).to(device))

    def step() -> None:
        student(images).square().mean().backward()
        student.zero_grad()

    return step


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
