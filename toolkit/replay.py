"""Rehearsal data by self-distillation: the base model's own verified answers, as a source that counteracts forgetting.

from toolkit import recipe, replay; replay.replay(recipe.load("pocket"), count=100)

Prompts are answered in every mode of the model. Kept are replies that ended by themselves and do what their mode promises
(toolkit/evaluate/score.py), and where the prompt's expected answer is known, only correct ones. The base would have said
these rows anyway, so training on them costs little and keeps what other rows make it forget.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path

from toolkit.evaluate.score import Judge, has_tags, leaks, thinks
from toolkit.family import KINDS, mode_title
from toolkit.files import ROOT, ToolkitError, lock, outputs, write_jsonl
from toolkit.generate import Reply
from toolkit.mix import Mix, prompt_key
from toolkit.progress import Progress
from toolkit.recipe import Recipe, Source
from toolkit.render import Chat, examples, load_chat
from toolkit.run import compile_mix, default_console, resolve
from toolkit.sources import Rejected, conversations

BATCH = 32
"""Prompts asked at a time."""
MAX_PROMPTS_PER_ROW = 20
"""Prompts per wanted row after which a mode is given up: a base that is right less often has little to rehearse there."""

Answer = Callable[[Sequence[list[dict]], str, int], list[Reply]]
"""(prompts, mode, seed) → one reply each."""


def replay(
    recipe: Recipe, *, prompts: str | Path | None = None, count: int = 100, answer: Answer | None = None, console=None
) -> Path:
    """Write `count` verified rows, as many in each mode, to outputs/<name>-replay.jsonl; returns the file.

    `prompts` is any file that a source can be; by default rows of the recipe's own sources that it does not train on,
    those with fraction 0 included. `answer` stands in for the base model in tests. Raises ToolkitError when no reply was
    kept.
    """
    console = console or default_console()
    recipe = resolve(recipe, console)
    path = outputs() / f"{recipe.name}-replay.jsonl"
    with lock(path, "replay"), Progress(console, "verified rows", total=count) as progress:
        mixed, chat = compile_mix(recipe, console), load_chat(recipe.model.model_name, recipe.model.revision)
        sources = [_rows(Source(str(prompts)), recipe, set())] if prompts else unused(recipe, mixed)
        asked = list(islice(_prompts(sources, mixed), MAX_PROMPTS_PER_ROW * count))
        answer, modes, rows, dropped = answer or base_answers(recipe), KINDS[chat.kind], [], Counter()
        for i, mode in enumerate(modes):
            wanted = (count + len(modes) - 1 - i) // len(modes)
            kept, why = collect(asked, answer, mode, wanted, recipe.data.seed, progress, hybrid=len(modes) > 1)
            console.print(f"{mode_title(mode)}: kept {len(kept)} of {wanted} wanted")
            rows, dropped = rows + kept, dropped + why
        reasons = ", ".join(f"{why} {n}" for why, n in dropped.most_common()) or "none"
        if not rows:
            raise ToolkitError(f"no reply was kept; dropped: {reasons}. Give other --prompts, or another base model")
        write_jsonl(path, rows)
    console.print(f"dropped: {reasons}\n{source_line(path, rows, recipe, mixed, chat)}")
    return path


def unused(recipe: Recipe, mixed: Mix) -> list[Iterator[dict]]:
    """Conversations of each source that the mix neither trains on nor holds out."""
    used = {(row.source, row.number) for row in (*mixed.train, *mixed.validation)}
    return [_rows(s, recipe, {number for name, number in used if name == s.name}) for s in recipe.data.sources]


def _rows(source: Source, recipe: Recipe, used: set[int]) -> Iterator[dict]:
    for number, row in conversations(source, recipe.data.seed, recipe.data.placeholders):
        if number not in used and not isinstance(row, Rejected):
            yield row


def _prompts(sources: list[Iterator[dict]], mixed: Mix) -> Iterator[dict]:
    """{"messages" up to the last user turn, "expected_answer" if known}, one row of each source after another, each
    prompt once; none that is held out."""
    seen = {prompt_key(row.conversation) for row in mixed.validation}
    for row in (row for turn in zip_longest(*sources) for row in turn if row):
        last = max((i for i, m in enumerate(row["messages"]) if m["role"] == "user"), default=None)
        if last is None or row.get("tools"):  # only its tool could verify a call
            continue
        messages = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in row["messages"][: last + 1]]
        key = prompt_key({"messages": messages})
        if key not in seen:
            seen.add(key)
            yield {**row, "messages": messages}


def collect(
    prompts: list[dict], answer: Answer, mode: str, wanted: int, seed: int, progress: Progress, *, hybrid: bool
) -> tuple[list[dict], Counter]:
    """(rows, dropped by reason): ask batch by batch until there are as many rows as wanted, or no more prompts."""
    rows, dropped = [], Counter()
    with Judge() as judge:
        for start in range(0, len(prompts), BATCH):
            if len(rows) == wanted:
                break
            batch = prompts[start : start + BATCH]
            replies = answer([prompt["messages"] for prompt in batch], mode, seed + start)
            for prompt, reply in zip(batch, replies, strict=True):
                if why := rejection(reply, mode, prompt.get("expected_answer"), judge, hybrid=hybrid):
                    dropped[why] += 1
                elif len(rows) < wanted:
                    rows.append(row_of(prompt, reply))
                    progress.advance(1)
    return rows, dropped


def rejection(reply: Reply, mode: str, expected: str | None, judge: Judge, *, hybrid: bool) -> str:
    """Why a reply must not be rehearsed; empty when it may. Only a hybrid model can leak one mode into the other."""
    if not reply.finished:
        return "unfinished"
    if mode == "thinking" and not thinks(reply):
        return "no_whole_think_block"
    if mode == "non_thinking" and (not reply.answer or has_tags(reply.text) or (hybrid and leaks(reply))):
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
    """The base model's answers, sampled with its own values for each mode."""
    from toolkit.generate import generate
    from toolkit.model import load_base

    model, tokenizer = load_base(recipe.model)
    limit = recipe.evaluate.max_new_tokens
    return lambda prompts, mode, seed: generate(model, tokenizer, prompts, mode, max_new_tokens=limit, seed=seed)


def source_line(path: Path, rows: list[dict], recipe: Recipe, mixed: Mix, chat: Chat) -> str:
    """The line for a recipe's data.sources, with the fraction at which every row is used once; `max_repeats: 2` replaces
    the rows that are held out, without which the whole mix would be reduced."""
    unit, texts = recipe.data.unit, [example for row in rows for example in examples(row, "auto", chat)]
    counted = [[e.completion] if unit == "supervised_tokens" else [e.prompt, e.completion] for e in texts]
    size = (
        len(texts) if unit == "examples" else sum(map(len, chat.encode([part for parts in counted for part in parts])))
    )
    share = size / (recipe.data.budget or mixed.report["total"][unit])
    fraction = math.floor(1000 * min(1.0, max(share, 0.001))) / 1000
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return (
        f"{path}: {size:,} {unit.replace('_', ' ')}. To mix it in, add to data.sources, and lower the other fractions so "
        f"that the sum is 1:\n    - {{path: {shown}, format: messages, mode: auto, fraction: {fraction:g}, max_repeats: 2}}"
    )
