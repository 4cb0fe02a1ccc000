"""JSON Lines: files with one JSON object per line."""

import json
from pathlib import Path
from typing import Any


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All valid rows of a file; an empty list if there is no such file."""
    return parse_jsonl(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else []


def parse_jsonl(text: str) -> list[dict[str, Any]]:
    """All valid rows. A line that is no valid JSON, because a crash cut it short or it is damaged, is skipped."""
    rows = []
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
