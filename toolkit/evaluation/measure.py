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
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from toolkit.evaluation.questions import Asked, fingerprint, from_mix, select, spread
from toolkit.evaluation.score import Judge, longest_answers, marks
from toolkit.evaluation.stats import difference, interval, is_rate
from toolkit.evaluation.subject import LoadedRun
from toolkit.evaluation.words import summary, verdict
from toolkit.family import mode_title
from toolkit.files import finite, outputs
from toolkit.view.progress import Progress

__all__ = ["evaluate", "from_mix", "is_rate", "score", "summarize", "summary", "verdict"]

COLUMNS = ["section", "model", "metric", "question", "value", "weight"]
MODELS = ("base", "tuned")
MAY_CHANGE = {"identity"}
"""Probe categories a run may mean to change ("who made you?"): reported, but not part of the pooled kl and nll."""
KEPT = ("accuracy", "accuracy/chat", "adherence", "kl")
"""Metrics whose sums and counts per question are written out, so that `compare` can pair runs question by question."""
SAMPLES = 8
"""Prompts of each mode whose replies are kept for people to read."""


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

    Questions and probes are those that ship unless given (questions.SHIPPED, probes.jsonl); `validation` holds rows
    {"input_ids", "prompt_length", "source", "mode"}. `steps` of a short training make a quick evaluation smaller
    (questions.sized). `seed` is evaluation's own, not the recipe's: runs that differ in their training seed must be asked
    alike. The base's replies are kept in `cache` (default: .base_replies under the outputs) for the next evaluation.
    `console` is a rich one that shows progress. Raises ToolkitError for a model without an adapter or a chat template."""
    asked = select(level, steps, questions, chat_questions, probes, validation)
    limit, cache = max_new_tokens or asked.size.max_new_tokens, cache or outputs() / ".base_replies"
    return score(LoadedRun(model, tokenizer, cache, seed, limit, batch_size), asked, console)


def score(subject, asked: Asked, console=None) -> dict:
    """The same for anything that replies as a LoadedRun does."""
    from rich.console import Console

    started, console, numbers = time.perf_counter(), console or Console(highlight=False), asked.numbers()
    asks, total = [asked.questions[i]["messages"] for i in numbers], len(MODELS) * len(subject.modes) * len(numbers)
    console.print(
        f"{asked.level} evaluation: {total} replies (base and tuned, {' and '.join(map(mode_title, subject.modes))}) of at "
        f"most {subject.max_new_tokens} tokens, {len(asked.probes)} probes, {len(asked.validation)} held-out rows"
    )
    with Progress(console, "evaluating", total + len(subject.modes) * len(asked.probes)) as progress:
        replies = {
            mode: {name: subject.reply(asks, mode, name == "tuned", progress) for name in MODELS}
            for mode in subject.modes
        }
        # after all replies, since a direct answer is measured by the length of the base's
        rows = [*answer_rows(replies, asked), *forgetting_rows(subject, asked, progress)]
    result = {
        "level": asked.level,
        "seed": subject.seed,
        "modes": list(subject.modes),
        "budget": asdict(asked.size) | {"replies": total, "max_new_tokens": subject.max_new_tokens},
        "seconds": round(time.perf_counter() - started, 2),
        "fingerprints": {name: fingerprint(getattr(asked, name)) for name in ("questions", "probes", "validation")},
        **summarize(pd.DataFrame(rows, columns=COLUMNS), subject.seed),
        "samples": samples(replies, asked),
    }
    return finite(result | {"verdict": verdict(result)})


def answer_rows(replies: dict[str, dict[str, list]], asked: Asked) -> Iterator[tuple]:
    """Rows of the long table for what each reply of base and tuned scores."""
    numbers = asked.numbers()
    with Judge() as judge:
        for mode, models in replies.items():
            # a model with one mode has no other from which reasoning could leak
            longest = longest_answers(numbers, models["base"]) if len(replies) > 1 else {}
            for model in MODELS:
                for i, reply in zip(numbers, models[model], strict=True):
                    for metric, value, weight in marks(mode, reply, asked.questions[i], longest.get(i), judge):
                        yield mode, model, metric, i, float(value), weight


def forgetting_rows(subject, asked: Asked, progress) -> Iterator[tuple]:
    """Rows for NLL and KL per token on the base's own greedy answers to the probes, and held-out loss by source."""
    for mode in subject.modes:
        answers = subject.own([p["messages"] for p in asked.probes], mode, asked.size.probe_tokens, progress)
        for i, (probe, sums) in enumerate(zip(asked.probes, subject.divergence(answers), strict=True)):
            pooled = probe["category"] not in MAY_CHANGE
            for model, kl in (("base", 0.0), ("tuned", sums["kl"])):
                yield "forgetting", model, f"kl/{probe['category']}", i, kl, sums["tokens"]
                # weight 0 leaves a probe out of the pooled number
                yield "forgetting", model, "kl", i, pooled * kl, pooled * sums["tokens"]
                yield "forgetting", model, "nll", i, pooled * sums[model], pooled * sums["tokens"]
    for i, (row, sums) in enumerate(zip(asked.validation, subject.divergence(asked.validation), strict=True)):
        for model in MODELS:
            yield "forgetting", model, f"loss/{row['source']}/{row['mode']}", i, sums[model], sums["tokens"]


def summarize(long: pd.DataFrame, seed: int) -> dict:
    """{"base", "tuned", "difference"}: {section: {metric: {"value", "low", "high", "n"}}} and "per_question", from the
    long table. A value that is not a number counts as not measured."""
    measured = np.isfinite(long.value)
    long = long.assign(weight=long.weight.where(measured, 0), value=long.value.where(measured, 0))
    result = {name: defaultdict(dict) for name in (*MODELS, "difference", "per_question")}
    for section, rows in long.groupby("section", sort=False):
        # One entry for each question asked, so that every metric of `per_question` pairs with every other
        asked = rows.question[rows.metric.isin(KEPT)].max()
        for metric, part in rows.groupby("metric"):
            length, settings = int(np.nanmax([asked, part.question.max()])) + 1, {"seed": seed, "rate": is_rate(metric)}
            sums = {}
            for model, own in part.groupby("model"):
                sums[model] = [np.bincount(own.question, own[x], minlength=length) for x in ("value", "weight")]
                result[model][section][metric] = interval(*sums[model], **settings)
                if metric in KEPT:
                    kept = result["per_question"][section].setdefault(model, {})
                    kept[metric] = [np.round(x, 6).tolist() for x in sums[model]]
            result["difference"][section][metric] = difference(sums["base"], sums["tuned"], **settings)
    return result


def samples(replies: dict[str, dict[str, list]], asked: Asked) -> list[dict]:
    """A few prompts of each mode with both models' replies, for people to read."""
    numbers, rows = asked.numbers(), []
    for mode, models in replies.items():
        for place in spread(len(numbers), SAMPLES):
            question = asked.questions[numbers[place]]
            row = {"mode": mode, "prompt": question["messages"][-1]["content"]}
            row["expected_answer"] = question["expected_answer"]
            rows.append(row | {model: models[model][place].text for model in MODELS})
    return rows
