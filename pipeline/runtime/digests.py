"""Canonical JSON and the digests of records and of bytes that are written to disk."""

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def canonical(record: object) -> bytes:
    """Canonical JSON: sorted keys and no spaces, so that equal records give equal bytes. NaN raises ValueError."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def fingerprint(record: object) -> str:
    """BLAKE2b-128 of a record's canonical JSON, as 32 hexadecimal digits."""
    return hashlib.blake2b(canonical(record), digest_size=16).hexdigest()


def digest(data: "ReadableBuffer") -> str:
    """BLAKE2b-128 of bytes or of a contiguous array's memory, as 32 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def sealed(record: Mapping[str, object]) -> dict[str, object]:
    """The record with `seal`, the fingerprint of its other entries.

    A record that was read is undamaged if `sealed(record) == record`.
    """
    rest = {key: value for key, value in record.items() if key != "seal"}
    return {**rest, "seal": fingerprint(rest)}
