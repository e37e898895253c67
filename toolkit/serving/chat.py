"""Talk to a run in the terminal: replies appear as they are generated, thinking dimmed; run and base side by side.

`python -m toolkit chat pocket`, or chat("pocket"); in a pipe every line is a turn.
"""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from toolkit.export.checkpoint import check_scale
from toolkit.export.llama import Engine
from toolkit.family import mode_title
from toolkit.files import ToolkitError, did_you_mean
from toolkit.serving.client import Answer, Message, ask, chat_body, open_engine, stream
from toolkit.serving.engine import BASE, modes_of_run
from toolkit.training.model import run_folder

COMMANDS = {
    "/think": "reason before answering",
    "/no_think": "answer at once",
    "/base": "talk to the base model, without what was trained",
    "/tuned": "talk to the run again",
    "/both": "base and run answer side by side",
    "/scale N": "add so much of the adapter: 0 is the base, 1 the run",
    "/clear": "begin a new conversation",
    "/help": "this list",
    "/quit": "leave (so does Ctrl-D); Ctrl-C stops a reply",
}
NEAR_SWITCH = re.compile(r"(?:^|\s)(/no-?think(?:ing)?)(?=\s|$)")
"""What people type for /no_think, which alone a template or a model knows."""
MODES_BY_COMMAND = {"/think": "thinking", "/no_think": "non_thinking"}
CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""A model's text never moves the cursor or sets the terminal's title."""
DIM = "dim italic"


@dataclass
class Talk:
    """A conversation and its switches."""

    engine: Engine
    console: Console
    run: str
    names: tuple[str, ...]
    """Who answers: the run, `base`, or both."""
    modes: tuple[str, ...]
    mode: str
    max_tokens: int
    messages: list[Message] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False)

    def body(self, name: str, messages: list[Message]) -> dict[str, Any]:
        """A request to one of those who answer."""
        return chat_body(self.engine, name, self.mode, messages, self.max_tokens)


def chat(
    run: str | Path, *, mode: str | None = None, max_tokens: int = 2048, console: Console | None = None, **server: Any
) -> None:
    """Read turns and answer them until /quit or the end of input; `server` is what `open_engine` takes.

    Raises ToolkitError where there is no engine."""
    console = console or Console(highlight=False, soft_wrap=True)
    folder = run_folder(run).resolve()
    modes = modes_of_run(folder)
    engine = open_engine(folder, say=console.print, **server)
    # an instruct model has one mode, whatever was asked for
    first = mode if mode in modes else modes[0]
    talk = Talk(engine, console, folder.name, (folder.name,), modes, first, max_tokens)
    talk.note(f"{talk.run}, {mode_title(talk.mode)}. /help lists the commands")
    for line in map(str.strip, typed_lines()):
        try:
            if line.partition(" ")[0] == "/quit":
                break
            if line:
                turn(talk, line)
        except ToolkitError as error:
            console.print(f"error: {error}", markup=False)


def typed_lines() -> Iterator[str]:
    """Turns as people type them, with arrow keys where Python has readline; from a pipe, line by line."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):  # a Windows console edits lines by itself
        import readline  # noqa: F401  importing it is what makes input() edit and remember lines
    while True:
        try:
            yield input("› ")
        except KeyboardInterrupt:
            print()  # an unfinished line is thrown away, as in a shell
        except EOFError:
            return


def turn(talk: Talk, line: str) -> None:
    """Do what a line says: a command, a question, or a switch with a question after it. Raises ToolkitError."""
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    known = [name.split()[0] for name in COMMANDS]
    if near := NEAR_SWITCH.search(line):
        raise ToolkitError(f"{near[1]}: only text to the model. Did you mean '/no_think'?")
    if command == "/help":
        listed = [f"{name:<12}{meaning}" for name, meaning in COMMANDS.items()]
        talk.console.print("\n".join(listed), markup=False)
    elif command == "/clear":
        talk.messages = []
        talk.note("(a new conversation)")
    elif command == "/scale":
        set_scale(talk, rest)
    elif command in known:
        switch(talk, command)
        if rest:
            reply(talk, rest)
    # a mistyped command; `/usr/bin is …` with more words after it is a question
    elif command.startswith("/") and not rest:
        raise ToolkitError(f"{command}: no such command{did_you_mean(command, known)}. /help lists them")
    else:
        reply(talk, line)


