"""The device a model runs on, the cores this process may use, and the default number of loader processes."""

import os
import platform

import torch

from compress_ssl.pipeline.runtime.errors import UserError


def choose_device(name: str, local: int | None = None) -> torch.device:
    """The device for a value of --device: auto, cpu, cuda or cuda:N. Raises UserError if it is not available.

    local: this process's local rank if several train together on this machine. Each rank then uses the GPU of its
    number, or all share the CPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if local is None:
            return torch.device(name)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and local is not None:
        if device.index is not None:
            raise UserError(
                f"--device {name} is one device, but each of several processes needs its own; use --device cuda"
            )
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} of this machine has no CUDA device: {torch.cuda.device_count()} are there; "
                "start as many processes as devices, or use --device cpu"
            )
        return torch.device("cuda", local)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name} was given, but {torch.cuda.device_count()} CUDA devices are there")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:N")
    return device


def device_name(device: torch.device) -> str:
    """The GPU's model name, or `cpu (x86_64)` with the machine's architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def available_cores() -> int:
    """The number of CPU cores that this process may use: those of its affinity mask, where there is one."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loader_workers(asked: int | None, device: torch.device, beside: int = 1) -> int:
    """The number of loader processes: `asked` if it is given, otherwise a default.

    For a model on a GPU the default is one per core, at most 16. For a model on the CPU it is at most 4, because
    loaders and model compete for the cores, and 0 (loading in the main process) on a single core.
    beside: the number of processes of this run on this machine; they share its cores equally.
    """
    if asked is not None:
        return asked
    cores = max(1, available_cores() // beside)
    if device.type == "cuda":
        return min(16, cores)
    return min(4, cores) if cores > 1 else 0
