"""A comparison as a terminal table, a CSV file, a picture and one HTML page: all from its one DataFrame.

from toolkit import compare, report; report.write(compare.compare(Path("outputs").glob("sweep*")), Path("comparison"))
"""

import base64
import html
from pathlib import Path

import pandas as pd

from toolkit import tracking
from toolkit.compare import CHAT, KL, METRICS, RULE, Comparison, kept_of_base, metric_title
from toolkit.evaluate import is_rate, show
from toolkit.family import MODES, mode_title

LOOKS = {
    "thinking": {"color": "#12355b", "marker": "o", "linestyle": "-", "markerfacecolor": "#12355b"},
    "non_thinking": {"color": "#d9822b", "marker": "s", "linestyle": "--", "markerfacecolor": "white"},
    "forgetting": {"color": "#444444", "marker": "D", "linestyle": "-", "markerfacecolor": "#444444"},
}
"""Dark, filled and solid against light, hollow and dashed: the two modes stay apart in greyscale."""
PANELS = (
    ("Accuracy, reasoning questions", "% right", [(mode, "accuracy") for mode in MODES]),
    ("Accuracy, chat questions", "% right", [(mode, "accuracy/chat") for mode in MODES]),
    ("Mode adherence", "% of replies", [(mode, "adherence") for mode in MODES]),
    ("Forgetting: KL from the base", "nats per token", [KL]),
    ("Length of a reply", "tokens", [("thinking", "reasoning_tokens"), ("non_thinking", "answer_tokens")]),
)
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:1120px;margin:2em auto;padding:0 1em}img{width:100%}
table{border-collapse:collapse;font-size:.8em}th,td{padding:.3em .6em;border-bottom:1px solid #ddd;text-align:right}
td:first-child{text-align:left}.wide{overflow-x:auto}"""


def conclude(comparison: Comparison, folder: Path, console) -> None:
    """Write the files, log to wandb what came from there, and print the table, the notes and the verdict."""
    paths = write(comparison, folder)
    console.print(terminal_table(comparison))
    for name, why in comparison.left_out:
        console.print(f"left out: {name}: {why}", style="yellow")
    for note in comparison.notes:
        console.print(f"· {note}")
    runs = [run for point in comparison.points for run in point.runs]
    if any(tracking.logs_to_wandb(run.recipe["train"]) for run in runs):
        tracking.comparison(folder, *for_wandb(comparison), console)
    console.print(f"table, picture and page: {paths['csv'].with_suffix('')}.csv, .png, .html")
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


def for_wandb(comparison: Comparison) -> tuple[list[dict], tuple[str, list[dict]], dict]:
    """(rows of the table, (share key, points of the curve over it), summary) under the names of toolkit.tracking."""
    table = comparison.table().astype(object)
    key = f"mix/reasoning_share_{comparison.unit}"
    key = key if comparison.axis in ("reasoning", "") else f"mix/share_of_{comparison.axis}"
    charted = [
        (section, metric) for section, metric in METRICS if metric in ("accuracy", "accuracy/chat", "adherence", "kl")
    ]
    curve = [
        {key: p.place} | {f"eval/tuned/{s}/{m}": p.values[s, m]["value"] for s, m in charted if (s, m) in p.values}
        for p in comparison.points
        if p.place is not None
    ]
    best = comparison.recommended
    summary = {"recommendation": " ".join(comparison.verdict[:2])} | ({"recommended": best.label} if best else {})
    return table.where(table.notna(), None).to_dict("records"), (key, curve), summary


def terminal_table(comparison: Comparison):
    """A rich table of what decides, one line for each point at 80 columns; everything else is in the CSV and the page."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    modes = [mode for mode in MODES if (mode, "adherence") in comparison.base]
    chat = [CHAT] if comparison.goal != CHAT and CHAT in comparison.base else []
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    grid.add_column("", overflow="fold")
    for key in [comparison.goal, *chat]:
        grid.add_column(metric_title(key, comparison.points[0].runs[0]), justify="right", width=14)
    grid.add_column("keeps mode" + (",\non / off" if len(modes) > 1 else ""), justify="right", no_wrap=True)
    grid.add_column("KL", justify="right", no_wrap=True)
    for label, runs, values in everyone(comparison):
        best = comparison.recommended is not None and label == comparison.recommended.label
        name = Text(("★ " if best else "") + label)
        if comparison.axis:
            name.append("".join(f"\n{run.name}" for run in runs), "dim")
        kept = " / ".join(cell("adherence", values.get((mode, "adherence"))).split(" ")[0] for mode in modes)
        shown = [cell(key[1], values.get(key)) for key in [comparison.goal, *chat]]
        kl = f"{values[KL]['value']:.2f}" if KL in values else "-"
        grid.add_row(name, *shown, kept, kl, style="bold" if best else None)
    return grid


def everyone(comparison: Comparison) -> list[tuple[str, list, dict]]:
    """(label, runs, values) of the base and of each point."""
    return [("base", [], comparison.base), *((p.label, p.runs, p.values) for p in comparison.points)]


def cell(metric: str, found: dict | None) -> str:
    """`70% [59, 81]` for a rate, `0.22 [0.2, 0.24]` for others, `-` for what was not measured."""
    if found is None:
        return "-"
    if not is_rate(metric):
        return show(found)
    value, low, high = (f"{100 * found[end]:.0f}" for end in ("value", "low", "high"))
    return f"{value}% [{low}, {high}]"


def page(comparison: Comparison, png: bytes) -> str:
    """The HTML report, one file: verdict, picture, table, rule, and every run that went in or was left out."""
    text = html.escape
    items = [*comparison.notes, *(f"Left out: {name}: {why}" for name, why in comparison.left_out)]
    columns = {metric_title(key, comparison.points[0].runs[0]): [cell(key[1], v.get(key)) for _, _, v in everyone(comparison)]
               for key in METRICS if key in comparison.base}  # fmt: skip
    table = pd.DataFrame({"": [label for label, _, _ in everyone(comparison)], **columns}).to_html(
        index=False, border=0
    )
    shares = comparison.table().filter(regex="^(label|runs|reasoning_share)").to_html(index=False, border=0, na_rep="")
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Comparison</title><style>{STYLE}</style></head>
<body><h1>{text(comparison.verdict[0])}</h1><p>{text(comparison.verdict[1])}</p>
<p><code>{text(comparison.verdict[2])}</code></p><ul>{"".join(f"<li>{text(item)}</li>" for item in items)}</ul>
<img alt="comparison" src="data:image/png;base64,{base64.b64encode(png).decode()}">
<h2>Results</h2><p>Mean over seeds, with the 95% interval over questions (and seeds).</p><div class="wide">{table}</div>
<h2>Runs and their achieved shares</h2><div class="wide">{shares}</div><h2>Rule</h2><p>{text(RULE)}</p></body></html>
"""


# --- the picture -----------------------------------------------------------------------------------------------------


def figure(comparison: Comparison):
    """Panels over the share, or with one line per run where they differ in more: what was measured, and the frontier."""
    from matplotlib.figure import Figure

    measured = {key for point in comparison.points for key in point.values}
    panels = [(title, unit, kept) for title, unit, keys in PANELS if (kept := [key for key in keys if key in measured])]
    rows, tall = -(-(len(panels) + 1) // 3), 0 if comparison.axis else 0.25 * len(comparison.points)
    picture = Figure(figsize=(13, (3.6 + tall) * rows + 0.4), layout="constrained")
    axes = list(picture.subplots(rows, 3, squeeze=False).flatten())
    for number, (axis, (title, unit, keys)) in enumerate(zip(axes, panels, strict=False)):
        _panel(axis, comparison, keys, unit, names=number % 3 == 0)
        axis.set_title(title)
    _frontier(axes[len(panels)], comparison)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e8e8e8")
        axis.set_axisbelow(True)
    for axis in axes[len(panels) + 1 :]:
        axis.remove()
    shown = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    picture.legend(shown.values(), shown, loc="outside lower center", ncols=6, frameon=False)
    return picture


def _panel(axis, comparison: Comparison, keys: list[tuple[str, str]], unit: str, *, names: bool) -> None:
    """One metric of each mode, with intervals, against the share (x) or against the runs' names (y)."""
    upright, scale = bool(comparison.axis), 100 if "%" in unit else 1
    for turn, (section, metric) in enumerate(keys):
        look, title = dict(LOOKS[section]), mode_title(section) if section in MODES else "KL"
        title = f", {title}" if len(comparison.points[0].runs[0].modes()) > 1 or section not in MODES else ""
        points = [(i, point) for i, point in enumerate(comparison.points) if (section, metric) in point.values]
        found = [point.values[section, metric] for _, point in points]
        places = [100 * p.place + turn if upright else i + turn / 5 for i, p in points]  # apart, where modes are equal
        values = [scale * f["value"] for f in found]
        error = [[scale * abs(f["value"] - f[end]) for f in found] for end in ("low", "high")]
        look["linestyle"] = look["linestyle"] if upright else "none"
        xy, bars = ((places, values), {"yerr": error}) if upright else ((values, places), {"xerr": error})
        axis.errorbar(*xy, **bars, **look, capsize=3, linewidth=1.8, elinewidth=1.2, label=f"tuned{title}")
        base = comparison.base.get((section, metric))
        if base and section in MODES:  # the base's distance from itself says nothing
            line = axis.axhline if upright else axis.axvline
            line(scale * base["value"], color=look["color"], linestyle=":", label=f"base{title}")
    if best := comparison.recommended:
        band = axis.axvspan if upright else axis.axhspan
        place = 100 * best.place if upright else comparison.points.index(best)
        width = 1.5 if upright else 0.35
        band(place - width, place + width, color="#999999", alpha=0.25, zorder=0, label="recommended")
    along, across = (axis.set_ylim, axis.set_ylabel) if upright else (axis.set_xlim, axis.set_xlabel)
    along((-4, 104) if "%" in unit else (0, None))
    across(unit)
    if upright:
        axis.set(xlabel=f"{comparison.axis} share, % of {comparison.unit.replace('_', ' ')} (achieved)", xlim=(-5, 106))
    else:
        labels = [f"{i}  {point.label}" if names else str(i) for i, point in enumerate(comparison.points, 1)]
        axis.set_yticks(range(len(labels)), labels, fontsize=9)
        axis.set_ylim(len(labels) - 0.4, -0.6)


def _frontier(axis, comparison: Comparison) -> None:
    """The goal against what is kept of the base; each label inside the axes, points at one place share theirs."""
    chat = CHAT in comparison.points[0].values and comparison.goal != CHAT
    short = {
        p.label: f"{100 * p.place:.0f}%" if comparison.axis else str(i) for i, p in enumerate(comparison.points, 1)
    }
    places: dict[tuple[float, float], list[str]] = {}
    for label, _, values in everyone(comparison):
        if comparison.goal in values:
            kept = (100 if chat else 1) * kept_of_base(values, comparison.goal)
            places.setdefault((100 * values[comparison.goal]["value"], kept), []).append(label)
    edge = sorted(place for place, labels in places.items() if set(labels) & set(comparison.frontier))
    axis.plot(*zip(*edge, strict=True), color="#777777", linewidth=1.2, zorder=1)
    middle = (min(x for x, _ in places) + max(x for x, _ in places)) / 2
    for turn, ((x, y), labels) in enumerate(sorted(places.items())):
        best = comparison.recommended is not None and comparison.recommended.label in labels
        color = "#888888" if labels == ["base"] else "#12355b"
        axis.plot(x, y, "*" if best else "o", markersize=17 if best else 8, color=color, zorder=3,
                  markerfacecolor=color if (x, y) in edge else "white")  # fmt: skip
        side, up = ("left", 9) if x <= middle else ("right", -9), 8 if turn % 2 else -14
        axis.annotate(", ".join(short.get(label, label) for label in labels), (x, y), xytext=(side[1], up),
                      textcoords="offset points", ha=side[0], fontsize=9)  # fmt: skip
    kept = f"{metric_title(CHAT, comparison.points[0].runs[0])}, %" if chat else "minus KL from the base, nats/token"
    axis.set(
        title="Frontier (filled: beaten by none)",
        xlabel=f"{metric_title(comparison.goal, comparison.points[0].runs[0])}, %",
        ylabel=kept,
    )
    axis.margins(x=0.12, y=0.18)
