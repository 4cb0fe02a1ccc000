"""Regions: the cells of a convolutional network's last map before pooling, found with forward hooks.

For networks whose library offers no way to ask for them. Vision transformers do: see `Network.regions`.
"""

from collections.abc import Callable
from typing import TypeGuard

from torch import Tensor, nn

OUTPUT_IS_THE_MAP = ""
"""The name that stands for the network's own output, in place of a submodule's."""


def is_map(out: object) -> TypeGuard[Tensor]:
    """Whether an output is a map (B, c, h, w) of more than one cell."""
    return isinstance(out, Tensor) and out.dim() == 4 and out.shape[2] * out.shape[3] > 1


def map_to_regions(last_map: Tensor) -> Tensor:
    """(B, c, h, w) -> (B, R, c) with R = h * w, row by row."""
    return last_map.flatten(2).transpose(1, 2)


def find_last_map(backbone: nn.Module, forward: Callable[[], Tensor]) -> str | None:
    """Name of the submodule that last returns a map during one `forward()`.

    OUTPUT_IS_THE_MAP if the network returns a map itself; None if there is no map.
    """
    found: list[str] = []

    def hook_for(name: str) -> Callable[..., None]:
        def record_name(_module: nn.Module, _inputs: object, out: object) -> None:
            if is_map(out):
                found.append(name)

        return record_name

    submodules = [(name, module) for name, module in backbone.named_modules() if name]
    try:
        hooks = [module.register_forward_hook(hook_for(name)) for name, module in submodules]
    except RuntimeError:
        hooks = []  # ScriptModules do not accept forward hooks
    try:
        out = forward()
    finally:
        for hook in hooks:
            hook.remove()
    if is_map(out):
        return OUTPUT_IS_THE_MAP
    return found[-1] if found else None


def forward_with_regions(backbone: nn.Module, name: str, forward: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """One `forward()` of a network whose last map is called `name` -> (output before pooling, regions (B, R, c))."""
    if name == OUTPUT_IS_THE_MAP:
        out = forward()
        return out, map_to_regions(out)
    maps: list[Tensor] = []
    hook = backbone.get_submodule(name).register_forward_hook(lambda _module, _inputs, out: maps.append(out))
    try:
        out = forward()
    finally:
        hook.remove()
    return out, map_to_regions(maps[-1])  # the last one: a module may be called more than once in a forward
