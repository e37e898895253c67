"""Score a run against its own base: accuracy, mode adherence, forgetting, each with its interval.

result = evaluate(model, tokenizer, questions); print("\\n".join(verdict(result)))

Base and tuned are one loaded model with its adapter off and on. A question is {"messages": [...up to a user turn],
"expected_answer": "42", "set": "sums"}. Accuracy counts replies that ended by themselves; `cut` is the share that did not.

Everything that is measured goes into one long table, a row for each mark: section (a mode, or forgetting), model (base or
tuned), metric, question (or probe, or held-out row), value, weight. All numbers are sums over groups of it.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median

import numpy as np
import pandas as pd

from toolkit.evaluate.questions import (
    LEVELS,
    SHIPPED,
    Ask,
    choose,
    fingerprint,
    from_mix,
    load_probes,
    plan,
    read_questions,
    sized,
)
from toolkit.evaluate.score import Judge, marks
from toolkit.evaluate.stats import difference, interval, is_rate
from toolkit.evaluate.subject import LoadedRun
from toolkit.evaluate.text import show, summary, table, verdict
from toolkit.family import mode_title
from toolkit.files import ToolkitError, finite, outputs
from toolkit.generate import Reply
from toolkit.progress import Progress

__all__ = ["evaluate", "from_mix", "is_rate", "score", "show", "summarize", "summary", "table", "verdict"]

COLUMNS = ["section", "model", "metric", "question", "value", "weight"]
MODELS = ("base", "tuned")
MAY_CHANGE = {"identity"}
"""Probe categories a run may mean to change ("who made you?"): reported, but not part of the pooled kl and nll."""
KEPT = ("accuracy", "accuracy/chat", "adherence", "kl")
"""Metrics whose sums and counts per question are written out, so that `compare` can pair runs question by question."""


def evaluate(
    model,
    tokenizer,
    questions: Sequence[dict] | None = None,
    chat_questions: Sequence[dict] | None = None,
    probes: Sequence[dict] | None = None,
    validation: Sequence[dict] = (),
    *,
    level: str = "quick",
    steps: int | None = None,
    seed: int = 3407,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    console=None,
    cache: Path | None = None,
) -> dict:
    """eval.json's content for a PeftModel, in the modes that its chat template has.

    Questions and probes are those that ship unless given (questions.SHIPPED, probes.jsonl); `validation` holds rows {"input_ids", "prompt_length", "source", "mode"}.
    `steps` of a short training make a quick evaluation smaller (questions.sized). `seed` is evaluation's own, not the
    recipe's: runs that differ in their training seed must be asked alike. The base's replies are kept in `cache`
    (default: .base_replies under the outputs) for the next evaluation. `console` is a rich one that shows progress.
    Raises ToolkitError for a model without an adapter or a chat template."""
    limit, cache = max_new_tokens or LEVELS[level].max_new_tokens, cache or outputs() / ".base_replies"
    subject = LoadedRun(model, tokenizer, cache, seed, limit, batch_size)
    probes = load_probes() if probes is None else probes
    questions, chat_questions = (
        read_questions(shipped) if given is None else given
        for given, shipped in zip((questions, chat_questions), SHIPPED, strict=True)
    )
    return score(subject, questions, chat_questions, probes, validation, level=level, steps=steps, console=console)


def score(
    subject,
    questions: Sequence[dict],
    chat_questions: Sequence[dict],
    probes: Sequence[dict],
    validation: Sequence[dict],
    *,
    level: str,
    steps: int | None = None,
    console=None,
) -> dict:
    """The same for anything that replies as a LoadedRun does."""
    from rich.console import Console

    size, started, console = sized(level, steps), time.perf_counter(), console or Console()
    asked = [{**q, "chat": False} for q in choose(questions, size.questions, "set")]
    asked += [{**q, "chat": True} for q in choose(chat_questions, size.questions, "set")]
    if not asked:
        raise ToolkitError(
            "nothing to ask: evaluation needs questions with an expected_answer (recipe: evaluate.questions)"
        )
    kinds = {(probe["category"], probe["language"]) for probe in probes}
    probes = choose(probes, size.probes * len(kinds), "category", "language")
    validation = choose(validation, size.validation, "source", "mode")
    plans = {mode: plan(asked, mode, size, switches=subject.switches) for mode in subject.modes}
    total = 2 * sum(map(len, plans.values()))
    console.print(
        f"{level} evaluation: {total} replies (base and tuned, {' and '.join(map(mode_title, plans))}) of at most "
        f"{subject.max_new_tokens} tokens, {len(probes)} probes, {len(validation)} held-out rows"
    )
    with Progress(console, "evaluating", total + len(plans) * len(probes)) as progress, Judge() as judge:
        replies = {
            (mode, adapter): subject.reply([ask.messages for ask in asks], mode, adapter, progress)
            for mode, asks in plans.items()
            for adapter in (False, True)
        }
        rows = [row for mode in plans for row in mode_rows(subject, mode, plans[mode], replies, asked, judge)]
        rows += forgetting_rows(subject, probes, validation, size.probe_tokens, progress)
    what = {"questions": asked, "probes": probes, "validation": validation}
    result = {
        "level": level,
        "seed": subject.seed,
        "modes": list(subject.modes),
        "budget": {
            "replies": total,
            "samples": size.samples,
            "max_new_tokens": subject.max_new_tokens,
            "probes": len(probes),
            "probe_tokens": size.probe_tokens,
            "validation_rows": len(validation),
        },
        "seconds": round(time.perf_counter() - started, 2),
        "answer_timeouts": judge.timeouts,
        "fingerprints": {name: fingerprint(rows) for name, rows in what.items()},
        **summarize(pd.DataFrame(rows, columns=COLUMNS), subject.seed),
        "samples": samples(plans, replies, asked),
    }
    return finite(result | {"verdict": verdict(result)})


def mode_rows(subject, mode: str, asks: list[Ask], replies: dict, asked: list[dict], judge) -> Iterator[tuple]:
    """Rows of the long table for one mode: what each reply of base and tuned scores."""
    hybrid = len(subject.modes) > 1
    usual = usual_tokens(asks, replies[mode, False])
    for on, model in enumerate(MODELS):
        for ask, reply in zip(asks, replies[mode, bool(on)], strict=True):
            question = asked[ask.question]
            for mark in marks(ask, reply, question, usual[ask.question, ask.purpose], judge, hybrid=hybrid):
                metric, value, weight = mark
                yield mode, model, metric, ask.question, float(value) * weight, weight
        if hybrid:  # any other model always opens a block, or never does
            chances = subject.first([q["messages"] for q in asked], mode, bool(on))
            yield from ((mode, model, "think_probability", i, chance, 1) for i, chance in enumerate(chances))


def usual_tokens(asks: list[Ask], base: list[Reply]) -> dict[tuple[int, str], float]:
    """Answer tokens that the base takes for each (question, purpose), and no fewer than it takes for most."""
    lengths = defaultdict(list)
    for ask, reply in zip(asks, base, strict=True):
        lengths[ask.question, ask.purpose].append(reply.answer_tokens)
    typical = median(mean(tokens) for tokens in lengths.values())
    return {key: max(mean(tokens), typical, 1) for key, tokens in lengths.items()}


def forgetting_rows(subject, probes: list[dict], validation: list[dict], tokens: int, progress) -> Iterator[tuple]:
    """Rows for NLL and KL per token on the base's own greedy answers to the probes, and held-out loss by source."""
    for mode in subject.modes:
        found = subject.divergence(subject.own([p["messages"] for p in probes], mode, tokens, progress))
        for i, (probe, sums) in enumerate(zip(probes, found, strict=True)):
            counts = int(probe["category"] not in MAY_CHANGE)
            parts = {"": counts, f"/{probe['category']}": 1} | ({f"/{mode}": counts} if len(subject.modes) > 1 else {})
            for model, kl in (("base", 0.0), ("tuned", sums["kl"])):
                for part, weight in parts.items():
                    for metric, value in (("kl", kl), ("nll", sums[model])):
                        yield "forgetting", model, metric + part, i, value * weight, sums["tokens"] * weight
    for i, (row, sums) in enumerate(zip(validation, subject.divergence(validation), strict=True)):
        for model in MODELS:
            yield "forgetting", model, f"loss/{row['source']}/{row['mode']}", i, sums[model], sums["tokens"]


