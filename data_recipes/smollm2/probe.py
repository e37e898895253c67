"""Do two trainings on real weights predict the ratios between them? SmolLM2 at 10% and 90% general data, and their sums.

python -m data_recipes.smollm2.make && python -m data_recipes.smollm2.probe    # → data_recipes/measured/probe_smollm2.json

For each seed the two runs are trained and added with the weights that predict 25, 50 and 75%, and each sum is measured beside
a run that was trained on that share. Finished runs and measured scales are kept, so that the same command resumes it.
"""

from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from data_recipes.smollm2.dial import FIGURES, SEEDS, conditions, mean, measure, train
from toolkit import run
from toolkit.comparison.blend import blend
from toolkit.comparison.probe import HIGH, LOW, weights_of
from toolkit.files import ROOT, write_json

OUT = ROOT / "data_recipes" / "measured" / "probe_smollm2.json"
SHARES = (0.5, 0.25, 0.75)
"""Of general data, between the two trained ones."""
BEYOND = (1.25, 1.5)
"""Scales of the sum at half: it is nearer to the base than a run trained on half, so a scale beyond 1 may make up for it."""


def summed(share: float, seed: int) -> Path:
    """The sum of a seed's two runs that predicts a share."""
    pair = [train(f"general{end:g}", end, seed) for end in (LOW, HIGH)]
    name = f"smollm2_sum{share:g}_s{seed}"
    return blend(pair, weights_of(share), name=name, console=run.default_console())


def rows_of(members: dict[tuple[float, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each share that was measured of every seed."""
    rows = []
    for share in sorted(SHARES):
        known = [members[share, seed] for seed in SEEDS if (share, seed) in members]
        if len(known) == len(SEEDS):
            rows.append({"share_of_general_data": share} | mean(known))
    return rows


def agreement(sums: list[dict[str, Any]], trained: list[dict[str, Any]]) -> dict[str, Any]:
    """For each figure: rank correlation of the means over the shares, and the mean and largest distance of a sum from the
    run of its seed, in the figure's own unit (shares of 1, nats)."""
    found = {}
    for name in FIGURES:
        means = [pd.Series([row[name]["value"] for row in rows]) for rows in (sums, trained)]
        ranked = means[0].rank().corr(means[1].rank())
        pairs = [
            zip(row[name]["each"], other[name]["each"], strict=True) for row, other in zip(sums, trained, strict=True)
        ]
        errors = [abs(one - other) for pair in pairs for one, other in pair]
        found[name] = {"rank_correlation": round(ranked, 6), "mean_error": fmean(errors), "largest_error": max(errors)}
    return found


def main() -> None:
    """Measure every sum and the run that was trained on its share, then one sum beyond scale 1; the record is written after
    each."""
    head = described()
    sums: dict[tuple[float, int], dict[str, Any]] = {}
    trained: dict[tuple[float, int], dict[str, Any]] = {}
    for share in SHARES:
        for seed in SEEDS:
            sums[share, seed] = measure(summed(share, seed), (1.0,))["1"]
            trained[share, seed] = measure(train(f"general{share:g}", share, seed), (1.0,))["1"]
            points = {"sums": rows_of(sums), "trained": rows_of(trained)}
            write_json(OUT, head | points)
    found = head | points | {"agreement": agreement(**points), "half_beyond": []}
    for scale in BEYOND:
        members = [measure(summed(0.5, seed), (scale,))[f"{scale:g}"] for seed in SEEDS]
        found["half_beyond"].append({"scale": scale} | mean(members))
        write_json(OUT, found)


def described() -> dict[str, Any]:
    """What is measured, where and when."""
    return {
        "what": f"SmolLM2-135M-Instruct: runs of data_recipes/smollm2.yaml with {LOW:.0%} and {HIGH:.0%} general data, summed with the "
        "weights that predict shares between them, beside runs trained on those shares; figures as in dial_smollm2.json. "
        "Means over the seeds (each); intervals of 95% cover questions and seeds.",
        "command": "python -m data_recipes.smollm2.probe",
        **conditions(),
    }


if __name__ == "__main__":
    main()
