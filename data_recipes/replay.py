"""Rehearsal data by self-distillation: the base model's own verified answers, as a source that counteracts forgetting.

from toolkit import recipe; from data_recipes import replay; replay.replay(recipe.load("pocket"), count=100)

Prompts are answered in every mode of the model. Kept are replies that ended by themselves and do what their mode promises
(toolkit/evaluation/score.py), and where the prompt's expected answer is known, only correct ones. The base would have said
these rows anyway, so training on them costs little and keeps what other rows make it forget.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice, repeat, zip_longest
from pathlib import Path

from toolkit.data.mix import Mix, prompt_key
from toolkit.data.render import Chat, examples, load_chat
from toolkit.data.sources import Rejected, conversations
from toolkit.evaluation.generate import Reply
from toolkit.evaluation.score import AnswerChecker, has_tags, leaks, thinks
from toolkit.family import KINDS, mode_title
from toolkit.files import ToolkitError, lock, outputs, write_jsonl
from toolkit.recipe import REPLY_LIMIT, Recipe, Source
from toolkit.run import compile_mix, pinned, resolve
from toolkit.view.progress import Progress

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

    `prompts` is any file that a source can be; by default the recipe's own sources, those with fraction 0 included.
    Prompts that the recipe trains on or holds out are not asked. `answer` stands in for the base model in tests. Raises
    ToolkitError when no reply was kept.
    """
    console = pinned(console)
    recipe = resolve(recipe, console)
    path = outputs() / f"{recipe.name}-replay.jsonl"
    with lock(path.with_suffix(""), "replay"), Progress(console, "verified rows", total=count) as progress:
        mixed, chat = compile_mix(recipe, console), load_chat(recipe.model.model_name, recipe.model.revision)
        sources = [Source(str(prompts))] if prompts else recipe.data.sources
        asked = list(islice(unused(sources, recipe, mixed), MAX_PROMPTS_PER_ROW * count))
        answer, modes, rows, dropped = answer or base_answers(recipe), KINDS[chat.kind], [], Counter()
        for i, mode in enumerate(modes):
            # an odd count gives the first mode one more
            wanted, before = (count + len(modes) - 1 - i) // len(modes), len(rows)
            kept = verified(asked, answer, mode, recipe.data.seed, dropped, hybrid=len(modes) > 1)
            for row in islice(kept, wanted):
                rows.append(row)
                progress.advance(1)
            console.print(f"{mode_title(mode)}: kept {len(rows) - before} of {wanted} wanted")
        reasons = ", ".join(f"{why} {n}" for why, n in dropped.most_common()) or "none"
        if not rows:
            raise ToolkitError(f"no reply was kept; dropped: {reasons}. Give other --prompts, or another base model")
        write_jsonl(path, rows)
    console.print(f"dropped: {reasons}\n{source_line(path, rows, mixed, chat)}")
    return path


def unused(sources: Sequence[Source], recipe: Recipe, mixed: Mix) -> Iterator[dict]:
    """{"messages" up to the last user turn, "expected_answer" if known}, one row of each source after another, each
    prompt once; none that the mix trains on or holds out."""
    used = {(row.source, row.number) for row in (*mixed.train, *mixed.validation)}
    seen = {prompt_key(row.conversation) for row in mixed.validation}
    settings = recipe.data.seed, recipe.data.placeholders
    readers = [zip(repeat(source.name), conversations(source, *settings)) for source in sources]
    for name, (number, row) in filter(None, chain.from_iterable(zip_longest(*readers))):
        if (name, number) in used or isinstance(row, Rejected) or row.get("tools"):  # only its tool could verify a call
            continue
        messages = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in row["messages"]]
        # the row's own answer is what the base shall give instead
        while messages and messages[-1]["role"] != "user":
            messages.pop()
        key = prompt_key({"messages": messages})
        if messages and key not in seen:
            seen.add(key)
            yield {**row, "messages": messages}


def verified(
    prompts: list[dict], answer: Answer, mode: str, seed: int, dropped: Counter, *, hybrid: bool
) -> Iterator[dict]:
    """Rows in the `messages` format for the replies that may be rehearsed, asked in batches as they are wanted; one
    without reasoning_content is a non-thinking one. Others count in `dropped` by reason."""
    with AnswerChecker() as checker:
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            # seed + start: otherwise the nth prompt of every batch would draw the same numbers
            replies = answer([prompt["messages"] for prompt in batch], mode, seed + start)
            for prompt, reply in zip(batch, replies, strict=True):
                if why := rejection(reply, mode, prompt.get("expected_answer"), checker, hybrid=hybrid):
                    dropped[why] += 1
                    continue
                said = {"role": "assistant", "content": reply.answer}
                if reply.reasoning:
                    said["reasoning_content"] = reply.reasoning
                yield {**prompt, "messages": [*prompt["messages"], said]}


def rejection(reply: Reply, mode: str, expected: str | None, checker: AnswerChecker, *, hybrid: bool) -> str:
    """Why a reply must not be rehearsed; empty when it may. Only a hybrid model can leak one mode into the other."""
    if not reply.finished:
        return "unfinished"
    if mode == "thinking" and not thinks(reply):
        return "no_whole_think_block"
    if mode == "non_thinking" and (not reply.answer or has_tags(reply.text) or (hybrid and leaks(reply))):
        return "empty_or_leaking"
    return "" if expected is None or checker.is_right(reply.answer, expected) else "wrong_answer"


def base_answers(recipe: Recipe) -> Answer:
    """The base model's answers, sampled with its own values for each mode."""
    from toolkit.evaluation.generate import generate
    from toolkit.training.model import load_base

    model, tokenizer = load_base(recipe.model)
    limit = recipe.evaluate.max_new_tokens or REPLY_LIMIT
    return lambda prompts, mode, seed: generate(model, tokenizer, prompts, mode, max_new_tokens=limit, seed=seed)


def source_line(path: Path, rows: list[dict], mixed: Mix, chat: Chat) -> str:
    """The line for a recipe's data.sources, with the fraction at which every row is used about once; `max_repeats: 2`
    replaces the rows that are held out, without which the whole mix would be reduced."""
    completions = [example.completion for row in rows for example in examples(row, "auto", chat)]
    size = sum(map(len, chat.encode(completions)))
    fraction = min(1.0, max(0.001, size / mixed.report["total"]["supervised_tokens"]))
    return (
        f"{path}: {size:,} supervised tokens. To mix it in, add to data.sources, and lower the other fractions so that the "
        f"sum is 1:\n    - {{path: {path}, format: messages, mode: auto, fraction: {fraction:.3f}, max_repeats: 2}}"
    )
