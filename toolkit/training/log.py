"""Where the libraries' output goes: run.log of the run in work.

with quiet(): sft_trainer.train()
"""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from toolkit.files import displaced, outputs, shareable


class Log(io.TextIOBase):
    """Where the libraries' stdout and stderr go: run.log of the run in work, otherwise outputs/toolkit.log. People pass it
    on: it names neither the home folder nor a token.

    One object for the whole process: log handlers created while `quiet()` is in place keep writing to it."""

    folder: Path | None = None

    @property
    def path(self) -> Path:
        """The file in use; not in a run that was renamed meanwhile, where it would begin a second folder."""
        file = (self.folder or outputs()) / "run.log"
        return file if self.folder and not displaced(file) else outputs() / "toolkit.log"

    def append(self, text: str) -> None:
        """Add a text to the file. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8", errors="replace") as file:
            file.write(shareable(text))

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):  # a full disk must not turn a library's warning into a crash
            self.append(text)
        return len(text)


LOG = Log()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send what libraries print, warn and log to LOG instead of the screen, unless TOOLKIT_DEBUG is set."""
    if os.environ.get("TOOLKIT_DEBUG"):
        yield
        return
    screens = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    loggers = [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
    # a handler keeps the stream of the moment it was made, whatever sys.stderr is now
    handlers = {h for x in loggers for h in x.handlers if isinstance(h, logging.StreamHandler)}
    # of logging's last resort it is a property, which nobody can set
    streams = {h: h.stream for h in handlers if vars(h).get("stream") in screens}
    with contextlib.redirect_stdout(LOG), contextlib.redirect_stderr(LOG), warnings.catch_warnings():
        for handler in streams:
            handler.setStream(LOG)
        try:
            yield
        finally:
            for handler, stream in streams.items():
                handler.setStream(stream)
