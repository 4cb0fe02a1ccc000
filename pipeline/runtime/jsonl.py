"""JSON Lines: files with one JSON object per line."""

import json
from pathlib import Path

from compress_ssl.pipeline.runtime.records import JsonObject


def read_jsonl(path: Path) -> list[JsonObject]:
    """All valid rows of a file; an empty list if there is no such file."""
    return parse_jsonl(path.read_bytes()) if path.exists() else []


def parse_jsonl(raw: bytes | str) -> list[JsonObject]:
    """All valid rows. A line that is no JSON object, because a crash cut it short or it is damaged, is skipped.

    NaN and infinity are read: a logged number may be either.
    """
    text = raw.decode("utf-8", errors="replace") if isinstance(raw, bytes) else raw
    rows = []
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
