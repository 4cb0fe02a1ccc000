"""Load the state of a part of a checkpoint, with everything checked that torch itself does not check.

A module checks names and shapes. An optimizer and a scaler take what they are given, and fail in a later step.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

STATE_NAMES: Mapping[str, tuple[str, ...]] = {
    "SGD": ("momentum_buffer",),
    "Lars": ("momentum_buffer",),
    "Adam": ("step", "exp_avg", "exp_avg_sq"),
    "AdamW": ("step", "exp_avg", "exp_avg_sq"),
}
"""{class of an optimizer: what it keeps for each parameter, once it has taken a step}."""

Group = dict[str, Any]  # the type is that of torch: numbers, texts and tensors by name


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state of an optimizer that was made with the same settings.

    Raises ValueError, or what torch raises, for a state that is none of this optimizer.
    """
    own = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for number, (before, group) in enumerate(zip(own, optimizer.param_groups, strict=True)):
        for name in before.keys() - {"params", "lr"}:  # the rate is set anew in each step
            _require_equal(group, before, name, f"param_groups[{number}].{name}")
    known = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if set(optimizer.state) - set(known):
        raise ValueError("it has a state of parameters that the optimizer has not")
    for number, parameter in enumerate(known):
        kept = optimizer.state.get(parameter)
        if kept:  # a parameter that has had no gradient yet has no state
            _require_fit(kept, STATE_NAMES[type(optimizer).__name__], parameter, f"state[{number}]")


def _require_equal(group: Group, own: Group, name: str, where: str) -> None:
    if name not in group or type(group[name]) is not type(own[name]) or group[name] != own[name]:
        raise ValueError(f"{where} is {group.get(name)!r:.40}, but {own[name]!r:.40} for this run")


def _require_fit(kept: Group, names: tuple[str, ...], parameter: torch.Tensor, where: str) -> None:
    """Raises ValueError unless this is what an optimizer keeps for a parameter."""
    if set(kept) != set(names):
        raise ValueError(f"{where} holds {', '.join(map(str, kept))[:80]}, not {', '.join(names)}")
    for name, value in kept.items():
        if name == "step":
            good = isinstance(value, torch.Tensor) and value.ndim == 0 and 0 <= float(value) < math.inf
        else:
            good = isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.is_floating_point()
            good = good or (value is None and names == ("momentum_buffer",))  # SGD before a first gradient
        if not good:
            raise ValueError(f"{where}.{name} does not fit its parameter of shape {tuple(parameter.shape)}")


def load_scaler_state(scaler: torch.amp.GradScaler, state: dict[str, Any]) -> None:
    """Load the state of a scaler. Raises ValueError unless it holds numbers; that of one that is off is empty."""
    for name, value in state.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value!r:.40}, but must be a number")
    scaler.load_state_dict(state)
