"""The README's picture from the recorded sweep: python data_recipes/measured/picture.py   (reads sweep_pocket.json)."""

import json
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
ABOVE = (9, 7)
PLACES = {"0% reasoning": (-29, -5), "100% reasoning": (9, -15)}
"""Where a name stands beside its point, in points, where ABOVE would cover a neighbour."""
REASONING, CHAT = "thinking/accuracy", "non_thinking/accuracy/chat"


def main() -> None:
    """Write sweep_pocket.png: chat accuracy against reasoning accuracy, one point a ratio, with 95% intervals; the small
    points are its trainings."""
    record = json.loads((HERE / "sweep_pocket.json").read_text(encoding="utf-8"))
    rows = record["rows"]
    picture = Figure(figsize=(7.2, 4.2), layout="constrained")
    axis = picture.subplots()
    for row in rows:
        x, y = (100 * float(row[key]) for key in (REASONING, CHAT))
        bars = [
            [[abs(100 * float(row[f"{key}.{end}"]) - at)] for end in ("low", "high")]
            for key, at in ((REASONING, x), (CHAT, y))
        ]
        base, best = row["label"] == "base", row["recommended"] == "1"
        colour = "#888888" if base else "#12355b"
        marker = "X" if base else "*" if best else "o"
        axis.errorbar(x, y, xerr=bars[0], yerr=bars[1], color=colour, marker=marker, markersize=17 if best else 8,
                      elinewidth=0.7, alpha=0.95, capsize=0)  # fmt: skip
        name = "base" if base else row["label"].replace(" reasoning", "") + (" (recommended, a tie)" if best else "")
        axis.annotate(
            name, (x, y), xytext=PLACES.get(row["label"], ABOVE), textcoords="offset points", fontsize=10, color=colour
        )
    for training in record["trainings"]:
        axis.plot(100 * training["sums"], 100 * training["chat"], ".", color="#12355b", alpha=0.35, markersize=5)
    axis.set(xlabel="reasoning questions right, thinking on, %", ylabel="chat questions right, thinking off, %",
             title="Share of reasoning data: what it gains and what it costs", xlim=(0, 112), ylim=(76, 102))  # fmt: skip
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#eeeeee")
    picture.savefig(HERE / "sweep_pocket.png", dpi=130)


if __name__ == "__main__":
    main()
