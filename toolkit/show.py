"""A mix and a run to look at: tables, pictures, and rows with the tokens they teach coloured.

from rich import print; from toolkit import mix, recipe, show; print(show.plan_table(mix.plan(recipe.load("pocket").data)))
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

from toolkit.family import mode_title
from toolkit.files import ToolkitError, read_jsonl
from toolkit.mix import UNITS, Mix
from toolkit.recipe import Source
from toolkit.render import Chat, examples
from toolkit.sources import Rejected, conversations, detect, open_rows

PALETTE = ("#4c72b0", "#dd8452", "#55a868", "#8172b3", "#937860", "#da8bc3")
BASE, TUNED = "#9aa5b1", "#12355b"
SHOWN, TAUGHT = "color:#777777", "background:#c8e6c9;color:#111"
BINS = 40
SMOOTH = 0.8
"""Weight of the past in the smoothed training loss; the raw values stay visible behind it."""
SCORES = {
    ("thinking", "accuracy"): "thinking:\nreasoning questions",
    ("thinking", "adherence"): "thinking:\nthinks when asked to",
    ("non_thinking", "accuracy"): "non-thinking:\nreasoning questions",
    ("non_thinking", "accuracy/chat"): "non-thinking:\nchat questions",
    ("non_thinking", "adherence"): "non-thinking:\nanswers at once",
    ("forgetting", "kl"): "forgetting: KL from the base,\nnats per token",
}
"""(section, metric) of eval.json → title of its panel; KL is in nats, all others are shares of replies."""
LOST = {
    key: SCORES[key] for key in [("forgetting", "kl"), ("non_thinking", "accuracy/chat"), ("thinking", "adherence")]
}
"""What training may cost."""


# --- tables ----------------------------------------------------------------------------------------------------------


def plan_table(planned: dict[str, dict]):
    """What a recipe asks for (`mix.plan`), before anything is read."""
    table = _table("source", "share", "to train", "held out")
    for name, row in planned.items():
        share = "as it comes" if row["share"] is None else f"{row['share']:.1%}"
        quota = "all there is" if row["quota"] is None else f"{row['quota']:,}"
        table.add_row(name, share, quota, str(row["validation"]))
    return table


def verdict(report: dict) -> str:
    """One sentence on a compiled mix (`report` is mix.json's content): its size, and how near it is to its plan."""
    total, unit = report["total"], report["unit"]
    off = max(abs(report["achieved"][unit].get(name, 0) - share) for name, share in report["planned"].items())
    return (
        f"{total['examples']:,} examples, {total['supervised_tokens']:,} supervised of {total['tokens']:,} tokens; "
        f"shares of {unit.replace('_', ' ')} within {100 * off:.1f} points of the plan"
    )


def mix_table(report: dict):
    """What a mix achieved: each source's amount and share in all three units."""
    table = _table("source", *UNITS, "planned")
    for name, row in report["sources"].items():
        modes = [f"{n:,} {mode_title(m)}" if len(row["modes"]) > 1 else mode_title(m) for m, n in row["modes"].items()]
        amounts = row["rows_kept"], row["tokens"], row["supervised_tokens"]
        cells = [f"{n:,}\n{report['achieved'][u].get(name, 0):.1%}" for u, n in zip(UNITS, amounts, strict=True)]
        table.add_row("\n".join([name, *modes]), *cells, f"\n{report['planned'][name]:.1%}")
    return table


def _table(*columns: str):
    """Names wrap and are never cut: two sources may differ in their last letters."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column.replace("_", "\n", 1), justify="right" if i else "left", overflow="fold")
    return table


def notes(report: dict) -> list[str]:
    """What a reader of the table should also know: drops by reason, repeats, the limiting source, warnings."""
    lines = []
    for name, row in report["sources"].items():
        if row["dropped"]:
            lines.append(f"{name}: dropped " + ", ".join(f"{n} {reason}" for reason, n in row["dropped"].items()))
        if row["rows_repeated"]:
            asked = f"path#{row['rows_asked']}" if row["rows_asked"] else "max_repeats"
            lines.append(f"{name}: {row['rows_repeated']} of {row['rows_kept']} rows are repeats ({asked})")
    if report["limited_by"]:
        lines.append(f"{report['limited_by']} is exhausted: the mix was reduced to keep the requested fractions")
    return lines + [f"warning: {w}" for w in report["warnings"]]


# --- rows with their supervised tokens coloured ----------------------------------------------------------------------


def _chosen(mixed: Mix, chat: Chat, count: int) -> Iterator[tuple[str, str, str]]:
    """(title, text shown, text taught) of the first `count` training rows of each source and mode."""
    taken: Counter = Counter()
    for row in mixed.train:
        taken[row.source, row.mode] += 1
        if taken[row.source, row.mode] <= count:
            size = f"{len(row.ids)} tokens, {row.size('supervised_tokens')} supervised"
            title = f"{row.source} · row {row.number} · {mode_title(row.mode)} · {size}"
            yield title, chat.decode(row.ids[: row.prompt_length]), chat.decode(row.ids[row.prompt_length :])


def terminal(mixed: Mix, chat: Chat, count: int):
    """Rows as the model sees them, for a rich console: what it is taught is green, what it is only shown is grey."""
    from rich.text import Text

    for title, shown, taught in _chosen(mixed, chat, count):
        yield Text(title, "bold")
        yield Text.assemble((shown, "bright_black"), (taught, "bold green"), "\n")


def html(mixed: Mix, chat: Chat, count: int) -> str:
    """The same as HTML, for a notebook: supervised tokens on green."""
    legend = f"<p><span style='{SHOWN}'>what the model sees</span>, <span style='{TAUGHT}'>what it is taught</span></p>"
    rows = _chosen(mixed, chat, count)
    return legend + "\n".join(f"<p><b>{escape(title)}</b></p>{_coloured(*texts)}" for title, *texts in rows)


def _coloured(shown: str, taught: str) -> str:
    style = "white-space:pre-wrap;overflow-wrap:anywhere"
    shown, taught = escape(shown), escape(taught)
    return f"<pre style='{style}'><span style='{SHOWN}'>{shown}</span><span style='{TAUGHT}'>{taught}</span></pre>"


def label_rule(conversation: dict, chat: Chat) -> tuple[str, str]:
    """(shown, taught) of the last assistant turn by the label rule."""
    example = examples(conversation, "auto", chat)[-1]
    return example.prompt, example.completion


def trl_masking(conversation: dict, chat: Chat) -> tuple[str, str]:
    """(shown, taught) as TRL's assistant_only_loss and Unsloth's train_on_responses_only mask a row: everything after
    the last assistant header is taught, so a direct answer teaches the empty think block that Qwen3's template writes."""
    messages, tools = conversation["messages"], conversation.get("tools")
    whole = chat.render(messages, tools, add_generation_prompt=False)
    header = len(chat.render(messages[:-1], tools))  # without a mode, Qwen3's generation prompt has no think block
    return whole[:header], whole[header:]


def compared(mixed: Mix, chat: Chat):
    """One held-out row of each source and mode: what is taught here, and what TRL / Unsloth masking would teach."""
    from IPython.display import HTML

    rows = {(row.source, row.mode): row.conversation for row in reversed(mixed.validation)}
    heads = "".join(f"<th style='text-align:left'>{name}</th>" for name in ("here", "TRL / Unsloth masking"))
    body = "".join(
        f"<tr><td colspan='2' style='text-align:left'><b>{escape(source)} · {mode_title(mode)}</b></td></tr>"
        f"<tr>{cell(_coloured(*label_rule(row, chat)))}{cell(_coloured(*trl_masking(row, chat)))}</tr>"
        for (source, mode), row in sorted(rows.items())
    )
    return HTML(f"<table style='width:100%;table-layout:fixed'><tr>{heads}</tr>{body}</table>")


def first_row(source: Source, chat: Chat, placeholders: dict):
    """The first conversation of a file as the model sees it: its format, and every turn it teaches coloured."""
    from IPython.display import HTML

    number, found = next(conversations(source, seed=0, placeholders=placeholders))
    if isinstance(found, Rejected):
        raise ToolkitError(f"{source.path}, row {number}: {found.detail}")
    turns = [_coloured(e.prompt, e.completion) for e in examples(found, "auto", chat, source.turns)]
    title = f"{source.path} · {detect(source, open_rows(source))} · row {number}, {len(turns)} example(s)"
    return HTML(f"<b>{escape(title)}</b>" + "".join(turns))


def cell(content: str) -> str:
    """One cell of an HTML table whose text wraps."""
    return f"<td style='text-align:left;vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere'>{content}</td>"


# --- pictures --------------------------------------------------------------------------------------------------------


def _panels(width: float, height: float, count: int, **options):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False, **options)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", color="#eeeeee")
        one.set_axisbelow(True)
    return figure, axes


