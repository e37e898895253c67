"""Score a run against its own base: held-out loss, accuracy, mode adherence, lengths, forgetting, each with its interval.

result = evaluate(model, tokenizer, questions); print("\\n".join(verdict(result)))

Base and tuned are one loaded model with its adapter off and on. Fast evidence comes first (fast.py), then as many replies
as the time allows (plan.py). A question is {"messages": [...up to a user turn], "expected_answer": "42", "set": "sums"}.
A reply that the limit cut counts as `cut` and as nothing else.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console

from toolkit.evaluation.fast import fast_evidence
from toolkit.evaluation.generate import Conversations, Reply
from toolkit.evaluation.lengths import compare_lengths
from toolkit.evaluation.plan import plan_generation, smallest_change
from toolkit.evaluation.questions import (
    EvaluationSet,
    Questions,
    fingerprint,
    from_mix,
    select,
    spread,
)
from toolkit.evaluation.score import AnswerChecker, Mark, longest_answers, reply_marks
from toolkit.evaluation.stats import is_rate
from toolkit.evaluation.subject import LoadedRun, Subject
from toolkit.evaluation.table import MODELS, summarize
from toolkit.evaluation.words import summary, verdict
from toolkit.family import mode_title
from toolkit.files import finite, outputs, read_if_whole, read_json, write_json
from toolkit.recipe import REPLY_LIMIT
from toolkit.records import (
    Evaluation,
    EvaluationSample,
    HeldOutRow,
    OwnRow,
    OwnRowReplies,
    Probe,
    ReplyLengths,
)
from toolkit.view.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["evaluate", "from_mix", "is_rate", "score", "summary", "verdict"]

# Prompts of each mode whose replies are kept for people to read.
SAMPLES = 8
Replies = dict[str, list[Reply]]
"""{model: a reply to each prompt}."""


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Questions = None,
    chat_questions: Questions = None,
    probes: Sequence[Probe] | None = None,
    validation: Sequence[HeldOutRow] = (),
    own_rows: Sequence[OwnRow] = (),
    *,
    level: str = "quick",
    steps: int | None = None,
    minutes: float | None = None,
    train_seconds: float | None = None,
    questions_per_mode: int | None = None,
    seed: int = 3407,
    max_new_tokens: int | None = None,
    limits: dict[str, int] | None = None,
    console: Console | None = None,
    cache: Path | None = None,
) -> Evaluation:
    """eval.json's content for a PeftModel, in the modes that its chat template has.

    Questions and probes are those that ship unless given (questions.SHIPPED, probes.jsonl); `validation` holds rows
    {"input_ids", "prompt_length", "source", "mode"}, `own_rows` some of them as text, `limits` the longest reply by mode
    (`from_mix` gives all three); `max_new_tokens` is one limit for all modes. Replies are generated for `minutes`, by
    default for a third of `train_seconds`; `steps` of a short training make a quick evaluation smaller; a number of
    `questions_per_mode` (of each kind) is asked whatever it takes. `seed` is evaluation's own, not the recipe's: runs that
    differ in their training seed must be asked alike. The base's replies are kept in `cache` (default: .base_replies
    under the outputs) for the next evaluation. `console` is a rich one that shows progress.
    Raises ToolkitError for a model without an adapter or a chat template."""
    subject = LoadedRun(model, tokenizer, cache or outputs() / ".base_replies", seed)
    known = dict.fromkeys(subject.modes, max_new_tokens) if max_new_tokens else limits or {}
    # no reply is longer than what the model was loaded for
    room = model.config.get_text_config().max_position_embeddings
    limits = {mode: min(room, known.get(mode) or REPLY_LIMIT) for mode in subject.modes}
    given = questions, chat_questions, probes, validation, own_rows
    # what cannot be asked is named before anything is generated
    starts = [question["messages"] for question in select(level, steps, *given).starts]
    first = subject.modes[0]
    plan = plan_generation(
        level, steps=steps, limits=limits, minutes=minutes, train_seconds=train_seconds,
        questions=questions_per_mode, modes=subject.modes, speed=lambda: subject.speed(starts, first, limits[first]),
    )  # fmt: skip
    return score(subject, select(level, steps, *given, plan=plan), console)


def score(
    subject: Subject, eval_set: EvaluationSet, console: Console | None = None, *, fast: bool = True
) -> Evaluation:
    """The same for anything that replies as a LoadedRun does; without `fast` evidence for what gives no probabilities."""
    started = time.perf_counter()
    console = console or Console(highlight=False)
    console.print(announcement(eval_set, subject.modes), markup=False)
    prompts_per_mode = len(MODELS) * len(eval_set.numbers()) + fast * len(eval_set.probes)
    total = len(subject.modes) * prompts_per_mode + len(MODELS) * len(eval_set.own_rows)
    replies: dict[str, Replies] = {}
    with Progress(console, "evaluating", total) as progress:
        evidence = fast_evidence(cast(LoadedRun, subject), eval_set, progress) if fast else []
        own_rows = list(own_row_replies(subject, eval_set, progress))
        conversations = [eval_set.questions[i]["messages"] for i in eval_set.numbers()]
        if conversations:
            replies = {mode: both(subject, conversations, mode, eval_set, progress) for mode in subject.modes}
        # after all replies, since a direct answer is measured by the length of the base's
        scores = summarize([*answer_marks(replies, eval_set), *evidence], subject.seed)
    # limits as they were used: another evaluation of the run asks by them
    limits = {mode: eval_set.plan.limit(mode) for mode in subject.modes}
    result: Any = {
        "level": eval_set.level,
        "seed": subject.seed,
        "modes": list(subject.modes),
        "budget": {
            **asdict(eval_set.plan.size),
            "replies": len(subject.modes) * len(MODELS) * len(conversations),
            "max_new_tokens": max(limits.values()),
            "limits": limits,
            "note": eval_set.plan.note,
        },
        "shipped": list(eval_set.shipped),
        "seconds": round(time.perf_counter() - started, 2),
        "fingerprints": {name: fingerprint(getattr(eval_set, name)) for name in ("questions", "probes", "validation")},
        **scores,
        "lengths": reply_lengths(replies, eval_set, subject.seed),
        "own_rows": own_rows,
        "samples": list(samples(replies, eval_set)),
    }
    return finite(result | {"verdict": verdict(result)})


def announcement(eval_set: EvaluationSet, modes: Sequence[str]) -> str:
    """What will be asked and how long it takes, before the first reply."""
    plan, asked = eval_set.plan, eval_set.questions
    note = f"\n{plan.note}" if plan.note else ""
    if not asked:
        return f"{eval_set.level} evaluation without generation{note}"
    several = f" x {plan.size.samples} replies" if plan.size.samples > 1 else ""
    shown = f"{len(modes)} mode{'s' * (len(modes) > 1)} ({' and '.join(map(mode_title, modes))})"
    limit = max(map(plan.limit, modes))
    time_left = f": about {duration(plan.seconds)}" if plan.seconds is not None else ""
    fewest = min(Counter(question["chat"] for question in asked).values())
    return (
        f"{eval_set.level} evaluation: {len(asked)} questions{several} x {shown} x base and tuned, up to {limit:,} tokens"
        f"{time_left}\nfrom {fewest} questions of a kind, a change below {smallest_change(fewest)} points cannot be told{note}"
    )


def duration(seconds: float) -> str:
    """`14 minutes`, `40 seconds`."""
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{max(1, seconds):.0f} seconds"


def both(
    subject: Subject, conversations: Conversations, mode: str, eval_set: EvaluationSet, progress: Progress
) -> Replies:
    """A reply of base and tuned to each conversation."""
    limit = eval_set.plan.limit(mode)
    return {
        model: subject.reply(conversations, mode, model == "tuned", progress, max_new_tokens=limit) for model in MODELS
    }


def own_row_replies(subject: Subject, eval_set: EvaluationSet, progress: Progress) -> Iterator[OwnRowReplies]:
    """The person's own held-out rows answered by base and tuned, beside their reference."""
    for mode in subject.modes:
        own = [row for row in eval_set.own_rows if row["mode"] == mode]
        replies = both(subject, [row["messages"] for row in own], mode, eval_set, progress)
        for row, base, tuned in zip(own, replies["base"], replies["tuned"], strict=True):
            yield OwnRowReplies(
                source=row["source"], mode=mode, prompt=row["messages"][-1]["content"],
                reference=row["reference"], base=base.text, tuned=tuned.text,
            )  # fmt: skip


