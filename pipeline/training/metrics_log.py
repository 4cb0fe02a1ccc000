"""What a run writes about itself: metrics.jsonl, train.log and TensorBoard events.

metrics.jsonl has one JSON object per logged step; a resumed run cuts it back to its step first.
"""

import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress_ssl.pipeline.runtime.jsonl import read_jsonl
from compress_ssl.pipeline.runtime.storage import Folder


class MetricsLog:
    """`with Journal(folder, step) as log: log.write({"step": 10, "loss": ...})`."""

    def __init__(self, folder: Path, step: int):
        self.folder, self.step = folder, step

    def __enter__(self) -> "MetricsLog":
        kept = [row for row in read_jsonl(self.folder / "metrics.jsonl") if row["step"] <= self.step]
        Folder(self.folder).put("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._rows = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")
        self._text = open(self.folder / "train.log", "a", encoding="utf-8")
        self._board = EventFile(self.folder / "tensorboard", self.step + 1 if self.step else None)
        self.note(f"from step {self.step}")
        return self

    def write(self, row: Mapping[str, Any]) -> None:
        """A row of numbers; it has a `step`."""
        self._rows.write(json.dumps(row) + "\n")
        self._rows.flush()
        self._board.write(row)
        self.note("  ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))

    def note(self, text: str) -> None:
        """A line of train.log."""
        self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self._text.flush()

    def __exit__(self, *_: object) -> None:
        self._rows.close()
        self._text.close()
        self._board.close()


class EventFile:
    """An event file of TensorBoard, written where it is asked for.

    torch's SummaryWriter writes from a thread, where a full disk ends as a traceback and the training goes on.
    """

    def __init__(self, folder: Path, purge: int | None):
        """`purge`: what an earlier event file has from this step on does not count."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():017.6f}.{platform.node()}.{os.getpid()}"
        self._records = RecordWriter(open(folder / name, "xb"))  # noqa: SIM115
        self._event(file_version="brain.Event:2")
        if purge is not None:
            self._event(step=purge, session_log=SessionLog(status=SessionLog.START))

    def write(self, row: Mapping[str, Any]) -> None:
        """A row of numbers; it has a `step`."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=row[name]) for name in row if name != "step"]
        self._event(step=row["step"], summary=Summary(value=values))
        self._records.flush()

    def close(self) -> None:
        self._records.close()

    def _event(self, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), **what).SerializeToString())
