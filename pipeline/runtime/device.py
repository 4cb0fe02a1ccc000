"""Which device, how many cores, and how many loader processes suit them."""

import os
import platform

import torch

from compress_ssl.pipeline.runtime.artifact import UserError


def choose_device(name: str, local: int | None = None) -> torch.device:
    """auto, cpu, cuda, cuda:N -> a device that is there. Raises UserError.

    local: the number of this process among several on this machine, which share the CPU or have a GPU each.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if local is None:
            return torch.device(name)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is no device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and local is not None:
        if device.index is not None:
            raise UserError(f"--device {name} is one device, but several processes want one each; use --device cuda")
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} of this machine has no CUDA device: {torch.cuda.device_count()} are there; "
                "start as many processes as devices, or use --device cpu"
            )
        return torch.device("cuda", local)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name} was asked, but {torch.cuda.device_count()} CUDA devices are there")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:N")
    return device


def device_name(device: torch.device) -> str:
    """What kind of device it is, in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loader_workers(asked: int | None, device: torch.device, beside: int = 1) -> int:
    """Loader processes: as asked, else one per core up to 16 for a GPU.

    Beside a model on the CPU up to 4, which take the time that it leaves: none on a single core.
    beside: processes of the run that share this machine's cores.
    """
    mine = max(1, available_cores() // beside)
    return asked if asked is not None else min(16, mine) if device.type == "cuda" else min(4, mine) * (mine > 1)
