"""Talk to a run in the terminal: replies appear as they are generated, thinking dimmed; run and base side by side.

`python -m toolkit chat pocket`, or chat("pocket"); in a pipe every line is a turn.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from toolkit.data.render import load_chat
from toolkit.export.llama import Engine
from toolkit.family import KINDS, mode_title
from toolkit.files import ToolkitError, append_rows, outputs
from toolkit.serving.engine import BASE, connect, start
from toolkit.training.model import run_folder

COMMANDS = {
    "/think": "reason before answering",
    "/no_think": "answer at once",
    "/base": "talk to the base model, without what was trained",
    "/tuned": "talk to the run again",
    "/save FILE": "keep the conversation as one more row of a .jsonl file, which can be trained on",
    "/clear": "begin a new conversation",
    "/help": "this list",
    "/quit": "leave (so does Ctrl-D); Ctrl-C stops a reply",
}
SWITCHES = ("/think", "/no_think", "/base", "/tuned")
"""Commands after which a question may stand."""
CONTROLS = {c: None for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"}
"""A model's text never moves the cursor or sets the terminal's title."""


@dataclass
class Talk:
    """A conversation and its switches."""

    engine: Engine
    console: object
    run: str
    name: str
    """The run's, or `base`: who answers."""
    modes: tuple[str, ...]
    mode: str
    max_tokens: int
    messages: list[dict] = field(default_factory=list)

    def note(self, text: str, style: str | None = "dim") -> None:
        self.console.print(text, style=style, markup=False)


def chat(run: str | Path, *, mode: str | None = None, max_tokens: int = 2048, url: str | None = None,
         key: str | None = None, console=None, **options) -> None:  # fmt: skip
    """Read turns and answer them until /quit or the end of input.

    `url` is a server that `serve` started; without one an engine starts in this process with `options` of `start`.
    Raises ToolkitError when it cannot."""
    from rich.console import Console

    console = console or Console(highlight=False, soft_wrap=True)
    folder = run_folder(run).resolve()
    modes = KINDS[load_chat(str(folder / "adapter")).kind] or ("non_thinking",)
    engine = connect(url, folder.name, key) if url else start([folder], say=console.print, **options)
    talk = Talk(engine, console, folder.name, folder.name, modes, mode if mode in modes else modes[0], max_tokens)
    talk.note(f"{talk.name}, {mode_title(talk.mode)}. /help lists the commands")
    for line in _lines():
        try:
            if line.strip() and not _turn(talk, line.strip()):
                break
        except ToolkitError as error:
            talk.note(f"error: {error}", None)


def _lines() -> Iterator[str]:
    """Turns as people type them, with history and arrow keys; from a pipe, line by line."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield from sys.stdin
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory

    outputs().mkdir(parents=True, exist_ok=True)
    commands = WordCompleter([command.split()[0] for command in COMMANDS], sentence=True)
    session = PromptSession(history=FileHistory(outputs() / ".chat_history"), completer=commands)
    while True:
        try:
            yield session.prompt("› ")
        except KeyboardInterrupt:
            continue  # an unfinished line is thrown away, as in a shell
        except EOFError:
            return


def _turn(talk: Talk, line: str) -> bool:
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
        case "/think" | "/no_think":
            mode = "thinking" if command == "/think" else "non_thinking"
            if mode not in talk.modes:
                raise ToolkitError(f"{command}: this model only answers {mode_title(talk.modes[0])}")
            talk.mode = mode
            talk.note(f"({mode_title(mode)})")
        case "/base" | "/tuned":
            # an exported file holds base and adapter as one
            if not talk.engine.runs:
                raise ToolkitError(f"{command}: this server has one set of weights: chat without --from has both")
            talk.name = BASE if command == "/base" else talk.run
            talk.note(f"({talk.name})")
        # a mistyped command; `/usr/bin is …` with more words after it is a question
        case _ if command.startswith("/") and not rest:
            raise ToolkitError(f"{command}: no such command. /help lists them")
        case _:
            _reply(talk, line)
    if command in SWITCHES and rest:
        _reply(talk, rest)
    return True


def _reply(talk: Talk, line: str) -> None:
    """Stream an answer. What Ctrl-C leaves of it stays in the conversation; a question without one is taken back."""
    asked = [*talk.messages, {"role": "user", "content": line}]
    body = {
        "messages": asked,
        "max_tokens": talk.max_tokens,
        "chat_template_kwargs": {"enable_thinking": talk.mode == "thinking"},
        **talk.engine.sampling.get(talk.mode, {}),
        **talk.engine.lora(talk.name),
    }
    said, tokens, cut = {"reasoning_content": "", "content": ""}, 0, ""
    try:
        for chunk in talk.engine.stream(body):
            # the last chunk counts the tokens of the whole reply
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
            for choice in chunk["choices"]:
                _show(talk.console, choice["delta"], said)
                cut = f", cut at {talk.max_tokens}" if choice["finish_reason"] == "length" else cut
        talk.note(f"\n({tokens} tokens{cut})")
    except KeyboardInterrupt:
        talk.note("\n(stopped)")
    if said["content"].strip():  # without an answer the template would refuse the next question
        answer = {key: text.strip() for key, text in said.items() if text.strip()}
        talk.messages = [*asked, {"role": "assistant", **answer}]


def _show(console, delta: dict, said: dict[str, str]) -> None:
    """Print a piece of a reply. Reasoning is dim on a terminal; in a pipe both parts are labelled."""
    pieces = {
        "reasoning_content": delta.get("reasoning_content") or delta.get("reasoning"),
        "content": delta.get("content"),
    }
    for key, piece in pieces.items():
        text = (piece or "").translate(CONTROLS)
        if not said[key]:
            text = text.lstrip()
            if text and any(said.values()):
                console.print("\n")
            if text and not console.is_terminal:
                console.print("thinking: " if key == "reasoning_content" else "answer: ", end="")
        said[key] += text
        style = "dim italic" if key == "reasoning_content" else None
        console.print(text, end="", style=style, markup=False, emoji=False)


def save(file: str, messages: list[dict]) -> Path:
    """A conversation as one more row of a .jsonl file, as training reads it. Raises ToolkitError."""
    path = Path(file).expanduser()
    if not messages:
        raise ToolkitError("nothing was said yet")
    if path.suffix != ".jsonl":
        raise ToolkitError(f"/save {file}: expected a .jsonl file, as in /save talk.jsonl")
    append_rows(path, [{"messages": messages}])
    return path
