"""The frozen heads of the teacher, stored in a file beside the arrays of a store."""

from collections.abc import Mapping

import safetensors.torch
from torch import Tensor

from compress_ssl.pipeline.store.shards import ShardIndex

HEADS_FILE = "heads.safetensors"  # key of the file in a store


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a safetensors file with these tensors."""
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def head_files(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """{key: bytes} of the file of heads, for `FeatureStore.create`; {} if there is no head."""
    return {HEADS_FILE: to_bytes(tensors)} if tensors else {}


def load_heads(store: ShardIndex) -> dict[str, Tensor]:
    """The tensors of the teacher's heads; {} if the store has none. Raises UserError if the file is damaged."""
    if HEADS_FILE not in store.about.small:
        return {}
    return safetensors.torch.load(store.read_small_file(HEADS_FILE))
