"""A comparison for people: one table, one picture, the sentences, a page; and every number as CSV and JSON.

from toolkit.comparison import decide, report; report.write(decide.compare(Path("outputs").glob("sweep*")), Path("comparison"))
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from toolkit.comparison.decide import CHAT, KL, SCALE, SUMMED, Comparison, noun, of_one_training, score_text
from toolkit.comparison.points import Average, Point
from toolkit.comparison.runs import Run
from toolkit.evaluation.stats import is_rate
from toolkit.evaluation.words import title
from toolkit.files import read_if_there, read_json, write_json
from toolkit.training import tracking
from toolkit.view import figures, page, tables

# matplotlib and pandas take a second to import, which a table must not wait for
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def conclude(comparison: Comparison, console: Console, folder: Path | None = None) -> None:
    """Print the table, the notes and the verdict. With a folder, also write the files and the page there and log to wandb,
    if the runs did."""
    console.print(terminal_table(comparison))
    for note in notes(comparison):
        console.print(f"· {note}", markup=False)
    if folder:
        write(comparison, folder)
        console.print(f"the runs side by side: {write_page(comparison, folder)}", markup=False)
        log(comparison, folder, console)
    for line in comparison.verdict:
        console.print(line, style="bold", markup=False)


def notes(comparison: Comparison) -> Iterator[str]:
    """What went into the table and what did not."""
    # else the points are named after their runs, or are all of the same ones
    if comparison.axis and not of_one_training(comparison.axis):
        yield from (f"{point.label}: {run_names(point)}" for point in comparison.points)
    yield from (f"left out: {name}: {why}" for name, why in comparison.left_out.items())
    yield from comparison.notes


def run_names(point: Point) -> str:
    """The runs of a point, one for each seed."""
    return " ".join(run.name for run in point.runs)


def write(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Write the picture, the CSV and what `--json` prints; returns their paths by kind."""
    import pandas

    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"comparison.{kind}" for kind in ("png", "csv", "json")}
    # without matplotlib's version the same comparison gives the same bytes
    figure(comparison).savefig(paths["png"], dpi=150, facecolor="white", metadata={"Software": None})
    # objects: a count stays a whole number where another point has none
    rows = pandas.DataFrame(numbers(comparison), dtype=object)
    rows.to_csv(paths["csv"], index=False, lineterminator="\r\n")
    write_json(paths["json"], as_json(comparison))
    return paths


def write_page(comparison: Comparison, folder: Path) -> Path:
    """Write report.html beside the other files: the runs side by side, each with a link to its page."""
    # each run once: the scales of a dial are one run
    runs = {run.folder: run for point in comparison.points for run in point.runs}
    rows = [page_row(run, folder.resolve()) for run in runs.values()]
    sources = dict.fromkeys(source for row in rows for source in row["mix"]["planned"])
    values = {
        "name": folder.resolve().name,
        "found": page.compared(folder),
        "runs": rows,
        "colours": figures.source_colours(sources),
    }
    return page.render("comparison.html", values, folder)


def page_row(run: Run, folder: Path) -> dict[str, Any]:
    """What the page shows of a run, read from its folder."""
    own = run.folder / page.PAGE
    return {
        "name": run.name,
        # the way to its own page from this one
        "page": Path(os.path.relpath(own, folder)).as_posix() if own.is_file() else "",
        "seed": run.recipe["data"]["seed"],
        "manifest": read_json(run.folder / "manifest.json"),
        "mix": read_json(run.folder / "mix.json"),
        # a dial needs no evaluation
        "result": read_if_there(run.folder / "eval.json"),
    }


def log(comparison: Comparison, folder: Path, console: Console) -> None:
    """A wandb run with the table and the picture: the comparison has no recipe of its own, so its runs say whether their
    owner wants wandb."""
    runs = [run for point in comparison.points for run in point.runs]
    if any("wandb" in tracking.trackers(run.recipe["train"]) for run in runs):
        shown = zip(comparison.everyone(), in_words(comparison), strict=True)
        rows = [row | {"settings": point.label, "runs": run_names(point)} for point, row in shown]
        sentences = " ".join(comparison.verdict[:-1])
        folders = list(dict.fromkeys(run.folder for run in runs))
        project = runs[0].recipe["train"].get("project")
        tracking.TRACKER.comparison(folder, folders, rows, curve(comparison), sentences, project, console)


def curve(comparison: Comparison) -> list[dict[str, float]]:
    """What was measured along the axis: `{dial/scale: 0.5, dial/forgetting/kl: 0.1}`, the base first, or of other comparisons
    `{sweep/reasoning: 0.5, …}`; nothing where points are compared by name."""
    kind, points = ("dial", comparison.everyone()) if comparison.axis == SCALE else ("sweep", comparison.points)
    rows = []
    for point in points if comparison.axis else ():
        values = {f"{kind}/{section}/{metric}": score.value for (section, metric), score in point.values.items()}
        rows.append({f"{kind}/{comparison.axis}": point.place} | values)
    return rows


# --- the table -------------------------------------------------------------------------------------------------------


