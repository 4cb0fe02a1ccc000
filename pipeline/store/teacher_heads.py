"""The frozen heads of the teacher, kept beside the arrays of a store."""

from collections.abc import Mapping

import safetensors.torch
from torch import Tensor

from compress_ssl.pipeline.store.shards import Shelf

HEADS = "heads.safetensors"  # beside the arrays of a store


def spell(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as a safetensors file."""
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def files(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """{key: bytes} to lie beside the arrays of a store; nothing where there is no head."""
    return {HEADS: spell(tensors)} if tensors else {}


def beside(store: "Shelf") -> dict[str, Tensor]:
    """The teacher's frozen heads that a store keeps; {} if it keeps none. Raises UserError if they are damaged."""
    return safetensors.torch.load(store.small(HEADS)) if HEADS in store.about["small"] else {}
