"""Loading the weights of a checkpoint file into a module, and writing safetensors files.

Reading never runs code from a file. Loading loads all selected tensors or changes nothing: whatever is missing, left
over or of another shape is found before the module is touched, and the error suggests key=, prefix= and drop= that fit.
"""

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from compress_ssl.pipeline.models.selection import CheckpointFormat, Selection, State, compare, describe_misfit, matches
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.spec import did_you_mean

MAX_LEVELS = 32  # of dictionaries inside each other in a checkpoint
MAX_DICTIONARIES = 100_000  # in a checkpoint, those that are in it several times counted as often

ALIGNMENT = 8
"""Bytes. The header of a safetensors file is padded with spaces, so that tensors begin at multiples of this."""

# ---------------------------------------------------------------- loading


def load(
    module: nn.Module,
    file: Path,
    *,
    name: str,
    selection: Selection | None = None,
    checkpoint_format: CheckpointFormat | None = None,
) -> State:
    """Load a file into a module, completely or not at all. Returns the tensors that `selection.head` matches.

    name: of the network, for error texts. Raises UserError for a file that cannot be read, for several sets of
    weights that fit, and for a selection that does not fit, with selections that do.
    """
    selection = selection or Selection()
    checkpoint_format = checkpoint_format or CheckpointFormat()
    wanted = module.state_dict()
    tables = _find_tables(read(file), file)
    if selection.key and selection.key not in tables:
        hint = did_you_mean(selection.key, tables)
        raise UserError(f"{file} holds no tensors under key={selection.key}{hint or '.'} It holds: {_keys(tables)}")
    tried = [selection.key] if selection.key else list(tables)
    fits = {key: compare(tables[key], wanted, selection, checkpoint_format) for key in tried}
    fitting = [key for key, fit in fits.items() if fit]
    if len(fitting) > 1:
        raise UserError(f"{file} holds {len(fitting)} sets of weights that fit {name}; choose one: {_keys(fitting)}")
    if not fitting:
        raise UserError(describe_misfit(file, name, fits, tables, wanted, selection, checkpoint_format))
    fit = fits[fitting[0]]
    head = fit.head | _head_of_other_tables(tables, fitting[0], selection)
    if selection.head and not head:
        raise UserError(f"{file}: nothing matches head={'+'.join(selection.head)}; leave it out or correct it")
    # not strict: what is missing or left over was compared above, and is only what the selection allows
    module.load_state_dict(fit.state, strict=False)
    return head


def _head_of_other_tables(tables: Mapping[str, State], loaded: str, selection: Selection) -> State:
    """Tensors that head= matches by their full dotted name, in tables other than the loaded one.

    EsViT's checkpoints, for example, keep the centres of the teacher's outputs with the loss.
    """
    head: State = {}
    for key, table in tables.items():
        if key == loaded:
            continue
        for name, tensor in table.items():
            full_name = f"{key}.{name}"
            if matches(full_name.lstrip("."), selection.head):
                head[full_name] = tensor
    return head


def _find_tables(content: Mapping[str, object], file: Path) -> dict[str, State]:
    """{dotted path: table} for every dictionary in a checkpoint that holds tensors by name, in the file's order.

    Raises UserError if dictionaries are nested beyond MAX_LEVELS, as in a pickle that contains itself.
    """
    found: dict[str, State] = {}
    to_search: list[tuple[str, int, Mapping[str, object]]] = [("", 1, content)]  # path, level, dictionary
    searched = 0
    while to_search:
        path, level, node = to_search.pop()
        searched += 1
        if level > MAX_LEVELS or searched > MAX_DICTIONARIES:
            raise UserError(
                f"weights={file} holds dictionaries more than {MAX_LEVELS} levels deep, or more than "
                f"{MAX_DICTIONARIES} of them, and is no checkpoint; save a state dict"
            )
        named = {key: value for key, value in node.items() if isinstance(key, str)}  # optimizers' keys are numbers
        table = {key: value.detach() for key, value in named.items() if isinstance(value, Tensor)}
        if table:
            found[path] = table
        inside = [(key, value) for key, value in named.items() if isinstance(value, Mapping)]
        to_search += [(f"{path}.{key}" if path else key, level + 1, value) for key, value in reversed(inside)]
    return found


def _keys(tables: Iterable[str]) -> str:
    """`key=student, key=teacher`, for error texts."""
    return ", ".join(f"key={key}" if key else "(the outermost dictionary)" for key in tables) or "no tensors at all"


# ---------------------------------------------------------------- reading


def read(file: Path) -> Mapping[str, object]:
    """Read the (nested) dictionary in a file, with torch.load(weights_only=True) or safetensors.

    Raises UserError if the file is missing or damaged, if it would run code, or if it holds no dictionary.
    """
    start = _read_start(file)
    try:
        if start[8:9] == b"{":  # safetensors: eight bytes of length, then JSON
            return safetensors.torch.load_file(file)
        # DINO's checkpoints hold their command-line flags in a Namespace, which runs no code
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the errors below name what is wrong with a file
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for damaged files
        raise UserError(_describe_unreadable(file, error)) from error
    if not isinstance(content, Mapping):
        raise UserError(f"weights={file} holds a {type(content).__name__}, not tensors by name; save a state dict")
    return content


def _read_start(file: Path) -> bytes:
    """The first nine bytes of a file. Raises UserError if it cannot be opened."""
    try:
        with open(file, "rb") as stream:
            return stream.read(9)
    except FileNotFoundError:
        raise UserError(f"weights={file} does not exist; check the path") from None
    except OSError as error:
        raise UserError(f"weights={file} cannot be read: {error.strerror or error}; check the path") from None


def _describe_unreadable(file: Path, error: Exception) -> str:
    if "TorchScript" in str(error):
        return f"weights={file} is a TorchScript program; name it as the model: torchscript:{file}"
    if isinstance(error, pickle.UnpicklingError):
        code = re.search(r"GLOBAL (\S+)", str(error))
        what = f"would run code when it is loaded ({code[1]})" if code else "is damaged, or a pickle that runs code"
        return (
            f"weights={file} {what}; compress reads only tensors. "
            "If you trust it, save its state dict anew: torch.save(model.state_dict(), FILE)"
        )
    return f"weights={file} is damaged or no checkpoint ({type(error).__name__}); fetch it anew"


# ---------------------------------------------------------------- writing


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a safetensors file, the same bytes for the same arguments.

    The safetensors library writes the entries of the metadata in a different order each time, so the header is
    written here.
    """
    data = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    end = 8 + int.from_bytes(data[:8], "little")  # the first eight bytes are the length of the header
    header = json.dumps({"__metadata__": dict(metadata), **json.loads(data[8:end])}).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    return len(header).to_bytes(8, "little") + header + data[end:]
