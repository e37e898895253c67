"""A comparison as a terminal table, a CSV file, a picture and one HTML page that needs nothing else.

paths = write(compare(runs), Path("outputs/comparison"))  # comparison.csv, .png, .html
"""

import csv
import html
import io
from collections.abc import Callable, Iterable
from pathlib import Path

from toolkit import evaluate, tracking
from toolkit.compare import MARGIN, RULE, Comparison, noun, retention
from toolkit.evaluate import show
from toolkit.folders import GOAL, KL, METRICS, UNITS, Point

CHAT = ("non_thinking", "accuracy/chat")
LOOKS = {
    "thinking": {"color": "#12355b", "marker": "o", "linestyle": "-", "markerfacecolor": "#12355b"},
    "non_thinking": {"color": "#d9822b", "marker": "s", "linestyle": "--", "markerfacecolor": "white"},
    "forgetting": {"color": "#444444", "marker": "D", "linestyle": "-", "markerfacecolor": "#444444"},
}
"""Dark, filled and solid against light, hollow and dashed: the two modes stay apart in greyscale."""
MARKERS = "osD^vP*X"
HEADINGS = {
    "accuracy": "accuracy", "accuracy/chat": "chat accuracy", "adherence": "adherence", "reasoning_tokens": "reasoning tokens",
    "answer_tokens": "answer tokens", "cut": "cut by the limit", "kl": "KL, nats/token", "nll": "NLL, nats/token",
}  # fmt: skip
STYLE = """
body{font:16px/1.55 system-ui,sans-serif;color:#1a1a1a;max-width:1120px;margin:2.5em auto;padding:0 1.2em}
h1{font-size:1.6em;margin-bottom:.3em}h2{font-size:1.15em;margin-top:2em}
.sentence{font-size:1.15em;border-left:5px solid #12355b;padding:.5em 1em;background:#f1f4f8}
table{border-collapse:collapse;font-size:.82em;font-variant-numeric:tabular-nums}.wide{overflow-x:auto}
th,td{padding:.35em .7em;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}th{border-bottom:2px solid #555}
th:first-child,td:first-child{text-align:left}tr.best{background:#e6edf5;font-weight:600}tr.base{color:#555;font-style:italic}
small{color:#666;font-weight:400}svg{width:100%;height:auto}li{margin:.25em 0}
"""


