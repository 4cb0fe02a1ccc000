"""Ctrl-C and SIGTERM as a request that a loop grants at its next safe point."""

import signal
import time
from types import FrameType
from typing import Any

from compress_ssl.pipeline.runtime.launch_env import is_launched

REPEAT_WINDOW = (
    2.0  # seconds: a cluster signals every process of a job, and torchrun then passes the signal on to its ranks
)


class Interrupted(BaseException):
    """The work was stopped by a signal; the text says what is kept and how to go on.

    No Exception: raised in the middle of anything, it must not pass for a broken image or a missing package.
    """

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


class StopRequest:
    """`with Interrupt() as stop:` then ask `stop.requested`; a second signal is not held back."""

    def __init__(self) -> None:
        self.signum, self._first = 0, 0.0
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signum != 0

    def __enter__(self) -> "StopRequest":
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum and not (is_launched() and time.monotonic() - self._first < REPEAT_WINDOW):
            raise KeyboardInterrupt
        if not self.signum:
            self.signum, self._first = signum, time.monotonic()

    def check(self, message: str) -> None:
        """Raises Interrupted with this message if a signal came."""
        if self.signum:
            raise Interrupted(self.signum, message)
