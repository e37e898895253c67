"""The base model's own answers, verified, as a source any recipe can mix in: it keeps what training would make it forget.

    replay(recipe.load("data_recipes/hybrid.yaml"), count=100)     `python -m toolkit replay RECIPE --count 100`

Prompts are answered in thinking and in non-thinking mode. Kept are replies that ended by themselves and are what their mode
promises (`toolkit/score.py`), and where the prompt's expected answer is known, only right ones. The rows are what the base
says already, so training on them costs little and pulls back what the other rows push away.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from toolkit.evaluate.score import Judge, has_tags, leaks, thinks
from toolkit.family import MODES
from toolkit.files import ROOT, ToolkitError, outputs
from toolkit.generate import Reply
from toolkit.mix import Mix, prompt_key
from toolkit.recipe import Recipe, Source
from toolkit.render import examples, load_chat
from toolkit.sources import Rejected, conversations

BATCH = 32
"""Prompts asked at a time, in each mode."""
GIVE_UP = 20
"""Replies per wanted row after which a mode is given up: a base that is right less often has little to replay there."""

Answer = Callable[[Sequence[list[dict]], str, int], list[Reply]]
"""(prompts, mode, seed) → a reply each."""


@dataclass
class Kept:
    """Verified rows of both modes, and why others were dropped."""

    rows: list[dict] = field(default_factory=list)
    asked: Counter = field(default_factory=Counter)
    dropped: Counter = field(default_factory=Counter)


def replay(
    recipe: Recipe,
    *,
    prompts: str | Path | None = None,
    count: int = 100,
    out: str | Path | None = None,
    answer: Answer | None = None,
    console=None,
) -> Path:
    """Write `count` verified rows, half of them in each mode; returns the file (data_recipes/-ready messages JSONL).

    `prompts` is any file a source can be (by default: rows of the recipe's own sources that it does not train on, those with
    fraction 0 included). `answer` stands in for the base model in tests. Raises ToolkitError when nothing was kept.
    """
    from toolkit.run import compile_mix, default_console, resolve

    console = console or default_console()
    recipe = resolve(recipe, console)
    mixed = compile_mix(recipe, console)
    found = _asked(_given(prompts, recipe) if prompts else unseen(recipe, mixed), mixed)
    kept = collect(found, answer or base_answers(recipe), count, recipe.data.seed)
    if not kept.rows:
        raise ToolkitError(
            f"no reply was kept: asked {dict(kept.asked)}, dropped {dict(kept.dropped)}. Give other --prompts"
        )
    path = Path(out) if out else outputs() / f"{recipe.name}-replay.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept.rows), encoding="utf-8")
    console.print(summary(kept, count))
    console.print(advice(path, kept.rows, recipe, mixed))
    return path


def unseen(recipe: Recipe, mixed: Mix) -> Iterator[dict]:
    """Conversations of the recipe's sources that the mix neither trains on nor holds out, the sources in turn."""
    used = {(row.source, row.number) for row in (*mixed.train, *mixed.validation)}
    streams = [
        _rows(source, recipe, {number for name, number in used if name == source.name})
        for source in recipe.data.sources
    ]
    while streams:
        for stream in list(streams):
            row = next(stream, None)
            if row is None:
                streams.remove(stream)
            else:
                yield row


def _given(prompts: str | Path, recipe: Recipe) -> Iterator[dict]:
    return _rows(Source(str(prompts)), recipe, set())


def _rows(source: Source, recipe: Recipe, used: set[int]) -> Iterator[dict]:
    for number, row in conversations(source, recipe.data.seed, recipe.data.placeholders):
        if number not in used and not isinstance(row, Rejected):
            yield row


def _asked(rows: Iterator[dict], mixed: Mix) -> Iterator[dict]:
    """{"messages" up to the last user turn, "expected_answer" if known}, each prompt once; none that is held out."""
    seen = {prompt_key(row.conversation) for row in mixed.validation}
    for row in rows:
        last = max((i for i, m in enumerate(row["messages"]) if m["role"] == "user"), default=None)
        if last is None or row.get("tools"):  # a call is verified by its tool, which is not here
            continue
        messages = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in row["messages"][: last + 1]]
        key = prompt_key({"messages": messages})
        if key not in seen:
            seen.add(key)
            yield {**row, "messages": messages}