def write(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Write the CSV, the picture and the page; returns their paths by kind."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"comparison.{kind}" for kind in ("csv", "png", "html")}
    with paths["csv"].open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(cells(comparison))
    picture = figure(comparison)
    picture.savefig(paths["png"], dpi=150)
    paths["html"].write_text(page(comparison, _svg(picture)), encoding="utf-8")
    return paths


def conclude(comparison: Comparison, folder: Path, console) -> None:
    """Print the table, the notes and the sentence, write the files, log to wandb what came from there."""
    console.print(table(comparison))
    paths = write(comparison, folder)
    for name, why in comparison.left_out:
        console.print(f"left out: {name}: {why}", style="yellow")
    for note in comparison.notes:
        console.print(f"· {note}")
    console.print(comparison.sentence, style="bold")
    console.print("\n".join(str(path) for path in paths.values()))
    if any(tracking.logs_to_wandb(run.recipe["train"]) for point in comparison.points for run in point.runs):
        axis, points, (columns, rows), summary = for_wandb(comparison)
        logged = [dict(zip(["runs", *columns[1:]], row, strict=True)) for row in rows]
        tracking.comparison(folder, logged, (axis, points), summary, console)


def for_wandb(comparison: Comparison) -> tuple[str, list[dict], tuple[list, list], dict]:
    """(key of the x axis, a curve's points, columns and rows of all runs, summary) under the names of toolkit.tracking."""

    def shares(of: Callable[[str], float]) -> dict:
        return {f"mix/reasoning_share_{unit}": of(unit) for unit in UNITS}

    keys = shown(comparison)
    points = [
        shares(point.shares.get)
        | {
            f"eval/tuned/{section}/{metric}{'' if end == 'value' else '.' + end}": point.values[section, metric][end]
            for section, metric in keys
            for end in ("value", "low", "high")
        }
        for point in comparison.points
    ]
    names = [f"eval/{name}/{section}/{metric}" for name in ("base", "tuned") for section, metric in keys]
    runs = [(run, evaluate.summary(run.eval)) for point in comparison.points for run in point.runs]
    rows = [[run.name, *shares(run.share).values(), *map(found.get, names)] for run, found in runs]
    summary = {"recommendation": comparison.sentence}
    if comparison.recommended:
        summary |= {f"recommended/{k}": v for k, v in shares(comparison.recommended.shares.get).items()}
    axis = f"mix/reasoning_share_{comparison.unit}"
    return axis, points, (["run", *shares(lambda _: 0.0), *names], rows), summary


def shown(comparison: Comparison) -> list[tuple[str, str]]:
    """Metrics that every point has."""
    return [key for key in METRICS if all(key in point.values for point in comparison.points)]


def table(comparison: Comparison):
    """A rich table: one column a ratio, so that it fits a terminal; the recommended one is marked."""
    from rich.table import Table

    grid = Table(title="Tuned runs against the achieved reasoning share; 95% intervals")
    grid.add_column("")
    grid.add_column("base", justify="right", style="dim")
    for point in comparison.points:
        best = point is comparison.recommended
        grid.add_column(("★ " if best else "") + point.label, justify="right", style="bold" if best else None)
    for unit in UNITS:
        grid.add_row(f"share of {unit}", "", *(f"{100 * point.shares[unit]:.1f}%" for point in comparison.points))
    grid.add_row("runs (seeds)", "", *(str(len(point.runs)) for point in comparison.points), end_section=True)
    for section, metric in shown(comparison):
        base = comparison.base.get((section, metric))
        name = f"{_mode(section)}{HEADINGS[metric]}"
        values = [show(point.values[section, metric]).replace(" [", "\n[") for point in comparison.points]
        grid.add_row(name, show(base).replace(" [", "\n[") if base else "-", *values)
    return grid


def cells(comparison: Comparison) -> Iterable[list]:
    """Rows of the CSV file: base, then a row for each ratio; value, low, high and n of every metric."""
    keys = shown(comparison)
    ends = ("value", "low", "high", "n")
    yield ["label", *(f"reasoning_share_{unit}" for unit in UNITS), "runs", "recommended", "frontier",
           *(f"{section}/{metric}{'' if end == 'value' else '.' + end}" for section, metric in keys for end in ends)]  # fmt: skip
    yield ["base", "", "", "", "", "", "", *(comparison.base.get(key, {}).get(end) for key in keys for end in ends)]
    for point in comparison.points:
        yield [point.label, *(point.shares[unit] for unit in UNITS), " ".join(run.name for run in point.runs),
               int(point is comparison.recommended), int(point in comparison.frontier),
               *(point.values[key][end] for key in keys for end in ends)]  # fmt: skip


def figure(comparison: Comparison):
    """Six panels: accuracy, chat accuracy, adherence, forgetting, length, and the frontier."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(13, 7.6), layout="constrained")
    axes = picture.subplots(2, 3).flatten()
    both = ("thinking", "non_thinking")
    chat = [(mode, "accuracy/chat") for mode in both]
    panels = [
        ("Accuracy, reasoning questions", "% right of finished replies", [(mode, "accuracy") for mode in both]),
        ("Accuracy, chat questions", "% right of finished replies", chat),
        ("Mode adherence", "% of replies", [(mode, "adherence") for mode in both]),
        ("Forgetting: KL from the base", "nats per token", [KL]),
        ("Length of a reply", "tokens", [("thinking", "reasoning_tokens"), ("non_thinking", "answer_tokens")]),
    ]
    for axis, (title, unit, keys) in zip(axes, panels, strict=False):
        _curves(axis, comparison, [key for key in keys if key in shown(comparison)], "%" in unit)
        axis.set(title=title, ylabel=unit)
    _frontier(axes[5], comparison)
    handles, labels = axes[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=10)
    return picture


def _curves(axis, comparison: Comparison, keys: list[tuple[str, str]], percent: bool) -> None:
    places, scale = _places(comparison), 100 if percent else 1
    for turn, (section, metric) in enumerate(keys):
        look, name = LOOKS[section], _mode(section).strip() or "KL"
        if base := comparison.base.get((section, metric)):
            axis.axhline(
                scale * base["value"], color=look["color"], linestyle=":", linewidth=1.3, label=f"base, {name}"
            )
        aside = (turn - (len(keys) - 1) / 2) * (0.012 * (max(places.values()) - min(places.values())) or 1)
        for marker, (variant, points) in zip(MARKERS, _lines(comparison).items(), strict=False):
            x, found = [places[p.label] + aside for p in points], [p.values[section, metric] for p in points]
            shape = {"marker": marker} if variant else {}  # with one line a mode, each mode keeps its own marker
            _line(axis, x, found, scale, look | shape, f"tuned, {name} {variant}".strip())
    if comparison.recommended:
        axis.axvline(
            places[comparison.recommended.label],
            color="#999999",
            linewidth=9,
            alpha=0.25,
            zorder=0,
            label="recommended",
        )
    _share_axis(axis, comparison, places)
    axis.set_ylim((-4, 104) if percent else (0, None))
    if not keys:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color="#888888")


def _line(axis, x: list[float], found: list[dict], scale: float, look: dict, label: str) -> None:
    y = [scale * f["value"] for f in found]
    low, high = ([scale * abs(f["value"] - f[end]) for f in found] for end in ("low", "high"))
    axis.errorbar(x, y, yerr=[low, high], capsize=3, linewidth=1.8, elinewidth=1.2, markersize=6, label=label, **look)
    seeds = [
        (place, scale * value) for place, f in zip(x, found, strict=True) for value in f["each"] if len(f["each"]) > 1
    ]
    if seeds:
        axis.plot(*zip(*seeds, strict=True), "_", color=look["color"], markersize=11, zorder=1)


def _lines(comparison: Comparison) -> dict[str, list[Point]]:
    """Points to be joined: by variant along the share, or all of them where the share is the same."""
    if _one_share(comparison):
        return {"": comparison.points}
    variants = dict.fromkeys(point.variant for point in comparison.points)
    return {variant: [p for p in comparison.points if p.variant == variant] for variant in variants}


def _one_share(comparison: Comparison) -> bool:
    return len(comparison.points) > 1 and len({point.planned for point in comparison.points}) == 1


def _places(comparison: Comparison) -> dict[str, float]:
    """Where each point stands: at its achieved share in %, or in a row where all have the same share."""
    if _one_share(comparison):
        return {point.label: float(i) for i, point in enumerate(comparison.points)}
    return {point.label: 100 * point.shares[comparison.unit] for point in comparison.points}


def _share_axis(axis, comparison: Comparison, places: dict[str, float]) -> None:
    axis.grid(axis="y", color="#e5e5e5")
    axis.spines[["top", "right"]].set_visible(False)
    if _one_share(comparison):
        keys = {part.split("=")[0] for part in comparison.points[0].variant.split(", ")}
        axis.set_xticks(list(places.values()), [_short(point, comparison) for point in comparison.points], fontsize=9)
        axis.set_xlabel(", ".join(sorted(keys)))
        axis.margins(x=0.2)
    else:
        axis.set(xlabel=f"reasoning share, % of {comparison.unit.replace('_', ' ')} (achieved)", xlim=(-5, 105))


def _frontier(axis, comparison: Comparison) -> None:
    chat = all(CHAT in point.values for point in comparison.points)
    scale = 100 if chat else 1
    place = {point.label: (100 * point.values[GOAL]["value"], scale * retention(point)) for point in comparison.points}
    edge = sorted(place[point.label] for point in comparison.frontier)
    axis.plot(*zip(*edge, strict=True), color="#777777", linestyle="-", linewidth=1.2, zorder=1)
    for turn, point in enumerate(comparison.points):
        best, (x, y) = point is comparison.recommended, place[point.label]
        axis.plot(
            x,
            y,
            "*" if best else "o",
            markersize=17 if best else 7,
            color="#12355b",
            zorder=3,
            markerfacecolor="#12355b" if point in comparison.frontier else "white",
        )
        side = (8, 7) if turn % 2 == 0 else (8, -14)
        axis.annotate(_short(point, comparison), (x, y), xytext=side, textcoords="offset points", fontsize=9)
    if chat and CHAT in comparison.base:
        base = 100 * comparison.base[GOAL]["value"], 100 * comparison.base[CHAT]["value"]
        axis.plot(*base, "x", color="#444444", markersize=9, markeredgewidth=2)
        axis.annotate("base", base, xytext=(7, -12), textcoords="offset points", fontsize=9, color="#444444")
    axis.set(
        title="Frontier: filled points are beaten by none",
        xlabel="thinking accuracy, % (reasoning questions)",
        ylabel="chat accuracy without thinking, %" if chat else "minus KL from the base, nats per token",
    )
    axis.grid(color="#eeeeee")
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.25, y=0.15)


def _short(point: Point, comparison: Comparison) -> str:
    if _one_share(comparison):
        return "\n".join(part.split("=", 1)[1] for part in point.variant.split(", "))
    return f"{100 * point.shares[comparison.unit]:.0f}% {point.variant}".strip()


def _mode(section: str) -> str:
    return {"thinking": "thinking ", "non_thinking": "non-thinking "}.get(section, "")


def _svg(picture) -> str:
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "comparison"}):  # the same comparison gives the same file
        picture.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def page(comparison: Comparison, svg: str) -> str:
    """The HTML report: sentence, picture, table, rule, and every run that went in or was left out."""
    text = html.escape
    left_out = "".join(f"<li><b>{text(name)}</b>: {text(why)}</li>" for name, why in comparison.left_out)
    notes = "".join(f"<li>{text(note)}</li>" for note in comparison.notes)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Comparison of {len(comparison.points)} {noun(comparison.points)}</title><style>{STYLE}</style></head><body>
<h1>Which of {len(comparison.points)} {noun(comparison.points)}?</h1>
<p class="sentence">{text(comparison.sentence)}</p>
<ul>{notes}</ul>
{svg}
<h2>Results</h2>
<p>Tuned runs, mean over seeds; in brackets the 95% interval over questions (and, with several seeds, over seeds). Shares are
those the compiled mixes achieved.</p>
<div class="wide">{_results(comparison)}</div>
<h2>How the choice is made</h2>
<p>{text(RULE)}</p>
<p>Accuracy counts replies that ended by themselves; those cut by the token limit stand in their own column. Adherence with
thinking: a closed, non-empty block and an answer after it. Without: no tags, no thinking aloud, and no answer three times as
long as the base's. KL: how far the tuned model's next-token distribution is from the base's on the base's own answers to a
fixed bilingual probe set. The margin is {MARGIN}.</p>
<h2>Runs</h2>
<div class="wide">{_runs(comparison)}</div>
{f"<h2>Left out</h2><ul>{left_out}</ul>" if left_out else ""}
</body></html>
"""


def _results(comparison: Comparison) -> str:
    keys = shown(comparison)
    rows = [_row("base", comparison.base, keys, ["", "", ""], "base")]
    for point in comparison.points:
        shares = [f"{100 * point.shares[unit]:.1f}%" for unit in UNITS]
        rows.append(_row(point.label, point.values, keys, shares, "best" if point is comparison.recommended else ""))
    heads = [*(f"{unit.replace('_', ' ')}" for unit in UNITS), *(f"{_mode(s)}<br>{HEADINGS[m]}" for s, m in keys)]
    return f"<table><tr><th>{'</th><th>'.join(['', *heads])}</th></tr>{''.join(rows)}</table>"


def _row(label: str, values: dict, keys: list, shares: list[str], kind: str) -> str:
    found = [show(values[key]).replace(" [", "<br><small>[") + "</small>" if key in values else "-" for key in keys]
    return f'<tr class="{kind}"><td>{"</td><td>".join([html.escape(label), *shares, *found])}</td></tr>'


def _runs(comparison: Comparison) -> str:
    rows = []
    for run in (run for point in comparison.points for run in point.runs):
        losses = [row["loss"] for row in run.metrics if "loss" in row]
        shares = [f"{100 * run.share(unit):.1f}%" for unit in UNITS]
        loss = f"{losses[-1]:.3f}" if losses else "-"
        parts = [
            html.escape(run.name),
            *shares,
            str(len(losses)),
            loss,
            html.escape(str(run.manifest.get("seeds", "-"))),
        ]
        rows.append(f"<tr><td>{'</td><td>'.join(parts)}</td></tr>")
    heads = ["", *(unit.replace("_", " ") for unit in UNITS), "logged steps", "last loss", "seeds"]
    return f"<table><tr><th>{'</th><th>'.join(heads)}</th></tr>{''.join(rows)}</table>"
