"""Ctrl-C and SIGTERM as a request that a loop grants at its next safe point."""

import signal
from types import FrameType
from typing import Any


class Interrupted(BaseException):
    """The work was stopped by a signal; the text says what is kept and how to go on.

    No Exception: raised in the middle of anything, it must not pass for a broken image or a missing package.
    """

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


class Interrupt:
    """`with Interrupt() as stop:` then ask `stop.requested`; a second signal is not held back."""

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signum != 0

    def __enter__(self) -> "Interrupt":
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            raise KeyboardInterrupt
        self.signum = signum

    def check(self, message: str) -> None:
        """Raises Interrupted with this message if a signal came."""
        if self.signum:
            raise Interrupted(self.signum, message)
