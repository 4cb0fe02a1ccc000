"""The frozen heads of the teacher, kept beside the arrays of a store."""

from collections.abc import Mapping

import safetensors.torch
from torch import Tensor

from compress_ssl.pipeline.store.shards import ShardIndex

HEADS_FILE = "heads.safetensors"  # beside the arrays of a store


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as a safetensors file."""
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def head_files(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """{key: bytes} to lie beside the arrays of a store; nothing where there is no head."""
    return {HEADS_FILE: to_bytes(tensors)} if tensors else {}


def load_heads(store: "ShardIndex") -> dict[str, Tensor]:
    """The teacher's frozen heads that a store keeps; {} if it keeps none. Raises UserError if they are damaged."""
    return safetensors.torch.load(store.small(HEADS_FILE)) if HEADS_FILE in store.about["small"] else {}
