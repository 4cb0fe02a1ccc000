"""Records are read from JSON with every type and range checked, and are written back as they were."""

import json
from dataclasses import dataclass
from typing import Literal

import pytest

from compress_ssl.pipeline.runtime.records import (
    UNSET,
    Count,
    Digest,
    InvalidRecord,
    Number,
    Positive,
    UnsetType,
    parse_json,
    read_record,
    to_json,
)


@dataclass(frozen=True)
class Part:
    size: Positive


@dataclass(frozen=True)
class Example:
    images: Positive
    seed: Count
    shapes: dict[str, tuple[Positive, ...]]
    digest: Digest
    kind: Literal["a", "b"]
    rate: Number
    limit: int | None
    part: Part | UnsetType = UNSET


GOOD = {
    "images": 3, "seed": 2**64 - 1, "shapes": {"x": [1, 2]}, "digest": "0" * 32, "kind": "a", "rate": 1, "limit": None,
}  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"part": {"size": 1}}, {"rate": 0.1}])
def test_a_record_is_written_as_it_was_read(more):
    there = {**GOOD, **more}
    written = to_json(read_record(Example, there, "X"))
    assert json.dumps(written, sort_keys=True) == json.dumps(there, sort_keys=True)  # 1 stays 1, not 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": "x"}, "images: expected int, got str"),
        ({"images": True}, "images: expected int, got bool"),
        ({"images": 3.0}, "images: expected int, got float"),
        ({"images": 0}, "images: expected int >= 1"),
        ({"seed": -1}, "seed: expected int >= 0"),
        ({"shapes": {"x": [1, "2"]}}, "expected int, got str"),
        ({"shapes": [1]}, "shapes: expected object, got array"),
        ({"digest": "zz"}, "digest: expected str matching"),
        ({"kind": "c"}, "kind: invalid enum value 'c'"),
        ({"part": {"size": 1, "colour": 2}}, "has the entry part.colour, which this version of compress does not know"),
        ({"newer": 1}, "has the entry newer, which this version of compress does not know"),
        ({"rate": float("nan")}, "rate"),
    ],
)
def test_an_entry_of_another_type_or_name_is_named(change, words):
    with pytest.raises(InvalidRecord) as error:
        read_record(Example, {**GOOD, **change}, "S/manifest.json")
    assert str(error.value).startswith("S/manifest.json ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", [[], None, "text", 3, {}])
def test_what_is_no_record_at_all_is_refused(data):
    with pytest.raises(InvalidRecord, match="S/manifest.json is not valid"):
        read_record(Example, data, "S/manifest.json")


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[" * 500_000, b'{"a":' * 500_000, b"NaN", b"-Infinity"])
def test_bytes_that_are_no_json_are_refused(raw):
    with pytest.raises(InvalidRecord, match="S/x.json is damaged: it is not valid JSON"):
        parse_json(raw, "S/x.json")
