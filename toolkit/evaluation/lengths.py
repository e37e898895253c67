"""How much longer the tuned model's replies are, and whether some of them never end.

compare_lengths(base, tuned, sets=["sums"] * 8, samples=1, limit=1024, seed=3407)["ratio"]

A reply that the limit cut has a length nobody knows, so nothing here is a mean over all replies. Of both models the
same share of the shortest replies is compared: where tuned replies are simply r times longer, so are those.
"""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np

from toolkit.evaluation.generate import Reply
from toolkit.evaluation.stats import RESAMPLES, nothing_measured, percentile_interval
from toolkit.records import Interval, ReplyLengths

# Share of replies that never end from which it is a loss: lengths are not exactly proportional.
EXCESS = 0.05
Groups = list[tuple[np.ndarray, np.ndarray]]
"""By question set: tokens of base and tuned (questions × samples), infinite where the limit cut a reply."""


def compare_lengths(
    base: Sequence[Reply], tuned: Sequence[Reply], sets: Sequence[str], samples: int, limit: int, seed: int
) -> ReplyLengths:
    """Lengths of both models' replies; `sets` names the set of each question, which has `samples` replies in a row."""
    before, after = (tokens_of(replies).reshape(-1, samples) for replies in (base, tuned))
    # by set: where only mathematics is thought about longer, chat replies would hide by how much
    groups = []
    for name in dict.fromkeys(sets):
        rows = np.array(sets) == name
        groups.append((before[rows], after[rows]))
    return {
        "base": mean_ended(before),
        "tuned": mean_ended(after),
        "ratio": bootstrapped(groups, length_ratio, seed),
        "endless": bootstrapped(groups, functools.partial(endless_share, limit), seed),
    }


def tokens_of(replies: Sequence[Reply]) -> np.ndarray:
    """Length of each reply; infinite where nobody knows it."""
    return np.array([r.reasoning_tokens + r.answer_tokens if r.finished else math.inf for r in replies])


def mean_ended(tokens: np.ndarray) -> float | None:
    """Mean length of the replies that ended; None without any."""
    ended = tokens[np.isfinite(tokens)]
    return float(ended.mean()) if len(ended) else None


def bootstrapped(groups: Groups, statistic: Callable[[Groups], float], seed: int) -> Interval:
    """A statistic of all groups with its 95% interval; each resample draws the same questions of both models, set by set."""
    # questions are what is resampled, the samples of one stay together
    n = sum(len(base) for base, _ in groups)
    value = statistic(groups)
    if math.isnan(value):
        return nothing_measured()
    rng = np.random.default_rng([seed, n])
    resampled = []
    for _ in range(RESAMPLES):
        drawn = []
        for base, tuned in groups:
            rows = rng.integers(len(base), size=len(base))
            drawn.append((base[rows], tuned[rows]))
        resampled.append(statistic(drawn))
    low, high = percentile_interval(np.nan_to_num(resampled, nan=value), value, n, None)
    return {
        "value": value,
        "low": low,
        "high": high,
        "n": n,
    }


def length_ratio(groups: Groups) -> float:
    """Tokens of the shortest replies of all sets, tuned by base; NaN where one of the models ended none."""
    base, tuned = np.sum([shortest(*group, 1.0) for group in groups], axis=0)
    return float(tuned / base) if base and tuned else math.nan


def shortest(base: np.ndarray, tuned: np.ndarray, share: float) -> tuple[float, float]:
    """(base, tuned) tokens of the shortest replies: a share of as many as both models ended."""
    base, tuned = np.sort(base, axis=None), np.sort(tuned, axis=None)
    count = math.ceil(share * min(np.isfinite(base).sum(), np.isfinite(tuned).sum()))
    return float(base[:count].sum()), float(tuned[:count].sum())


def endless_share(limit: int, groups: Groups) -> float:
    """Share of tuned replies that are cut, less the share that would be if the base's were as much longer."""
    excess = 0.0
    for before, after in groups:
        # the shorter half, since replies near the limit are those that are missing where some never end
        base, tuned = shortest(before, after, 0.5)
        factor = max(1.0, tuned / base) if base else 1.0
        excess += np.isinf(after).sum() - (factor * before > limit).sum()
    return float(excess / sum(before.size for before, _ in groups))
