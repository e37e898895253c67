"""What evaluation asks, and what that costs: levels, questions, the probe set that ships.

asked = select("quick", steps=200); asked.numbers()
"""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from toolkit.data.mix import as_question, read_questions
from toolkit.data.sources import Rejected
from toolkit.files import ToolkitError, read_jsonl
from toolkit.recipe import REPLY_LIMIT, Source

SHIPPED = (
    Source("data_recipes/samples/heldout_reasoning.jsonl", name="sums", format="openmath"),
    Source("data_recipes/samples/heldout_chat.jsonl", name="chat", format="question", mode="non_thinking"),
)
"""Easy questions, reasoning and chat, that any chat model answers: they show what was lost."""
PROBES = Path(__file__).with_name("probes.jsonl")
"""The frozen bilingual probe set that ships: rows {"id", "category", "language", "messages"}."""
STEPS_PER_QUESTION = 4
"""A quick evaluation asks one question of each kind for so many training steps, so that it takes about a sixth of the
training time, a third at most (pocket recipe, 2 cores, 2026-11-25: 0.9 s a step, 0.65 s a question in both modes)."""


@dataclass(frozen=True)
class Level:
    """How much is asked."""

    questions: int
    """Of each kind, reasoning and chat."""
    samples: int
    """Replies per question, mode and model."""
    probes: int
    """Per category and language, each answered by the base in every mode."""
    probe_tokens: int
    validation: int
    max_new_tokens: int


LEVELS = {
    "quick": Level(
        questions=64, samples=1, probes=2, probe_tokens=48, validation=64, max_new_tokens=REPLY_LIMIT["quick"]
    ),
    "full": Level(
        questions=500, samples=4, probes=6, probe_tokens=256, validation=500, max_new_tokens=REPLY_LIMIT["full"]
    ),
}


def sized(level: str, steps: int | None = None) -> Level:
    """A level, the quick one made smaller after a short training of `steps` optimizer steps.

    It goes by steps and not by measured time: every run of a sweep takes the same number of steps, so all are asked the
    same questions and can be compared, on whatever machine each of them ran."""
    if level not in LEVELS:
        raise ToolkitError(f"level {level!r}: expected {' or '.join(LEVELS)}")
    size = LEVELS[level]
    if level != "quick" or steps is None:
        return size
    questions = next((n for n in (64, 32, 16) if n * STEPS_PER_QUESTION <= steps), 8)
    return replace(size, questions=questions, probes=1 + (questions > 16), validation=questions)


@dataclass(frozen=True)
class Asked:
    """Everything that one evaluation asks."""

    level: str
    size: Level
    questions: list[dict]
    """{"messages", "expected_answer", "set", "chat": whether it counts as a chat question}."""
    probes: list[dict]
    validation: list[dict]

    def numbers(self) -> list[int]:
        """The question of every prompt, the same in each mode and for base and tuned."""
        return [i for i in range(len(self.questions)) for _ in range(self.size.samples)]


def select(
    level: str,
    steps: int | None = None,
    questions: Sequence[dict] | None = None,
    chat_questions: Sequence[dict] | None = None,
    probes: Sequence[dict] | None = None,
    validation: Sequence[dict] = (),
) -> Asked:
    """As many of the given questions, probes and held-out rows as the level asks; those that ship stand in for None."""
    size = sized(level, steps)
    rows = []
    for chat, (given, shipped) in enumerate(zip((questions, chat_questions), SHIPPED, strict=True)):
        found = read_questions(shipped) if given is None else [checked_question(row) for row in given]
        rows += [{**row, "chat": bool(chat)} for row in choose(found, size.questions, "set")]
    if not rows:
        raise ToolkitError(
            "nothing to ask: evaluation needs questions with an expected_answer (recipe: evaluate.questions)"
        )
    probes = read_jsonl(PROBES) if probes is None else probes
    kinds = {(probe["category"], probe["language"]) for probe in probes}
    chosen = choose(probes, size.probes * len(kinds), "category", "language")
    return Asked(level, size, rows, chosen, choose(validation, size.validation, "source", "mode"))


def checked_question(row: dict) -> dict:
    """A question of somebody's own, with its answer as text and a set. Raises ToolkitError naming what it lacks."""
    asked, answer = (row.get(key) if isinstance(row, dict) else None for key in ("messages", "expected_answer"))
    roles = [m.get("role") for m in asked if isinstance(m, dict)] if isinstance(asked, list) else []
    if roles[-1:] != ["user"] or type(answer) not in (str, int, float) or str(answer).strip() in ("", "nan"):
        raise ToolkitError(f"a question needs messages up to a user turn, and an expected_answer; found {row!r:.200}")
    return {"set": "questions", **row, "expected_answer": str(answer)}


def from_mix(mixed) -> dict:
    """{"questions", "validation"} of a compiled mix: its held-out rows, and those that carry an expected answer and need no
    tools (None without any).

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
    validation = [
        {"input_ids": row.ids.tolist(), "prompt_length": row.prompt_length, "source": row.source, "mode": row.mode}
        for row in rows
    ]
    return {"questions": questions or None, "validation": validation}


def choose(rows: Sequence[dict], limit: int, *keys: str) -> list[dict]:
    """At most `limit` rows, in turn from each group that shares `keys`. Which ones is decided by their content alone: every
    run of a sweep asks the same, whatever order its seed read them in."""
    ranked, seen = [], Counter()
    # a hash orders them by content and at random; then one of each group in turn
    for row in sorted(rows, key=lambda row: fingerprint([row])):
        group = tuple(row[key] for key in keys)
        ranked.append((seen[group], group, row))
        seen[group] += 1
    return [row for _, _, row in sorted(ranked, key=lambda item: item[:2])[:limit]]


def spread(length: int, count: int) -> list[int]:
    """At most `count` places in a list of that length, evenly spread."""
    return np.linspace(0, length - 1, min(count, length)).astype(int).tolist()


def fingerprint(asked) -> str:
    """Identity of what was asked, order included: 16 hex digits for plain values."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
