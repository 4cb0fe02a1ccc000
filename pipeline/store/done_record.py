"""Done records: which rows and views of a store are written, and the digests of their content."""

from dataclasses import dataclass

from compress_ssl.pipeline.runtime import digests
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.records import Count, Digest, InvalidRecord, parse_json, read_record, to_json
from compress_ssl.pipeline.store.records import ArrayName, Row


@dataclass(frozen=True)
class DoneRecord:
    """The record of a shard: the digests of its content. A file of this kind also has the seal of `digests.sealed`."""

    rows: tuple[Count, Count]  # (first, one past the last)
    views: tuple[Count, Count]
    bad: dict[Row, str]  # {row: why the image could not be used}
    status: Digest
    content: Digest
    digest: dict[ArrayName, tuple[Digest, ...]]  # of each view, by array

    def to_bytes(self) -> bytes:
        """The bytes of the file."""
        return digests.canonical(digests.sealed(to_json(self))) + b"\n"


def read_done_record(raw: bytes, where: str) -> DoneRecord:
    """The done record in a file. Raises UserError if it does not fit its own digest or is not valid."""
    remedy = "compress verify --repair marks its shard to be made again"
    try:
        entries = parse_json(raw, where)
    except InvalidRecord:
        entries = None
    if not isinstance(entries, dict) or digests.canonical(digests.sealed(entries)) + b"\n" != raw:
        raise UserError(f"{where} is damaged: it does not fit its own digest; {remedy}")
    del entries["seal"]
    return read_record(DoneRecord, entries, where, remedy=remedy)
