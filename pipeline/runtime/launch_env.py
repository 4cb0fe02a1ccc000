"""What a launcher such as torchrun tells each process that it starts."""

import os
from dataclasses import dataclass

from compress_ssl.pipeline.runtime.errors import UserError

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MAX_RANKS = 1_000_000  # more than any cluster starts; bounds numbers that are no count


@dataclass(frozen=True)
class Launch:
    """This process as one of several, as its launcher numbers them."""

    rank: int
    world_size: int
    local_rank: int  # among the ranks on this machine
    local_world_size: int
    address: str  # of rank 0
    port: int


def is_launched() -> bool:
    """Whether torchrun, or `distributed.launch.launch_ranks`, started this process as one of several.

    A WORLD_SIZE that is no number counts as several: `read_launch` then refuses it in words.
    """
    return all(name in os.environ for name in LAUNCHER_VARIABLES) and os.environ["WORLD_SIZE"].strip() not in ("0", "1")


def read_launch() -> Launch | None:
    """What the launcher set; None in a process that was started alone. Raises UserError for values that cannot be."""
    if not is_launched():
        return None
    world_size = _number("WORLD_SIZE", 2, MAX_RANKS)
    return Launch(
        rank=_number("RANK", 0, world_size - 1),
        world_size=world_size,
        local_rank=_number("LOCAL_RANK", 0, world_size - 1),
        local_world_size=_number("LOCAL_WORLD_SIZE", 1, world_size),
        address=os.environ["MASTER_ADDR"],
        port=_number("MASTER_PORT", 1, 2**16 - 1),
    )


def _number(name: str, least: int, most: int) -> int:
    """A whole number in the environment. Raises UserError if it is none or out of range."""
    text = os.environ[name]
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise UserError(
            f"the environment variable {name} is {text[:40]!r}, but must be a whole number from {least} to {most}; "
            f"launchers such as torchrun set it: start with one, or unset {', '.join(LAUNCHER_VARIABLES)}"
        )
    return number


def is_main_process() -> bool:
    """Whether this process prints progress and results: it is rank 0, or the only process."""
    return not is_launched() or os.environ["RANK"].strip() == "0"


def local_rank() -> int:
    """The number of this process among the ranks on its machine. Raises UserError as `read_launch` does."""
    launch = read_launch()
    return launch.local_rank if launch else 0


def local_world_size() -> int:
    """How many processes of this run are on this machine. Raises UserError as `read_launch` does."""
    launch = read_launch()
    return launch.local_world_size if launch else 1
