"""What evaluation asks: levels, questions, held-out rows, the probe set that ships.

eval_set = select("quick", steps=200); eval_set.numbers()
"""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.data import mix
from toolkit.data.mix import Mix, Row, as_question, read_questions
from toolkit.data.sources import Rejected
from toolkit.evaluation.plan import Plan, sized
from toolkit.files import ToolkitError, read_jsonl
from toolkit.recipe import REPLY_LIMIT, Recipe, Source
from toolkit.records import HeldOutRow, OwnRow, Probe, Question

# Easy questions, reasoning and chat, that any chat model answers: they show what was lost.
SHIPPED = (
    Source("data_recipes/samples/heldout_reasoning.jsonl", name="sums", format="openmath"),
    Source("data_recipes/samples/heldout_chat.jsonl", name="chat", format="question", mode="non_thinking"),
)
Questions = Sequence[Question] | None
"""Somebody's own; None for those that ship."""
# The frozen bilingual probe set that ships: rows {"id", "category", "language", "messages"}.
PROBES = Path(__file__).with_name("probes.jsonl")
# Held-out rows of each source that are answered before and after, for people to read.
OWN_ROWS = 3
# Questions of each kind at whose first token a mode's beginning is measured.
STARTS = 16


@dataclass(frozen=True)
class EvaluationSet:
    """Everything that one evaluation asks."""

    level: str
    plan: Plan
    questions: list[Question]
    probes: list[Probe]
    validation: list[HeldOutRow]
    own_rows: list[OwnRow]
    starts: list[Question]
    """Questions that are not answered, but at whose first token the model is looked at."""
    shipped: tuple[str, ...] = ()
    """Names of the question sets that are not the person's own."""

    def numbers(self) -> list[int]:
        """The question of every prompt, the same in each mode and for base and tuned."""
        return [i for i in range(len(self.questions)) for _ in range(self.plan.size.samples)]


def select(
    level: str,
    steps: int | None = None,
    questions: Questions = None,
    chat_questions: Questions = None,
    probes: Sequence[Probe] | None = None,
    validation: Sequence[HeldOutRow] = (),
    own_rows: Sequence[OwnRow] = (),
    plan: Plan | None = None,
) -> EvaluationSet:
    """As many of the given questions, probes and held-out rows as the level (or `plan`) asks; those that ship stand in
    for None. Raises ToolkitError where there is nothing to ask."""
    plan = plan or Plan(sized(level, steps))
    size = plan.size
    given = questions, chat_questions
    asked = [
        read_questions(shipped) if own is None else [checked_question(row) for row in own]
        for shipped, own in zip(SHIPPED, given, strict=True)
    ]
    if not any(asked):
        raise ToolkitError(
            "nothing to ask: evaluation needs questions with an expected_answer (recipe: evaluate.questions)"
        )

    def chosen(count: int) -> list[Any]:
        reasoning, chat = (choose(rows, count, "set") for rows in asked)
        return [row | {"chat": False} for row in reasoning] + [row | {"chat": True} for row in chat]

    known: Sequence[Any] = read_jsonl(PROBES) if probes is None else probes
    kinds = {(probe["category"], probe["language"]) for probe in known}
    # the person's own rows are answered too, unless nothing is generated
    own_count = OWN_ROWS * len({row["source"] for row in own_rows}) if size.questions else 0
    return EvaluationSet(
        level,
        plan,
        questions=chosen(size.questions),
        probes=choose(known, size.probes * len(kinds), "category", "language"),
        validation=choose(validation, size.validation, "source", "mode"),
        own_rows=choose(own_rows, own_count, "source"),
        starts=chosen(STARTS),
        shipped=tuple(shipped.name for shipped, own in zip(SHIPPED, given, strict=True) if own is None),
    )


def checked_question(row: Any) -> Any:
    """A question of somebody's own, with its answer as text and a set. Raises ToolkitError naming what it lacks."""
    try:
        asks = row["messages"][-1]["role"] == "user"
        answer = row["expected_answer"]
    except (TypeError, LookupError):
        asks, answer = False, None
    if not asks or type(answer) not in (str, int, float) or str(answer).strip() in ("", "nan"):
        raise ToolkitError(f"a question needs messages up to a user turn, and an expected_answer; found {row!r:.200}")
    return {"set": "questions", **row, "expected_answer": str(answer)}


# --- from a mix ------------------------------------------------------------------------------------------------------


