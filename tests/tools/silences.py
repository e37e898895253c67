"""The longest time that a verb shows nothing new on a terminal of 80 columns: no line, no count, no clock that moves.

python -m tests.tools.silences train pocket name=quiet     # or without words: every verb that works on the pocket model

A spinner does not count, since it would turn beside a process that hangs as well.
"""

import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from typing import NamedTuple

CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[⠀-⣿]")
"""What moves the cursor or sets a colour, and a spinner's dots."""
LOOK_SECONDS = 0.5
"""What comes within this time is one drawing of the screen."""
SMALL = "data.budget=3000 data.validation_size=8 train.max_steps=4 evaluate.max_new_tokens=48".split()
FEW = [*SMALL, "evaluate.questions.0.max_rows=8", "evaluate.questions.1.max_rows=8"]
VERBS = (
    ["doctor"], ["list"], ["mix", "pocket"], ["fit", "hybrid", "--vram", "8"], ["train", "pocket", "name=quiet", *FEW],
    ["evaluate", "quiet"], ["dial", "quiet", "--scales", "0.5", "1"], ["report", "quiet"],
    ["export", "quiet", "--quant", "q8_0", "q4_k_m"], ["verify", "quiet"], ["evaluate", "quiet", "--file", "q8_0"],
    ["generate", "quiet", "prompts.txt", "replies.jsonl", "--max-new-tokens", "32"],
    ["replay", "pocket", "--count", "4", *FEW],
    ["sweep", "pocket", "name=ratios", "--reasoning", "0", "1", "--seeds", "1", *FEW], ["compare"],
)  # fmt: skip
"""In an order in which each finds what it needs."""


class Silence(NamedTuple):
    """The longest time without a change on the screen."""

    seconds: float
    after: str
    """The last line that was there when it began."""
    whole: float
    """Seconds that the command took."""
    code: int


def measure(words: Sequence[str], columns: int = 80) -> Silence:
    """Run a verb under a pseudo-terminal and watch what it shows."""
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    command = [sys.executable, "-m", "toolkit", *words]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": str(columns)}
    began = changed = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, env=environment)
    os.close(writer)
    longest, after, screen = 0.0, "", ""
    while True:
        drawn = drawing(reader)
        now = time.monotonic()
        if drawn not in ("", screen) or drawn is None:
            if now - changed > longest:
                longest, after = now - changed, last_line(screen)
            changed, screen = now, drawn or ""
        if drawn is None:
            return Silence(longest, after, now - began, process.wait())


def drawing(reader: int) -> str | None:
    """What came within LOOK_SECONDS, without codes; None when the other side is closed."""
    until, text = time.monotonic() + LOOK_SECONDS, b""
    while (left := until - time.monotonic()) > 0:
        if select.select([reader], [], [], left)[0]:
            try:
                text += os.read(reader, 1 << 16)
            except OSError:  # so Linux says that the other side is closed
                os.close(reader)
                return None
    lines = CODES.sub("", text.decode("utf-8", "replace")).replace("\r", "\n").split("\n")
    # a display draws the same lines again and again
    return "\n".join(dict.fromkeys(line.strip() for line in lines if line.strip()))


def last_line(screen: str) -> str:
    """The last line of a screen, as far as a table has room for it."""
    return screen.rpartition("\n")[2][:60]


def main(words: list[str]) -> None:
    """Print a line for each verb: the longest silence, how long the verb took, and what stood there meanwhile."""
    print("| verb | longest silence, s | whole, s | after |\n|---|--:|--:|---|")
    for verb in [words] if words else VERBS:
        found = measure(verb)
        name = " ".join(word for word in verb if "=" not in word)
        failed = f" (exit {found.code})" if found.code else ""
        print(
            f"| `{name}`{failed} | {found.seconds:.1f} | {found.whole:.0f} | {found.after or '(start)'} |", flush=True
        )


if __name__ == "__main__":
    main(sys.argv[1:])