def in_words(comparison: Comparison) -> list[dict[str, str]]:
    """A row for the base and each point of what a recommendation is made by, the goal first: `{metric: 70% [59, 81]}`, and
    `-` where it was not measured; a star before what is recommended. Everything else is in the CSV."""
    keys = dict.fromkeys([comparison.goal, CHAT, ("thinking", "adherence"), ("non_thinking", "adherence"), KL])
    measured = {key for point in comparison.points for key in point.values}
    sections = comparison.points[0].runs[0].sections
    rows = []
    for point in comparison.everyone():
        row = {"settings": f"★ {point.label}" if point is comparison.recommended else point.label}
        for key in keys:
            if key in measured:
                row[title(*key, sections)] = score_text(key, point.values.get(key))
        rows.append(row)
    return rows


def terminal_table(comparison: Comparison) -> Table:
    """The table, whole at 80 columns: only the goal has its interval."""
    rows = in_words(comparison)
    for row in rows:
        # `70% [59, 81]` becomes `70%`: four intervals do not fit 80 columns
        for name in list(row)[2:]:
            row[name] = row[name].partition(" ")[0]
    return tables.rich_table(rows)


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
            row[name] = score.value
            for part in ("low", "high", "n"):
                row[f"{name}.{part}"] = getattr(score, part)
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
        "table": in_words(comparison),
        "points": numbers(comparison),
    }


# --- the picture -----------------------------------------------------------------------------------------------------


def figure(comparison: Comparison) -> "Figure":
    """What is gained against what is kept, with intervals; beside it the distance from the base, along the axis. The base
    is a grey cross, the recommended a dark star, each training of a mean a small point. Points that are compared by name
    are numbered."""
    from matplotlib.ticker import MaxNLocator

    picture, (left, right) = figures.panels(11, 4.8, 2, width_ratios=(3, 2))
    goal = comparison.goal
    # sums are made to see where what is learned begins
    along = goal if comparison.axis.startswith(SUMMED) else KL
    # where nobody was asked any chat, the distance from the base says what is left
    kept = CHAT if CHAT in comparison.base.values and goal != CHAT else KL
    for point in comparison.everyone():
        draw(left, comparison, point, point.values.get(goal), point.values.get(kept))
    for point in comparison.points:
        place = Average(point.place, point.place, point.place, 0, [])
        draw(right, comparison, point, place, point.values.get(along))
    if of_one_training(comparison.axis):
        line = [point for point in comparison.points if along in point.values]
        low = [point.values[along].low for point in line]
        high = [point.values[along].high for point in line]
        right.fill_between([point.place for point in line], low, high, color=figures.OTHER, alpha=0.15)
    sections = comparison.points[0].runs[0].sections
    left.set(xlabel=title(*goal, sections), ylabel=title(*kept, sections), title="what is gained, what is kept")
    is_share = noun(comparison.axis) == "ratio"
    axis_name = f"share of {comparison.axis}" if is_share else comparison.axis or "run"
    text = "KL from the base (nats per token)" if along == KL else title(*goal, sections)
    right.set(xlabel=axis_name, title=text, ylim=(0, None))
    in_percent = {
        left.xaxis: is_rate(goal[1]),
        left.yaxis: is_rate(kept[1]),
        right.xaxis: is_share,
        right.yaxis: is_rate(along[1]),
    }
    for axis, is_percent in in_percent.items():
        if is_percent:
            axis.set_major_formatter("{x:.0%}")
            # steps of 2.5% would be shown rounded
            axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10]))
    heading = "\n".join(f"{point.short}  {point.label}" for point in comparison.points)
    if comparison.axis:
        seeds = max(len(point.runs) for point in comparison.points)
        trainings = f"means of {seeds} trainings (the small points)" if seeds > 1 else "one training each"
        heading = f"by {axis_name}; {trainings}; bars are 95% intervals; star: recommended"
    picture.suptitle(heading, fontsize=10)
    return picture


def draw(axes: "Axes", comparison: Comparison, point: Point, x: Average | None, y: Average | None) -> None:
    """A point with its intervals and its name, where both numbers were measured."""
    if not x or not y:
        return
    shade, marker, size = figures.OTHER, "o", 8
    if point is comparison.recommended:
        shade, marker, size = figures.TUNED, "*", 15
    elif point is comparison.base:
        shade = figures.BASE
        marker = "X"
    axes.errorbar(
        x.value,
        y.value,
        xerr=arms(x),
        yerr=arms(y),
        fmt=marker,
        markersize=size,
        color=shade,
        elinewidth=0.8,
    )
    if len(x.each) > 1:  # of one training the mean is the training
        axes.plot(x.each, y.each, ".", color=shade, alpha=0.5)
    axes.margins(0.12)
    for text in axes.texts:  # points at one place share a label
        if text.get_position() == (x.value, y.value):
            text.set_text(f"{text.get_text()}, {point.short}")
            return
    axes.text(x.value, y.value, f" {point.short}", verticalalignment="bottom", fontsize=9)


def arms(score: Average) -> list[list[float]]:
    """The lengths of an interval's arms, as matplotlib's errorbar wants them."""
    # rounding may put an end a hair beyond the value
    return [[abs(score.value - score.low)], [abs(score.high - score.value)]]
