"""Bootstrap intervals over questions: what a number could have been, had other questions been drawn.

interval(right, asked, seed=3407)  # {"value": 0.71, "low": 0.63, "high": 0.79, "n": 120}
"""

import bisect
import functools
import math
from statistics import NormalDist

import numpy as np

RESAMPLES = 2000


def interval(sums, counts, *, seed: int, rate: bool = False) -> dict:
    """sum(sums) / sum(counts) with a 95% interval; one entry per question, which is what is resampled.

    `sums` and `counts` hold what several samples of a question add up to, so that its samples stay together (a cluster).
    `rate` says that the number lies between 0 and 1: where all questions agree, the bootstrap sees no spread at all, and
    the exact binomial bound takes its place; so does the exact interval for few questions with one sample each. Questions
    with a count of 0 are left out; `n` counts those that remain."""
    return _estimate([(sums, counts)], seed, least=0.0 if rate else None)


def difference(first, second, *, seed: int, rate: bool = False) -> dict:
    """second - first with a paired 95% interval: each resample draws the same questions for both.

    `first` and `second` are (sums, counts); only questions counted in both take part."""
    return _estimate([second, first], seed, least=-1.0 if rate else None)


def _estimate(pairs: list, seed: int, least: float | None) -> dict:
    """The ratio of the first (sums, counts), minus that of the second if there is one; `least` is a rate's lower limit."""
    table = np.asarray(pairs, float)  # pairs × (sums, counts) × questions
    table = np.compress((table[:, 1] > 0).all(axis=0), table, axis=2)
    n = table.shape[2]
    if not n:
        return {"value": None, "low": None, "high": None, "n": 0}
    # the same draws for all metrics over n questions, so that their differences are paired too
    drawn = draws(n, seed)
    value, *subtracted = (sums.sum() / counts.sum() for sums, counts in table)
    resampled, *resampled_subtracted = (ratios(sums, counts, drawn) for sums, counts in table)
    value -= sum(subtracted)
    low, high = ends(resampled - sum(resampled_subtracted), value, n, least)
    once = least == 0 and np.isin(table, (0, 1)).all()
    # resamples of a few questions take few values, and an end of 0 or 1 is impossible where not all agree
    if once and 0 < value < 1 and (n < 30 or low == 0 or high == 1):
        right = int(table[0, 0].sum())
        low, high = _rate(0.975, right - 1, n), _rate(0.025, right, n)
    return {"value": float(value), "low": low, "high": high, "n": n}


def is_rate(metric: str) -> bool:
    """Whether a metric counts replies, so that it lies between 0 and 1 and its extremes have an exact bound."""
    return metric.split("/")[0] in ("accuracy", "adherence", "switch", "cut")


@functools.lru_cache(maxsize=4)
def draws(n: int, seed: int) -> np.ndarray:
    """(RESAMPLES, n): how often each of n questions is drawn; the same for every metric over as many questions."""
    index = np.random.default_rng([seed, n]).integers(n, size=(RESAMPLES, n)) + n * np.arange(RESAMPLES)[:, None]
    return np.bincount(index.ravel(), minlength=RESAMPLES * n).reshape(RESAMPLES, n).astype(float)


def ratios(sums: np.ndarray, counts: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """The ratio in each resample; NaN where a resample drew nothing that counts."""
    with np.errstate(invalid="ignore"):  # einsum, not @: for so little work BLAS threads mostly wait for each other
        return np.einsum("rq,q->r", drawn, sums) / np.einsum("rq,q->r", drawn, counts)


def unanimous(n: int) -> float:
    """Share that n questions, none of which shows it, leave possible at 97.5%: the Clopper-Pearson bound."""
    return 1 - 0.025 ** (1 / n)


def _rate(chance: float, right: int, n: int) -> float:
    """The rate at which at most `right` of n questions are right with that chance: with 2.5%, and for one less
    with 97.5%, the ends of the exact interval (Clopper and Pearson, Biometrika 26, 1934)."""
    if 2 * right > n:  # the same said of the wrong ones, which are few: binomials of half of n overflow
        return 1 - _rate(1 - chance, n - right - 1, n)

    def more(step: int) -> float:
        rate = step / 10**9
        return -sum(math.comb(n, i) * rate**i * (1 - rate) ** (n - i) for i in range(right + 1))

    return bisect.bisect(range(10**9), -chance, key=more) / 10**9


def ends(resampled: np.ndarray, value: float, n: int, least: float | None) -> tuple[float, float]:
    """The 95% percentile interval, widened for small n as Hesterberg's "expanded percentile" does (The American
    Statistician 69, 2015, section 4.4): the plain one is too narrow by about sqrt((n-1)/n) and uses z for t. For a rate,
    which is `least` or more, the exact bound around its value where all questions agree: there is no spread to resample."""
    normal = NormalDist()
    tail = normal.cdf(-math.sqrt(n / (n - 1)) * _t975(n - 1)) if n > 1 else 0.0
    low, high = np.quantile(resampled, [tail, 1 - tail])
    if least is not None and math.isclose(low, high):
        low, high = max(least, value - unanimous(n)), min(1.0, value + unanimous(n))
    return float(low), float(high)


def _t975(freedom: int) -> float:
    """Student's t at 97.5%, by Cornish and Fisher's expansion; within 0.4% from 4 degrees of freedom on."""
    z = NormalDist().inv_cdf(0.975)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
