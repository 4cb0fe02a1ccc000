"""Images of a store that a user lists in a text file, one id or file name in a line."""

from collections import Counter
from pathlib import Path

import numpy as np

from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.formatting import shorten
from compress_ssl.pipeline.store.reader import StoreReader


def listed_rows(store: StoreReader, file: str, flag: str) -> np.ndarray:
    """(n,) int64 rows, ascending, of the images that a file lists. An id takes precedence over an equal file name.

    flag: the option that gave the file, with what else it takes. Raises UserError for a file that cannot be read, for
    a name that the store lacks and for a file name that several images share.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")  # some editors begin with a mark
    except (OSError, ValueError) as problem:  # ValueError: bytes that are no UTF-8, or a path that cannot be one
        why = "it is no text in UTF-8" if isinstance(problem, UnicodeDecodeError) else problem
        raise UserError(f"{flag} nor a readable text file ({why}); give one of them") from None
    listed = [line.strip() for line in lines if line.strip()]
    ids = [str(name) for name in store.table("sample_id")]
    file_names = [name.rpartition("/")[2] for name in ids]
    shared = {name for name, count in Counter(file_names).items() if count > 1}
    row = {name.strip(): i for names in (file_names, ids) for i, name in enumerate(names)}
    ambiguous = [name for name in listed if name in shared and name not in ids]
    if ambiguous:
        raise UserError(f"{file} names {ambiguous[0]}, and several images have this file name; give ids, as {ids[0]}")
    missing = [name for name in listed if name not in row]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(listed)} ids in {file} are not in {store.storage}, the first is "
            f"{shorten(missing[0], 200)}; they look like {ids[0]}"
        )
    return np.array(sorted({row[name] for name in listed}), np.int64)
