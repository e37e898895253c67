"""Talk to a run in the terminal: replies appear as they are generated, thinking dimmed; run and base side by side.

`python -m toolkit chat pocket`, or chat("pocket"); in a pipe every line is a turn.
"""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from toolkit.export.llama import Engine
from toolkit.family import mode_title
from toolkit.files import ToolkitError, append_rows, did_you_mean, outputs
from toolkit.serving.client import Answer, Message, ask, chat_body, open_engine
from toolkit.serving.engine import BASE, check_scale, modes_of_run
from toolkit.training.model import run_folder

COMMANDS = {
    "/think": "reason before answering",
    "/no_think": "answer at once",
    "/base": "talk to the base model, without what was trained",
    "/tuned": "talk to the run again",
    "/both": "base and run answer side by side",
    "/scale N": "add so much of the adapter: 0 is the base, 1 the run",
    "/save FILE": "keep the conversation as one more row of a .jsonl file, which can be trained on",
    "/clear": "begin a new conversation",
    "/help": "this list",
    "/quit": "leave (so does Ctrl-D); Ctrl-C stops a reply",
}
SWITCHES = ("/think", "/no_think", "/base", "/tuned", "/both")
"""Commands after which a question may stand."""
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

    def note(self, text: str, style: str | None = "dim") -> None:
        self.console.print(text, style=style, markup=False)

    def body(self, name: str, messages: list[Message]) -> dict[str, Any]:
        """A request to one of those who answer."""
        return chat_body(self.engine, name, self.mode, messages, self.max_tokens)


def chat(run: str | Path, *, mode: str | None = None, max_tokens: int = 2048, url: str | None = None,
         key: str | None = None, scale: float = 1.0, console: Console | None = None, **options: Any) -> None:  # fmt: skip
    """Read turns and answer them until /quit or the end of input.

    `url` is a server that `serve` started; without one an engine starts in this process with `options` of `start`.
    Raises ToolkitError when it cannot."""
    console = console or Console(highlight=False, soft_wrap=True)
    folder = run_folder(run).resolve()
    modes = modes_of_run(folder)
    engine = open_engine(folder, url=url, key=key, scale=scale, say=console.print, **options)
    first = mode if mode in modes else modes[0]
    talk = Talk(engine, console, folder.name, (folder.name,), modes, first, max_tokens)
    talk.note(f"{talk.run}, {mode_title(talk.mode)}. /help lists the commands")
    for line in typed_lines():
        try:
            if line.strip() and not turn(talk, line.strip()):
                break
        except ToolkitError as error:
            talk.note(f"error: {error}", None)


def typed_lines() -> Iterator[str]:
    """Turns as people type them, with history and arrow keys; from a pipe, line by line."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield from sys.stdin
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory

    outputs().mkdir(parents=True, exist_ok=True)
    commands = WordCompleter([command.split()[0] for command in COMMANDS], sentence=True)
    session: PromptSession[str] = PromptSession(history=FileHistory(outputs() / ".chat_history"), completer=commands)
    while True:
        try:
            yield session.prompt("› ")
        except KeyboardInterrupt:
            continue  # an unfinished line is thrown away, as in a shell
        except EOFError:
            return


def turn(talk: Talk, line: str) -> bool:
    """Do what a line says; False to leave. Raises ToolkitError."""
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    match command:
        case "/quit":
            return False
        case "/help":
            talk.note("\n".join(f"{name:<12}{meaning}" for name, meaning in COMMANDS.items()), None)
        case "/clear":
            talk.messages = []
            talk.note("(a new conversation)")
        case "/save":
            talk.note(f"(saved: {save(rest, talk.messages)})")
        case "/scale":
            set_scale(talk, rest)
        case "/think" | "/no_think":
            set_mode(talk, command)
        case "/base" | "/tuned" | "/both":
            set_names(talk, command)
        # a mistyped command; `/usr/bin is …` with more words after it is a question
        case _ if command.startswith("/") and not rest:
            known = [name.split()[0] for name in COMMANDS]
            raise ToolkitError(f"{command}: no such command{did_you_mean(command, known)}. /help lists them")
        case _:
            reply(talk, line)
    if command in SWITCHES and rest:
        reply(talk, rest)
    return True


def set_mode(talk: Talk, command: str) -> None:
    """/think or /no_think. Raises ToolkitError for a mode that the model does not have."""
    mode = "thinking" if command == "/think" else "non_thinking"
    if mode not in talk.modes:
        raise ToolkitError(f"{command}: this model only answers {mode_title(talk.modes[0])}")
    talk.mode = mode
    talk.note(f"({mode_title(mode)})")


def set_names(talk: Talk, command: str) -> None:
    """/base, /tuned or /both. Raises ToolkitError where base and adapter are served as one."""
    if not talk.engine.runs:
        raise ToolkitError(f"{command}: this server has one set of weights: chat without --from has both")
    talk.names = {"/base": (BASE,), "/tuned": (talk.run,), "/both": (BASE, talk.run)}[command]
    talk.note(f"({' and '.join(talk.names)})")


def set_scale(talk: Talk, number: str) -> None:
    """/scale N. Raises ToolkitError where it is no number, or the server has no scale."""
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
            ask(talk.engine, talk.body(talk.names[0], messages), printer(talk.console), answer=answer)
            talk.note(f"\n({answer.tokens} tokens{f', cut at {talk.max_tokens}' if answer.is_cut else ''})")
    except KeyboardInterrupt:
        talk.note("\n(stopped)")
    # without an answer the template would refuse the next question
    if answer.content.strip():
        parts = {"reasoning_content": answer.reasoning.strip(), "content": answer.content.strip()}
        kept = {key: text.translate(CONTROLS) for key, text in parts.items() if text}
        talk.messages = [*messages, {"role": "assistant", **kept}]


def side_by_side(talk: Talk, messages: list[Message]) -> Answer:
    """Base and run answer at the same time, in two columns; the conversation goes on with the run's answer."""
    with ThreadPoolExecutor(len(talk.names)) as pool:
        answers = list(pool.map(lambda name: ask(talk.engine, talk.body(name, messages)), talk.names))
    table = Table(*talk.names, box=None, expand=True, padding=(0, 1))
    reasoning = [answer.reasoning.strip().translate(CONTROLS) for answer in answers]
    if any(reasoning):
        table.add_row(*(Text(text, style=DIM) for text in reasoning), end_section=True)
    table.add_row(*(Text(answer.content.strip().translate(CONTROLS)) for answer in answers))
    talk.console.print(table)
    talk.note(f"({' and '.join(str(answer.tokens) for answer in answers)} tokens)")
    return answers[-1]


def printer(console: Console) -> Callable[[str, str], None]:
    """Prints pieces of a reply. Reasoning is dim on a terminal; in a pipe both parts are labelled."""
    begun: list[str] = []

    def show(part: str, piece: str) -> None:
        text = piece.translate(CONTROLS)
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


def save(file: str, messages: list[Message]) -> Path:
    """A conversation as one more row of a .jsonl file, as training reads it. Raises ToolkitError."""
    path = Path(file).expanduser()
    if not messages:
        raise ToolkitError("nothing was said yet")
    if path.suffix != ".jsonl":
        raise ToolkitError(f"/save {file}: expected a .jsonl file, as in /save talk.jsonl")
    append_rows(path, [{"messages": messages}])
    return path