def switch(talk: Talk, command: str) -> None:
    """Another mode, or another to answer. Raises ToolkitError for a mode or a base that there is not."""
    if mode := MODES_BY_COMMAND.get(command):
        if mode not in talk.modes:
            raise ToolkitError(f"{command}: this model only answers {mode_title(talk.modes[0])}")
        talk.mode = mode
        talk.note(f"({mode_title(mode)})")
        return
    if not talk.engine.runs:
        raise ToolkitError(f"{command}: this server has one set of weights: chat without --from has both")
    talk.names = {"/base": (BASE,), "/tuned": (talk.run,), "/both": (BASE, talk.run)}[command]
    talk.note(f"({' and '.join(talk.names)})")


def set_scale(talk: Talk, number: str) -> None:
    """How much of the adapter answers. Raises ToolkitError where it is no number, or the server has no scale."""
    if not (talk.engine.runs and talk.engine.takes_scale):
        raise ToolkitError("/scale: this server cannot scale an adapter: chat without --from and --url can")
    try:
        scale = float(number)
    except ValueError as error:
        raise ToolkitError(f"/scale {number}: expected a number, as in /scale 0.5") from error
    check_scale(scale)
    talk.engine.scale = scale
    talk.note(f"(scale {scale:g})")


def reply(talk: Talk, line: str) -> None:
    """Answer a question. What Ctrl-C leaves of it stays in the conversation; a question without one is taken back."""
    messages = [*talk.messages, {"role": "user", "content": line}]
    answer = Answer()
    try:
        if len(talk.names) > 1:
            answer = side_by_side(talk, messages)
        else:
            stream(talk.engine, talk.body(talk.names[0], messages), answer, printer(talk.console))
            talk.note(f"\n({answer.tokens} tokens{f', cut at {talk.max_tokens}' if answer.is_cut else ''})")
    except KeyboardInterrupt:
        talk.note("\n(stopped)")
    # without an answer the template would refuse the next question
    if answer.content.strip():
        parts = {"reasoning_content": cleaned(answer.reasoning), "content": cleaned(answer.content)}
        kept = {key: text for key, text in parts.items() if text}
        talk.messages = [*messages, {"role": "assistant", **kept}]


def side_by_side(talk: Talk, messages: list[Message]) -> Answer:
    """Base and run answer at the same time, in two columns; the conversation goes on with the run's answer."""
    # columns cannot grow side by side, so both come whole
    with ThreadPoolExecutor(len(talk.names)) as pool:
        answers = list(pool.map(lambda name: ask(talk.engine, talk.body(name, messages)), talk.names))
    table = Table(*talk.names, box=None, expand=True, padding=(0, 1))
    if any(answer.reasoning for answer in answers):
        table.add_row(*(Text(cleaned(answer.reasoning), style=DIM) for answer in answers), end_section=True)
    table.add_row(*(Text(cleaned(answer.content)) for answer in answers))
    talk.console.print(table)
    talk.note(f"({' and '.join(str(answer.tokens) for answer in answers)} tokens)")
    return answers[-1]


def cleaned(text: str) -> str:
    """A model's text without what drives a terminal."""
    return text.strip().translate(CONTROLS)


def printer(console: Console) -> Callable[[str, str], None]:
    """Prints pieces of a reply. Reasoning is dim on a terminal; in a pipe both parts are labelled."""
    begun: list[str] = []

    def show(part: str, piece: str) -> None:
        text = piece.translate(CONTROLS)
        # models open each part with line feeds, which would show as empty lines
        if part not in begun:
            text = text.lstrip()
            if not text:
                return
            if begun:
                console.print("\n")
            if not console.is_terminal:
                console.print("thinking: " if part == "reasoning" else "answer: ", end="")
            begun.append(part)
        console.print(text, end="", style=DIM if part == "reasoning" else None, markup=False, emoji=False)

    return show
