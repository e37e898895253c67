"""A file of prompts becomes a file of replies, in every mode or in one; the same call resumes it.

answer_file("pocket", "prompts.txt", "replies.jsonl", mode="non_thinking")
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

from toolkit.family import KINDS, MODES
from toolkit.files import ToolkitError, read_jsonl, write_error
from toolkit.generate import generate, prompts
from toolkit.model import load_run, run_folder
from toolkit.recipe import Source
from toolkit.render import load_chat
from toolkit.sources import Rejected, canonical, open_rows
from toolkit.sources.formats import FORMATS


def answer_file(
    run: str | Path, prompts_file: str | Path, replies_file: str | Path, mode: str = "both", *,
    max_new_tokens: int = 1024, batch_size: int = 16, seed: int = 3407, loaded: tuple | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict:  # fmt: skip
    """Answer every prompt that has no reply yet; returns {"prompts", "rejected", "there", "answered", "unfinished"}.

    Replies are appended a batch at a time, each flushed to the disk, so `kill -9` costs one batch at most; a batch that
    is answered again gives the same replies. `rejected` lists why rows were left out. `loaded` is a (model, tokenizer)
    of the run. Raises ToolkitError, before anything is answered, where no row is a prompt or one is too long."""
    folder, replies = run_folder(run).resolve(), Path(replies_file)
    modes = KINDS[load_chat(str(folder / "adapter")).kind] if mode == "both" else (mode,)
    if mode not in ("both", *MODES):
        raise ToolkitError(f"mode {mode!r}: expected both, {' or '.join(MODES)}")
    if replies.resolve() == Path(prompts_file).resolve():
        raise ToolkitError(f"{replies}: is the file of prompts; name another for the replies")
    asked, rejected = read_prompts(prompts_file)
    settings = {"run": folder.name, "seed": seed, "max_new_tokens": max_new_tokens}
    there = read_replies(replies, asked, settings)
    counts = {"prompts": len(asked), "rejected": rejected, "there": len(there), "answered": 0, "unfinished": 0}
    # Batches are cut from all prompts, answered or not, since a reply depends on the batch that it is seeded with
    batches = _batches(asked, batch_size)
    todo = [(m, batch) for m in modes for batch in batches if any((n, m) not in there for n in batch)]
    if not todo:
        return counts
    model, tokenizer = loaded or load_run(folder)
    _check_lengths(asked, modes, model, tokenizer, prompts_file)
    total = sum((n, m) not in there for m, batch in todo for n in batch)
    for m, batch in todo:
        options = {"max_new_tokens": max_new_tokens, "seed": seed + batch[0], "batch_size": len(batch)}
        tools = asked[batch[0]].get("tools")
        made = generate(model, tokenizer, [asked[n]["messages"] for n in batch], m, tools=tools, **options)
        rows = [
            _row(n, asked[n]["messages"], m, reply, settings)
            for n, reply in zip(batch, made, strict=True)
            if (n, m) not in there
        ]
        _append(replies, rows)
        counts["answered"] += len(rows)
        counts["unfinished"] += sum(not row["finished"] for row in rows)
        if progress:
            progress(counts["answered"], total)
    return counts


def _batches(asked: dict[int, dict], size: int) -> list[list[int]]:
    """Row numbers of prompts that are generated together: those that offer the same tools."""
    groups: dict[str, list[int]] = {}
    for number, prompt in asked.items():
        groups.setdefault(json.dumps(prompt.get("tools")), []).append(number)
    return [rows[i : i + size] for rows in groups.values() for i in range(0, len(rows), size)]


def _row(number: int, messages: list[dict], mode: str, reply, settings: dict) -> dict:
    tokens = {"tokens": reply.reasoning_tokens + reply.answer_tokens, "reasoning_tokens": reply.reasoning_tokens}
    said = {"reasoning": reply.reasoning, "answer": reply.answer, **tokens, "finished": reply.finished}
    return {"row": number, "prompt": messages[-1]["content"], "mode": mode, **said, "messages": messages, **settings}


def _append(path: Path, rows: list[dict]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise write_error(path, error) from error


def read_prompts(path: str | Path) -> tuple[dict[int, dict], list[str]]:
    """({row number: {"messages", "tools" if any}}, why rows were left out) of a file.

    A .txt has one prompt a line; .jsonl, .json, .csv and .parquet have them in columns named as in training (prompt,
    query, instruction, problem, question, or messages), with or without answers. Raises ToolkitError."""
    path, found, rejected = Path(path), {}, []
    if not path.is_file():
        raise ToolkitError(
            f"{path}: no such file: expected prompts as .txt (one a line), .jsonl, .json, .csv, .parquet"
        )
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ToolkitError(f"{path}: not UTF-8 at byte {error.start}: save it as UTF-8") from error
        drawn = [(n, {"prompt": line.strip()}) for n, line in enumerate(lines, start=1) if line.strip()]
    else:
        drawn = sorted(open_rows(Source(str(path))).draw(0), key=lambda numbered: numbered[0])
    for number, row in drawn:
        try:
            found[number] = _prompt(row)
        except Rejected as error:
            rejected.append(f"{path}, row {number}: {error.detail}")
    if not found:
        raise ToolkitError(rejected[0] if rejected else f"{path}: holds no prompts")
    return found, rejected


def _prompt(row: dict | Rejected) -> dict:
    """The conversation up to its last answer. Training's rules apply: a stand-in answer is put in where there is none,
    and taken away again. Raises Rejected."""
    if isinstance(row, Rejected):
        raise row
    row = {"prompt" if name == "question" else name: value for name, value in row.items()}
    for name, columns in FORMATS.items():
        turns = row.get(columns.get("messages"))
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            if turns[-1].get("role", turns[-1].get("from")) not in ("assistant", "gpt"):
                answer = {"from": "gpt", "value": "-"} if "from" in turns[-1] else {"role": "assistant", "content": "-"}
                row[columns["messages"]] = [*turns, answer]
        elif columns.get("user") in row:
            row[columns["assistant"]] = "-"
        else:
            continue
        conversation = canonical(row, name, {}, {})
        asked = {"messages": conversation["messages"][:-1]}
        return asked | ({"tools": conversation["tools"]} if "tools" in conversation else {})
    names = [c.get("messages", c.get("user")) for c in FORMATS.values()]
    raise Rejected("missing_field", f"the fields are {', '.join(row)}: expected one of {', '.join(names)}")


def read_replies(path: Path, asked: dict[int, dict], settings: dict) -> set[tuple[int, str]]:
    """(row number, mode) of the replies in a file, after cutting off a last line that a kill left unfinished.

    Raises ToolkitError for replies to other prompts or with other settings."""
    if not path.is_file():
        return set()
    raw = path.read_bytes()
    os.truncate(path, raw.rfind(b"\n") + 1)
    there = set()
    for number, row in enumerate(read_jsonl(path), start=1):
        given = {name: row.get(name) for name in settings}
        same = asked.get(row.get("row"), {}).get("messages") == row.get("messages")
        if not same or given != settings:
            other = ", ".join(f"{k} {v}" for k, v in given.items() if settings[k] != v) if same else "another prompt"
            raise ToolkitError(f"{path}, line {number}: a reply with {other}: name another file, or move this one away")
        there.add((row["row"], row["mode"]))
    return there


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
