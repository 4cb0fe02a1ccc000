"""What a run writes about itself: metrics.jsonl, train.log and TensorBoard events.

metrics.jsonl has one JSON object per logged step; a resumed run cuts it back to its step first.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.storage import Folder


class Journal:
    """`with Journal(folder, step) as log: log.write({"step": 10, "loss": ...})`."""

    def __init__(self, folder: Path, step: int):
        self.folder, self.step = folder, step

    def __enter__(self) -> "Journal":
        from torch.utils.tensorboard import SummaryWriter

        kept = [row for row in read(self.folder / "metrics.jsonl") if row["step"] <= self.step]
        Folder(self.folder).put("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._rows = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")
        self._text = open(self.folder / "train.log", "a", encoding="utf-8")
        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step + 1 if self.step else None)
        self.note(f"from step {self.step}")
        return self

    def write(self, row: Mapping[str, Any]) -> None:
        """A row of numbers; it has a `step`."""
        self._rows.write(json.dumps(row) + "\n")
        self._rows.flush()
        for name in row.keys() - {"step"}:
            self._board.add_scalar(name, row[name], row["step"])
        self.note("  ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))

    def note(self, text: str) -> None:
        """A line of train.log."""
        self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self._text.flush()

    def __exit__(self, *_: object) -> None:
        self._rows.close()
        self._text.close()
        self._board.close()


def read(path: Path) -> list[dict[str, Any]]:
    """All whole rows; a line cut short by a crash is passed over."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
