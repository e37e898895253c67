"""How much longer the tuned model's replies are, and whether some of them never end.

compare_lengths(base, tuned, sets=["sums"] * 8, samples=1, limit=1024, seed=3407)["ratio"]

A reply that the limit cut has a length nobody knows, so nothing here is a mean over all replies. Of both models the
same share of the shortest replies is compared: where tuned replies are simply r times longer, so are those.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from toolkit.evaluation.generate import Reply
from toolkit.evaluation.stats import RESAMPLES, nothing_measured, percentile_interval
from toolkit.records import Interval, ReplyLengths

EXCESS = 0.05
"""Share of replies that never end from which it is a loss: lengths are not exactly proportional."""


@dataclass(frozen=True)
class Group:
    """Replies of both models to the questions of one set: tokens (questions × samples), infinite where cut."""

    base: np.ndarray
    tuned: np.ndarray


def compare_lengths(
    base: Sequence[Reply], tuned: Sequence[Reply], sets: Sequence[str], samples: int, limit: int, seed: int
) -> ReplyLengths:
    """Lengths of both models' replies; `sets` names the set of each question, which has `samples` replies in a row."""
    tokens = [_tokens(replies).reshape(-1, samples) for replies in (base, tuned)]
    places = defaultdict(list)
    for place, name in enumerate(sets):
        places[name].append(place)
    # by set: where only mathematics is thought about longer, chat replies would hide by how much
    groups = [Group(tokens[0][rows], tokens[1][rows]) for rows in places.values()]
    return {
        "base": _mean_ended(tokens[0]),
        "tuned": _mean_ended(tokens[1]),
        "ratio": _bootstrapped(groups, _ratio, seed),
        "endless": _bootstrapped(groups, lambda drawn: _endless(drawn, limit), seed),
    }


def _tokens(replies: Sequence[Reply]) -> np.ndarray:
    return np.array([r.reasoning_tokens + r.answer_tokens if r.finished else math.inf for r in replies])


def _mean_ended(tokens: np.ndarray) -> float | None:
    ended = tokens[np.isfinite(tokens)]
    return float(ended.mean()) if len(ended) else None


def _bootstrapped(groups: list[Group], statistic: Callable[[list[Group]], float], seed: int) -> Interval:
    """A statistic of all groups with its 95% interval; each resample draws the same questions of both models, set by set."""
    # questions are what is resampled, the samples of one stay together
    n = sum(len(group.base) for group in groups)
    value = statistic(groups)
    if not n or math.isnan(value):
        return nothing_measured()
    rng = np.random.default_rng([seed, n])
    resampled = []
    for _ in range(RESAMPLES):
        rows = [rng.integers(len(group.base), size=len(group.base)) for group in groups]
        drawn = [Group(group.base[chosen], group.tuned[chosen]) for group, chosen in zip(groups, rows, strict=True)]
        resampled.append(statistic(drawn))
    low, high = percentile_interval(np.nan_to_num(resampled, nan=value), value, n, None)
    return {"value": value, "low": low, "high": high, "n": n}


def _ratio(groups: list[Group]) -> float:
    """Tokens of the shortest replies of all sets, tuned by base; NaN where one of the models ended none."""
    shortest = [_shortest(group, 1.0) for group in groups]
    base = sum(tokens[0] for tokens in shortest)
    tuned = sum(tokens[1] for tokens in shortest)
    return tuned / base if base and tuned else math.nan


def _shortest(group: Group, share: float) -> tuple[float, float]:
    """(base, tuned) tokens of the shortest replies: a share of as many as both models ended."""
    base, tuned = np.sort(group.base, axis=None), np.sort(group.tuned, axis=None)
    ended = min(np.isfinite(base).sum(), np.isfinite(tuned).sum())
    count = math.ceil(share * ended)
    return float(base[:count].sum()), float(tuned[:count].sum())


def _endless(groups: list[Group], limit: int) -> float:
    """Share of tuned replies that are cut, less the share that would be if the base's were as much longer."""
    excess = 0.0
    for group in groups:
        # the shorter half, since replies near the limit are those that are missing where some never end
        base, tuned = _shortest(group, 0.5)
        factor = max(1.0, tuned / base) if base else 1.0
        expected = (factor * group.base > limit).sum()
        excess += np.isinf(group.tuned).sum() - expected
    return float(excess / sum(group.base.size for group in groups))