def from_mix(mixed: Mix) -> dict[str, Any]:
    """{"questions", "validation", "own_rows", "limits"} of a compiled mix: its held-out rows as ids and as text, those of
    them that carry an expected answer and need no tools (None without any), and the longest reply by mode.

    evaluate(model, tokenizer, **from_mix(mixed)) scores a model in anybody's own notebook."""
    rows = mixed.validation
    # of a conversation with an example for each turn, only the last is asked for the answer, unless it was dropped
    last = {(row.source, row.number): row for row in rows}
    for entry in mixed.quarantine:
        last.pop((entry["source"], entry["row"]), None)
    questions = []
    for row in last.values():
        with contextlib.suppress(Rejected):
            questions.append(as_question(row.conversation, row.source))
    return {
        "questions": questions or None,
        "validation": [
            HeldOutRow(input_ids=row.ids.tolist(), prompt_length=row.prompt_length, source=row.source, mode=row.mode)
            for row in rows
        ],
        # evaluation shows no tools, so a row that calls some cannot be answered
        "own_rows": [own_row(row) for row in rows if "tools" not in row.conversation],
        "limits": reply_limits(mixed),
    }


def own_row(row: Row) -> OwnRow:
    """A held-out row as text."""
    *prompt, reply = row.conversation["messages"]
    parts = [(reply.get("reasoning_content") or "").strip(), reply["content"].strip()]
    return OwnRow(source=row.source, mode=row.mode, messages=prompt, reference="\n\n".join(filter(None, parts)))


def reply_limits(mixed: Mix) -> dict[str, int]:
    """The longest reply by mode: the 90th percentile of what the model was taught to write in it, at least REPLY_LIMIT.

    A limit below it cuts replies that are as they should be, and a cut reply says nothing."""
    taught = mixed.report.get("lengths", {})
    return {mode: max(REPLY_LIMIT, lengths["completion_p90"]) for mode, lengths in taught.items()}


# --- choosing --------------------------------------------------------------------------------------------------------


def choose(rows: Sequence[Any], limit: int, *keys: str) -> list[Any]:
    """At most `limit` rows, in turn from each group that shares `keys`. Which ones is decided by their content alone: every
    run of a sweep asks the same, whatever order its seed read them in."""
    ranked = []
    seen: Counter[tuple[Any, ...]] = Counter()
    # a hash orders them by content and at random; then one of each group in turn
    for row in sorted(rows, key=lambda row: fingerprint([row])):
        group = tuple(row[key] for key in keys)
        ranked.append((seen[group], group, row))
        seen[group] += 1
    return [row for _, _, row in sorted(ranked, key=lambda item: item[:2])[:limit]]


def spread(length: int, count: int) -> list[int]:
    """At most `count` places in a list of that length, evenly spread."""
    return np.linspace(0, length - 1, min(count, length)).astype(int).tolist()


def fingerprint(content: object) -> str:
    """Identity of what was asked, order included: 16 hex digits for plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def questions_of(recipe: Recipe, mixed: Mix) -> tuple[Questions, Questions]:
    """(reasoning, chat) questions of a recipe: its own sets; without any, held-out rows that carry an expected answer; None
    for those that ship."""
    if not recipe.evaluate.questions:
        return from_mix(mixed)["questions"], None
    reasoning: list[Question] = []
    chat: list[Question] = []
    for source in recipe.evaluate.questions:
        target = chat if source.mode == "non_thinking" else reasoning
        target.extend(read_questions(source, placeholders=recipe.data.placeholders))
    return reasoning, chat


def asked_of(
    recipe: Recipe, manifest: dict[str, Any], level: str | None = None, minutes: float | None = None
) -> dict[str, Any]:
    """What a run is asked, as arguments of `measure.evaluate`: the recipe's questions and the rows that its mix held out. A
    level or a number of minutes named here takes the place of the recipe's."""
    section = recipe.evaluate
    # the rows of the training itself: held-out rows of another mix may be among those it trained on
    mixed = mix.of_run(recipe, manifest)
    reasoning, chat = questions_of(recipe, mixed)
    return from_mix(mixed) | {
        "questions": reasoning,
        "chat_questions": chat,
        # the questions depend on it, so it is written into the result and compared by `compare`
        "level": level or section.level,
        "minutes": minutes or section.minutes,
        # whoever names a level or a time at the command line asks for more than the recipe fixes
        "questions_per_mode": None if level or minutes else section.questions_per_mode,
        "max_new_tokens": section.max_new_tokens,
        "steps": manifest.get("steps"),
        "train_seconds": manifest.get("train_seconds"),
    }
