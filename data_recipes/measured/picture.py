"""The pictures of the recorded sweep and dial: python -m data_recipes.measured.picture   (reads the .json beside each).

They are those that `sweep`, `dial`, a sweep's page and a run's page draw.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.comparison.decide import CHAT, KL, Comparison
from toolkit.comparison.points import Average, Point
from toolkit.comparison.report import figure
from toolkit.comparison.runs import Run
from toolkit.family import MODES

HERE = Path(__file__).resolve().parent
GOAL = ("thinking", "accuracy")


def recorded(name: str = "sweep_pocket") -> Comparison:
    """The comparison that a record holds: the base, and a point for each share or scale."""
    record = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    axis, rows = record.get("axis", "reasoning"), record.get("rows") or record["points"]
    base, *points = (point(row, axis) for row in rows)
    chosen = [int(row["recommended"]) for row in rows].index(1)
    best = points[chosen - 1]
    return Comparison(axis, GOAL, base, points, leading=best, recommended=best, verdict=[], notes=[], left_out={})


def point(row: Mapping[str, Any], axis: str) -> Point:
    """A row of a record, with what the picture shows of it."""
    values = {key: average("/".join(key), row) for key in (GOAL, CHAT, KL) if "/".join(key) in row}
    runs = [Run(name, {}, {}, MODES) for name in row["runs"].split()]
    # `50% reasoning`, `scale 0.75`
    short = row["label"].replace(axis, "").strip() if runs else "base"
    number = float(short.removesuffix("%")) if runs else 0.0
    return Point(row["label"], runs, values, place=number / 100 if "%" in short else number, short=short)


def average(name: str, row: Mapping[str, Any]) -> Average:
    """A number with its interval, and each training's."""
    value, low, high = (float(row[key]) for key in (name, f"{name}.low", f"{name}.high"))
    each = [float(text) for text in row[f"{name}.each"].split()]
    return Average(value, low, high, int(row[f"{name}.n"]), each)


if __name__ == "__main__":
    for name in ("sweep_pocket", "dial_pocket"):
        figure(recorded(name)).savefig(HERE / f"{name}.png", dpi=110, facecolor="white", metadata={"Software": None})
