"""How much an evaluation generates: longest replies, and as many questions as the minutes allow at this machine's speed.

plan = plan_generation("quick", limits={"thinking": 3100}, minutes=14, speed=lambda: Speed(rows=16, seconds_per_step=0.05))
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from toolkit.evaluation.stats import MIN_PAIRS
from toolkit.files import ToolkitError
from toolkit.recipe import REPLY_LIMIT

STEPS_PER_QUESTION = 4
"""A quick evaluation asks at most one question of each kind for so many training steps: every run of a sweep takes the
same number of steps, so all are asked the same, on whatever machine each of them ran."""
LEAST_MINUTES = 3.0
"""Time for replies unless a third of the training took longer; with less than MIN_MINUTES none are generated."""
MIN_MINUTES = 2.0
FULL_MINUTES = 120.0
NUMBERS = (384, 256, 192, 128, 96, 64, 48, 32, 24, 16, 12, 8)
"""Questions of each kind to choose from, so that a little noise in the measured speed changes nothing."""
USUAL_SHARE = 0.5
"""Mean reply as a share of the limit, where that is the 90th percentile of lognormal lengths (sigma 0.73)."""
KINDS = 2
"""Reasoning and chat questions."""


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
    """How fast a machine generates."""

    rows: int
    """Replies at once."""
    seconds_per_step: float
    """For one more token of each of them."""


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
    questions = min(size.questions, affordable)
    return replace(size, questions=questions, probes=1 + (affordable > 16), validation=affordable)


def minutes_for(level: str, train_seconds: float | None) -> float:
    """Minutes for replies where nobody named any: a third of the training's, but at least three."""
    if level == "full":
        return FULL_MINUTES
    return max(LEAST_MINUTES, (train_seconds or 0) / 3 / 60)


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
    if questions:
        return Plan(replace(size, questions=questions), limits)
    if not size.questions:
        return Plan(size, limits)
    # what is left where replies would take too long
    silent = replace(size, questions=0)
    if minutes is not None and minutes < MIN_MINUTES:
        return Plan(
            silent, limits, note=f"fast evidence only: replies need {MIN_MINUTES:g} minutes or more (--minutes 3)"
        )
    seconds = 60 * (minutes or minutes_for(level, train_seconds))
    measured = speed()
    for smaller in smaller_sizes(size):
        expected = generation_seconds(smaller, Plan(smaller, limits), modes, measured)
        if expected <= seconds:
            return Plan(smaller, limits, expected, _why_fewer(smaller, size, level, steps, minutes))
    note = (
        f"fast evidence only: even {NUMBERS[-1]} questions of each kind would take about {expected / 60:.0f} minutes, and "
        f"fewer than {MIN_PAIRS} show nothing (--minutes {math.ceil(expected / 60)} generates them)"
    )
    return Plan(silent, limits, note=note)


def smaller_sizes(size: Level) -> list[Level]:
    """The level itself, then with one reply to a question, then with fewer questions."""
    fewer = [n for n in NUMBERS if n < size.questions]
    return [size, *(replace(size, questions=n, samples=1) for n in [size.questions, *fewer])]


def generation_seconds(size: Level, plan: Plan, modes: Sequence[str], speed: Speed) -> float:
    """Seconds for the replies of base and tuned in each mode."""
    replies = KINDS * size.questions * size.samples
    rows = min(speed.rows, replies)
    steps = 0.0
    for mode in modes:
        # the last batch runs to the limit, since one long reply is enough; those before it are refilled
        steps += 2 * (1 + USUAL_SHARE * (replies / rows - 1)) * plan.limit(mode)
    return steps * speed.seconds_per_step


def _why_fewer(size: Level, full: Level, level: str, steps: int | None, minutes: float | None) -> str:
    """Why fewer questions are asked than the level names; empty where all are."""
    if size.questions < full.questions:
        return f"{size.questions} of {full.questions} questions of each kind fit the time: --minutes asks more"
    if steps is not None and minutes is None and full.questions < LEVELS[level].questions:
        return f"{size.questions} questions of each kind after {steps} training steps: --level full asks more"
    return ""


def smallest_change(questions: int) -> int:
    """Points below which a change cannot be told from so many questions: six must differ the same way."""
    return min(100, math.ceil(100 * MIN_PAIRS / max(1, questions)))
