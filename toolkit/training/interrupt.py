"""Ctrl-C and SIGTERM while a run trains: the first one asks for a checkpoint, a second one stops at once.

with StopRequest(print) as request: sft_trainer.train(); request.number      # of the signal that came, or None
"""

import signal
import threading
from types import FrameType
from typing import Any

from toolkit.files import Say

NAMES = {"SIGINT", "SIGTERM", "SIGHUP"}
# What asks a process to stop; Windows has no SIGHUP.
SIGNALS = [number for number in signal.Signals if number.name in NAMES]


class StopRequest:
    """Holds a signal back until the training has written a checkpoint and calls `obey`."""

    def __init__(self, say: Say):
        self.say = say
        self.number: int | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self.number = None
        if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
            return self
        for number in SIGNALS:
            handler = signal.getsignal(number)
            # one that is ignored (nohup) stays ignored
            if handler not in (None, signal.SIG_IGN):
                self._handlers[number] = handler
                signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - a signal handler's signature
        self._restore()
        self.number = number
        self.say("stopping: a checkpoint is written at the end of this step (a second Ctrl-C stops at once)")

    @property
    def came(self) -> bool:
        """Whether a signal asked for a checkpoint."""
        return self.number is not None

    def obey(self) -> None:
        """Stop now, as the signal would have by itself."""
        if self.number is not None:
            signal.raise_signal(self.number)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def __exit__(self, *_: object) -> None:
        self._restore()
