"""Progress on stderr with rate and time left: a bar on a terminal, elsewhere a line every LINE_INTERVAL seconds."""

import io
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from compress_ssl.pipeline.runtime.formatting import format_duration
from compress_ssl.pipeline.runtime.launch_env import is_main_process

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINE_INTERVAL = 15.0  # seconds between two lines if the stream is no terminal


class ProgressBar:
    """The progress of a loop that counts `unit`s (images, steps) to a total; the loop calls `advance(n, note)`.

    start: the count that earlier runs of the command reached; it does not enter the rate.
    """

    def __init__(self, what: str, total: int, unit: str, start: int = 0, stream: TextIO | None = None):
        self.what, self.total, self.unit, self.start, self.now = what, total, unit, start, start
        self.stream = stream or _stderr()
        self.began = self.last_line = time.monotonic()
        self._drawn: tuple[Progress, TaskID] | None = None  # the bar on a terminal, and its only task

    def advance(self, n: int, note: str = "") -> None:
        """Count n more units and show a note, for example the loss."""
        self.now += n
        if self._drawn is not None:
            bar, task = self._drawn
            bar.update(task, completed=self.now, note=note, rate=self.rate)
        elif time.monotonic() - self.last_line >= LINE_INTERVAL:
            self.last_line = time.monotonic()
            left = (self.total - self.now) / self.rate if self.rate else 0.0
            print(
                f"{self.what}: {self.now}/{self.total} {self.unit}, {self.rate:.0f} {self.unit}/s, "
                f"{format_duration(left)} left{'  ' + note if note else ''}",
                file=self.stream,
                flush=True,
            )

    @property
    def rate(self) -> float:
        """Units per second since this object was made."""
        return (self.now - self.start) / max(1e-9, time.monotonic() - self.began)

    def _make_bar(self) -> "Progress":
        """The bar; rich is imported only where one is drawn."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        rate = TextColumn("{task.fields[rate]:.0f} " + self.unit + "/s")
        return Progress(
            *columns, rate, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=Console(file=self.stream)
        )


@contextmanager
def progress_bar(what: str, total: int, unit: str, start: int = 0) -> Iterator[ProgressBar]:
    """A ProgressBar for the block; it is drawn as a bar if stderr is a terminal. Only rank 0 shows anything."""
    out = ProgressBar(what, total, unit, start, None if is_main_process() else io.StringIO())
    if not out.stream.isatty():
        yield out
        return
    with out._make_bar() as bar:
        out._drawn = bar, bar.add_task(what, total=total, completed=start, note="", rate=0.0)
        yield out


def echo(text: str) -> None:
    """Print one line for people to stderr; of several ranks only rank 0 prints."""
    if is_main_process():
        print(text, file=_stderr(), flush=True)


def _stderr() -> TextIO:
    """stderr, or a stream that nobody reads if it is closed (`2>&-`): print() would then write to stdout."""
    return sys.stderr or io.StringIO()
