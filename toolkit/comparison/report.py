"""A comparison for people: one table, one picture, the sentences; and every number as CSV.

from toolkit.comparison import decide, report; report.write(decide.compare(Path("outputs").glob("sweep*")), Path("comparison"))
"""

import csv
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from toolkit.comparison.decide import CHAT, KL, SCALE, Comparison, score_text
from toolkit.comparison.points import Point
from toolkit.comparison.runs import Key, Score
from toolkit.evaluation.stats import is_rate
from toolkit.evaluation.words import title
from toolkit.family import MODES
from toolkit.training import tracking
from toolkit.view import figures, tables

# matplotlib takes a second to import, which a table must not wait for
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def conclude(comparison: Comparison, console: Console, folder: Path | None = None) -> None:
    """Print the table, the notes and the verdict. With a folder, also write the files there and log to wandb, if the
    runs did."""
    console.print(terminal_table(comparison))
    for note in notes(comparison):
        console.print(f"· {note}", markup=False)
    if folder:
        paths = write(comparison, folder)
        console.print(f"picture and numbers: {', '.join(map(str, paths.values()))}", markup=False)
        log(comparison, folder, console)
    for line in comparison.verdict:
        console.print(line, style="bold", markup=False)


def notes(comparison: Comparison) -> list[str]:
    """What went into the table and what did not."""
    lines = [f"left out: {name}: {why}" for name, why in comparison.left_out.items()]
    if comparison.axis not in ("", SCALE):
        lines = [f"{point.label}: {run_names(point)}" for point in comparison.points] + lines
    return lines + comparison.notes


def run_names(point: Point) -> str:
    """The runs of a point, one for each seed."""
    return " ".join(run.name for run in point.runs)


