"""The console that people read, and progress with time left on it for everything that takes longer than five seconds.

with Progress(console, "evaluating", total=640) as progress: progress.advance(32)
"""

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rich takes a tenth of a second to load
    from rich.console import Console
    from rich.progress import Progress as RichProgress


def default_console() -> "Console":
    """Where people read: colours on a terminal and in a notebook, plain wide text in a pipe."""
    from rich.console import Console

    console = Console(highlight=False)
    piped = not (console.is_terminal or console.is_jupyter)
    return Console(highlight=False, soft_wrap=True, width=160) if piped else console


def pinned(console: "Console | None") -> "Console":
    """A console, or the default one, that keeps printing where it does now while the libraries' output goes to the log."""
    console = console or default_console()
    console.file = console.file
    return console


class Progress:
    """A bar with time left on a terminal or in a notebook; elsewhere a line every ten seconds."""

    PLAIN_EVERY = 10  # seconds

    def __init__(self, console: "Console", title: str, total: int):
        self.console, self.title, self.total = console, title, total
        self.done = 0
        self.bar: RichProgress | None = None

    def __enter__(self) -> "Progress":
        self.started = self.printed = time.monotonic()
        # two live displays at once, of which one is silent, leave a notebook's outputs in each other's cells
        if not self.console.quiet and (self.console.is_terminal or self.console.is_jupyter):
            from rich import progress
            from rich.table import Column

            # a column of its own wraps on a narrow terminal; rich's default cuts the time left instead
            title = progress.TextColumn("{task.description}", table_column=Column())
            columns = title, progress.BarColumn(20), progress.MofNCompleteColumn(), progress.TimeRemainingColumn()
            self.bar = progress.Progress(
                # the clock goes on while a single step takes long
                progress.TimeElapsedColumn(), *columns, console=self.console, transient=True,
                redirect_stdout=False, redirect_stderr=False,  # what libraries print meanwhile goes to the log
                refresh_per_second=2,  # a notebook gets a message each time: ten a second of a sweep were minutes behind
            )  # fmt: skip
            self.task = self.bar.add_task(self.title, total=self.total)
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, count: int) -> None:
        """`count` more are done."""
        self.done += count
        now = time.monotonic()
        if self.bar:
            self.bar.update(self.task, description=self.title, completed=self.done, total=self.total)
        elif now - self.printed >= self.PLAIN_EVERY and 0 < self.done < self.total:
            self.printed = now
            pace = (now - self.started) / self.done
            left = time_left(pace * (self.total - self.done))
            self.console.print(f"{self.title}: {self.done} of {self.total}, about {left}", markup=False)

    def skip(self, count: int) -> None:
        """`count` need not be done; they do not count for the time left."""
        self.total -= count
        self.advance(0)


@contextlib.contextmanager
def working(console: "Console", what: str) -> Iterator[None]:
    """`loading pocket 0:00:07` on a terminal or in a notebook while something is in work that cannot be counted."""
    from rich import progress

    columns = progress.SpinnerColumn(), progress.TextColumn("{task.description}"), progress.TimeElapsedColumn()
    with progress.Progress(
        *columns, console=console, transient=True, disable=console.quiet or not (console.is_terminal or console.is_jupyter),
        redirect_stdout=False, redirect_stderr=False, refresh_per_second=2,  # as above
    ) as bar:  # fmt: skip
        bar.add_task(what)
        yield


def time_left(seconds: float) -> str:
    """`40 s left`, `14 min left`, `3.5 h left`."""
    if seconds < 90:
        return f"{seconds:.0f} s left"
    return f"{seconds / 60:.0f} min left" if seconds < 5400 else f"{seconds / 3600:.1f} h left"
