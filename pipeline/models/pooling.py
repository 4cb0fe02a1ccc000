"""Pooling of a backbone's output to one vector per image."""

from typing import Literal

from torch import Tensor

from compress_ssl.pipeline.runtime.errors import UserError

Pool = Literal["auto", "avg", "cls", "max", "none"]
"""Values of the option pool=. `auto`: mean of a map, vectors unchanged. `cls`: first token. `none`: flatten."""

_ADVICE = {2: "leave pool= out", 3: "say pool=cls or pool=avg"}  # by number of dimensions of the output


def pool_output(out: Tensor, pool: Pool) -> Tensor:
    """Pool a map (B, C, H, W), tokens (B, T, C) or a vector (B, d) to (B, d).

    Raises UserError if the output has another shape, or is tokens and pool is `auto`: neither the class token nor
    the mean is the right choice for every model.
    """
    if pool == "none" or (out.dim() == 2 and pool == "auto"):
        return out.flatten(1)
    if out.dim() == 4 and pool != "cls":
        return out.amax((2, 3)) if pool == "max" else out.mean((2, 3))
    if out.dim() == 3 and pool == "cls":
        return out[:, 0]
    if out.dim() == 3 and pool != "auto":
        return out.amax(1) if pool == "max" else out.mean(1)
    advice = _ADVICE.get(out.dim(), "say pool=avg or pool=none")
    raise UserError(f"the model's output has shape {tuple(out.shape)}, which pool={pool} does not fit; {advice}")