def collect(prompts: Iterator[dict], answer: Answer, count: int, seed: int) -> Kept:
    """Ask batch by batch, in both modes, until each has its half, gives too little, or the prompts run out."""
    kept, have = Kept(), Counter()
    wanted = {"thinking": count - count // 2, "non_thinking": count // 2}
    with Judge() as judge:
        while batch := list(islice(prompts, BATCH)):
            open_ = [m for m in MODES if have[m] < wanted[m] and kept.asked[m] < GIVE_UP * max(wanted[m], BATCH)]
            if not open_:
                break
            for mode in open_:
                replies = answer([p["messages"] for p in batch], mode, seed + kept.asked[mode])
                for prompt, reply in zip(batch, replies, strict=True):
                    kept.asked[mode] += 1
                    if why := wrong(reply, mode, prompt.get("expected_answer"), judge):
                        kept.dropped[why] += 1
                    elif have[mode] < wanted[mode]:
                        have[mode] += 1
                        kept.rows.append(row_of(prompt, reply))
    return kept


def wrong(reply: Reply, mode: str, expected: str | None, judge: Judge) -> str:
    """Why a reply must not be replayed; empty when it may."""
    if not reply.finished:
        return "unfinished"
    if mode == "thinking" and not thinks(reply):
        return "no_whole_think_block"
    if mode == "non_thinking" and (not reply.answer or has_tags(reply.text) or leaks(reply)):
        return "empty_or_leaking"
    return "" if expected is None or judge.right(reply.answer, expected) else "wrong_answer"


def row_of(prompt: dict, reply: Reply) -> dict:
    """A row in the `messages` format; one without reasoning_content is a non-thinking one."""
    said = {"role": "assistant", "content": reply.answer}
    if reply.reasoning:
        said["reasoning_content"] = reply.reasoning
    expected = {"expected_answer": prompt["expected_answer"]} if "expected_answer" in prompt else {}
    return {"messages": [*prompt["messages"], said], **expected}


def base_answers(recipe: Recipe) -> Answer:
    """The base model's answers, sampled with Qwen3's values for each mode."""
    from toolkit.generate import generate
    from toolkit.model import load_base

    model, tokenizer = load_base(recipe.model)
    limit = recipe.evaluate.max_new_tokens
    return lambda prompts, mode, seed: generate(model, tokenizer, prompts, mode, max_new_tokens=limit, seed=seed)


def summary(kept: Kept, count: int) -> str:
    """How many were asked, kept and dropped."""
    thinking = sum("reasoning_content" in row["messages"][-1] for row in kept.rows)
    dropped = ", ".join(f"{why} {n}" for why, n in kept.dropped.most_common()) or "none"
    return (
        f"kept {len(kept.rows)} of {sum(kept.asked.values())} replies ({count} wanted): {thinking} thinking, "
        f"{len(kept.rows) - thinking} non-thinking; dropped: {dropped}"
    )


def advice(path: Path, rows: list[dict], recipe: Recipe, mixed: Mix) -> str:
    """The line for a recipe's data.sources, with the fraction at which every row is used once; a few rows
    repeat in place of those held out, or the whole mix would shrink."""
    chat = load_chat(recipe.model.model_name, recipe.model.revision)
    texts = [example for row in rows for example in examples(row, "auto", chat)]
    ids = chat.encode([part for e in texts for part in (e.prompt, e.completion)])
    sizes = {
        "examples": len(texts),
        "supervised_tokens": sum(map(len, ids[1::2])),
        "tokens": sum(map(len, ids)),
    }
    unit = recipe.data.unit
    share = sizes[unit] / (recipe.data.budget or mixed.report["total"][unit])
    fraction = math.floor(1000 * min(1.0, max(share, 0.001))) / 1000
    shown = path.relative_to(ROOT) if path.is_absolute() and path.is_relative_to(ROOT) else path
    return (
        f"{path}: {sizes[unit]:,} {unit.replace('_', ' ')}. To mix it in, add to data.sources (and take as much off the others, "
        f"the sum is 1):\n    - {{path: {shown}, format: messages, mode: auto, fraction: {fraction:g}, max_repeats: 2}}"
    )
