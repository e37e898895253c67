"""A file of prompts becomes a file of replies, in every mode or in one; the same call resumes it.

answer_file("pocket", "prompts.txt", "replies.jsonl", mode="non_thinking")
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from toolkit.data.formats import FORMATS
from toolkit.data.render import load_chat
from toolkit.data.sources import Rejected, canonical, open_rows
from toolkit.evaluation.generate import generate, prompts
from toolkit.family import KINDS, MODES
from toolkit.files import ToolkitError, append_rows, read_jsonl, sha256
from toolkit.recipe import Source
from toolkit.training.model import check_adapter, load_run, run_folder

MOVE = "name another file, or move this one away"


def answer_file(
    run: str | Path, prompts_file: str | Path, replies_file: str | Path, mode: str = "both", *,
    max_new_tokens: int = 1024, batch_size: int = 16, seed: int = 3407, loaded: tuple | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict:  # fmt: skip
    """Answer every prompt that has no reply yet; returns {"prompts", "rejected", "there", "answered", "unfinished"}.

    Replies are appended a batch at a time, each flushed to the disk, so `kill -9` costs one batch at most. A reply
    depends on the seed and the row's number, whatever is there already. `rejected` lists why rows were left out.
    `loaded` is a (model, tokenizer) of the run. Raises ToolkitError, before anything is answered, where no row is a
    prompt or one is too long."""
    folder, replies = run_folder(run).resolve(), Path(replies_file)
    if mode not in ("both", *MODES):
        raise ToolkitError(f"mode {mode!r}: expected both, {' or '.join(MODES)}")
    # replies are appended: the prompts would grow by them
    if replies.resolve() == Path(prompts_file).resolve():
        raise ToolkitError(f"{replies}: is the file of prompts; name another for the replies")
    modes = KINDS[load_chat(str(folder / "adapter")).kind] if mode == "both" else (mode,)
    asked, rejected = read_prompts(prompts_file)
    check_adapter(folder)
    adapter = sha256(folder / "adapter" / "adapter_model.safetensors")[:8]  # the same name may have been trained again
    settings = {"run": folder.name, "adapter": adapter, "seed": seed, "max_new_tokens": max_new_tokens}
    there = read_replies(replies, asked, settings)
    counts = {"prompts": len(asked), "rejected": rejected, "there": len(there), "answered": 0, "unfinished": 0}
    missing = [(m, {n: prompt for n, prompt in asked.items() if (n, m) not in there}) for m in modes]
    batches = [(m, batch) for m, rows in missing for batch in _batches(rows, batch_size)]
    if not batches:
        return counts
    # only now: a file that is finished is known without loading a model
    model, tokenizer = loaded or load_run(folder)
    _check_lengths(asked, modes, model, tokenizer, prompts_file)
    total = sum(len(batch) for _, batch in batches)
    for m, batch in batches:
        made = generate(
            model, tokenizer, [asked[n]["messages"] for n in batch], m, tools=asked[batch[0]].get("tools"),
            max_new_tokens=max_new_tokens, seed=seed, numbers=batch, batch_size=len(batch),
        )  # fmt: skip
        answers = zip(batch, made, strict=True)
        append_rows(replies, [_row(n, asked[n], m, reply, settings) for n, reply in answers])
        counts["answered"] += len(batch)
        counts["unfinished"] += sum(not reply.finished for reply in made)
        progress(counts["answered"], total)
    return counts


def _batches(asked: dict[int, dict], size: int) -> list[list[int]]:
    """Row numbers of prompts that are generated together: those that offer the same tools."""
    # `generate` takes one set of tools for all of its prompts
    groups: dict[str, list[int]] = {}
    for number, prompt in asked.items():
        groups.setdefault(json.dumps(prompt.get("tools")), []).append(number)
    return [rows[i : i + size] for rows in groups.values() for i in range(0, len(rows), size)]


def _row(number: int, prompt: dict, mode: str, reply, settings: dict) -> dict:
    tokens = {"tokens": reply.reasoning_tokens + reply.answer_tokens, "reasoning_tokens": reply.reasoning_tokens}
    said = {"reasoning": reply.reasoning, "answer": reply.answer, **tokens, "finished": reply.finished}
    return {"row": number, "prompt": prompt["messages"][-1]["content"], "mode": mode, **said, **prompt, **settings}


def read_prompts(path: str | Path) -> tuple[dict[int, dict], list[str]]:
    """({row number: {"messages", "tools" if any}}, why rows were left out) of a file.

    A .txt has one prompt a line; .jsonl, .json, .csv and .parquet have them in columns named as in training (prompt,
    query, instruction, problem, question, or messages), with or without answers. Raises ToolkitError."""
    path, found, rejected = Path(path), {}, []
    if not path.is_file():
        raise ToolkitError(
            f"{path}: no such file: expected prompts as .txt (one a line), .jsonl, .json, .csv, .parquet"
        )
    drawn = _lines(path) if path.suffix == ".txt" else open_rows(Source(str(path))).draw(0)
    # drawn rows come shuffled; people expect the file's order
    for number, row in sorted(drawn, key=lambda numbered: numbered[0]):
        try:
            found[number] = _prompt(row)
        except Rejected as error:
            rejected.append(f"{path}, row {number}: {error.detail}")
    if not found:
        raise ToolkitError(rejected[0] if rejected else f"{path}: holds no prompts")
    return found, rejected


def _lines(path: Path) -> list[tuple[int, dict]]:
    try:
        # not splitlines(), which also splits at form feeds and at line separators inside a text
        lines = re.split(r"\r\n|\r|\n", path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ToolkitError(f"{path}: not UTF-8 at byte {error.start}: save it as UTF-8") from error
    return [(number, {"prompt": line.strip()}) for number, line in enumerate(lines, start=1) if line.strip()]


def _prompt(row: dict | Rejected) -> dict:
    """The conversation up to its last answer. Training's rules apply: a stand-in answer is put in where there is none,
    and taken away again. Raises Rejected."""
    if isinstance(row, Rejected):
        raise row
    row = {"prompt" if name == "question" else name: value for name, value in row.items()}
    columns = {name: of.get("messages") or of["user"] for name, of in FORMATS.items()}
    kind = next((name for name, column in columns.items() if column in row), None)
    if kind is None:
        expected = ", ".join(dict.fromkeys(columns.values()))
        raise Rejected("missing_field", f"the fields are {', '.join(row)}: expected one of {expected}")
    turns = row[columns[kind]]
    if "assistant" in FORMATS[kind]:
        row[FORMATS[kind]["assistant"]] = "-"
    elif turns and isinstance(turns, list) and isinstance(turns[-1], dict):
        answer = {"from": "gpt", "value": "-"} if "from" in turns[-1] else {"role": "assistant", "content": "-"}
        if turns[-1].get("role", turns[-1].get("from")) not in ("assistant", "gpt"):
            row[columns[kind]] = [*turns, answer]
    conversation = canonical(row, kind, {}, {})
    conversation.pop("expected_answer", None)
    conversation["messages"].pop()
    return conversation


def read_replies(path: Path, asked: dict[int, dict], settings: dict) -> set[tuple[int, str]]:
    """(row number, mode) of the replies in a file, after cutting off a last line that a kill left unfinished.

    Raises ToolkitError, and leaves the file as it is, when it holds anything else, or replies to other prompts or with
    other settings."""
    if not path.is_file():
        return set()
    *lines, rest = path.read_bytes().split(b"\n")
    begin = b'{"row": '
    if rest[: len(begin)] != begin[: len(rest)]:
        raise ToolkitError(f"{path}, line {len(lines) + 1}: not the beginning of a reply: {MOVE}")
    for number, row in enumerate(read_jsonl(path), start=1):
        row = row if isinstance(row, dict) else {}
        prompt = asked.get(row.get("row"), {})
        expected = settings | {key: prompt.get(key) for key in ("messages", "tools")}
        if other := [name for name, value in expected.items() if row.get(name) != value]:
            raise ToolkitError(f"{path}, line {number}: a reply to other {', '.join(other)}: {MOVE}")
    os.truncate(path, path.stat().st_size - len(rest))  # only now is it known to be a file of replies
    return {(row["row"], row["mode"]) for row in read_jsonl(path)}


def _check_lengths(asked: dict[int, dict], modes, model, tokenizer, path) -> None:
    """What does not fit is known before hours of generation, not after."""
    context = model.config.max_position_embeddings
    for mode in modes:
        for number, prompt in asked.items():
            _, [ids] = prompts(tokenizer, [prompt["messages"]], mode, prompt.get("tools"))
            if len(ids) >= context:
                raise ToolkitError(
                    f"{path}, row {number}: {len(ids)} tokens, the model was loaded for {context}: shorten it"
                )
