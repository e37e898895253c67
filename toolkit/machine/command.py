"""From a verb to an exit code: signals, one line for every error, tracebacks in a log. Standard library only.

code = exit_code(lambda: print("done") or 0)
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from toolkit.files import ToolkitError, first_line, outputs, safe_output
from toolkit.training.interrupt import SIGNALS
from toolkit.training.log import Log

# Exit codes: a bug or a check that failed; an error that says how to fix it.
BUG, FIXABLE = 1, 2
# Signals that asked the current verb to stop.
_received: list[int] = []


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP: handled like Ctrl-C, so that every `finally` runs. `args[0]` is the signal's number."""


def exit_code(verb: Callable[[], int], run: Callable[[], str] = str) -> int:
    """Call `verb` and return its exit code, or the one of its failure, which is told in one line on stderr.

    `run` gives the run's name as far as it is known: its log takes the traceback."""
    safe_output()
    catch_signals()
    try:
        return verb()
    except BrokenPipeError:  # the reader of a pipe left (`… | head`); Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, Exception) as error:
        # a library that is interrupted while it is imported raises an error of its own
        if isinstance(error, KeyboardInterrupt) or _received:
            return interrupted(error)
        if os.environ.get("TOOLKIT_DEBUG"):
            raise
        return failed(error, run())


def catch_signals() -> None:
    """SIGTERM and SIGHUP raise Stopped from now on, and all are remembered; one that is ignored (nohup) stays ignored."""
    _received.clear()

    def stop(number: int, _frame: FrameType | None) -> None:
        _received.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)

    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, stop)


def interrupted(error: BaseException) -> int:
    """Say how to go on, and let a further signal end the process at once: threads and exit handlers may take long."""
    number = error.args[0] if isinstance(error, Stopped) else (*_received, signal.SIGINT)[0]
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, lambda again, _frame: os._exit(128 + again))
    print("interrupted: run the same command again; it resumes from what is finished", file=sys.stderr)
    return 128 + number


def failed(error: Exception, run: str) -> int:
    """One line that helps, for whatever a library raised, and the exit code."""
    if isinstance(error, ToolkitError):
        print(f"error: {error}", file=sys.stderr)
        return FIXABLE
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package not in ("toolkit", "data_recipes"):
        print(
            f"error: the package {package!r} is not installed: run `python -m toolkit setup`, then the same command "
            "again (`python -m toolkit doctor` shows what is missing)",
            file=sys.stderr,
        )
        return FIXABLE
    cause = "This is a bug, or a library that failed"
    if isinstance(error, ImportError):
        cause = (
            "A package is missing or of another version (`python -m toolkit doctor` says which, `setup` installs it)"
        )
    print(
        f"error: {type(error).__name__}: {first_line(error)}\n{cause}: {_traceback_of(error, run)}. Run the same command again to "
        "resume.",
        file=sys.stderr,
    )
    return BUG


def _traceback_of(error: Exception, run: str) -> str:
    """Say where an error's traceback is: in the log that `run.train` wrote, else it is added to the run's here."""
    for note in getattr(error, "__notes__", ()):
        if note.startswith("log: "):
            return f"the traceback is in {note.removeprefix('log: ')}"
    log = Log()
    runs = [folder for folder in (Path(run), outputs() / run) if (folder / "recipe.yaml").is_file()]
    log.folder = runs[0] if runs else None
    lines = [f"{time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(sys.argv)}\n", *traceback.format_exception(error)]
    try:
        log.append("".join(lines))
    except OSError:  # the disk may be what failed
        return "set TOOLKIT_DEBUG=1 to see the traceback"
    return f"the traceback is in {log.path}"
