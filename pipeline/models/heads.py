"""Frozen heads of a teacher, built from nothing but their tensors: projections, classifiers, prototypes.

Self-supervised checkpoints hold their heads as numbered layers of a sequence (MoCo's `fc.0`, `fc.2`;
SwAV's `projection_head.0`, `.1`, `.3`; DINO's `head.mlp.0`, ..., `head.last_layer`), so names and
shapes say what the layers are; a number that is left out is an activation.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from compress_ssl.pipeline.runtime.artifact import UserError

if TYPE_CHECKING:
    pass

Tensors = Mapping[str, Tensor]
_LAYER = re.compile(r"^(?:(?P<stem>.*?)\.)?(?:mlp\.)?(?P<number>\d+)\.(?P<kind>[a-z_]+)$")
_SINGLE = re.compile(r"^(?:(?P<stem>.*)\.)?(?P<kind>weight|bias)$")


def group_by_head(tensors: Tensors) -> dict[str, dict[str, Tensor]]:
    """The heads in a table of tensors, by the names they begin with, prototypes (`last_layer`) with their head.

    {"fc.0.weight": ..., "fc.2.weight": ...} is one head, "fc", of tensors {"0.weight", "2.weight"}.
    """
    out: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if ".last_layer." in f".{name}":
            stem, _, rest = f".{name}".rpartition(".last_layer.")
            out.setdefault(stem.strip("."), {})[f"last_layer.{rest}"] = tensor
        elif found := _LAYER.match(name):
            out.setdefault(found["stem"] or "", {})[f"{found['number']}.{found['kind']}"] = tensor
        elif found := _SINGLE.match(name):
            out.setdefault(found["stem"] or "", {})[f"0.{found['kind']}"] = tensor
    return {stem: layers for stem, layers in out.items() if any(t.ndim == 2 for t in layers.values())}


class ProjectionHead(nn.Sequential):
    """A head in evaluation mode: (n, D) -> (n, P). DINO's ends in unit vectors, as its prototypes expect them."""

    def __init__(self, tensors: Tensors):
        """tensors: one of `groups`. Activations are GELU in a head with prototypes, as DINO's, else ReLU.

        Raises UserError if the tensors are no sequence of linear and norm layers.
        """
        layers: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            place, _, kind = name.partition(".")
            if place != "last_layer":
                layers.setdefault(int(place), {})[kind] = tensor
        dino = any(name.startswith("last_layer.") for name in tensors)
        modules: list[nn.Module] = []
        before = min(layers)
        for number in sorted(layers):
            if number > before + 1:
                modules.append(nn.GELU() if dino else nn.ReLU())
            modules.append(_layer(number, layers[number]))
            before = number
        super().__init__(*modules)
        self.unit = dino
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "ProjectionHead":
        """It stays frozen, whatever it is part of."""
        return super().train(False)

    def forward(self, embedding: Tensor) -> Tensor:
        out = super().forward(embedding)
        return F.normalize(out, dim=-1) if self.unit else out


def prototypes(tensors: Tensors) -> Tensor | None:
    """(C, P) prototype vectors of a DINO head, weight normalisation resolved; None if it has none."""
    if (direction := tensors.get("last_layer.weight_v")) is not None:
        return F.normalize(direction, dim=1) * tensors["last_layer.weight_g"].reshape(-1, 1)
    if (direction := tensors.get("last_layer.parametrizations.weight.original1")) is not None:
        return F.normalize(direction, dim=1) * tensors["last_layer.parametrizations.weight.original0"].reshape(-1, 1)
    return tensors.get("last_layer.weight")


def _layer(number: int, tensors: Tensors) -> nn.Module:
    weight = tensors.get("weight")
    made: nn.Module
    if weight is not None and weight.ndim == 2:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in tensors)
    elif (mean := tensors.get("running_mean")) is not None:
        made = nn.BatchNorm1d(len(mean), affine=weight is not None)
    elif weight is not None and weight.ndim == 1:
        made = nn.LayerNorm(len(weight))
    else:
        shapes = ", ".join(f"{kind} {tuple(tensor.shape)}" for kind, tensor in tensors.items())
        raise UserError(f"layer {number} of the head is neither linear nor a norm ({shapes}); name another head=")
    made.load_state_dict({**made.state_dict(), **tensors})
    return made


def frozen_classifier(layer: nn.Module) -> nn.Linear:
    """A frozen copy of a linear layer. Raises UserError for anything else."""
    if not isinstance(layer, nn.Linear):
        raise UserError(f"the classifier is a {type(layer).__name__}, not one linear layer; keep embedding only")
    copy = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    copy.load_state_dict(layer.state_dict())
    return copy.eval().requires_grad_(False)  # type: ignore[return-value]
