"""A file of prompts becomes a file of replies, in every mode or in one; the same call resumes it.

answer_file("pocket", "prompts.txt", "replies.jsonl", mode="non_thinking")
"""

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from toolkit.data.chat import Chat
from toolkit.data.formats import FORMATS
from toolkit.data.render import check_special_tokens
from toolkit.data.sources import Rejected, canonical, open_rows
from toolkit.files import ToolkitError, lock, read_text, sha256
from toolkit.recipe import Source
from toolkit.records import Conversation, JsonObject
from toolkit.serving.client import answer_all, open_engine
from toolkit.serving.engine import SLOTS, chat_of, modes_of_run
from toolkit.training.base import ADAPTER_WEIGHTS
from toolkit.training.model import check_adapter, run_folder
from toolkit.view.progress import Progress

Row = JsonObject
COLUMNS = {kind: names.get("messages") or names["user"] for kind, names in FORMATS.items()}
"""Where the prompt is, by format."""


def answer_file(
    run: str | Path,
    prompts_file: str | Path,
    replies_file: str | Path,
    mode: str = "both",
    *,
    max_new_tokens: int = 1024,
    clients: int = SLOTS,
    seed: int = 3407,
    scale: float = 1.0,
    console: Console | None = None,
    **server: Any,
) -> list[str]:
    """Answer every prompt that has no reply yet, `clients` at a time; `server` is what `open_engine` takes. Returns why
    rows have none: they are no prompts, or the server refuses them.

    A reply's seed depends on `seed` and its row, whatever is there already. Raises ToolkitError, before anything is
    answered, where no row is a prompt, the file holds something else, or another process is writing to it."""
    folder = run_folder(run).resolve()
    replies = Path(replies_file).resolve()
    # replies are appended: the prompts would grow by them
    if replies == Path(prompts_file).resolve():
        raise ToolkitError(f"{replies}: is the file of prompts; name another for the replies")
    modes = modes_of_run(folder)
    if mode not in ("both", *modes):
        raise ToolkitError(f"mode {mode!r}: expected both, {' or '.join(modes)}, as this model has")
    prompts, rejected = read_prompts(prompts_file, chat_of(folder))
    check_adapter(folder)
    # a name may have been trained again
    adapter = sha256(folder / "adapter" / ADAPTER_WEIGHTS)[:8]
    settings = {"run": folder.name, "adapter": adapter, "scale": scale, "seed": seed, "max_new_tokens": max_new_tokens}
    requests = [
        {"row": number, "mode": wanted, **prompt, **settings}
        for wanted in (modes if mode == "both" else [mode])
        for number, prompt in prompts.items()
    ]
    open_server = partial(open_engine, folder, scale=scale, **server)
    bar = Progress(console or Console(quiet=True), "answering", len(requests))
    with lock(replies.with_name(f"{replies.name} (replies)"), "generate"), bar:
        return rejected + answer_all(requests, replies, open_server, clients, bar)


def read_prompts(path: str | Path, chat: Chat | None = None) -> tuple[dict[int, Row], list[str]]:
    """({row number: {"messages", "tools" if any}}, why rows were left out) of a file.

    A .txt has one prompt a line; .jsonl, .json, .csv and .parquet have them in columns named as in training (prompt,
    query, instruction, problem, question, or messages), with or without answers. A text that `chat` would read as structure
    is left out, as a server does not. Raises ToolkitError."""
    path = Path(path)
    if not path.is_file():
        raise ToolkitError(
            f"{path}: no such file: expected prompts as .txt (one a line), .jsonl, .json, .csv, .parquet"
        )
    rows: dict[int, Any]
    if path.suffix == ".txt":
        # not splitlines(), which also splits at form feeds and at line separators inside a text
        lines = enumerate(read_text(path).split("\n"), start=1)
        rows = {number: {"prompt": line.strip()} for number, line in lines if line.strip()}
    else:
        rows = dict(open_rows(Source(str(path))).draw(0))
    prompts: dict[int, Row] = {}
    rejected = []
    # drawn rows come shuffled; people expect the file's order
    for number in sorted(rows):
        try:
            prompt = prompt_of(rows[number])
            if chat:
                check_special_tokens(prompt, chat)
            prompts[number] = dict(prompt)
        except Rejected as error:
            rejected.append(f"{path}, row {number}: {error.detail}")
    if not prompts:
        raise ToolkitError(rejected[0] if rejected else f"{path}: holds no prompts")
    return prompts, rejected


def prompt_of(row: Row | Rejected) -> Conversation:
    """The conversation up to its last answer. Training's rules apply: a stand-in answer is put in where there is none,
    and taken away again. Raises Rejected."""
    if isinstance(row, Rejected):
        raise row
    row = {"prompt" if name == "question" else name: value for name, value in row.items()}
    kind = next((kind for kind, column in COLUMNS.items() if column in row), None)
    if kind is None:
        expected = ", ".join(dict.fromkeys(COLUMNS.values()))
        raise Rejected("missing_field", f"the fields are {', '.join(row)}: expected one of {expected}")
    turns = row[COLUMNS[kind]]
    if answer := FORMATS[kind].get("assistant"):
        row[answer] = "-"
    elif isinstance(turns, list) and not is_answered(turns):
        row[COLUMNS[kind]] = [*turns, {"role": "assistant", "content": "-"}]
    conversation = canonical(row, kind, {}, {})
    conversation.pop("expected_answer", None)
    conversation["messages"].pop()
    return conversation


def is_answered(turns: list[Any]) -> bool:
    """Whether the last of some turns is an answer; what is no turn is refused where turns are read."""
    last = turns[-1] if turns else None
    return not isinstance(last, dict) or last.get("role", last.get("from")) in ("assistant", "gpt")
