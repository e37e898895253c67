"""What evaluation asks, and what that costs: levels, questions, every prompt of a mode, the probe set that ships.

asks = plan([as_question(row, "sums") for row in rows], "thinking", sized("quick", steps=200), switches=True)
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from toolkit.files import ToolkitError, read_jsonl
from toolkit.recipe import Source
from toolkit.sources import Rejected, conversations

SHIPPED = (
    Source("data_recipes/samples/heldout_reasoning.jsonl", name="sums", format="openmath"),
    Source("data_recipes/samples/heldout_chat.jsonl", name="chat", format="question", mode="non_thinking"),
)
"""Easy questions, reasoning and chat, that any chat model answers: they show what was lost."""
PROBES = Path(__file__).with_name("probes.jsonl")
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
    switches: int
    """Questions that are also asked with soft switches."""
    probes: int
    """Per category and language, each answered by the base in every mode."""
    probe_tokens: int
    validation: int
    max_new_tokens: int


LEVELS = {
    "quick": Level(questions=64, samples=1, switches=16, probes=2, probe_tokens=48, validation=64, max_new_tokens=1024),
    "full": Level(
        questions=500, samples=4, switches=64, probes=6, probe_tokens=256, validation=500, max_new_tokens=8192
    ),
}


def sized(level: str, steps: int | None = None) -> Level:
    """A level, the quick one made smaller after a short training of `steps` optimizer steps.

    It goes by steps and not by measured time: every run of a sweep takes the same number of steps, so all are asked the
    same questions and can be compared, on whatever machine each of them ran."""
    size = LEVELS[level]
    if level != "quick" or steps is None:
        return size
    questions = next((n for n in (64, 32, 16) if n * STEPS_PER_QUESTION <= steps), 8)
    return replace(
        size, questions=questions, switches=questions // 4, probes=1 + (questions > 16), validation=questions
    )


@dataclass(frozen=True)
class Ask:
    """One prompt: for an answer, or to see whether a soft switch is obeyed."""

    question: int
    mode: str
    messages: list[dict]
    purpose: str = "answer"
    must_think: bool = False


def load_probes() -> list[dict]:
    """The frozen bilingual probe set that ships: {"id", "category", "language", "messages"}."""
    return read_jsonl(PROBES)


def as_question(conversation: dict, name: str) -> dict:
    """A question from a canonical conversation with an expected_answer: the messages before its last assistant turn."""
    messages = conversation["messages"]
    while messages and messages[-1]["role"] != "user":
        messages = messages[:-1]
    if not messages or not conversation.get("expected_answer"):
        raise ToolkitError(
            f"{name}: a question needs a user turn and an expected_answer, found {str(conversation)[:200]}"
        )
    return {"messages": messages, "expected_answer": conversation["expected_answer"], "set": name}


def read_questions(source: Source, seed: int = 0, placeholders: dict | None = None) -> list[dict]:
    """The questions of a source; a malformed row is an error, as nobody would miss a question."""
    found = []
    for number, conversation in conversations(source, seed, placeholders or {}):
        if isinstance(conversation, Rejected):
            raise ToolkitError(f"{source.path}, row {number}: {conversation.detail}")
        found.append(as_question(conversation, source.name))
    return found


def from_mix(mixed) -> dict:
    """{"questions", "validation"} of a compiled mix: its held-out rows, and those that carry an expected answer (None
    without any).

    evaluate(model, tokenizer, **from_mix(mixed)) scores a model in anybody's own notebook."""
    rows = [
        {"input_ids": row.ids.tolist(), "prompt_length": row.prompt_length, "source": row.source, "mode": row.mode}
        for row in mixed.validation
    ]
    answered = [row for row in mixed.validation if row.conversation.get("expected_answer")]
    questions = [as_question(row.conversation, row.source) for row in answered]
    return {"questions": questions or None, "validation": rows}


def choose(rows: Sequence[dict], limit: int, *keys: str) -> list[dict]:
    """At most `limit` rows, in turn from each group that shares `keys`. Which ones is decided by their content alone: every
    run of a sweep asks the same, whatever order its seed read them in."""
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: fingerprint([row])):
        groups[tuple(row[key] for key in keys)].append(row)
    ranked = [(turn, name, row) for name, members in sorted(groups.items()) for turn, row in enumerate(members)]
    return [row for _, _, row in sorted(ranked, key=lambda item: item[:2])[:limit]]


def plan(asked: list[dict], mode: str, size: Level, *, switches: bool) -> list[Ask]:
    """Every prompt of a mode in one list, the same for base and tuned: full batches, and pairs. `switches` says that the
    model obeys /think and /no_think, which is then tried on some questions."""
    asks = [Ask(i, mode, q["messages"]) for i, q in enumerate(asked) for _ in range(size.samples)]
    spread = np.linspace(0, len(asked) - 1, min(size.switches, len(asked))).astype(int).tolist()
    for turn, i in enumerate(spread if switches else ()):
        asks += _switches(asked[i], asked[i - 1], i, mode, turn % 2 == 0)
    return asks


def _switches(question: dict, earlier: dict, i: int, mode: str, thinks_now: bool) -> list[Ask]:
    messages = question["messages"]
    if mode == "non_thinking":  # enable_thinking=False is the hard switch: /think must not undo it
        return [Ask(i, mode, _switched(messages, "/think"), "switch/hard")]
    before, now = ("/no_think", "/think") if thinks_now else ("/think", "/no_think")
    past = [*_switched(earlier["messages"], before), {"role": "assistant", "content": earlier["expected_answer"]}]
    here = [message for message in _switched(messages, now) if message["role"] != "system"]
    return [
        Ask(i, mode, _switched(messages, "/think"), "switch/think", must_think=True),
        Ask(i, mode, _switched(messages, "/no_think"), "switch/no_think"),
        Ask(i, mode, past + here, "switch/mid_conversation", must_think=thinks_now),
    ]


def _switched(messages: list[dict], switch: str) -> list[dict]:
    return [*messages[:-1], {**messages[-1], "content": f"{messages[-1]['content']} {switch}"}]


def fingerprint(rows: Sequence) -> str:
    """Identity of what was asked, in order."""
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