def answer_marks(replies: dict[str, Replies], eval_set: EvaluationSet) -> Iterator[Mark]:
    """Rows of the long table for what each reply of base and tuned scores."""
    numbers = eval_set.numbers()
    with AnswerChecker() as checker:
        for mode, models in replies.items():
            # a model with one mode has no other from which reasoning could leak
            longest = longest_answers(numbers, models["base"]) if len(replies) > 1 else {}
            for model in MODELS:
                for i, reply in zip(numbers, models[model], strict=True):
                    scored = reply_marks(mode, reply, eval_set.questions[i], longest.get(i), checker)
                    for metric, value, weight in scored:
                        yield Mark(mode, model, metric, i, float(value), weight)


def reply_lengths(replies: dict[str, Replies], eval_set: EvaluationSet, seed: int) -> dict[str, ReplyLengths]:
    """How much longer tuned replies are, and whether some never end, by mode."""
    sets = [f"{question['set']} {question['chat']}" for question in eval_set.questions]
    samples = eval_set.plan.size.samples
    return {
        mode: compare_lengths(models["base"], models["tuned"], sets, samples, eval_set.plan.limit(mode), seed)
        for mode, models in replies.items()
    }


def samples(replies: dict[str, Replies], eval_set: EvaluationSet) -> Iterator[EvaluationSample]:
    """A few prompts of each mode with both models' replies, for people to read."""
    numbers = eval_set.numbers()
    for mode, models in replies.items():
        for place in spread(len(numbers), SAMPLES):
            question = eval_set.questions[numbers[place]]
            yield EvaluationSample(
                mode=mode, prompt=question["messages"][-1]["content"], expected_answer=question["expected_answer"],
                base=models["base"][place].text, tuned=models["tuned"][place].text,
            )  # fmt: skip


# --- a run's files ---------------------------------------------------------------------------------------------------


def write(folder: Path, result: Evaluation) -> None:
    """Write a run's eval.json; fast evidence of a run with replies beside it, which it does not replace: they were paid for."""
    has_replies = scored(folder) and read_json(folder / "eval.json")["level"] != "fast"
    is_beside = has_replies and result["level"] == "fast"
    write_json(folder / ("eval-fast.json" if is_beside else "eval.json"), result)


def scored(folder: Path) -> bool:
    """Whether a run has an evaluation that can be read."""
    return {"base", "tuned", "difference"} <= read_if_whole(folder / "eval.json").keys()
