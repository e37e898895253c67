"""How much longer the tuned model's replies are, and whether some of them never end.

compare_lengths(base, tuned, sets=["sums"] * 8, samples=1, limit=1024, seed=3407)["ratio"]

A reply that the limit cut has a length nobody knows, so nothing here is a mean over all replies. Of both models the
same share of the shortest replies is compared: where tuned replies are simply r times longer, so are those.
"""

import math
from collections.abc import Sequence

import numpy as np

from toolkit.evaluation.generate import Reply
from toolkit.evaluation.stats import RESAMPLES, nothing_measured, percentile_interval
from toolkit.records import Interval, ReplyLengths

# Share of replies that never end from which it is a loss: lengths are not exactly proportional.
EXCESS = 0.05
Groups = list[tuple[np.ndarray, np.ndarray]]
"""By question set: tokens of base and tuned (resamples × questions × samples), infinite where the limit cut a reply."""


def compare_lengths(
    base: Sequence[Reply], tuned: Sequence[Reply], sets: Sequence[str], samples: int, limit: int, seed: int
) -> ReplyLengths:
    """Lengths of both models' replies; `sets` names the set of each question, which has `samples` replies in a row."""
    before, after = (tokens_of(replies).reshape(-1, samples) for replies in (base, tuned))
    groups = resampled_groups(before, after, sets, seed)
    return ReplyLengths(
        base=mean_ended(before),
        tuned=mean_ended(after),
        ratio=estimate(length_ratio(groups), len(before)),
        endless=estimate(endless_share(groups, limit), len(before)),
    )


def tokens_of(replies: Sequence[Reply]) -> np.ndarray:
    """Length of each reply; infinite where nobody knows it."""
    return np.array([r.reasoning_tokens + r.answer_tokens if r.finished else math.inf for r in replies])


def mean_ended(tokens: np.ndarray) -> float | None:
    """Mean length of the replies that ended; None without any."""
    ended = tokens[np.isfinite(tokens)]
    return float(ended.mean()) if len(ended) else None


def resampled_groups(before: np.ndarray, after: np.ndarray, sets: Sequence[str], seed: int) -> Groups:
    """The replies themselves, then RESAMPLES times as if other questions had been drawn, the same of both models.

    Set by set: where only mathematics is thought about longer, chat replies would hide by how much."""
    places = [np.flatnonzero(np.array(sets) == name) for name in dict.fromkeys(sets)]
    drawn = [[rows] for rows in places]
    rng = np.random.default_rng([seed, len(before)])
    for _ in range(RESAMPLES):
        for rows, draws in zip(places, drawn, strict=True):
            draws.append(rows[rng.integers(len(rows), size=len(rows))])
    # questions are what is resampled, the samples of one stay together
    return [(before[np.array(draws)], after[np.array(draws)]) for draws in drawn]


def estimate(values: np.ndarray, n: int) -> Interval:
    """The first of the values, with the 95% interval of the others."""
    value = float(values[0])
    if math.isnan(value):
        return nothing_measured()
    return percentile_interval(np.nan_to_num(values[1:], nan=value), value, n, None)


def length_ratio(groups: Groups) -> np.ndarray:
    """Tokens of the shortest replies of all sets, tuned by base; NaN where one of the models ended none."""
    base, tuned = np.sum([shortest(*group, share=1.0) for group in groups], axis=0)
    return np.divide(tuned, base, out=np.full(len(base), math.nan), where=(base > 0) & (tuned > 0))


def shortest(base: np.ndarray, tuned: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """(base, tuned) tokens of the shortest replies of each resample: a share of as many as both models ended."""
    base, tuned = (np.sort(tokens.reshape(len(tokens), -1)) for tokens in (base, tuned))
    ended = np.minimum(np.isfinite(base).sum(1), np.isfinite(tuned).sum(1))
    kept = np.arange(base.shape[1]) < np.ceil(share * ended)[:, None]
    return base.sum(1, where=kept), tuned.sum(1, where=kept)


def endless_share(groups: Groups, limit: int) -> np.ndarray:
    """Share of tuned replies that are cut, less the share that would be if the base's were as much longer."""
    excess = np.zeros(len(groups[0][0]))
    for before, after in groups:
        # the shorter half, since replies near the limit are those that are missing where some never end
        base, tuned = shortest(before, after, share=0.5)
        factor = np.maximum(1.0, np.divide(tuned, base, out=np.ones(len(base)), where=base > 0))
        expected = (factor[:, None, None] * before > limit).sum((1, 2))
        excess += np.isinf(after).sum((1, 2)) - expected
    return excess / sum(before[0].size for before, _ in groups)
