"""A file of prompts becomes a file of replies, in every mode or in one; the same call resumes it.

answer_file("pocket", "prompts.txt", "replies.jsonl", mode="non_thinking")
"""

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.data.chat import Chat, load_chat
from toolkit.data.formats import FORMATS
from toolkit.data.render import check_special_tokens
from toolkit.data.sources import Rejected, canonical, open_rows
from toolkit.export.llama import Engine, Refused
from toolkit.family import MODES
from toolkit.files import ToolkitError, append_rows, lock, read_jsonl, sha256
from toolkit.recipe import Source
from toolkit.records import Conversation
from toolkit.serving.client import ask, chat_body, open_engine
from toolkit.serving.engine import SLOTS, modes_of_run
from toolkit.training.model import check_adapter, run_folder

MOVE = "name another file, or move this one away"
BEGINNING = b'{"row": '
"""How the line of a reply begins."""
Row = dict[str, Any]
Place = tuple[int, str]
"""(row number, mode) of a reply."""


@dataclass
class Counts:
    """What became of a file of prompts."""

    prompts: int
    rejected: list[str]
    """Why rows were left out, or what the server answered instead of a reply."""
    there: int = 0
    answered: int = 0
    unfinished: int = 0
    """Replies that ended at the limit of tokens."""


@dataclass(frozen=True)
class Job:
    """How prompts are answered; what decides a reply stands in each line of the file."""

    engine: Engine
    settings: Row
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when nobody waits for replies any more."""

    def reply(self, number: int, mode: str, prompt: Row) -> Row | Refused:
        """The line of one reply, or why the server refuses it."""
        limit = self.settings["max_new_tokens"]
        body = chat_body(self.engine, self.settings["run"], mode, prompt["messages"], limit)
        # without a cached prefix a reply does not depend on those before it
        body |= {"seed": seed_of(self.settings["seed"], number, mode), "cache_prompt": False}
        body |= {"tools": prompt["tools"]} if "tools" in prompt else {}
        try:
            answer = ask(self.engine, body, stop=self.stop)
        except Refused as error:
            return error
        return {
            "row": number,
            "prompt": prompt["messages"][-1]["content"],
            "mode": mode,
            "reasoning": answer.reasoning.strip(),
            "answer": answer.content.strip(),
            "tool_calls": answer.tool_calls,
            "tokens": answer.tokens,
            "finished": not answer.is_cut,
            **prompt,
            **self.settings,
        }


def answer_file(
    run: str | Path, prompts_file: str | Path, replies_file: str | Path, mode: str = "both", *,
    max_new_tokens: int = 1024, clients: int = SLOTS, seed: int = 3407, scale: float = 1.0,
    progress: Callable[[int, int], None] = lambda *_: None, **server: Any,
) -> Counts:  # fmt: skip
    """Answer every prompt that has no reply yet, `clients` at a time; `server` is what `open_engine` takes.

    Replies are appended in order, each flushed to the disk, so `kill -9` costs those being generated. A reply's seed
    depends on `seed`, its row and its mode, whatever is there already. Raises ToolkitError, before anything is answered,
    where no row is a prompt, the file holds something else, or another process is writing to it."""
    folder = run_folder(run).resolve()
    replies = Path(replies_file).resolve()
    if mode not in ("both", *MODES):
        raise ToolkitError(f"mode {mode!r}: expected both, {' or '.join(MODES)}")
    # replies are appended: the prompts would grow by them
    if replies == Path(prompts_file).resolve():
        raise ToolkitError(f"{replies}: is the file of prompts; name another for the replies")
    modes = modes_of_run(folder) if mode == "both" else (mode,)
    if mode not in ("both", *modes_of_run(folder)):
        raise ToolkitError(f"mode {mode!r}: this model only answers {modes_of_run(folder)[0]}")
    prompts, rejected = read_prompts(prompts_file, load_chat(str(folder / "adapter")))
    check_adapter(folder)
    # a name may have been trained again
    adapter = sha256(folder / "adapter" / "adapter_model.safetensors")[:8]
    settings = {"run": folder.name, "adapter": adapter, "scale": scale, "seed": seed, "max_new_tokens": max_new_tokens}
    with lock(replies.with_name(f"{replies.name} (replies)"), "generate"):
        there = read_replies(replies, prompts, settings)
        counts = Counts(len(prompts), rejected, there=len(there))
        missing = [(number, mode) for mode in modes for number in prompts if (number, mode) not in there]
        # a file that is finished is known without loading a model
        if missing:
            job = Job(open_engine(folder, scale=scale, **server), settings)
            for place, reply in zip(missing, replies_of(job, missing, prompts, clients), strict=True):
                keep(counts, replies, place, reply)
                progress(counts.answered, len(missing))
    return counts


def replies_of(job: Job, places: list[Place], prompts: dict[int, Row], clients: int) -> Iterable[Row | Refused]:
    """The replies in the order of `places`, several being generated at once."""
    pool = ThreadPoolExecutor(clients)
    try:
        yield from pool.map(lambda place: job.reply(place[0], place[1], prompts[place[0]]), places)
    finally:
        # after Ctrl-C nothing more begins, and what is being generated ends with its next token
        job.stop.set()
        pool.shutdown(wait=False, cancel_futures=True)


def keep(counts: Counts, replies: Path, place: Place, reply: Row | Refused) -> None:
    """Append a reply to the file, or note why there is none."""
    if isinstance(reply, Refused):
        counts.rejected.append(f"row {place[0]}, {place[1]}: {reply}")
        return
    append_rows(replies, [reply])
    counts.answered += 1
    counts.unfinished += not reply["finished"]


def seed_of(seed: int, number: int, mode: str) -> int:
    """The seed of one reply, as 32 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number} {mode}".encode()).digest()[:4], "big")