def write(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Write the picture and the CSV; returns their paths by kind."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"comparison.{kind}" for kind in ("png", "csv")}
    # without matplotlib's version the same comparison gives the same bytes
    figure(comparison).savefig(paths["png"], dpi=150, facecolor="white", metadata={"Software": None})
    rows = numbers(comparison)
    columns = dict.fromkeys(column for row in rows for column in row)
    with open(paths["csv"], "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows)
    return paths


def log(comparison: Comparison, folder: Path, console: Console) -> None:
    """A wandb run with the table and the picture: the comparison has no recipe of its own, so its runs say whether their
    owner wants wandb."""
    recipes = [run.recipe for point in comparison.points for run in point.runs]
    if any("wandb" in tracking.trackers(recipe["train"]) for recipe in recipes):
        rows = [row | {"runs": run_names(point)} for point, row in in_words(comparison)]
        tracking.TRACKER.comparison(folder, rows, " ".join(comparison.verdict[:-1]), console)


# --- the table -------------------------------------------------------------------------------------------------------


def in_words(comparison: Comparison) -> list[tuple[Point, dict[str, str]]]:
    """The base and each point with its row of what a recommendation is made by, the goal first: `{metric: 70% [59, 81]}`,
    and `-` where it was not measured. Everything else is in the CSV."""
    keys = dict.fromkeys([comparison.goal, CHAT, *((mode, "adherence") for mode in MODES), KL])
    measured = {key for point in comparison.points for key in point.values}
    sections = comparison.points[0].runs[0].sections
    rows = []
    for point in comparison.everyone():
        row = {"settings": point.label}
        for key in keys:
            if key in measured:
                row[title(*key, sections)] = score_text(key, point.values.get(key))
        rows.append((point, row))
    return rows


def terminal_table(comparison: Comparison) -> Table:
    """The table, whole at 80 columns: only the goal has its interval."""
    rows, best = [], []
    for number, (point, row) in enumerate(in_words(comparison)):
        if point is comparison.recommended:
            row["settings"] = f"★ {point.label}"
            best.append(number)
        # `70% [59, 81]` becomes `70%`: four intervals do not fit 80 columns
        for name in list(row)[2:]:
            row[name] = row[name].partition(" ")[0]
        rows.append(row)
    return tables.rich_table(rows, bold=best)


def numbers(comparison: Comparison) -> list[dict[str, Any]]:
    """A row for the base and each point: its runs, achieved reasoning shares, every metric with its interval."""
    rows = []
    for point in comparison.everyone():
        row: dict[str, Any] = {"label": point.label, "runs": run_names(point)}
        for unit in point.runs[0].reasoning if point.runs else ():
            shares = [run.reasoning[unit] for run in point.runs]
            row[f"reasoning_share_{unit}"] = sum(shares) / len(shares)
        for (section, metric), score in point.values.items():
            name = f"{section}/{metric}"
            row |= {name: score.value, f"{name}.low": score.low, f"{name}.high": score.high, f"{name}.n": score.n}
            row[f"{name}.each"] = " ".join(f"{value:.6g}" for value in score.each)
        row["recommended"] = int(point is comparison.recommended)
        rows.append(row)
    return rows


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything, for programs."""
    recommended = comparison.recommended
    return {
        "axis": comparison.axis,
        "recommended": recommended.label if recommended else None,
        "verdict": comparison.verdict,
        "notes": comparison.notes,
        "left_out": comparison.left_out,
        "points": numbers(comparison),
    }


# --- the picture -----------------------------------------------------------------------------------------------------


def figure(comparison: Comparison) -> "Figure":
    """What is gained against what is kept, with intervals; beside it the distance from the base, along the axis. The base
    is grey, the recommended dark. Points that are compared by name are numbered."""
    picture, (left, right) = figures.panels(11, 4.8, 2, width_ratios=(3, 2))
    draw_gained_and_kept(left, comparison)
    draw_distance(right, comparison)
    heading = "\n".join(f"{point.short}  {point.label}" for point in comparison.points)
    if comparison.axis:
        seeds = max(len(point.runs) for point in comparison.points)
        heading = f"by {comparison.axis}; {seeds} training{'s' if seeds > 1 else ''} a point, bars are 95% intervals"
    picture.suptitle(heading, fontsize=10)
    return picture


def draw_gained_and_kept(axes: "Axes", comparison: Comparison) -> None:
    """The goal against the chat that is left, or where nobody was asked any, against the distance from the base."""
    goal = comparison.goal
    kept = CHAT if CHAT in comparison.base.values and goal != CHAT else KL
    labels: dict[tuple[float, float], list[str]] = defaultdict(list)
    for point in comparison.everyone():
        if goal in point.values and kept in point.values:
            x, left_right = value_and_arms(goal, point.values[goal])
            y, below_above = value_and_arms(kept, point.values[kept])
            shade = colour(comparison, point)
            axes.errorbar(x, y, xerr=left_right, yerr=below_above, fmt="o", markersize=9, color=shade, elinewidth=0.8)
            labels[x, y].append(point.short)
    for place, names in labels.items():  # points at one place share a label
        axes.annotate(", ".join(names), place, (6, 6), textcoords="offset points", fontsize=9)
    axes.set(xlabel=axis_title(comparison, goal), ylabel=axis_title(comparison, kept))
    axes.set_title("what is gained, what is kept")
    axes.margins(0.12)


def draw_distance(axes: "Axes", comparison: Comparison) -> None:
    """KL from the base, point by point along the axis."""
    measured = [point for point in comparison.points if KL in point.values]
    for point in measured:
        kl, below_above = value_and_arms(KL, point.values[KL])
        axes.errorbar(point.place, kl, yerr=below_above, fmt="o", markersize=7, color=colour(comparison, point))
    places = [point.place for point in measured]
    axes.plot(places, [point.values[KL].value for point in measured], color=figures.BASE, linewidth=1, zorder=0)
    axes.set_xticks(places, [point.short for point in measured], fontsize=9)
    axes.set(title="KL from the base (nats per token)", xlabel=comparison.axis or "run", ylim=(0, None))
    axes.margins(0.12)


def colour(comparison: Comparison, point: Point) -> str:
    """Grey for the base, dark for the recommended, blue for the others."""
    if point is comparison.base:
        return figures.BASE
    return figures.TUNED if point is comparison.recommended else figures.PALETTE[0]


def value_and_arms(key: Key, score: Score) -> tuple[float, list[list[float]]]:
    """A number, in per cent for a rate, and the lengths of its interval's arms as matplotlib's errorbar wants them."""
    factor = 100 if is_rate(key[1]) else 1
    below, above = score.value - score.low, score.high - score.value
    return factor * score.value, [[max(0.0, factor * below)], [max(0.0, factor * above)]]


def axis_title(comparison: Comparison, key: Key) -> str:
    """`reasoning questions with thinking, %`."""
    name = title(*key, comparison.points[0].runs[0].sections)
    return f"{name}, %" if is_rate(key[1]) else name
