"""SIGINT (Ctrl-C) and SIGTERM as a request to stop, which a loop fulfils at its next safe point."""

import signal
import time
from collections.abc import Callable
from types import FrameType

from compress_ssl.pipeline.runtime.launch_env import is_launched

Handler = Callable[[int, FrameType | None], object] | int | signal.Handlers | None
"""What signal.signal returns; None stands for a handler that was not set from Python, which it cannot set again."""

REPEAT_WINDOW = 2.0
"""Seconds after a first signal in which a rank ignores a second one.

A cluster sends a signal to every process of a job, and torchrun sends it to its ranks once more.
"""


class Interrupted(BaseException):
    """A signal stopped the work; the text says what was saved and how to continue.

    It derives from BaseException, because it can be raised at any place, and an `except Exception` there must not
    mistake it for a broken image or a missing package.
    """

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


class StopRequest:
    """Collects signals in a block `with StopRequest() as stop:`; a loop in it reads `stop.requested`.

    A second signal raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.signum, self._first = 0, 0.0
        self._before: dict[int, Handler] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self.signum != 0

    def __enter__(self) -> "StopRequest":
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._before[signum] = signal.signal(signum, self._record_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            if handler is not None:
                signal.signal(signum, handler)

    def _record_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.signum and not (is_launched() and time.monotonic() - self._first < REPEAT_WINDOW):
            raise KeyboardInterrupt
        if not self.signum:
            self.signum, self._first = signum, time.monotonic()

    def check(self, message: str) -> None:
        """Raise Interrupted with this message if a signal has arrived."""
        if self.signum:
            raise Interrupted(self.signum, message)
