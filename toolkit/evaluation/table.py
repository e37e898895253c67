"""Evaluation's long table, summed up: a row for each mark, all numbers are sums over groups of it.

scores = summarize(marks, seed=3407); scores["tuned"]["thinking"]["accuracy"]["value"]
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import TypedDict

import numpy as np

from toolkit.evaluation.score import Mark
from toolkit.evaluation.stats import Sample, interval, is_rate, paired_difference
from toolkit.records import PerQuestion, Sections

MODELS = ("base", "tuned")
KEPT = ("accuracy", "accuracy/chat", "adherence", "kl")
"""Metrics whose sums and counts per question are written out, so that `compare` can pair runs question by question."""


class Scores(TypedDict):
    """The part of eval.json that is computed from marks."""

    base: Sections
    tuned: Sections
    difference: Sections
    per_question: PerQuestion


def summarize(marks: Iterable[Mark], seed: int) -> Scores:
    """All numbers of the long table. A value that is not a number counts as not measured."""
    sections = by_section_and_metric(marks)
    scores: dict[str, Sections] = {name: {section: {} for section in sections} for name in (*MODELS, "difference")}
    per_question: PerQuestion = {section: {model: {} for model in MODELS} for section in sections}
    for section, metrics in sections.items():
        # One entry for each question asked, so that every metric of `per_question` pairs with every other
        longest = max((question_count(pair) for metric, pair in metrics.items() if metric in KEPT), default=0)
        for metric, pair in sorted(metrics.items()):
            length = max(longest, question_count(pair))
            samples = {model: sample_of(pair[model], length) for model in MODELS}
            for model, sample in samples.items():
                scores[model][section][metric] = interval(sample, seed=seed, rate=is_rate(metric))
                if metric in KEPT:
                    sums_and_counts = [np.round(x, 6).tolist() for x in (sample.sums, sample.counts)]
                    per_question[section][model][metric] = sums_and_counts
            scores["difference"][section][metric] = paired_difference(
                samples["base"], samples["tuned"], seed=seed, rate=is_rate(metric)
            )
    return Scores(
        base=scores["base"], tuned=scores["tuned"], difference=scores["difference"], per_question=per_question
    )


def by_section_and_metric(marks: Iterable[Mark]) -> dict[str, dict[str, dict[str, list[Mark]]]]:
    """{section: {metric: {model: its marks}}}."""
    grouped: defaultdict[str, defaultdict[str, dict[str, list[Mark]]]] = defaultdict(
        lambda: defaultdict(lambda: {model: [] for model in MODELS})
    )
    for mark in marks:
        grouped[mark.section][mark.metric][mark.model].append(mark)
    return {section: dict(metrics) for section, metrics in grouped.items()}


def question_count(pair: dict[str, list[Mark]]) -> int:
    """One more than the highest number of a question."""
    return 1 + max(mark.question for own in pair.values() for mark in own)


def sample_of(marks: list[Mark], length: int) -> Sample:
    """What the marks of each question add up to."""
    # NaN of a diverged run: not measured, instead of spoiling the sum of all others
    measured = [mark for mark in marks if math.isfinite(mark.value)]
    questions = np.array([mark.question for mark in measured], int)
    return Sample(
        np.bincount(questions, [mark.value for mark in measured], minlength=length),
        np.bincount(questions, [mark.weight for mark in measured], minlength=length),
    )
