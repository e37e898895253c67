"""Bootstrap intervals over questions: what a number could have been, had other questions been drawn.

interval(right, asked, seed=3407)  # {"value": 0.71, "low": 0.63, "high": 0.79, "n": 120}
"""

import functools
import math
from statistics import NormalDist

import numpy as np

RESAMPLES = 2000


def interval(sums, counts, *, seed: int, rate: bool = False) -> dict:
    """sum(sums) / sum(counts) with a 95% interval; one entry per question, which is what is resampled.

    `sums` and `counts` hold what several samples of a question add up to, so that its samples stay together (a cluster).
    `rate` says that the number lies between 0 and 1: where all questions agree, the bootstrap sees no spread at all, and
    the exact binomial bound takes its place. Questions with a count of 0 are left out; `n` counts those that remain."""
    sums, counts = _kept(sums, counts)
    if not len(sums):
        return {"value": None, "low": None, "high": None, "n": 0}
    value = sums.sum() / counts.sum()
    low, high = _quantiles(ratios(sums, counts, draws(len(sums), seed)), len(sums))
    if rate and value in (0.0, 1.0):
        bound = unanimous(len(sums))
        low, high = (0.0, bound) if value == 0 else (1 - bound, 1.0)
    return {"value": float(value), "low": float(low), "high": float(high), "n": len(sums)}


def difference(first, second, *, seed: int, rate: bool = False) -> dict:
    """second - first with a paired 95% interval: each resample draws the same questions for both.

    `first` and `second` are (sums, counts); only questions counted in both take part."""
    both = (np.asarray(first[1]) > 0) & (np.asarray(second[1]) > 0)
    a, b = ([np.asarray(x, float)[both] for x in pair] for pair in (first, second))
    n = int(both.sum())
    if not n:
        return {"value": None, "low": None, "high": None, "n": 0}
    value = b[0].sum() / b[1].sum() - a[0].sum() / a[1].sum()
    drawn = draws(n, seed)
    low, high = _quantiles(ratios(*b, drawn) - ratios(*a, drawn), n)
    if rate and math.isclose(low, high):
        low, high = max(-1.0, value - unanimous(n)), min(1.0, value + unanimous(n))
    return {"value": float(value), "low": float(low), "high": float(high), "n": n}


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


def _kept(sums, counts) -> tuple[np.ndarray, np.ndarray]:
    sums, counts = np.asarray(sums, float), np.asarray(counts, float)
    return sums[counts > 0], counts[counts > 0]


def _quantiles(resampled: np.ndarray, n: int) -> np.ndarray:
    """The 95% percentile interval, widened for small n as Hesterberg's "expanded percentile" does (The American
    Statistician 69, 2015, section 4.4): the plain one is too narrow by about sqrt((n-1)/n) and uses z for t."""
    normal = NormalDist()
    tail = normal.cdf(-math.sqrt(n / (n - 1)) * _t975(n - 1)) if n > 1 else 0.0
    return np.quantile(resampled, [tail, 1 - tail])


def _t975(freedom: int) -> float:
    """Student's t at 97.5%, by Cornish and Fisher's expansion; within 0.4% from 4 degrees of freedom on."""
    z = NormalDist().inv_cdf(0.975)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
