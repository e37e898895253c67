"""A comparison for people: one table, one picture, the sentences; and every number as CSV.

from toolkit.comparison import decide, report; report.write(decide.compare(Path("outputs").glob("sweep*")), Path("comparison"))
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from toolkit.comparison.decide import CHAT, KL, SCALE, Average, Comparison, Point, score_text
from toolkit.comparison.runs import Key
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
    members = [f"{point.label}: {', '.join(run.name for run in point.runs)}" for point in comparison.points]
    left_out = [f"left out: {name}: {why}" for name, why in comparison.left_out.items()]
    by_share = comparison.axis not in ("", SCALE)
    return [*(members if by_share else []), *left_out, *comparison.notes]


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
        rows = [
            {"settings": point.label, **texts, "runs": " ".join(run.name for run in point.runs)}
            for point, texts in zip(comparison.everyone(), in_words(comparison), strict=True)
        ]
        tracking.TRACKER.comparison(folder, rows, " ".join(comparison.verdict[:-1]), console)


# --- the table -------------------------------------------------------------------------------------------------------


def deciding(comparison: Comparison) -> list[Key]:
    """What a recommendation is made by; everything else is in the CSV."""
    keys = dict.fromkeys([comparison.goal, CHAT, *((mode, "adherence") for mode in MODES), KL])
    measured = [point.values for point in comparison.points]
    return [key for key in keys if any(key in values for values in measured)]


def in_words(comparison: Comparison) -> list[dict[str, str]]:
    """The table: for the base and each point `{metric: 70% [59, 81]}`, and `-` where it was not measured."""
    sections = comparison.points[0].runs[0].sections
    keys = deciding(comparison)
    return [
        {title(*key, sections): score_text(key, point.values.get(key)) for key in keys}
        for point in comparison.everyone()
    ]


def terminal_table(comparison: Comparison) -> Table:
    """The table, whole at 80 columns: only the goal has its interval."""
    rows = []
    for point, texts in zip(comparison.everyone(), in_words(comparison), strict=True):
        goal, *others = texts
        label = f"★ {point.label}" if point is comparison.recommended else point.label
        # `70% [59, 81]` becomes `70%`: four intervals do not fit 80 columns
        rows.append({"": label, goal: texts[goal]} | {name: texts[name].partition(" ")[0] for name in others})
    best = [i for i, point in enumerate(comparison.everyone()) if point is comparison.recommended]
    return tables.rich_table(rows, bold=best)


def numbers(comparison: Comparison) -> list[dict[str, Any]]:
    """A row for the base and each point: its runs, achieved reasoning shares, every metric with its interval."""
    rows = []
    for point in comparison.everyone():
        row: dict[str, Any] = {"label": point.label, "runs": " ".join(run.name for run in point.runs)}
        for unit in point.runs[0].reasoning if point.runs else ():
            shares = [run.reasoning[unit] for run in point.runs]
            row[f"reasoning_share_{unit}"] = sum(shares) / len(shares)
        for (section, metric), score in point.values.items():
            name = f"{section}/{metric}"
            row |= {name: score.value, f"{name}.low": score.low, f"{name}.high": score.high, f"{name}.n": score.n}
            row[f"{name}.each"] = " ".join(f"{value:.6g}" for value in score.each)
        rows.append(row | {"recommended": int(point is comparison.recommended)})
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
    heading = [f"{number}  {point.label}" for number, point in enumerate(comparison.points, 1)]
    if comparison.axis:
        seeds = max(len(point.runs) for point in comparison.points)
        heading = [f"by {comparison.axis}; {seeds} training{'s' if seeds > 1 else ''} a point, bars are 95% intervals"]
    picture.suptitle("\n".join(heading), fontsize=10)
    return picture


def short_names(comparison: Comparison) -> list[str]:
    """`25% reasoning` is `25%` beside a point, `scale 0.5` is `0.5`, a run's name is its number."""
    names = ["base"]
    for number, point in enumerate(comparison.points, 1):
        share = next((word for word in point.label.split() if word[0].isdigit()), point.label)
        names.append(share if comparison.axis else str(number))
    return names


def colour(comparison: Comparison, point: Point) -> str:
    """Grey for the base, dark for the recommended, blue for the others."""
    if point is comparison.base:
        return figures.BASE
    return figures.TUNED if point is comparison.recommended else figures.PALETTE[0]


def draw_gained_and_kept(axes: "Axes", comparison: Comparison) -> None:
    """The goal against the chat that is left, or where nobody was asked any, against the distance from the base."""
    goal = comparison.goal
    kept = CHAT if CHAT in comparison.base.values and goal != CHAT else KL
    labels: dict[tuple[float, float], list[str]] = {}
    for name, point in zip(short_names(comparison), comparison.everyone(), strict=True):
        if goal in point.values and kept in point.values:
            x, y = scaled(goal, point.values[goal]), scaled(kept, point.values[kept])
            shade = colour(comparison, point)
            axes.errorbar(
                x[0], y[0], xerr=arms(x), yerr=arms(y), fmt="o", markersize=9, color=shade, elinewidth=0.8, alpha=0.9
            )
            labels.setdefault((x[0], y[0]), []).append(name)
    for place, names in labels.items():  # points at one place share a label
        axes.annotate(", ".join(names), place, (6, 6), textcoords="offset points", fontsize=9)
    sections = comparison.points[0].runs[0].sections
    axes.set(xlabel=axis_title(goal, sections), ylabel=axis_title(kept, sections), title="what is gained, what is kept")
    axes.margins(0.12)


def draw_distance(axes: "Axes", comparison: Comparison) -> None:
    """KL from the base, point by point along the axis."""
    measured = [(point, point.values[KL]) for point in comparison.points if KL in point.values]
    numbered = not comparison.axis or len({point.place for point, _ in measured}) < len(measured)
    places = [float(i) if numbered else point.place for i, (point, _) in enumerate(measured, 1)]
    for place, (point, score) in zip(places, measured, strict=True):
        bars = arms((score.value, score.low, score.high))
        axes.errorbar(place, score.value, yerr=bars, fmt="o", markersize=7, color=colour(comparison, point))
    axes.plot(places, [score.value for _, score in measured], color=figures.BASE, linewidth=1, zorder=0)
    names = dict(zip(map(id, comparison.everyone()), short_names(comparison), strict=True))
    axes.set_xticks(places, [names[id(point)] for point, _ in measured], fontsize=9)
    axes.set(title="KL from the base (nats per token)", xlabel=comparison.axis or "run", ylim=(0, None))
    axes.margins(0.12)


def scaled(key: Key, score: Average) -> tuple[float, float, float]:
    """(value, low, high): per cent for a rate."""
    factor = 100 if is_rate(key[1]) else 1
    return factor * score.value, factor * score.low, factor * score.high


def arms(ends: Sequence[float]) -> list[list[float]]:
    """(value, low, high) as matplotlib's errorbar wants it: the lengths of both arms."""
    value, low, high = ends
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def axis_title(key: Key, sections: Sequence[str]) -> str:
    """`reasoning questions with thinking, %`."""
    return title(*key, sections) + (", %" if is_rate(key[1]) else "")
