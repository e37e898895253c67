"""A comparison as a terminal table, a CSV file, a picture and one HTML page: all from its one DataFrame.

from toolkit import compare, report; report.write(compare.compare(Path("outputs").glob("sweep*")), Path("comparison"))
"""

import base64
import html
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from toolkit import tracking
from toolkit.compare import CHAT, KL, METRICS, RULE, TITLES, Comparison, Key, amount, metric_title
from toolkit.family import MODES, mode_title

LOOKS = {
    "thinking": {"color": "#12355b", "marker": "o", "linestyle": "-"},
    "non_thinking": {"color": "#d9822b", "marker": "s", "linestyle": "--", "markerfacecolor": "white"},
}
"""Dark, filled and solid against light, hollow and dashed: the two modes stay apart in greyscale."""
PANELS = ("accuracy", "accuracy/chat", "adherence")
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:1120px;margin:2em auto;padding:0 1em}img{width:100%}
table{border-collapse:collapse;font-size:.8em}th,td{padding:.3em .6em;border-bottom:1px solid #ddd;text-align:right}
td:first-child{text-align:left}.wide{overflow-x:auto}"""


def conclude(comparison: Comparison, folder: Path, console) -> None:
    """Write the files, log to wandb what came from there, and print the table, the notes and the verdict."""
    paths = write(comparison, folder)
    console.print(terminal_table(comparison))
    for point in comparison.points if comparison.axis else ():
        console.print(f"{point.label}: {', '.join(run.name for run in point.runs)}")
    for name, why in comparison.left_out.items():
        console.print(f"left out: {name}: {why}", style="yellow")
    for note in comparison.notes:
        console.print(f"· {note}")
    if any(tracking.logs_to_wandb(run.recipe["train"]) for point in comparison.points for run in point.runs):
        rows = comparison.table().astype(object).replace({np.nan: None}).to_dict("records")
        tracking.comparison(folder, rows, " ".join(comparison.verdict[:2]), console)
    console.print(f"table, picture and page: {', '.join(map(str, paths.values()))}")
    for line in comparison.verdict:
        console.print(line, style="bold", markup=False)


def write(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Write the CSV, the picture and the page; returns their paths by kind."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"comparison.{kind}" for kind in ("csv", "png", "html")}
    comparison.table().to_csv(paths["csv"], index=False)
    figure(comparison).savefig(paths["png"], dpi=150, metadata={"Software": None})
    paths["html"].write_text(page(comparison, paths["png"].read_bytes()), encoding="utf-8")
    return paths


def cells(comparison: Comparison, keys: Sequence[Key], *, bounds: Sequence[Key]) -> pd.DataFrame:
    """A row for the base and each point: `70% [59, 81]` for keys in `bounds`, `70%` for others, `-` where not measured."""

    def cell(key: Key, found: dict | None) -> str:
        if found is None:
            return "-"
        value, low, high = (amount(key, found[end]) for end in ("value", "low", "high"))
        return f"{value} [{low.rstrip('%')}, {high.rstrip('%')}]" if key in bounds else value

    run, everyone = comparison.points[0].runs[0], comparison.everyone()
    return pd.DataFrame({metric_title(key, run): [cell(key, p.values.get(key)) for p in everyone] for key in keys})


def terminal_table(comparison: Comparison):
    """A rich table of what decides, whole at 80 columns; everything else is in the CSV and the page."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    keys = [comparison.goal, CHAT, *((mode, "adherence") for mode in MODES), KL]
    keys = [key for key in dict.fromkeys(keys) if key in comparison.base.values]
    table = cells(comparison, keys, bounds=keys[:1])
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    grid.add_column("", overflow="fold")
    for title in table:  # no word or number is cut
        grid.add_column(title, justify="right", width=max(map(len, [*title.split(), *table[title]])))
    for point, row in zip(comparison.everyone(), table.values, strict=True):
        best = point is comparison.recommended
        grid.add_row(Text(("★ " if best else "") + point.label), *row, style="bold" if best else None)
    return grid


def page(comparison: Comparison, png: bytes) -> str:
    """The HTML report, one file: verdict, picture, table, rule, and every run that went in or was left out."""
    first, second, command = map(html.escape, comparison.verdict)
    left_out = [f"Left out: {name}: {why}" for name, why in comparison.left_out.items()]
    items = "".join(f"<li>{html.escape(item)}</li>" for item in (*comparison.notes, *left_out))
    measured = [key for key in METRICS if key in comparison.base.values]
    runs = comparison.table().filter(regex="^(label|runs|reasoning_share)")
    table = pd.concat([runs, cells(comparison, measured, bounds=measured)], axis=1)
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Comparison</title><style>{STYLE}</style></head>
<body><h1>{first}</h1><p>{second}</p><p><code>{command}</code></p><ul>{items}</ul>
<img alt="comparison" src="data:image/png;base64,{base64.b64encode(png).decode()}">
<h2>Results</h2><p>Mean over seeds, with the 95% interval over questions (and seeds); shares as achieved.</p>
<div class="wide">{table.to_html(index=False, border=0, na_rep="", float_format="{:.1%}".format)}</div>
<h2>Rule</h2><p>{RULE}</p></body></html>
"""


# --- the picture -----------------------------------------------------------------------------------------------------


def figure(comparison: Comparison):
    """Accuracy and adherence over the share, or by run where more than a share differs; and the frontier."""
    from matplotlib.figure import Figure

    panels = [metric for metric in PANELS if any(metric == key[1] for p in comparison.points for key in p.values)]
    rows = len(panels) // 2 + 1
    picture = Figure(figsize=(11, 4.2 * rows), layout="constrained")
    axes = list(picture.subplots(rows, 2, squeeze=False).flatten())
    for axis, metric in zip(axes, panels, strict=False):
        _panel(axis, comparison, metric)
    _frontier(axes[len(panels)], comparison)
    for axis in axes[len(panels) + 1 :]:
        axis.remove()
    for axis in picture.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e8e8e8")
    if not comparison.axis:
        names = [f"{i}  {point.label}" for i, point in enumerate(comparison.points, 1)]
        picture.suptitle("\n".join(names), fontsize=9)
    shown = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    picture.legend(shown.values(), shown, loc="outside lower center", ncols=5, frameon=False)
    return picture


def _panel(axis, comparison: Comparison, metric: str) -> None:
    """One metric of each mode, with intervals, over the share or the runs' numbers."""
    places = [100 * p.place if comparison.axis else i for i, p in enumerate(comparison.points, 1)]
    for mode, look in LOOKS.items():
        look = look if comparison.axis else {**look, "linestyle": "none"}
        shown = [(place, p.values[mode, metric]) for place, p in zip(places, comparison.points, strict=True)
                 if (mode, metric) in p.values]  # fmt: skip
        if shown:
            value, low, high = (100 * np.array([found[end] for _, found in shown]) for end in ("value", "low", "high"))
            error, label = np.abs([value - low, high - value]), mode_title(mode)
            axis.errorbar([place for place, _ in shown], value, error, **look, capsize=3, label=f"tuned, {label}")
            if base := comparison.base.values.get((mode, metric)):
                axis.axhline(100 * base["value"], color=look["color"], linestyle=":", label=f"base, {label}")
    if comparison.recommended:
        place, wide = places[comparison.points.index(comparison.recommended)], 1.5 if comparison.axis else 0.2
        axis.axvspan(place - wide, place + wide, color="#999999", alpha=0.25, zorder=0, label="recommended")
    unit = comparison.unit.replace("_", " ")
    share = f"{comparison.axis} share, % of {unit} (achieved)" if comparison.axis else "run"
    axis.set(title=TITLES[metric], ylim=(-4, 104), ylabel="% of replies", xlabel=share)
    if not comparison.axis:
        axis.set_xticks(places)


def _frontier(axis, comparison: Comparison) -> None:
    """The goal against what is left of the base; each label inside the axes, points at one place share theirs."""
    places: dict[tuple[float, float], list[str]] = defaultdict(list)
    for i, point in enumerate(comparison.everyone()):
        short = "base" if not i else f"{100 * point.place:.0f}%" if comparison.axis else str(i)
        if comparison.goal in point.values:
            places[comparison.place_of(point)].append(short)
            filled = point.label in comparison.frontier()
            size, color = 14 if point is comparison.recommended else 8, LOOKS["thinking"]["color"] if i else "#888888"
            face = color if filled else "white"
            axis.plot(*comparison.place_of(point), "o", markersize=size, color=color, markerfacecolor=face, zorder=3)
    middle = np.mean([min(places)[0], max(places)[0]])
    for turn, (place, labels) in enumerate(sorted(places.items())):
        left = place[0] <= middle
        axis.annotate(", ".join(labels), place, (9 if left else -9, 9 if turn % 2 else -15), fontsize=9,
                      textcoords="offset points", ha="left" if left else "right")  # fmt: skip
    run, chat = comparison.points[0].runs[0], CHAT in comparison.base.values and comparison.goal != CHAT
    kept = metric_title(CHAT, run) if chat else "minus KL from the base, nats/token"
    title = "frontier (filled: beaten by none)"
    axis.set(title=title, xlabel=metric_title(comparison.goal, run), ylabel=kept)
    axis.margins(x=0.12, y=0.18)
