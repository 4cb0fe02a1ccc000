"""The logs of a run: metrics.jsonl, train.log and TensorBoard events.

metrics.jsonl has one JSON object per logged step. A resumed run first removes the rows after the step from which
it continues. train.log has the same rows as text, with the time; it is only appended to.
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
    """The three logs of one run: `with MetricsLog(folder, step) as log: log.write({"step": 10, "loss": ...})`."""

    def __init__(self, folder: Path, step: int):
        """step: the step from which the run continues; 0 for a new run."""
        self.folder, self.step = folder, step

    def __enter__(self) -> "MetricsLog":
        kept = [row for row in read_jsonl(self.folder / "metrics.jsonl") if row["step"] <= self.step]
        Folder(self.folder).put("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._rows = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")
        self._text = open(self.folder / "train.log", "a", encoding="utf-8")
        self._events = EventFile(self.folder / "tensorboard", self.step + 1 if self.step else None)
        self.note(f"from step {self.step}")
        return self

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row of numbers, one of which is "step", to all three logs."""
        self._rows.write(json.dumps(row) + "\n")
        self._rows.flush()
        self._events.write(row)
        fields = [
            f"{name} {value:.5g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
        ]
        self.note("  ".join(fields))

    def note(self, text: str) -> None:
        """Append a line to train.log."""
        self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self._text.flush()

    def __exit__(self, *_: object) -> None:
        self._rows.close()
        self._text.close()
        self._events.close()


class EventFile:
    """A TensorBoard event file, written in the calling thread.

    torch's SummaryWriter writes in a thread of its own: on a full disk that thread fails with a traceback while
    the training continues. Here the error reaches the caller.
    """

    def __init__(self, folder: Path, purge: int | None):
        """purge: TensorBoard ignores what earlier event files hold from this step on; None for a new run."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():017.6f}.{platform.node()}.{os.getpid()}"
        self._records = RecordWriter(open(folder / name, "xb"))  # noqa: SIM115 (closed by close)
        self._write_event(file_version="brain.Event:2")  # TensorBoard requires this first record
        if purge is not None:
            self._write_event(step=purge, session_log=SessionLog(status=SessionLog.START))

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row of numbers as scalars. Its "step" is the place of all others on the axis."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=row[name]) for name in row if name != "step"]
        self._write_event(step=row["step"], summary=Summary(value=values))
        self._records.flush()

    def close(self) -> None:
        self._records.close()

    def _write_event(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())
