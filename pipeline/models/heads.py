"""Frozen heads of a teacher, built from their tensors alone: projection heads, classifiers, prototypes.

Self-supervised checkpoints hold a head as numbered layers of an nn.Sequential, for example

    MoCo    fc.0, fc.2
    SwAV    projection_head.0, projection_head.1, projection_head.3
    DINO    head.mlp.0, head.mlp.2, head.mlp.4, head.last_layer

Names and shapes of the tensors determine the layers. A number that is missing is an activation, since
activations have no tensors.
"""

import re
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.formatting import describe_exception

Tensors = Mapping[str, Tensor]
_LAYER = re.compile(r"^(?:(?P<head>.*?)\.)?(?:mlp\.)?(?P<number>[0-9]{1,9})\.(?P<kind>[a-z_]+)$")  # `fc.0.weight`
_SINGLE_LAYER = re.compile(r"^(?:(?P<head>.*)\.)?(?P<kind>weight|bias)$")  # `fc.weight`
_PARAMETRIZED = "parametrizations.weight"
_PROTOTYPES = ".last_layer."  # DINO's and EsViT's name for the layer of prototypes


# ---------------------------------------------------------------- tensors of a checkpoint


def group_by_head(tensors: Tensors) -> dict[str, dict[str, Tensor]]:
    """Group a table of tensors by head: {head: {"NUMBER.KIND" or "last_layer.KIND": tensor}}.

    {"fc.0.weight": ..., "fc.2.weight": ...} is one head "fc" of the tensors {"0.weight": ..., "2.weight": ...}.
    Prototypes (`last_layer`) belong to the head whose name they begin with. Groups without a matrix are
    left out: they are no heads.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        head_and_key = _split_name(name)
        if head_and_key:
            head, key = head_and_key
            groups.setdefault(head, {})[key] = tensor
    return {head: layers for head, layers in groups.items() if any(t.ndim == 2 for t in layers.values())}


def _split_name(name: str) -> tuple[str, str] | None:
    """`fc.2.weight` -> (`fc`, `2.weight`), `fc.weight` -> (`fc`, `0.weight`); None for other tensors."""
    if _PROTOTYPES in f".{name}":
        head, _, kind = f".{name}".rpartition(_PROTOTYPES)
        return head.strip("."), f"last_layer.{kind}"
    numbered = _LAYER.match(name)
    if numbered:
        return numbered["head"] or "", f"{numbered['number']}.{numbered['kind']}"
    single = _SINGLE_LAYER.match(name)
    if single:
        return single["head"] or "", f"0.{single['kind']}"
    return None


def prototypes(tensors: Tensors) -> Tensor | None:
    """Prototype vectors (C, P) of one head's tensors (see `group_by_head`); None if the head has none.

    Weight normalisation is resolved: g * v / |v|, stored as weight_g and weight_v by torch.nn.utils.weight_norm
    and as original0 and original1 by torch.nn.utils.parametrizations.weight_norm. Raises UserError if g does not fit v.
    """
    for g, v in (("weight_g", "weight_v"), (f"{_PARAMETRIZED}.original0", f"{_PARAMETRIZED}.original1")):
        length, direction = tensors.get(f"last_layer.{g}"), tensors.get(f"last_layer.{v}")
        if direction is None:
            continue
        if length is None or direction.ndim != 2 or length.numel() != len(direction):
            raise UserError(f"the head's prototypes last_layer.{v} lack a last_layer.{g} of one number for each")
        return F.normalize(direction, dim=1) * length.reshape(-1, 1)
    return tensors.get("last_layer.weight")


# ---------------------------------------------------------------- modules


class ProjectionHead(nn.Sequential):
    """A frozen head in evaluation mode: embedding (n, D) -> projection (n, P).

    The projection of a head with prototypes (DINO, arXiv 2104.14294) has unit length, because the prototypes
    are applied to unit vectors.
    """

    def __init__(self, tensors: Tensors):
        """tensors: one group of `group_by_head`. Activations are GELU in a head with prototypes, as in DINO, else ReLU.

        Raises UserError if a layer is neither linear nor a norm.
        """
        has_prototypes = any(name.startswith("last_layer.") for name in tensors)
        layers = _group_by_number(tensors)
        if not layers:
            raise UserError("the head has prototypes and no layer before them; name the whole head, as in head=head")
        modules: list[nn.Module] = []
        previous = min(layers)
        for number in sorted(layers):
            if number > previous + 1:
                modules.append(nn.GELU() if has_prototypes else nn.ReLU())
            modules.append(_build_layer(number, layers[number]))
            previous = number
        super().__init__(*modules)
        self.unit = has_prototypes
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "ProjectionHead":
        """Do nothing: the head stays in evaluation mode when a module that contains it is trained."""
        return super().train(False)

    def forward(self, embedding: Tensor) -> Tensor:
        """(n, D) -> (n, P)"""
        out = embedding
        for layer in self:
            out = layer(out)
        return F.normalize(out, dim=-1) if self.unit else out


def _group_by_number(tensors: Tensors) -> dict[int, dict[str, Tensor]]:
    """{number of a layer: {kind: tensor}}, without the prototypes."""
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, kind = name.partition(".")
        if number != "last_layer":
            layers.setdefault(int(number), {})[kind] = tensor
    return layers


def _build_layer(number: int, tensors: Tensors) -> nn.Module:
    """The layer that has these tensors: Linear, BatchNorm1d or LayerNorm. Raises UserError for others."""
    weight, running_mean = tensors.get("weight"), tensors.get("running_mean")
    layer: nn.Module
    if weight is not None and weight.ndim == 2:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in tensors)
    elif running_mean is not None and running_mean.ndim == 1:
        layer = nn.BatchNorm1d(len(running_mean), affine=weight is not None)
    elif weight is not None and weight.ndim == 1:
        layer = nn.LayerNorm(len(weight))
    else:
        shapes = ", ".join(f"{kind} {tuple(tensor.shape)}" for kind, tensor in tensors.items())
        raise UserError(f"layer {number} of the head is neither linear nor a norm ({shapes}); name another head=")
    try:
        layer.load_state_dict({**layer.state_dict(), **tensors})
    except RuntimeError as error:  # torch lists what does not fit: an unknown tensor, another shape
        raise UserError(f"layer {number} of the head: {describe_exception(error)}; name another head=") from None
    return layer


def frozen_classifier(layer: nn.Module) -> nn.Linear:
    """A frozen copy of a linear layer. Raises UserError if `layer` is not nn.Linear."""
    if not isinstance(layer, nn.Linear):
        raise UserError(f"the classifier is a {type(layer).__name__}, not one linear layer; keep embedding only")
    copy = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    copy.load_state_dict(layer.state_dict())
    return copy.eval().requires_grad_(False)
