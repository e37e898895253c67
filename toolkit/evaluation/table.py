"""Evaluation's long table, summed up: a row for each mark, all numbers are sums over groups of it.

scores = summarize(marks, seed=3407); scores["tuned"]["thinking"]["accuracy"]["value"]
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final, TypedDict

import numpy as np

from toolkit.evaluation.score import Mark
from toolkit.evaluation.stats import Sample, interval, is_rate, paired_difference
from toolkit.records import PerQuestion, Sections

MODELS: Final = ("base", "tuned")
# Metrics whose sums and counts per question are written out, so that `compare` can pair runs question by question.
KEPT = ("accuracy", "accuracy/chat", "adherence", "kl")


class Scores(TypedDict):
    """The part of eval.json that is computed from marks."""

    base: Sections
    tuned: Sections
    difference: Sections
    per_question: PerQuestion


def summarize(marks: Iterable[Mark], seed: int) -> Scores:
    """All numbers of the long table. A value that is not a number counts as not measured."""
    grouped: defaultdict[str, defaultdict[str, list[Mark]]] = defaultdict(lambda: defaultdict(list))
    for mark in marks:
        grouped[mark.section][mark.metric].append(mark)
    scores = Scores(base={}, tuned={}, difference={}, per_question={})
    for section, metrics in grouped.items():
        changes = scores["difference"][section] = {}
        kept = scores["per_question"][section] = {model: {} for model in MODELS}
        scores["base"][section], scores["tuned"][section] = {}, {}
        # One entry for each question asked, so that every metric of `per_question` pairs with every other
        asked = max((questions(own) for metric, own in metrics.items() if metric in KEPT), default=0)
        for metric, own in sorted(metrics.items()):
            length, rate = max(asked, questions(own)), is_rate(metric)
            samples = {model: sample_of(own, model, length) for model in MODELS}
            changes[metric] = paired_difference(samples["base"], samples["tuned"], seed=seed, rate=rate)
            for model in MODELS:
                scores[model][section][metric] = interval(samples[model], seed=seed, rate=rate)
                if metric in KEPT:
                    kept[model][metric] = samples[model].rounded()
    return scores


def questions(marks: Sequence[Mark]) -> int:
    """One more than the highest number of a question."""
    return 1 + max(mark.question for mark in marks)


def sample_of(marks: Sequence[Mark], model: str, length: int) -> Sample:
    """What a model's marks of each question add up to."""
    # NaN of a diverged run: not measured, instead of spoiling the sum of all others
    measured = [mark for mark in marks if mark.model == model and math.isfinite(mark.value)]
    places = np.array([mark.question for mark in measured], int)
    sums = np.bincount(places, [mark.value for mark in measured], minlength=length)
    return Sample(sums, np.bincount(places, [mark.weight for mark in measured], minlength=length))
