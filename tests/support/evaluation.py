"""Sums per question as evaluation's long table: `summarize(long_table({"thinking": [base, tuned]}), seed=1)`."""

from toolkit.evaluation.score import Mark
from toolkit.evaluation.table import MODELS


def long_table(sums: dict[str, list[dict]]) -> list[Mark]:
    """{section: [base, tuned]}, each {metric: (sums, counts)}, as marks."""
    marks = []
    for section, pair in sums.items():
        for model, metrics in zip(MODELS, pair, strict=True):
            for metric, counted in metrics.items():
                for i, (value, weight) in enumerate(zip(*counted, strict=True)):
                    marks.append(Mark(section, model, metric, i, value, weight))
    return marks
