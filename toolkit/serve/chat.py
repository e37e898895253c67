"""Talk to a run in the terminal: streamed, thinking dimmed, both modes, with and without the adapter.

`python -m toolkit chat pocket`, or chat("outputs/pocket", source="gguf"); in a pipe it reads a line a turn.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from toolkit.files import ToolkitError, outputs
from toolkit.serve.engine import best_source, open_engine
from toolkit.serve.request import BASE, Ask, Piece, Refused, converse

HELP = {
    "/think": "reason before answering",
    "/no_think": "answer at once",
    "/base": "switch the adapter off, and on again",
    "/save FILE": "keep the conversation: .jsonl adds a row that can be trained on, .md is for reading",
    "/clear": "forget the conversation",
    "/help": "this list",
    "/quit": "leave (so does Ctrl-D); Ctrl-C stops a reply",
}
CONTROLS = {c: None for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"}
"""A model's text never moves the cursor or sets the terminal's title."""


@dataclass
class Talk:
    """A conversation and its switches."""

    engine: object
    console: object
    max_tokens: int
    thinking: bool = True
    base: bool = False
    messages: list[dict] = field(default_factory=list)

    @property
    def model(self) -> str:
        return BASE if self.base else self.engine.names[0]


def chat(run: str | Path, *, source: str | None = None, quant: str | None = None, thinking: bool = True,
         max_tokens: int = 2048, console=None) -> None:  # fmt: skip
    """Reads turns and answers them until /quit or the end of input. Raises ToolkitError when nothing can be loaded."""
    from rich.console import Console

    console = console or Console(highlight=False, soft_wrap=True)
    if source is None:
        source, why = best_source(run)
        console.print(f"talking to the {source} ({why})", style="dim", markup=False)
    talk = Talk(open_engine([run], source, quant), console, max_tokens, thinking)
    console.print(f"{talk.model}: {_mode(talk)}. /help lists the commands", style="dim", markup=False)
    for line in _lines():
        if not _turn(talk, line.strip()):
            break


def _lines() -> Iterator[str]:
    """Turns as people type them, with history and arrow keys; from a pipe, line by line."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield from sys.stdin
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory

    outputs().mkdir(parents=True, exist_ok=True)
    commands = WordCompleter([command.split()[0] for command in HELP], sentence=True)
    session = PromptSession(history=FileHistory(outputs() / ".chat_history"), completer=commands)
    while True:
        try:
            yield session.prompt("› ")
        except KeyboardInterrupt:
            continue  # an unfinished line is thrown away, as in a shell
        except EOFError:
            return


def _turn(talk: Talk, line: str) -> bool:
    """Does what a line says; False to leave."""
    if not line:
        return True
    name, _, rest = line.partition(" ")
    if not line.startswith("/") or name not in COMMANDS:
        if name.startswith("/") and not rest:
            talk.console.print(f"{name}: no such command. /help lists them", markup=False)
        else:
            _reply(talk, line)
        return True
    try:
        return COMMANDS[name](talk, rest.strip()) is not False
    except ToolkitError as error:
        talk.console.print(f"error: {error}", markup=False)
        return True


def _reply(talk: Talk, line: str) -> None:
    """Streams an answer. What a Ctrl-C leaves of it stays in the conversation; a question without one is taken back."""
    asked = [*talk.messages, {"role": "user", "content": line}]
    ask = Ask(asked, talk.thinking, talk.model, max_tokens=talk.max_tokens)
    said = {"reasoning": "", "content": ""}
    try:
        end = _show(talk.console, converse(talk.engine, ask), said)
        talk.console.print(f"({end.usage['completion_tokens']} tokens{_ended(end)})", style="dim", markup=False)
    except KeyboardInterrupt:
        talk.console.print("\n(stopped)", style="dim")
    except Refused as refused:
        hint = "; /clear begins a new conversation" if refused.code == "context_length_exceeded" else ""
        talk.console.print(f"error: {refused}{hint}", markup=False)
    if said["content"].strip():
        reasoning = {"reasoning_content": said["reasoning"]} if said["reasoning"] else {}
        talk.messages = [*asked, {"role": "assistant", "content": said["content"], **reasoning}]


def _show(console, pieces: Iterator[Piece], said: dict[str, str]) -> Piece:
    """Prints pieces as they come; reasoning is dim on a terminal and labelled in a pipe."""
    kind = None
    for piece in pieces:
        if piece.kind == "end":
            console.print()
            return piece
        if piece.kind != kind:
            console.print(_heading(console, kind, piece.kind), end="", style="dim")
            kind = piece.kind
        said[piece.kind] += piece.text
        style = "dim italic" if kind == "reasoning" else None
        console.print(piece.text.translate(CONTROLS), end="", style=style, markup=False, emoji=False)
    raise AssertionError("a reply ends with its end or an error")


def _heading(console, before: str | None, kind: str) -> str:
    gap = "\n\n" if before else ""
    if console.is_terminal:
        return gap
    return gap + {"reasoning": "thinking: ", "content": "answer: "}[kind]


def _ended(end: Piece) -> str:
    return ", cut at the limit" if end.finish == "length" else ""


def _mode(talk: Talk) -> str:
    return "thinking" if talk.thinking else "non-thinking"


def _switch(thinking: bool) -> Callable:
    def switch(talk: Talk, rest: str):
        talk.thinking = thinking
        talk.console.print(f"({_mode(talk)})", style="dim")
        if rest:
            _reply(talk, rest)

    return switch


def _base(talk: Talk, _rest: str):
    if BASE not in talk.engine.names:
        raise ToolkitError("only the adapter can be switched off: python -m toolkit chat RUN --from adapter")
    talk.base = not talk.base
    state = "off: this is the base" if talk.base else "on"
    talk.console.print(f"(adapter {state})", style="dim")


def _save(talk: Talk, rest: str):
    if not rest:
        raise ToolkitError("/save: expected a file, talk.jsonl or talk.md")
    if not talk.messages:
        raise ToolkitError("nothing was said yet")
    path = Path(rest).expanduser()
    try:
        save(path, talk.messages)
    except OSError as error:
        raise ToolkitError(f"{path}: cannot be written ({error.strerror})") from error
    talk.console.print(f"(saved: {path})", style="dim", markup=False)


def save(path: Path, messages: list[dict]) -> None:
    """A conversation as one more row of a .jsonl, in the shape that training reads, or as Markdown in a new file."""
    if path.suffix == ".jsonl":
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        return
    parts = []
    for message in messages:
        if "reasoning_content" in message:
            parts.append("> " + message["reasoning_content"].replace("\n", "\n> "))
        parts.append(message["content"] if message["role"] == "assistant" else f"**{message['content']}**")
    with open(path, "x", encoding="utf-8") as file:  # a file that is there already is somebody's
        file.write("\n\n".join(parts) + "\n")


def _clear(talk: Talk, _rest: str):
    talk.messages = []
    talk.console.print("(a new conversation)", style="dim")


def _help(talk: Talk, _rest: str):
    for command, meaning in HELP.items():
        talk.console.print(f"{command:<12}{meaning}", markup=False)


COMMANDS = {
    "/think": _switch(True),
    "/no_think": _switch(False),
    "/base": _base,
    "/save": _save,
    "/clear": _clear,
    "/help": _help,
    "/quit": lambda _talk, _rest: False,
}
