"""The logs of a run: metrics.jsonl, train.log and TensorBoard events.

metrics.jsonl has one JSON object per logged step. A resumed run first removes the rows after the step from which
it continues. train.log has the same rows as text, with the time; it is only appended to.
"""

import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress_ssl.pipeline.runtime.jsonl import parse_jsonl
from compress_ssl.pipeline.runtime.records import JsonObject, Number
from compress_ssl.pipeline.runtime.storage import Folder, Storage

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class MetricsRow:
    """What was logged after a step."""

    step: int  # steps taken
    values: Mapping[str, Number]  # epoch, loss, lr, val_nn, ... by name

    @property
    def loss(self) -> Number | None:
        """The loss of the step; None in the row of a validation."""
        return self.values.get("loss")

    def to_json(self) -> dict[str, Number]:
        """The row as it stands in the file."""
        return {"step": self.step, **self.values}


def read_metrics(storage: Storage) -> list[MetricsRow]:
    """The rows of a run's metrics.jsonl in order; empty if there is none.

    A line that is no row, because a crash cut it short or somebody changed it, is skipped: one bad line must neither
    stop a run nor hide its other rows.
    """
    lines = parse_jsonl(storage.get(METRICS)) if storage.exists(METRICS) else []
    return [row for line in lines if (row := _parse_row(line))]


def _parse_row(line: JsonObject) -> MetricsRow | None:
    """The row, None unless "step" is a whole number from 0 to 2**63 - 1 and every other entry a number."""
    step, values = line.get("step"), {name: value for name, value in line.items() if name != "step"}
    if not _is_number(step) or not isinstance(step, int) or not 0 <= step < 2**63:
        return None
    return MetricsRow(step, values) if all(_is_number(value) for value in values.values()) else None


def _is_number(value: object) -> bool:
    """Whether a value is a number that fits into a float; NaN and infinity count, true and false do not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < 2**1023


class MetricsLog:
    """The three logs of one run: `with MetricsLog(folder, step) as log: log.write(MetricsRow(10, {"loss": ...}))`."""

    def __init__(self, folder: Path, step: int):
        """step: the step from which the run continues; 0 for a new run."""
        self.folder, self.step = folder, step

    def __enter__(self) -> "MetricsLog":
        storage = Folder(self.folder)
        kept = [row.to_json() for row in read_metrics(storage) if row.step <= self.step]
        storage.put(METRICS, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._rows = open(self.folder / METRICS, "a", encoding="utf-8")
        self._text = open(self.folder / "train.log", "a", encoding="utf-8")
        self._events = EventFile(self.folder / "tensorboard", self.step + 1 if self.step else None)
        self.note(f"from step {self.step}")
        return self

    def write(self, row: MetricsRow) -> None:
        """Append a row to all three logs."""
        self._rows.write(json.dumps(row.to_json()) + "\n")
        self._rows.flush()
        self._events.write(row)
        fields = [
            f"{name} {value:.5g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in row.to_json().items()
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
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():017.6f}.{platform.node()}.{os.getpid()}"
        self._records = RecordWriter(open(folder / name, "xb"))  # noqa: SIM115 (closed by close)
        self._append(Event(file_version="brain.Event:2"))  # TensorBoard requires this first record
        if purge is not None:
            self._append(Event(step=purge, session_log=SessionLog(status=SessionLog.START)))

    def write(self, row: MetricsRow) -> None:
        """Append the values of a row as scalars. Its step is their place on the axis."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.values.items()]
        self._append(Event(step=row.step, summary=Summary(value=values)))
        self._records.flush()

    def close(self) -> None:
        self._records.close()

    def _append(self, event: "Event") -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
