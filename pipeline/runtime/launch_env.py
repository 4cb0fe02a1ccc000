"""What a launcher such as torchrun tells each process that it starts."""

import os

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_launched() -> bool:
    """Whether torchrun, or `distributed.launch.launch_ranks`, started this process as one of several."""
    return all(name in os.environ for name in LAUNCHER_VARIABLES) and int(os.environ["WORLD_SIZE"]) > 1


def is_main_process() -> bool:
    """Whether this process prints progress and results: it is rank 0, or the only process."""
    return not is_launched() or os.environ["RANK"] == "0"


def local_rank() -> int:
    """The number of this process among the ranks on its machine."""
    return int(os.environ["LOCAL_RANK"]) if is_launched() else 0


def local_world_size() -> int:
    """How many processes of this run are on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if is_launched() else 1
