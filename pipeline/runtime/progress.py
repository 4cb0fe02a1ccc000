"""A progress line with rate and time left: a bar on a terminal, a line now and then elsewhere."""

import io
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from compress_ssl.pipeline.runtime.formatting import format_duration
from compress_ssl.pipeline.runtime.launch_env import is_main_process

LINE_INTERVAL = 15.0  # seconds between lines where there is no terminal


class ProgressBar:
    """Counts `unit`s towards a total. `advance(n, note)` is all a loop calls."""

    def __init__(self, what: str, total: int, unit: str, start: int = 0, stream: TextIO | None = None):
        self.what, self.total, self.unit, self.start, self.now = what, total, unit, start, start
        self.stream = stream or sys.stderr
        self.began = self.said = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def advance(self, n: int, note: str = "") -> None:
        self.now += n
        if self._bar is not None:
            self._bar.update(self._task, completed=self.now, note=note, rate=self.rate)
        elif time.monotonic() - self.said >= LINE_INTERVAL:
            self.said = time.monotonic()
            left = (self.total - self.now) / self.rate if self.rate else 0.0
            print(
                f"{self.what}: {self.now}/{self.total} {self.unit}, {self.rate:.0f} {self.unit}/s, "
                f"{format_duration(left)} left{'  ' + note if note else ''}",
                file=self.stream,
                flush=True,
            )

    @property
    def rate(self) -> float:
        """Units per second since the meter began."""
        return (self.now - self.start) / max(1e-9, time.monotonic() - self.began)

    def _draw(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        rate = TextColumn("{task.fields[rate]:.0f} " + self.unit + "/s")
        return Progress(
            *columns, rate, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=Console(file=self.stream)
        )


@contextmanager
def progress_bar(what: str, total: int, unit: str, start: int = 0) -> Iterator[ProgressBar]:
    """A Meter that draws a bar while the block runs if stderr is a terminal; of several ranks the first shows one."""
    out = ProgressBar(what, total, unit, start, None if is_main_process() else io.StringIO())
    if not out.stream.isatty():
        yield out
        return
    with out._draw() as bar:
        out._bar = bar
        out._task = bar.add_task(what, total=total, completed=start, note="", rate=0.0)
        yield out


def echo(text: str) -> None:
    """One line for people, on stderr; of several ranks the first says it."""
    if is_main_process():
        print(text, file=sys.stderr, flush=True)
