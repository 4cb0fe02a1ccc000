"""Which device, and how many loader processes suit it."""

import os

import torch

from pipeline.artifact import UserError


def choose(name: str) -> torch.device:
    """auto, cpu, cuda, cuda:N -> a device that is there. Raises UserError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is no device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name} was asked, but {torch.cuda.device_count()} CUDA devices are there")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:N")
    return device


def loader_workers(asked: int | None, device: torch.device) -> int:
    """Loader processes: as asked, else one per core up to 16 for a GPU and one beside a model on the CPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return asked if asked is not None else min(16, cores) if device.type == "cuda" else min(1, cores - 1)
