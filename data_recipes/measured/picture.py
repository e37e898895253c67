"""The README's picture from the recorded sweep: python -m data_recipes.measured.picture   (reads sweep_pocket.json).

It is the picture that `sweep`, `compare` and a sweep's page draw.
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
AXIS = "reasoning"


def recorded() -> Comparison:
    """The comparison that sweep_pocket.json holds: the base, and a point for each share."""
    record = json.loads((HERE / "sweep_pocket.json").read_text(encoding="utf-8"))
    base, *points = map(point, record["rows"])
    chosen = [row["recommended"] == "1" for row in record["rows"]].index(True)
    return Comparison(AXIS, GOAL, base, points, points[chosen - 1], [], [], {})


def point(row: Mapping[str, str]) -> Point:
    """A row of the record, with what the picture shows of it."""
    values = {key: average("/".join(key), row) for key in (GOAL, CHAT, KL) if "/".join(key) in row}
    runs = [Run(name, {}, {}, MODES) for name in row["runs"].split()]
    short = row["label"].removesuffix(f" {AXIS}")
    place = float(short.removesuffix("%")) / 100 if runs else 0.0
    return Point(row["label"], runs, values, place=place, short=short)


def average(name: str, row: Mapping[str, Any]) -> Average:
    """A number with its interval, and each training's."""
    value, low, high = (float(row[key]) for key in (name, f"{name}.low", f"{name}.high"))
    each = [float(text) for text in row[f"{name}.each"].split()]
    return Average(value, low, high, int(row[f"{name}.n"]), each)


if __name__ == "__main__":
    figure(recorded()).savefig(HERE / "sweep_pocket.png", dpi=110, facecolor="white", metadata={"Software": None})