def summarize(long: pd.DataFrame, seed: int) -> dict:
    """{"base", "tuned", "difference"}: {section: {metric: {"value", "low", "high", "n"}}} and "per_question", from the
    long table. A value that is not a number counts as not measured."""
    long = long.assign(weight=long.weight.where(np.isfinite(long.value), 0), value=long.value.where(np.isfinite, 0))
    result: dict = {"base": {}, "tuned": {}, "difference": {}, "per_question": {}}
    for section, rows in long.groupby("section", sort=False):
        # One entry for each question asked, so that every metric of `per_question` pairs with every other
        count = rows.question[rows.metric.isin(KEPT)].max() + 1 if rows.metric.isin(KEPT).any() else 0
        kept = result["per_question"][section] = {model: {} for model in MODELS}
        for metric, part in rows.groupby("metric"):
            rate, sums, length = is_rate(metric), {}, max(count, part.question.max() + 1)
            for model in MODELS:
                own = part[part.model == model]
                sums[model] = [np.bincount(own.question, own[x], minlength=length) for x in ("value", "weight")]
                result[model].setdefault(section, {})[metric] = interval(*sums[model], seed=seed, rate=rate)
                if metric in KEPT:
                    kept[model][metric] = [np.round(x, 6).tolist() for x in sums[model]]
            change = difference(sums["base"], sums["tuned"], seed=seed, rate=rate)
            result["difference"].setdefault(section, {})[metric] = change
    return result


def samples(plans: dict, replies: dict, asked: list[dict], count: int = 8) -> list[dict]:
    """A few prompts of each mode with both models' replies, for people to read."""
    rows = []
    for mode, asks in plans.items():
        for i in np.linspace(0, len(asks) - 1, min(count, len(asks))).astype(int).tolist():
            row = {"mode": mode, "purpose": asks[i].purpose, "prompt": asks[i].messages[-1]["content"]}
            row["expected_answer"] = asked[asks[i].question]["expected_answer"]
            rows.append(row | {name: replies[mode, on][i].text for name, on in (("base", False), ("tuned", True))})
    return rows
