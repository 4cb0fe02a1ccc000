"""Optimizers by name, each with up to two parameter groups: with and without weight decay."""

from typing import Any, get_args

import torch
from timm.optim.lars import Lars
from torch import nn

from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.training.choices import OptimizerName

OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)


def make_optimizer(
    name: str, modules: nn.Module, *, lr: float, momentum: float, weight_decay: float, norm_decay: bool
) -> torch.optim.Optimizer:
    """An optimizer over the parameters of `modules` that require gradients.

    momentum: for adam and adamw, this is beta 1 (beta 2 is 0.999). norm_decay: whether weight decay applies to norms
    and biases too, which are recognised as the parameters with one dimension or none. lars (You et al. 2017,
    arXiv 1708.03888) neither decays nor adapts these in any case, as in SimCLR (arXiv 2002.05709).
    Raises UserError for an unknown name.
    """
    decay_all = norm_decay and name != "lars"
    with_decay = [p for p in modules.parameters() if p.requires_grad and (decay_all or p.ndim > 1)]
    without = [p for p in modules.parameters() if p.requires_grad and not (decay_all or p.ndim > 1)]
    groups: list[dict[str, Any]] = [{"params": with_decay, "weight_decay": weight_decay}]  # the type is that of torch
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
