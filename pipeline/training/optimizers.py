"""Optimisers by name, each over two groups: what decays, and norms and biases where they are spared."""

from typing import Any

import torch
from timm.optim import Lars
from torch import nn

from compress_ssl.pipeline.runtime.artifact import UserError

OPTIMIZERS = ("sgd", "adam", "adamw", "lars")


def make_optimizer(
    name: str, modules: nn.Module, *, lr: float, momentum: float, weight_decay: float, norm_decay: bool
) -> torch.optim.Optimizer:
    """momentum is beta 1 of adam and adamw. norm_decay: norms and biases decay too.

    lars (You et al. 2017, as SimCLR uses it) never decays or adapts norms and biases. Raises UserError.
    """
    whole = norm_decay and name != "lars"
    with_decay = [p for p in modules.parameters() if p.requires_grad and (whole or p.ndim > 1)]
    without = [p for p in modules.parameters() if p.requires_grad and not (whole or p.ndim > 1)]
    groups: list[dict[str, Any]] = [{"params": with_decay, "weight_decay": weight_decay}]
    groups += [{"params": without, "weight_decay": 0.0}] if without else []
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)
    if name == "adam":
        return torch.optim.Adam(groups, lr=lr, betas=(momentum, 0.999))
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999))
    if name == "lars":
        return Lars(groups, lr=lr, momentum=momentum)
    raise UserError(f"unknown optimizer {name!r}. Known: {', '.join(OPTIMIZERS)}")
