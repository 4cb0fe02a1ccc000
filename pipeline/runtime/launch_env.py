"""What a launcher such as torchrun tells each process that it starts."""

import os

TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def started() -> bool:
    """Whether torchrun, or `start`, started this process as one of several."""
    return all(name in os.environ for name in TOLD) and int(os.environ["WORLD_SIZE"]) > 1


def leads() -> bool:
    """Whether this process is the one that speaks: rank 0, or the only one."""
    return not started() or os.environ["RANK"] == "0"


def local() -> int:
    """The number of this process on its machine."""
    return int(os.environ["LOCAL_RANK"]) if started() else 0


def beside() -> int:
    """Processes of this run on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if started() else 1
