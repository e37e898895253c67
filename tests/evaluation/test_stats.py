"""Intervals hold the truth as often as they say, and equal those of the frozen record to the last digit."""

import json
import math

import numpy as np
import pytest

from tests.support.evaluation import long_table
from toolkit.evaluation.stats import Sample, interval, paired_difference
from toolkit.evaluation.table import summarize
from toolkit.files import ROOT


def test_bootstrap_intervals_cover_the_truth_at_the_stated_rate():
    """60 questions with 2 samples each, 600 times: 95% intervals of a rate and of a paired difference hold the truth in
    93 to 97 of 100 (600 draws alone give a standard error of 0.9 points)."""
    rng, n, trials, covered = np.random.default_rng(1), 60, 600, np.zeros(2)
    gain = 0.7 - rng.beta(6, 6, 10**6).mean() / 2
    for trial in range(trials):
        skill = rng.beta(6, 6, n)
        first, second = rng.binomial(2, skill / 2), rng.binomial(2, 0.7, n)
        one = interval(Sample.of(second, np.full(n, 2)), seed=trial, rate=True)
        two = paired_difference(
            Sample.of(first, np.full(n, 2)), Sample.of(second, np.full(n, 2)), seed=trial, rate=True
        )
        covered += one["low"] <= 0.7 <= one["high"], two["low"] <= gain <= two["high"]
    assert np.all((covered / trials >= 0.93) & (covered / trials <= 0.97)), covered / trials


def test_where_all_questions_agree_the_interval_is_the_exact_bound_and_not_a_point():
    assert interval(Sample.of([1] * 20, [1] * 20), seed=0, rate=True)["low"] == pytest.approx(
        0.8316, abs=1e-4
    )  # Clopper-Pearson
    same = paired_difference(Sample.of([1] * 20, [1] * 20), Sample.of([1] * 20, [1] * 20), seed=0, rate=True)
    assert (same["value"], same["low"]) == (0.0, pytest.approx(-0.1684, abs=1e-4))
    assert interval(Sample.of([], []), seed=0) == {"value": None, "low": None, "high": None, "n": 0}


def at_most(right, n, rate):
    """Chance that at most so many of n independent questions are right."""
    return sum(math.comb(n, i) * rate**i * (1 - rate) ** (n - i) for i in range(right + 1))


@pytest.mark.parametrize(("right", "n"), [(4, 8), (1, 8), (3, 5), (1, 2), (16, 20), (27, 29), (63, 64), (2, 1500)])
def test_few_questions_or_nearly_unanimous_ones_have_the_exact_interval_of_a_rate(right, n):
    """Its ends leave what was found a chance of 2.5%; half of 8 right can be neither 6% nor 100%."""
    found = interval(Sample.of([1] * right + [0] * (n - right), [1] * n), seed=3407, rate=True)
    assert at_most(right, n, found["high"]) == pytest.approx(0.025, abs=1e-4)
    assert 1 - at_most(right - 1, n, found["low"]) == pytest.approx(0.025, abs=1e-4)
    if (right, n) == (4, 8):
        assert [found["low"], found["high"]] == pytest.approx([0.1570, 0.8430], abs=1e-4)  # printed tables


@pytest.mark.parametrize("n", [2, 5, 8, 20])
def test_intervals_of_few_questions_cover_every_rate(n):
    """At least 95 of 100 times, summed over all outcomes instead of simulated."""
    ends = [
        interval(Sample.of([1] * right + [0] * (n - right), [1] * n), seed=3407, rate=True) for right in range(n + 1)
    ]
    for rate in np.linspace(0.01, 0.99, 99):
        chances = [math.comb(n, i) * rate**i * (1 - rate) ** (n - i) for i in range(n + 1)]
        assert sum(c for c, end in zip(chances, ends, strict=True) if end["low"] <= rate <= end["high"]) >= 0.95


def test_questions_with_several_samples_are_resampled_whole():
    """Half of 8 questions right in both samples, as one question each: the exact interval of 16 would be too narrow."""
    twice = interval(Sample.of([2] * 4 + [0] * 4, [2] * 8), seed=3407, rate=True)
    assert twice["high"] - twice["low"] > 0.8430 - 0.1570


FROZEN = json.loads((ROOT / "tests/support/files/intervals.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", FROZEN["cases"], ids=lambda case: case["name"])
def test_intervals_are_to_the_last_digit_those_of_before_the_long_table(case):
    first, second, settings = case["first"], case["second"], {"seed": case["seed"], "rate": case["rate"]}
    assert interval(Sample.of(*second), **settings) == case["interval"]
    assert paired_difference(Sample.of(*first), Sample.of(*second), **settings) == case["difference"]


def test_an_evaluation_summed_up_from_the_long_table_equals_the_frozen_one():
    run = FROZEN["run"]
    assert json.loads(json.dumps(summarize(long_table(run["sums"]), run["seed"]))) == run["result"]
