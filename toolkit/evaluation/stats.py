"""Bootstrap intervals over questions: what a number could have been, had other questions been drawn.

interval(Sample.of([1, 0, 1], [1, 1, 1]), seed=3407)  # {"value": 0.67, "low": 0.09, "high": 0.99, "n": 3}
"""

import bisect
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from toolkit.records import Interval

RESAMPLES = 2000
# Fewer pairs show nothing at 95%, even where all agree: a sign test's least p is 2 * 0.5 ** n.
MIN_PAIRS = 6


@dataclass(frozen=True)
class Sample:
    """One entry for each question: what its replies (or tokens) add up to, and how many there were.

    Questions are what is resampled, so that several replies to one question stay together (a cluster)."""

    sums: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, sums: Sequence[float], counts: Sequence[float]) -> "Sample":
        """From plain lists."""
        return cls(np.asarray(sums, float), np.asarray(counts, float))

    def __len__(self) -> int:
        return len(self.sums)

    def chosen(self, which: np.ndarray) -> "Sample":
        """Those questions alone where `which` is true."""
        return Sample(self.sums[which], self.counts[which])

    def ratio(self) -> float:
        """The number itself: what all questions add up to, by how many there were."""
        return self.sums.sum() / self.counts.sum()

    def rounded(self) -> list[list[float]]:
        """[sums, counts] as eval.json keeps them."""
        return [np.round(self.sums, 6).tolist(), np.round(self.counts, 6).tolist()]

    def all_once(self) -> bool:
        """Whether each question counts once and is right or wrong, so that the exact binomial interval applies."""
        return bool(np.isin([self.sums, self.counts], (0, 1)).all())


def interval(sample: Sample, *, seed: int, rate: bool = False) -> Interval:
    """The ratio of a sample with a 95% interval. Questions with a count of 0 are left out; `n` counts those that remain.

    `rate` says that it lies between 0 and 1: where all questions agree, the bootstrap sees no spread at all, and the
    exact binomial bound takes its place; so does the exact interval for few questions with one reply each."""
    counted = sample.chosen(sample.counts > 0)
    n = len(counted)
    if not n:
        return nothing_measured()
    value = counted.ratio()
    resampled = resampled_ratios(counted, resample_counts(n, seed))
    found = percentile_interval(resampled, value, n, 0.0 if rate else None)
    # resamples of a few questions take few values, and an end of 0 or 1 is impossible where not all agree
    if rate and counted.all_once() and 0 < value < 1 and (n < 30 or found["low"] == 0 or found["high"] == 1):
        found["low"], found["high"] = exact_interval(int(counted.sums.sum()), n)
    return found


def paired_difference(before: Sample, after: Sample, *, seed: int, rate: bool = False) -> Interval:
    """after - before with a 95% interval. Each resample draws the same questions for both, of those counted in both."""
    both = (before.counts > 0) & (after.counts > 0)
    before, after = before.chosen(both), after.chosen(both)
    n = len(before)
    if not n:
        return nothing_measured()
    value = after.ratio() - before.ratio()
    counts = resample_counts(n, seed)
    resampled = resampled_ratios(after, counts) - resampled_ratios(before, counts)
    return percentile_interval(resampled, value, n, -1.0 if rate else None)


def nothing_measured() -> Interval:
    """The estimate of what no question counts for."""
    return Interval(value=None, low=None, high=None, n=0)


def direction(change: Interval) -> int:
    """1 where the whole interval of a difference lies above zero, -1 where it lies below, else 0."""
    if change["low"] is None or change["high"] is None or change["n"] < MIN_PAIRS:
        return 0
    return int(change["low"] > 0) - int(change["high"] < 0)


def is_rate(metric: str) -> bool:
    """Whether a metric counts replies, so that it lies between 0 and 1 and its extremes have an exact bound."""
    return metric.split("/")[0] in ("accuracy", "adherence", "cut")


@functools.lru_cache(maxsize=4)
def resample_counts(n: int, seed: int) -> np.ndarray:
    """(RESAMPLES, n): how often each of n questions is drawn; the same for every metric over as many questions, so that
    their differences are paired too."""
    first_of_resample = n * np.arange(RESAMPLES)[:, None]
    drawn = np.random.default_rng([seed, n]).integers(n, size=(RESAMPLES, n)) + first_of_resample
    return np.bincount(drawn.ravel(), minlength=RESAMPLES * n).reshape(RESAMPLES, n).astype(float)


def resampled_ratios(sample: Sample, counts: np.ndarray) -> np.ndarray:
    """The ratio in each resample; NaN where a resample drew nothing that counts."""
    with np.errstate(invalid="ignore"):
        # einsum, not @: for so little work BLAS threads mostly wait for each other
        return np.einsum("rq,q->r", counts, sample.sums) / np.einsum("rq,q->r", counts, sample.counts)


def percentile_interval(resampled: np.ndarray, value: float, n: int, lowest: float | None) -> Interval:
    """A value with its 95% percentile interval, widened for small n as Hesterberg's "expanded percentile" does (The American
    Statistician 69, 2015, section 4.4): the plain one is too narrow by about sqrt((n-1)/n) and uses z for t.

    For a rate, which is `lowest` or more, the exact bound around its value where all questions agree: there is no
    spread to resample."""
    tail = 0.0
    if n > 1:
        tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * student_t975(n - 1))
    low, high = np.quantile(resampled, [tail, 1 - tail])
    if lowest is not None and math.isclose(low, high):
        low = max(lowest, value - zero_count_bound(n))
        high = min(1.0, value + zero_count_bound(n))
    return Interval(value=float(value), low=float(low), high=float(high), n=n)


def zero_count_bound(n: int) -> float:
    """Share that n questions, none of which shows it, leave possible at 97.5%: the Clopper-Pearson bound."""
    return 1 - 0.025 ** (1 / n)


def exact_interval(right: int, n: int) -> tuple[float, float]:
    """The 95% interval of a rate by Clopper and Pearson (Biometrika 26, 1934); `right` is neither 0 nor n."""
    return _rate_where_at_most(right - 1, n, 0.975), _rate_where_at_most(right, n, 0.025)


def _rate_where_at_most(right: int, n: int, chance: float) -> float:
    """The rate at which at most `right` of n questions are right with that chance."""
    if 2 * right > n:  # the same said of the wrong ones, which are few: binomials of half of n overflow
        return 1 - _rate_where_at_most(n - right - 1, n, 1 - chance)

    def minus_chance(step: int) -> float:
        rate = step / 10**9
        chance = 0.0
        for i in range(right + 1):
            chance += math.comb(n, i) * rate**i * (1 - rate) ** (n - i)
        return -chance

    return bisect.bisect(range(10**9), -chance, key=minus_chance) / 10**9


def student_t975(freedom: int) -> float:
    """Student's t at 97.5%, by Cornish and Fisher's expansion; within 0.4% from 4 degrees of freedom on."""
    z = NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
