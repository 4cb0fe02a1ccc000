"""The environment variables that a launcher such as torchrun sets for each process (rank) that it starts."""

import os

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_launched() -> bool:
    """Whether this process is one of several ranks, started by torchrun or by `launch.launch_ranks`."""
    return all(name in os.environ for name in LAUNCHER_VARIABLES) and int(os.environ["WORLD_SIZE"]) > 1


def is_main_process() -> bool:
    """Whether this process prints for all ranks: rank 0, or the only process."""
    return not is_launched() or os.environ["RANK"] == "0"


def local_rank() -> int:
    """The number of this process among the ranks on its machine, from 0."""
    return int(os.environ["LOCAL_RANK"]) if is_launched() else 0


def local_world_size() -> int:
    """The number of ranks of this run on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if is_launched() else 1
