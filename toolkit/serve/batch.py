"""A file of prompts becomes a file of replies, in one mode or both; stopped at any moment, it goes on where it was.

answer_file("outputs/pocket", "prompts.txt", "replies.jsonl", mode="both")
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from toolkit.files import ToolkitError
from toolkit.generate import SAMPLING, Reply, generate
from toolkit.model import load_run, run_folder
from toolkit.recipe import Source
from toolkit.sources import open_rows
from toolkit.sources.formats import FORMATS, canonical
from toolkit.sources.readers import Rejected

MODES = {"both": tuple(SAMPLING), **{mode: (mode,) for mode in SAMPLING}}
SETTINGS = ("run", "seed", "max_new_tokens")
"""What every reply carries, so that replies of two kinds never end up in one file."""


def answer_file(
    run: str | Path,
    prompts_file: str | Path,
    replies_file: str | Path,
    mode: str = "both",
    *,
    max_new_tokens: int = 1024,
    batch_size: int = 16,
    seed: int = 3407,
    loaded: tuple | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Answers every prompt that has no reply yet; returns {"prompts", "there", "answered", "unfinished"}.

    A batch is written in one piece and put on the disk before the next begins, so `kill -9` costs one batch at most. A
    batch that is answered again gives the replies it gave before: the seed goes with the row. `loaded` is a (model,
    tokenizer) of the run. Raises ToolkitError for a row that is no prompt or is too long, before anything is answered.
    """
    if mode not in MODES:
        raise ToolkitError(f"mode {mode!r}: expected {', '.join(MODES)}")
    folder, prompts, replies = run_folder(run), read_prompts(prompts_file), Path(replies_file)
    if replies.resolve() == Path(prompts_file).resolve():
        raise ToolkitError(f"{replies}: is the file of prompts; name another for the replies")
    settings = dict(zip(SETTINGS, (folder.resolve().name, seed, max_new_tokens), strict=True))
    there = read_replies(replies, prompts, settings)
    missing = [(m, batch) for m in MODES[mode] for batch in _batches(prompts, batch_size) if _open(batch, m, there)]
    counts = {"prompts": len(prompts), "there": len(there), "answered": 0, "unfinished": 0}
    if not missing:
        return counts
    model, tokenizer = loaded or load_run(folder)
    _check_lengths(prompts, MODES[mode], model, tokenizer, prompts_file)
    total = sum(len(_open(batch, m, there)) for m, batch in missing)
    replies.parent.mkdir(parents=True, exist_ok=True)
    with open(replies, "ab") as file:
        for m, batch in missing:
            answers = _answer(model, tokenizer, prompts, batch, m, max_new_tokens, seed)
            rows = [_row(i, prompts[i], m, answers[i], settings) for i in _open(batch, m, there)]
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())
            counts["answered"] += len(rows)
            counts["unfinished"] += sum(not row["finished"] for row in rows)
            if progress:
                progress(counts["answered"], total)
    return counts


def read_prompts(path: str | Path) -> list[dict]:
    """[{"messages", "tools" if any}] of a file: a .txt has one prompt a line; jsonl, json, csv and parquet have them in
    columns named as in training (prompt, query, instruction, problem, question, or messages), with or without answers.

    Raises ToolkitError that names the row which is no prompt."""
    path = Path(path)
    if not path.is_file():
        raise ToolkitError(
            f"{path}: no such file: expected prompts as .txt (one a line), .jsonl, .json, .csv or .parquet"
        )
    if path.suffix == ".txt":
        prompts = list(_lines(path))
    else:
        rows = open_rows(Source(str(path)))
        drawn = sorted(rows.draw(0), key=lambda numbered: numbered[0])
        prompts = [_prompt(row, rows.where(number)) for number, row in drawn]
    if not prompts:
        raise ToolkitError(f"{path}: holds no prompts")
    return prompts


