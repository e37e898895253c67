"""Sums per question as evaluation's long table: `summarize(long_table({"thinking": [base, tuned]}), seed=1)`."""

import pandas as pd

from toolkit.evaluation.measure import COLUMNS, MODELS


def long_table(sums):
    """{section: [base, tuned]}, each {metric: (sums, counts)}, as evaluation's long table."""
    rows = [
        (section, model, metric, i, value, weight)
        for section, pair in sums.items()
        for model, metrics in zip(MODELS, pair, strict=True)
        for metric, counted in metrics.items()
        for i, (value, weight) in enumerate(zip(*counted, strict=True))
    ]
    return pd.DataFrame(rows, columns=COLUMNS)
