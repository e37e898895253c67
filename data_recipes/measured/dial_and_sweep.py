"""The README's picture, dial beside sweep, from the records: python data_recipes/measured/dial_and_sweep.py

Above the pocket model, below SmolLM2; left what is gained against what is kept, right the KL that it costs. Circles are trainings on
another share of the data, diamonds on a line one training at several scales of its adapter.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
BASE, SWEEP, DIALS = "#888888", "#12355b", ("#d1602b", "#3a8a5f", "#7a4fa3")
REASONING, CHAT, KL = "thinking/accuracy", "non_thinking/accuracy/chat", "forgetting/kl"
PLACES = {"o": (6, 5), "D": (6, -13), "X": (-32, -4)}
"""Where a name stands beside its point, in points, by the kind of point."""
CROWDED = {"0%": (-24, -4), "0.25": (9, 4)}
"""Where another point would be covered."""


class Dot(NamedTuple):
    """A point with its intervals: [value, low, high] of what is gained, what is kept, and the KL."""

    name: str
    gained: Sequence[float]
    kept: Sequence[float]
    kl: Sequence[float]


def record(name: str) -> dict[str, Any]:
    """A file of measured/."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def of_row(row: Mapping[str, Any], name: str) -> Dot:
    """A row of a comparison, as percentages."""
    gained, kept, kl = (
        [float(row.get(f"{key}{end}") or 0) for end in ("", ".low", ".high")] for key in (REASONING, CHAT, KL)
    )
    return Dot(name, [100 * value for value in gained], [100 * value for value in kept], kl)


def draw(
    panels: Sequence[Axes], dots: Sequence[Dot], colour: str, marker: str, line: str = "none", label: str = ""
) -> None:
    """Dots in both panels, joined where they are one training."""
    for axes, values in zip(panels, ("kept", "kl"), strict=True):
        xs, ys = [dot.gained for dot in dots], [getattr(dot, values) for dot in dots]
        bars = [[[abs(dot[0] - dot[end]) for dot in dots] for end in (1, 2)] for dots in (xs, ys)]
        axes.errorbar(
            [x[0] for x in xs], [y[0] for y in ys], xerr=bars[0], yerr=bars[1], color=colour, marker=marker, linestyle=line,
            markersize=7, elinewidth=0.5, label=label,
        )  # fmt: skip
        for dot, x, y in zip(dots, xs, ys, strict=True):
            place = CROWDED.get(dot.name, PLACES[marker])
            axes.annotate(dot.name, (x[0], y[0]), xytext=place, textcoords="offset points", fontsize=9, color=colour)


def pocket(panels: Sequence[Axes]) -> None:
    """The sweep over five shares of reasoning, and the dial of its 100% runs."""
    sweep = record("sweep_pocket")["rows"]
    draw(panels, [of_row(row, row["label"].split()[0]) for row in sweep[1:]], SWEEP, "o", label="trained on that share")
    scales = [row for row in record("dial_pocket")["points"] if REASONING in row]
    dots = [of_row(row, row["label"].removeprefix("scale ").removesuffix(" (base)")) for row in scales]
    draw(panels, dots[1:], DIALS[0], "D", "-", label="the 100% runs, dialled")
    draw(panels, [dots[0]._replace(name="base")], BASE, "X")
    panels[0].set(ylabel="chat right, thinking off, %", title="pocket Qwen3: share of reasoning data")
    for axes in panels:
        axes.set(xlabel="sums right, thinking on, %")


def smollm2(panels: Sequence[Axes]) -> None:
    """Three shares of general data, each with its dial."""
    rows = record("dial_smollm2")["points"]
    for share, colour in zip((0.0, 0.5, 0.8), DIALS, strict=True):
        dots = []
        for row in [row for row in rows if row["share_of_general_data"] == share]:
            learned = [50 * (row["name"][end] + row["style"][end]) for end in ("value", "low", "high")]
            kept = [100 * row["general"][end] for end in ("value", "low", "high")]
            dots.append(Dot(f"{row['scale']:g}", learned, kept, [row["kl"][end] for end in ("value", "low", "high")]))
        if dots:
            draw(panels, dots, colour, "D", "-", label=f"{share:.0%} general data, dialled")
    panels[0].axhline(0, color=BASE, linewidth=0.7)
    panels[0].set(ylabel="general questions against the base, points", title="SmolLM2-135M: share of general data")
    for axes in panels:
        axes.set(xlabel="name and style learned, mean, %")


def main() -> None:
    """Write dial_and_sweep.png."""
    picture = Figure(figsize=(10, 8), layout="constrained")
    for panels, drawn in zip(picture.subplots(2, 2), (pocket, smollm2), strict=True):
        drawn(panels)
        panels[1].set(ylabel="KL from the base, nats per token", title="what it costs")
        panels[1].set_ylim(bottom=-0.05 * panels[1].get_ylim()[1])
        panels[0].legend(fontsize=8, frameon=False)
        for axes in panels:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#eeeeee")
    picture.savefig(HERE / "dial_and_sweep.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