def _lines(path: Path) -> Iterator[dict]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ToolkitError(f"{path}: not UTF-8 at byte {error.start}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _prompt({"prompt": line.strip()}, f"{path} line {number}")


def _prompt(row: dict | Rejected, where: str) -> dict:
    """The conversation up to its last answer. The rules are those of training rows, so a stand-in answer is put in
    where the row has none and taken away again."""
    try:
        if isinstance(row, Rejected):
            raise row
        format, answered = _with_answer(row)
        conversation = canonical(answered, format, {}, {})
    except Rejected as rejected:
        raise ToolkitError(f"{where}: {rejected.detail}") from rejected
    asked = {"messages": conversation["messages"][:-1]}
    return asked | ({"tools": conversation["tools"]} if "tools" in conversation else {})


def _with_answer(row: dict) -> tuple[str, dict]:
    stand_in = "-"
    for name, columns in FORMATS.items():
        listed = columns.get("messages")
        if listed and type(row.get(listed)) is list:
            turns = row[listed]
            last = turns[-1] if turns and type(turns[-1]) is dict else {}
            if last.get("role", last.get("from")) in ("assistant", "gpt"):
                return name, row
            turn = (
                {"role": "assistant", "content": stand_in} if "from" not in last else {"from": "gpt", "value": stand_in}
            )
            return name, {**row, listed: [*turns, turn]}
        if not listed and columns["user"] in row:
            return name, {**row, columns["assistant"]: stand_in}
    if "question" in row:
        return _with_answer({**{k: v for k, v in row.items() if k != "question"}, "prompt": row["question"]})
    names = [c.get("messages", c.get("user")) for c in FORMATS.values()]
    raise Rejected("missing_field", f"the fields are {', '.join(row)}: expected one of {', '.join(names)}")


def read_replies(path: Path, prompts: list[dict], settings: dict) -> set[tuple[int, str]]:
    """(index, mode) of the replies in a file; a last line that a kill cut short is taken off.

    Raises ToolkitError for replies to other prompts or of another run."""
    if not path.is_file():
        return set()
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    there = set()
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            key = (row["row"] - 1, row["mode"])
            same = row["messages"] == prompts[key[0]]["messages"]
            given = {name: row[name] for name in SETTINGS}
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ToolkitError(
                f"{path} line {number}: no reply to these prompts ({error!r}): name another file"
            ) from error
        if not same or given != settings:
            found = (
                "another prompt" if not same else ", ".join(f"{k} {v}" for k, v in given.items() if settings[k] != v)
            )
            raise ToolkitError(f"{path} line {number}: a reply with {found}: name another file, or move this one away")
        there.add(key)
    if len(whole) < len(raw):
        os.truncate(path, len(whole))
    return there


def _batches(prompts: list[dict], size: int) -> list[range]:
    return [range(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size)]


def _open(batch: Sequence[int], mode: str, there: set[tuple[int, str]]) -> list[int]:
    return [i for i in batch if (i, mode) not in there]


def _check_lengths(prompts: list[dict], modes: tuple, model, tokenizer, path) -> None:
    context = model.config.max_position_embeddings
    for mode in modes:
        for number, prompt in enumerate(prompts, start=1):
            options = {
                "tools": prompt.get("tools"),
                "enable_thinking": mode == "thinking",
                "add_generation_prompt": True,
            }
            text = tokenizer.apply_chat_template(prompt["messages"], tokenize=False, **options)
            if (found := len(tokenizer(text, add_special_tokens=False)["input_ids"])) >= context:
                raise ToolkitError(
                    f"{path}: prompt {number} has {found} tokens, the model was loaded for {context}: shorten it"
                )


def _answer(model, tokenizer, prompts, batch: range, mode: str, max_new_tokens: int, seed: int) -> dict[int, Reply]:
    """Replies of a whole batch by index. Prompts with different tools are generated apart, as one call takes one set."""
    groups: dict[str, list[int]] = {}
    for i in batch:
        groups.setdefault(json.dumps(prompts[i].get("tools")), []).append(i)
    answers = {}
    for rows in groups.values():
        asked, tools = [prompts[i]["messages"] for i in rows], prompts[rows[0]].get("tools")
        options = {"max_new_tokens": max_new_tokens, "seed": seed + rows[0], "batch_size": len(rows), "tools": tools}
        answers |= zip(rows, generate(model, tokenizer, asked, mode, **options), strict=True)
    return answers


def _row(index: int, prompt: dict, mode: str, reply: Reply, settings: dict) -> dict:
    answer = {"reasoning": reply.reasoning, "answer": reply.answer}
    tokens = {"tokens": reply.reasoning_tokens + reply.answer_tokens, "reasoning_tokens": reply.reasoning_tokens}
    asked = {"row": index + 1, "prompt": prompt["messages"][-1]["content"], "mode": mode}
    return {**asked, **answer, **tokens, "finished": reply.finished, "messages": prompt["messages"], **settings}
