"""How much an evaluation generates: longest replies, and as many questions as the minutes allow at this machine's speed.

plan = plan_generation("quick", limits={"thinking": 3100}, minutes=14, speed=lambda: Speed(rows=16, seconds_per_step=0.05))
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from toolkit.evaluation.stats import MIN_PAIRS
from toolkit.files import ToolkitError
from toolkit.recipe import REPLY_LIMIT

# A quick evaluation asks at most one question of each kind for so many training steps: every run of a sweep takes the
# same number of steps, so all are asked the same, on whatever machine each of them ran.
STEPS_PER_QUESTION = 4
# Time for replies unless a third of the training took longer; with less than MIN_MINUTES none are generated.
LEAST_MINUTES = 3.0
MIN_MINUTES = 2.0
FULL_MINUTES = 120.0
# Questions of each kind to choose from: steps so large that a little noise in the measured speed changes nothing.
NUMBERS = (500, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16, 12, 8)
# Mean reply as a share of the limit, where that is the 90th percentile of lognormal lengths (sigma 0.73).
USUAL_SHARE = 0.5
# Reasoning and chat questions.
KINDS = 2


@dataclass(frozen=True)
class Level:
    """How much is asked."""

    questions: int
    """Of each kind, reasoning and chat; 0: no reply is generated."""
    samples: int
    """Replies per question, mode and model."""
    probes: int
    """Per category and language, each answered by the base in every mode."""
    probe_tokens: int
    validation: int
    """Held-out rows."""


LEVELS = {
    "fast": Level(questions=0, samples=1, probes=2, probe_tokens=48, validation=64),
    "quick": Level(questions=64, samples=1, probes=2, probe_tokens=48, validation=64),
    "full": Level(questions=500, samples=4, probes=6, probe_tokens=256, validation=500),
}


@dataclass(frozen=True)
class Speed:
    """How fast a machine generates: `rows` replies at once, in so many seconds for one more token of each."""

    rows: int
    seconds_per_step: float


@dataclass(frozen=True)
class Plan:
    """What an evaluation generates."""

    size: Level
    limits: dict[str, int] = field(default_factory=dict)
    """Longest reply in tokens, by mode; REPLY_LIMIT for a mode that is not named."""
    seconds: float | None = None
    """How long all replies are expected to take; None where the speed was not measured."""
    note: str = ""
    """Why less is generated than the level names."""

    def limit(self, mode: str) -> int:
        """The longest reply in a mode, in tokens."""
        return self.limits.get(mode, REPLY_LIMIT)


def sized(level: str, steps: int | None = None) -> Level:
    """A level, made smaller after a short training of `steps` optimizer steps unless it is the full one."""
    if level not in LEVELS:
        raise ToolkitError(f"level {level!r}: expected {', '.join(LEVELS)}")
    size = LEVELS[level]
    if level == "full" or steps is None:
        return size
    affordable = next((n for n in (64, 32, 16) if n * STEPS_PER_QUESTION <= steps), 8)
    probes = 2 if affordable > 16 else 1
    return replace(size, questions=min(size.questions, affordable), probes=probes, validation=affordable)


def minutes_for(level: str, train_seconds: float | None) -> float:
    """Minutes for replies where nobody named any: a third of the training's, but at least three."""
    return FULL_MINUTES if level == "full" else max(LEAST_MINUTES, (train_seconds or 0) / 180)


def plan_generation(
    level: str,
    *,
    steps: int | None = None,
    limits: dict[str, int],
    minutes: float | None = None,
    train_seconds: float | None = None,
    questions: int | None = None,
    modes: Sequence[str] = ("thinking", "non_thinking"),
    speed: Callable[[], Speed],
) -> Plan:
    """The plan of one evaluation. `questions` of each kind, where they are given, are asked whatever it takes; else as
    many as `minutes` allow. `speed` is called only where the time decides.

    A number of minutes that somebody names lifts the bound by `steps`."""
    size = sized(level, steps if minutes is None else None)
    # runs that are to be compared must be asked the same, on whatever machine: nothing is measured
    if questions or not size.questions:
        return Plan(replace(size, questions=questions or 0), limits)
    silent = replace(size, questions=0)
    if minutes is not None and minutes < MIN_MINUTES:
        note = f"fast evidence only: replies need {MIN_MINUTES:g} minutes or more (--minutes 3)"
        return Plan(silent, limits, note=note)
    seconds = 60 * (minutes or minutes_for(level, train_seconds))
    measured = speed()
    # first with fewer replies to a question, then with fewer questions
    fewer = [replace(size, questions=n, samples=1) for n in NUMBERS if n <= size.questions]
    for smaller in [size, *fewer]:
        plan = Plan(smaller, limits, note=why_fewer(smaller, size, level, steps))
        expected = generation_seconds(smaller, plan, modes, measured)
        if expected <= seconds:
            return replace(plan, seconds=expected)
    note = (
        f"fast evidence only: even {NUMBERS[-1]} questions of each kind would take about {expected / 60:.0f} minutes, and "
        f"fewer than {MIN_PAIRS} show nothing (--minutes {math.ceil(expected / 60)} generates them)"
    )
    return Plan(silent, limits, note=note)


def generation_seconds(size: Level, plan: Plan, modes: Sequence[str], speed: Speed) -> float:
    """Seconds for the replies of base and tuned in each mode."""
    replies = KINDS * size.questions * size.samples
    # the last batch runs to the limit, since one long reply is enough; those before it are refilled
    batches = 1 + USUAL_SHARE * (replies / min(speed.rows, replies) - 1)
    return 2 * batches * sum(plan.limit(mode) for mode in modes) * speed.seconds_per_step


def why_fewer(size: Level, asked: Level, level: str, steps: int | None) -> str:
    """Why fewer questions are asked than the level names; empty where all are."""
    if size.questions < asked.questions:
        return f"{size.questions} of {asked.questions} questions of each kind fit the time: --minutes asks more"
    if size.questions < LEVELS[level].questions:
        return f"{size.questions} questions of each kind after {steps} training steps: --level full asks more"
    return ""


def smallest_change(questions: int) -> int:
    """Points below which a change cannot be told from so many questions: six must differ the same way."""
    return min(100, math.ceil(100 * MIN_PAIRS / max(1, questions)))