def mix_figure(mixed: Mix):
    """Shares in three units side by side, and a length histogram per source with the max_seq_length line."""
    import pandas

    report, limit = mixed.report, mixed.report["max_seq_length"]
    figure, (shares, lengths) = _panels(10, 3.6, 2, width_ratios=(2, 3))
    names, titles = list(report["sources"]), [u.replace("_", "\n") for u in UNITS]
    achieved = pandas.DataFrame(report["achieved"]).reindex(names).T.set_axis(titles)
    achieved.plot.bar(stacked=True, ax=shares, color=PALETTE, rot=0, legend=False, width=0.8)
    for bars in shares.containers:
        texts = [f"{v:.0%}" if v > 0.04 else "" for v in bars.datavalues]
        shares.bar_label(bars, texts, label_type="center", color="white")
    shares.set(ylabel="share of the mix", ylim=(0, 1), title=f"one mix, three answers (recipe: {report['unit']})")
    for name, colour in zip(names, itertools.cycle(PALETTE), strict=False):
        sizes = [len(r.ids) for r in mixed.train if r.source == name]
        label = f"{name} ({len(sizes):,} rows)"
        lengths.hist(sizes, bins=BINS, range=(0, limit), color=colour, alpha=0.65, label=label)
    lengths.axvline(limit, color="black", linestyle="--", linewidth=1)
    note = f"tokens per row\n(dashed: max_seq_length {limit:,}; longer rows are dropped, never cut)"
    lengths.set(xlabel=note, ylabel="rows", yscale="log", title="how long the rows are")
    lengths.legend(frameon=False)
    return figure


