"""Files of one JSON object per line."""

import json
from pathlib import Path
from typing import Any


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a file; none if there is no such file."""
    return parse_jsonl(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else []


def parse_jsonl(text: str) -> list[dict[str, Any]]:
    """All whole rows; a line that a crash cut short or a disk damaged is passed over."""
    rows = []
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
