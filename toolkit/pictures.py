"""Pictures of a run, read from its folder: curves, scores in both modes, what was forgotten.

curves(Path("outputs/pocket")); scores(result); forgotten({"with replay": result, "without": other})
"""

import json
from collections.abc import Mapping
from pathlib import Path

BASE, TUNED = "#9aa5b1", "#12355b"
COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3", "#937860", "#da8bc3")
SMOOTH = 0.8
"""Weight of the past in the smoothed training loss; the raw values stay visible behind it."""
SCORES = {"accuracy": "reasoning\nquestions", "accuracy/chat": "chat\nquestions", "adherence": "keeps\nthe mode"}
LOST = {
    "kl": ("forgetting", "KL from the base\non general prompts, nats per token"),
    "accuracy/chat": ("non_thinking", "right answers to chat\nquestions, % (not thinking)"),
    "adherence": ("thinking", "still thinks when\nasked to, % of replies"),
}


def logged(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; empty where it has none yet."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def curves(folder: Path):
    """Training loss by step, and validation loss per source and mode."""
    lines = logged(folder)
    figure, (left, right) = _figure(10, 3.4, 2)
    steps, losses = _series(lines, "loss")
    left.plot(steps, losses, color=BASE, linewidth=1, label="each step")
    left.plot(steps, _smoothed(losses), color=TUNED, linewidth=2, label="smoothed")
    left.set(title="training loss", xlabel="optimizer step", ylabel="nats per supervised token", ylim=(0, None))
    keys = dict.fromkeys(k for line in lines for k in line if k.startswith("eval_") and k.endswith("_loss"))
    sources = [key for key in keys if "/" in key]
    for colour, key in zip(COLOURS, sources, strict=False):
        label = (
            key.removeprefix("eval_").removesuffix("_loss").replace("/", ", ").replace("non_thinking", "non-thinking")
        )
        right.plot(*_series(lines, key), color=colour, marker="o", markersize=4, label=label)
    steps, losses = _series(lines, "eval_loss")
    right.plot(steps, losses, color="black", linestyle=":", marker=".", label="all, as mixed")
    right.set(title="validation loss, by source and mode", xlabel="optimizer step", ylim=(0, None))
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=9)
    return figure


def scores(result: dict):
    """Base against tuned in both modes, with 95% intervals: the content of an eval.json."""
    figure, panels = _figure(10, 3.6, 2)
    for axes, (mode, title) in zip(
        panels, (("thinking", "thinking on"), ("non_thinking", "thinking off")), strict=True
    ):
        shown = [m for m in SCORES if result["tuned"][mode].get(m, {}).get("value") is not None]
        for aside, (name, colour) in zip((-0.17, 0.17), (("base", BASE), ("tuned", TUNED)), strict=True):
            _bars(axes, [i + aside for i in range(len(shown))], [result[name][mode][m] for m in shown], colour, name)
        axes.set_xticks(range(len(shown)), [SCORES[m] for m in shown])
        axes.set(title=title, ylim=(0, 122), yticks=range(0, 101, 20), ylabel="% of replies, with 95% interval")
    panels[0].legend(frameon=False, ncols=2, loc="upper left")
    return figure


def forgotten(results: Mapping[str, dict]):
    """What runs lost against their base: each eval.json's content under the name it is to have."""
    figure, panels = _figure(10, 3.4, len(LOST))
    colours = {"base": BASE, **dict(zip(results, COLOURS, strict=False))}
    for axes, (metric, (section, title)) in zip(panels, LOST.items(), strict=True):
        found = {name: result["tuned"][section][metric] for name, result in results.items()}
        if metric != "kl":  # the base's distance from itself says nothing
            found = {"base": next(iter(results.values()))["base"][section][metric], **found}
        for i, (name, value) in enumerate(found.items()):
            _bars(axes, [i], [value], colours[name], name, 1 if metric == "kl" else 100, 0.6)
        axes.set_xticks(range(len(found)), [name.replace(" + ", " +\n") for name in found], fontsize=8)
        axes.set(ylim=(0, None if metric == "kl" else 112))
        axes.set_title(title, fontsize=10)
    return figure


def _bars(
    axes, places: list, found: list[dict], colour: str, label: str, scale: float = 100, width: float = 0.34
) -> None:
    """Bars with their intervals, the value at the foot of each; what was not measured has none."""
    measured = [(x, f) for x, f in zip(places, found, strict=True) if f["value"] is not None]
    values = [scale * f["value"] for _, f in measured]
    reach = [[scale * abs(f["value"] - f[end]) for _, f in measured] for end in ("low", "high")]
    error = {"ecolor": "#555555", "elinewidth": 1.2, "capsize": 4}
    axes.bar([x for x, _ in measured], values, width, yerr=reach, color=colour, label=label, error_kw=error)
    for (x, _), value in zip(measured, values, strict=True):
        text = f"{value:.0f}" if scale == 100 else f"{value:.2g}"
        box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
        axes.annotate(text, (x, 0), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=9, bbox=box)


def _series(lines: list[dict], key: str) -> tuple[list, list]:
    points = {line["step"]: line[key] for line in lines if key in line}
    return list(points), list(points.values())


def _smoothed(values: list[float]) -> list[float]:
    """Exponential mean without the start's bias (Kingma & Ba 2015, section 3)."""
    result, mean = [], 0.0
    for n, value in enumerate(values, 1):
        mean = SMOOTH * mean + (1 - SMOOTH) * value
        result.append(mean / (1 - SMOOTH**n))
    return result


def _figure(width: float, height: float, panels: int):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, panels)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", color="#eeeeee")
        one.set_axisbelow(True)
    return figure, axes
