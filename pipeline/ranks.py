"""What the ranks of a distributed run share: gathers in one fixed order."""

import torch
from torch import Tensor, distributed
from torch.distributed.nn.functional import all_gather


def size() -> int:
    """Processes that train together; 1 without torch.distributed."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """The number of this process among them."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def gather(rows: Tensor) -> Tensor:
    """The (B, ...) rows of the whole step from each rank's share, with gradients: rank r has every size()-th from r."""
    if size() == 1:
        return rows
    return torch.stack(list(all_gather(rows.contiguous())), 1).flatten(0, 1)
