"""Memory formats of a student, by network and size: forward and backward, what `distill --channels-last` decides."""

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
    """Medians over alternating steps, ratios over neighbouring ones."""
    device = choose_device("auto")
    found: dict[str, object] = {"device": str(device)}
    for spec, size, batch in STUDENTS:
        acts = {name: _step(spec, size, batch, layout, device) for name, layout in FORMATS.items()}
        rounds = [{name: _seconds(act, device) for name, act in acts.items()} for _ in range(ROUNDS + 1)][1:]
        ratio = statistics.median(each["contiguous"] / each["channels last"] for each in rounds)
        found[f"{spec} at {size}, batch {batch}"] = {
            "channels last s": round(statistics.median(each["channels last"] for each in rounds), 3),
            "contiguous / channels last": round(ratio, 2),
        }
    return found


def _step(spec: str, size: int, batch: int, layout: torch.memory_format, device: torch.device) -> Callable[[], None]:
    """On images as the loader gives them."""
    student = build(spec, image_size=size, pretrained_default=False).to(device).to(memory_format=layout).train()
    images = student.prepare(torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8).to(device))

    def act() -> None:
        student(images).square().mean().backward()
        student.zero_grad()

    return act


def _seconds(act: Callable[[], None], device: torch.device) -> float:
    began = time.perf_counter()
    act()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
