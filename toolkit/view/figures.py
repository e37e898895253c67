"""Pictures of a mix and of a training, in one style: a colour for each source, grey for the base, dark for the tuned.

from toolkit.view import figures; figures.curves(Path("outputs/pocket")).savefig("curves.png")
"""

import io
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from toolkit.data.mix import UNITS, Mix
from toolkit.family import mode_title
from toolkit.files import read_if_there, read_jsonl
from toolkit.recipe import Recipe
from toolkit.records import JsonObject
from toolkit.training import tracking

# matplotlib and pandas take a second to import; what only reads metrics.jsonl must not wait for them
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import BarContainer
    from matplotlib.figure import Figure

PALETTE = ("#4c72b0", "#dd8452", "#55a868", "#8172b3", "#937860", "#da8bc3")
# The base; points of a comparison; the tuned model, and the point that is recommended. None is a source's colour.
BASE, OTHER, TUNED = "#9aa5b1", "#6f94bb", "#12355b"
BINS = 40
# Weight of the past in the smoothed training loss; the raw values stay visible behind it.
SMOOTH = 0.8


def panels(width: float, height: float, columns: int, **options: Any) -> "tuple[Figure, list[Axes]]":
    """(figure, axes side by side) in the style of every picture here."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(1, columns, **options))
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#eeeeee")
        panel.set_axisbelow(True)
    return figure, axes


def png(figure: "Figure") -> bytes:
    """A figure as PNG on white: the same in dark themes and on static pages."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=90, facecolor="white")
    return out.getvalue()


def source_colours(planned: Iterable[str]) -> dict[str, str]:
    """{source: its colour}, the same in every picture and on every page: by its place among the planned sources, since a
    source of which a ratio wants nothing is missing from what was achieved."""
    return dict(zip(planned, itertools.cycle(PALETTE), strict=False))


def mix_figure(mixed: Mix) -> "Figure":
    """Shares in three units side by side, and a length histogram per source with the max_seq_length line."""
    figure, (shares, lengths) = panels(10, 3.6, 2, width_ratios=(2, 3))
    draw_shares(shares, mixed)
    draw_lengths(lengths, mixed)
    return figure


def keep_mix_picture(recipe: Recipe, mixed: Mix) -> None:
    """Leave a mix's picture in its folder, where tracking takes it from; nothing without wandb."""
    if "wandb" in tracking.trackers(recipe.train):
        mix_figure(mixed).savefig(mixed.folder / tracking.MIX_PICTURE, dpi=120)


def draw_shares(axes: "Axes", mixed: Mix) -> None:
    """A stacked bar for each unit: the share of every source."""
    import pandas

    report = mixed.report
    achieved = pandas.DataFrame(report["achieved"]).reindex(list(report["sources"])).T
    achieved.index = [unit.replace("_", "\n") for unit in UNITS]
    colours = source_colours(report["planned"])
    achieved.plot.bar(stacked=True, ax=axes, color=colours, rot=0, legend=False, width=0.8)

    def number(share: float) -> str:
        # a share below 4% has no room for its number
        return f"{share:.0%}" if share > 0.04 else ""

    for bars in axes.containers:
        axes.bar_label(cast("BarContainer", bars), fmt=number, label_type="center", color="white")
    axes.set(ylabel="share of the mix", ylim=(0, 1))
    axes.set_title(f"one mix, three answers (recipe: {report['unit']})")


def draw_lengths(axes: "Axes", mixed: Mix) -> None:
    """How many rows of each source have how many tokens."""
    limit = mixed.report["max_seq_length"]
    colours = source_colours(mixed.report["planned"])
    for name in mixed.report["sources"]:
        sizes = [len(row.ids) for row in mixed.train if row.source == name]
        label = f"{name} ({len(sizes):,} rows)"
        axes.hist(sizes, bins=BINS, range=(0, limit), color=colours[name], alpha=0.65, label=label)
    axes.axvline(limit, color="black", linestyle="--", linewidth=1)
    note = f"tokens per row\n(dashed: max_seq_length {limit:,}; longer rows are dropped, never cut)"
    axes.set(xlabel=note, ylabel="rows", yscale="log", title="how long the rows are")
    axes.legend(frameon=False)


def logged(folder: Path) -> list[JsonObject]:
    """The lines of a run's metrics.jsonl; empty where it has none yet."""
    file = folder / "metrics.jsonl"
    return read_jsonl(file) if file.is_file() else []


def curves(folder: Path) -> "Figure":
    """Training loss by step, and validation loss per source and mode."""
    import pandas

    # a step has a line for the loss and one for each validation; `last` takes each column's value
    lines = pandas.DataFrame(logged(folder)).groupby("step").last()
    figure, (left, right) = panels(10, 3.4, 2)
    # no loss yet, where it is evaluated before the first step
    loss = lines.get("loss", pandas.Series(dtype=float)).dropna()
    smoothed = loss.ewm(alpha=1 - SMOOTH).mean()
    left.plot(loss, color=BASE, linewidth=1, label="each step")
    left.plot(smoothed, color=TUNED, linewidth=2, label="smoothed")
    left.set(title="training loss", xlabel="optimizer step", ylabel="nats per supervised token", ylim=(0, None))
    left.legend(frameon=False, fontsize=9)
    # the mix is written before the first step; in anybody's own trainer there may be none
    colours = source_colours(read_if_there(folder / "mix.json").get("planned", ()))
    for key in lines.filter(regex="^eval_.*loss$"):
        source, _, mode = key.removeprefix("eval_").removesuffix("_loss").rpartition("/")
        label = f"{source}, {mode_title(mode)}" if source else "all, as mixed"
        style = "--o" if mode == "non_thinking" else "-o"
        shade = colours.get(source, TUNED)
        right.plot(lines[key].dropna(), style, color=shade, markersize=4, label=label)
    right.set(title="validation loss, by source and mode", xlabel="optimizer step", ylim=(0, None))
    if right.lines:  # no validation yet: nothing to name
        right.legend(frameon=False, fontsize=9)
    return figure
