"""JSON Lines: files with one JSON object per line."""

import json
from pathlib import Path

from compress_ssl.pipeline.runtime.records import JsonObject


def read_jsonl(path: Path) -> list[JsonObject]:
    """All valid rows of a file; an empty list if there is no such file."""
    return parse_jsonl(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else []


def parse_jsonl(text: str) -> list[JsonObject]:
    """All valid rows. A line that is no JSON object, because a crash cut it short or it is damaged, is skipped."""
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