# --- the two files ---------------------------------------------------------------------------------------------------


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
    prompts: dict[int, Row] = {}
    rejected: list[str] = []
    drawn = text_lines(path) if path.suffix == ".txt" else open_rows(Source(str(path))).draw(0)
    # drawn rows come shuffled; people expect the file's order
    for number, row in sorted(drawn, key=lambda numbered: numbered[0]):
        try:
            prompt = prompt_of(row)
            if chat:
                check_special_tokens(prompt, chat)
            prompts[number] = dict(prompt)
        except Rejected as error:
            rejected.append(f"{path}, row {number}: {error.detail}")
    if not prompts:
        raise ToolkitError(rejected[0] if rejected else f"{path}: holds no prompts")
    return prompts, rejected


def text_lines(path: Path) -> list[tuple[int, Row]]:
    """(number, row) of the lines that are not empty. Raises ToolkitError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ToolkitError(f"{path}: not UTF-8 at byte {error.start}: save it as UTF-8") from error
    # not splitlines(), which also splits at form feeds and at line separators inside a text
    lines = enumerate(re.split(r"\r\n|\r|\n", text), start=1)
    return [(number, {"prompt": line.strip()}) for number, line in lines if line.strip()]


def prompt_of(row: Row | Rejected) -> Conversation:
    """The conversation up to its last answer. Training's rules apply: a stand-in answer is put in where there is none,
    and taken away again. Raises Rejected."""
    if isinstance(row, Rejected):
        raise row
    row = {"prompt" if name == "question" else name: value for name, value in row.items()}
    columns = {kind: names.get("messages") or names["user"] for kind, names in FORMATS.items()}
    kind = next((kind for kind, column in columns.items() if column in row), None)
    if kind is None:
        expected = ", ".join(dict.fromkeys(columns.values()))
        raise Rejected("missing_field", f"the fields are {', '.join(row)}: expected one of {expected}")
    column = columns[kind]
    row |= {FORMATS[kind]["assistant"]: "-"} if "assistant" in FORMATS[kind] else {column: answered(row[column])}
    conversation = canonical(row, kind, {}, {})
    conversation.pop("expected_answer", None)
    conversation["messages"].pop()
    return conversation


def answered(turns: Any) -> Any:
    """Turns with a stand-in answer at their end, unless they end in an answer or are none."""
    last = turns[-1] if isinstance(turns, list) and turns else None
    if not isinstance(last, dict) or last.get("role", last.get("from")) in ("assistant", "gpt"):
        return turns
    return [*turns, {"from": "gpt", "value": "-"} if "from" in last else {"role": "assistant", "content": "-"}]


def read_replies(path: Path, prompts: dict[int, Row], settings: Row) -> set[Place]:
    """(row number, mode) of the replies in a file, after cutting off a last line that a kill left unfinished.

    Raises ToolkitError, and leaves the file as it is, when it holds anything else, or replies to other prompts or with
    other settings."""
    if not path.is_file():
        return set()
    *lines, unfinished = path.read_bytes().split(b"\n")
    if unfinished[: len(BEGINNING)] != BEGINNING[: len(unfinished)]:
        raise ToolkitError(f"{path}, line {len(lines) + 1}: not the beginning of a reply: {MOVE}")
    for number, row in enumerate(read_jsonl(path), start=1):
        row = row if isinstance(row, dict) else {}
        prompt = prompts.get(row.get("row", -1), {})
        expected = settings | {key: prompt.get(key) for key in ("messages", "tools")}
        if other := [name for name, value in expected.items() if row.get(name) != value]:
            raise ToolkitError(f"{path}, line {number}: a reply to other {', '.join(other)}: {MOVE}")
    # only now is it known to be a file of replies
    os.truncate(path, path.stat().st_size - len(unfinished))
    return {(row["row"], row["mode"]) for row in read_jsonl(path)}