def logged(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; empty where it has none yet."""
    return read_jsonl(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []


def curves(folder: Path):
    """Training loss by step, and validation loss per source and mode."""
    import pandas

    lines = pandas.DataFrame(logged(folder)).groupby("step").last()
    figure, (left, right) = _panels(10, 3.4, 2)
    loss = lines["loss"].dropna()
    left.plot(loss, color=BASE, linewidth=1, label="each step")
    left.plot(loss.ewm(alpha=1 - SMOOTH).mean(), color=TUNED, linewidth=2, label="smoothed")
    left.set(title="training loss", xlabel="optimizer step", ylabel="nats per supervised token", ylim=(0, None))
    sources = [k for k in lines if k.startswith("eval_") and k.endswith("_loss") and "/" in k]
    for colour, key in zip(itertools.cycle(PALETTE), sources, strict=False):
        source, _, mode = key.removeprefix("eval_").removesuffix("_loss").rpartition("/")
        label = f"{source}, {mode_title(mode)}"
        right.plot(lines[key].dropna(), color=colour, marker="o", markersize=4, label=label)
    mixed = lines.get("eval_loss", pandas.Series(dtype=float)).dropna()
    right.plot(mixed, color="black", linestyle=":", marker=".", label="all, as mixed")
    right.set(title="validation loss, by source and mode", xlabel="optimizer step", ylim=(0, None))
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=9)
    return figure


def scores(results: Mapping[str, dict], panels: Mapping[tuple[str, str], str] = SCORES):
    """Runs beside their common base, with 95% intervals: {name: content of an eval.json}, one panel for each metric
    that was measured, so that a model with one mode has that mode's only."""
    base = next(iter(results.values()))["base"]
    sides = {"base": base} | {name: result["tuned"] for name, result in results.items()}
    shown = [key for key in panels if all(_measured(side, key) or key[1] == "kl" for side in sides.values())]
    figure, axes = _panels(max(5, 2.6 * len(shown)), 3.4, len(shown))
    for one, key in zip(axes, shown, strict=True):
        scale = 1 if key[1] == "kl" else 100
        found = {name: _measured(side, key) for name, side in sides.items()}
        for i, (name, colour) in enumerate(zip(found, (BASE, *PALETTE), strict=False)):
            if value := found[name]:  # the base has no distance from itself
                _bar(one, i, {end: scale * value[end] for end in ("value", "low", "high")}, colour)
        one.set_xticks(range(len(found)), [name.replace(" + ", " +\n") for name in found], fontsize=8)
        one.set(ylim=(0, None if key[1] == "kl" else 112), xlim=(-0.6, len(found) - 0.4))
        one.set_title(panels[key] + ("" if key[1] == "kl" else ", %"), fontsize=10)
    return figure


def _measured(side: dict, key: tuple[str, str]) -> dict | None:
    value = side.get(key[0], {}).get(key[1])
    return value if value and value["value"] is not None else None


def _bar(axes, place: int, found: dict, colour: str) -> None:
    """A bar with its interval, the value at its foot."""
    interval = [[abs(found["value"] - found[end])] for end in ("low", "high")]
    error = {"ecolor": "#555555", "elinewidth": 1.2, "capsize": 4}
    axes.bar([place], [found["value"]], 0.6, yerr=interval, color=colour, error_kw=error)
    box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    text = f"{found['value']:.3g}"
    axes.annotate(text, (place, 0), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=9, bbox=box)
