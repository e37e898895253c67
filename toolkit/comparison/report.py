"""A comparison as a terminal table, a CSV file, a picture and one HTML page: all from its one DataFrame.

from toolkit.comparison import decide, report; report.write(decide.compare(Path("outputs").glob("sweep*")), Path("comparison"))
"""

import base64
import html
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from toolkit.comparison.decide import CHAT, KL, METRICS, RULE, Comparison, Key
from toolkit.evaluation.stats import is_rate
from toolkit.evaluation.words import TITLES, title
from toolkit.evaluation.words import show as with_interval
from toolkit.family import MODES
from toolkit.files import read_json
from toolkit.training import tracking
from toolkit.view import figures, tables

SCORES = (
    ("thinking", "accuracy"), ("thinking", "adherence"), ("non_thinking", "accuracy"), CHAT, ("non_thinking", "adherence"), KL
)  # fmt: skip
LOST = (KL, CHAT, ("non_thinking", "cut"), ("thinking", "adherence"))
"""What training may cost."""
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:1120px;margin:2em auto;padding:0 1em}img{width:100%}
table{border-collapse:collapse;font-size:.8em}th,td{padding:.3em .6em;border-bottom:1px solid #ddd;text-align:right}
td:first-child{text-align:left}.wide{overflow-x:auto}"""


def conclude(comparison: Comparison, folder: Path, console) -> None:
    """Write the files, log to wandb what came from there, and print the table, the notes and the verdict."""
    paths = write(comparison, folder)
    console.print(terminal_table(comparison))
    for note in notes(comparison):
        console.print(f"· {note}", markup=False)
    # the runs say whether their owner wants wandb: the comparison has no recipe of its own
    if any("wandb" in tracking.trackers(run.recipe["train"]) for point in comparison.points for run in point.runs):
        rows = comparison.table().astype(object).replace({np.nan: None}).to_dict("records")
        tracking.comparison(folder, rows, " ".join(comparison.verdict[:2]), console)
    console.print(f"table, picture and page: {', '.join(map(str, paths.values()))}")
    for line in comparison.verdict:
        console.print(line, style="bold", markup=False)


def notes(comparison: Comparison) -> list[str]:
    """What went into the table and what did not."""
    made_of = [f"{point.label}: {', '.join(run.name for run in point.runs)}" for point in comparison.points]
    left_out = [f"left out: {name}: {why}" for name, why in comparison.left_out.items()]
    return [*(made_of if comparison.axis else ()), *left_out, *comparison.notes]


def write(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Write the CSV, the picture and the page; returns their paths by kind."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"comparison.{kind}" for kind in ("csv", "png", "html")}
    comparison.table().to_csv(paths["csv"], index=False)
    # without matplotlib's version the same comparison gives the same bytes
    figure(comparison).savefig(paths["png"], dpi=150, metadata={"Software": None})
    paths["html"].write_text(page(comparison, paths["png"].read_bytes()), encoding="utf-8")
    return paths


def deciding(comparison: Comparison) -> list[Key]:
    """What a recommendation is made by; everything else is in the CSV and the page."""
    keys = dict.fromkeys([comparison.goal, CHAT, *((mode, "adherence") for mode in MODES), KL])
    return [key for key in keys if key in comparison.points[0].values]


def texts(comparison: Comparison, keys: Sequence[Key]) -> pd.DataFrame:
    """A row for the base and each point: `70% [59, 81]`, and `-` where it was not measured."""
    run, everyone = comparison.points[0].runs[0], comparison.everyone()
    return pd.DataFrame(
        {title(*key, run.eval["tuned"]): [with_interval(key[1], p.values.get(key)) for p in everyone] for key in keys}
    )


def terminal_table(comparison: Comparison):
    """A rich table of what decides, whole at 80 columns: only the goal has its interval."""
    everyone, table = comparison.everyone(), texts(comparison, deciding(comparison))
    # `70% [59, 81]` becomes `70%`: four intervals do not fit 80 columns
    for column in table.columns[1:]:
        table[column] = table[column].str.partition(" ")[0]
    best = [i for i, point in enumerate(everyone) if point is comparison.recommended]
    labels = ["★ " * (i in best) + point.label for i, point in enumerate(everyone)]
    return tables.rich_table(table.assign(**{"": labels})[["", *table]].to_dict("records"), bold=best)


def page(comparison: Comparison, png: bytes) -> str:
    """The HTML report, one file: verdict, picture, table, rule, and every run that went in or was left out."""
    first, second, command = map(html.escape, comparison.verdict)
    items = "".join(f"<li>{html.escape(item)}</li>" for item in notes(comparison))
    runs = comparison.table().filter(regex="^(label|runs|reasoning_share)")
    table = pd.concat([runs, texts(comparison, [key for key in METRICS if key in comparison.base.values])], axis=1)
    with pd.option_context("display.max_colwidth", None):
        rows = table.to_html(index=False, border=0, na_rep="", float_format="{:.1%}".format)
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Comparison</title><style>{STYLE}</style></head>
<body><h1>{first}</h1><p>{second}</p><p><code>{command}</code></p><ul>{items}</ul>
<img alt="comparison" src="data:image/png;base64,{base64.b64encode(png).decode()}">
<h2>Results</h2><p>Mean over seeds, with the 95% interval over questions (and seeds); shares as achieved.</p>
<div class="wide">{rows}</div>
<h2>Rule</h2><p>{RULE}</p></body></html>
"""


# --- the picture -----------------------------------------------------------------------------------------------------


def figure(comparison: Comparison):
    """What decides as bars with intervals, the base first, the recommended dark; and what is gained against what is
    kept. Runs that differ in more than a share are numbered."""
    keys, everyone, run = deciding(comparison), comparison.everyone(), comparison.points[0].runs[0]
    # `25% reasoning` fits below a bar as `25%`, a run's name does not
    names = [point.label.split()[0] if comparison.axis else str(i) for i, point in enumerate(comparison.points, 1)]
    shades = [figures.TUNED if point is comparison.recommended else figures.PALETTE[0] for point in comparison.points]
    names, colours = ["base", *names], [figures.BASE, *shades]
    picture, axes = figures.panels(12, 7, 3, 2)
    for one, key in zip(axes, keys, strict=False):
        _bars(one, key, names, [point.values.get(key) for point in everyone], colours, run.eval["tuned"])
    _gained_and_kept(axes[len(keys)], comparison, names, colours)
    # the grid has six places
    for unused in axes[len(keys) + 1 :]:
        unused.remove()
    numbered = [f"{i}  {point.label}" for i, point in enumerate(comparison.points, 1)]
    picture.suptitle(
        f"by {comparison.axis} share (base grey, recommended dark)" if comparison.axis else "\n".join(numbered),
        fontsize=10,
    )
    return picture


def scores(runs: Mapping[str, Path], keys: Sequence[Key] = SCORES):
    """Runs beside their common base, with 95% intervals: {name: run folder}, one panel for each metric that was
    measured, so that a model with one mode has that mode's only."""
    results = {name: read_json(folder / "eval.json") for name, folder in runs.items()}
    sides = {"base": next(iter(results.values()))["base"]} | {name: result["tuned"] for name, result in results.items()}
    found = {key: [side.get(key[0], {}).get(key[1]) for side in sides.values()] for key in keys}
    shown = [key for key, values in found.items() if values[-1] and values[-1]["value"] is not None]
    picture, axes = figures.panels(max(5, 2.6 * len(shown)), 3.4, len(shown))
    names = [textwrap.fill(name, 9) for name in sides]
    for one, key in zip(axes, shown, strict=True):
        _bars(one, key, names, found[key], (figures.BASE, *figures.PALETTE), sides["base"])
    return picture


def _bars(axes, key: Key, names: list[str], found: list[dict | None], colours: Sequence[str], sections) -> None:
    """One metric: a bar with its interval for each name, nothing where it was not measured."""
    scale = 100 if is_rate(key[1]) else 1
    ends = (
        pd.DataFrame([value or {} for value in found], columns=["value", "low", "high"], dtype=float).dropna() * scale
    )
    # matplotlib wants the lengths of both arms, not the ends
    error = [(ends["value"] - ends[end]).abs() for end in ("low", "high")]
    drawn = axes.bar(ends.index, ends["value"], 0.6, yerr=error, capsize=4, color=[colours[i] for i in ends.index])
    axes.bar_label(drawn, fmt="%.3g", label_type="center", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    axes.set_xticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(0, 112 if scale == 100 else None)
    axes.set_title(textwrap.fill(title(*key, sections) + (", %" if scale == 100 else ""), 24), fontsize=10)


def _gained_and_kept(axes, comparison: Comparison, names: list[str], colours: list[str]) -> None:
    """The goal against the chat that is left, or where nobody was asked any, against the distance from the base."""
    kept = CHAT if CHAT in comparison.base.values and comparison.goal != CHAT else KL
    gained, table = "/".join(comparison.goal), comparison.table().assign(name=names, colour=colours)
    places = table.reindex(columns=[gained, "/".join(kept), "name", "colour"]).dropna()
    places.columns = ["x", "y", "name", "colour"]
    axes.scatter(places.x, places.y, s=90, color=places.colour)
    for place, names in places.groupby(["x", "y"])["name"]:  # points at one place share a label
        axes.annotate(", ".join(names), place, (0, 8), textcoords="offset points", ha="center", fontsize=9)
    axes.set(xlabel=TITLES[comparison.goal[1]], ylabel=TITLES[kept[1]], title="what is gained, what is kept")
    axes.margins(0.15)
