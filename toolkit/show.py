"""A compiled mix to look at: a table, a picture, and rows with their supervised tokens coloured.

console.print(table(mixed.report)); figure(mixed); print(html(mixed, chat, 2))
"""

from collections import Counter
from html import escape

from toolkit.mix import UNITS, Mix
from toolkit.render import Chat

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3", "#937860", "#da8bc3")
SUPERVISED = "#c8e6c9"
BINS = 40
RARE = 0.05
"""A language in fewer replies than this share of a source is worth a word: it is mostly an accident."""
LANGUAGES = {"zh": "Chinese", "other": "not Chinese"}


def plan_table(planned: dict[str, dict], unit: str):
    """What a recipe asks for, before anything is read."""
    from rich.table import Table

    table = Table(title=f"planned, in {unit.replace('_', ' ')}", title_justify="left")
    for column in ("source", "share", "quota", "held out"):
        table.add_column(column, justify="left" if column == "source" else "right")
    for name, row in planned.items():
        quota = "all there is" if row["quota"] is None else f"{row['quota']:,}"
        table.add_row(name, f"{row['share']:.1%}", quota, str(row["validation"]))
    return table


def table(report: dict):
    """What a mix achieved: rows, tokens, lengths and shares per source, in all three units."""
    from rich.table import Table

    table = Table(title="achieved", title_justify="left")
    columns = "source", "mode", "rows", "seen", "tokens", "supervised", "length p50/p90/max", "planned", *UNITS
    for column in columns:
        table.add_column(column.replace("_", " "), justify="left" if column in {"source", "mode"} else "right")
    for name, row in report["sources"].items():
        modes = (
            " + ".join(f"{n} {m}" for m, n in row["modes"].items())
            if len(row["modes"]) > 1
            else next(iter(row["modes"]), "")
        )
        numbers = (
            f"{row['rows_kept']:,}",
            f"{row['rows_seen']:,}",
            f"{row['tokens']:,}",
            f"{row['supervised_tokens']:,}",
        )
        shares = [f"{report['achieved'][u].get(name, 0):.1%}" for u in UNITS]
        length = "/".join(str(v) for v in row["length"].values())
        table.add_row(name, modes.replace("_", "-"), *numbers, length, f"{report['planned'][name]:.1%}", *shares)
    return table


def notes(report: dict) -> list[str]:
    """What a reader of the table should also know: drops by reason, the limiting source, warnings."""
    lines = []
    for name, row in report["sources"].items():
        if row["dropped"]:
            lines.append(f"{name}: dropped " + ", ".join(f"{n} {reason}" for reason, n in row["dropped"].items()))
        rare = {tongue: n for tongue, n in row["languages"].items() if 0 < n < RARE * sum(row["languages"].values())}
        lines += [
            f"{name}: {n} replies are {LANGUAGES[tongue]}, unlike the rest: meant so?" for tongue, n in rare.items()
        ]
        if row["rows_repeated"]:
            lines.append(f"{name}: {row['rows_repeated']} rows are repeats (max_repeats)")
    if report["limited_by"]:
        lines.append(f"{report['limited_by']} ran dry: the whole mix shrank to keep its shares")
    return lines + [f"warning: {w}" for w in report["warnings"]]


def figure(mixed: Mix):
    """Shares in three units side by side, and a length histogram per source with the max_seq_length line."""
    from matplotlib.figure import Figure

    report, names = mixed.report, list(mixed.report["sources"])
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    shares, lengths = figure.subplots(1, 2, width_ratios=(2, 3))
    for i, name in enumerate(names):
        values = [report["achieved"][u].get(name, 0) for u in UNITS]
        below = [sum(report["achieved"][u].get(n, 0) for n in names[:i]) for u in UNITS]
        bars = shares.bar([u.replace("_", "\n") for u in UNITS], values, bottom=below, color=COLOURS[i % 6], label=name)
        shares.bar_label(bars, [f"{v:.0%}" if v > 0.04 else "" for v in values], label_type="center", color="white")
    shares.set(ylabel="share of the mix", ylim=(0, 1), title=f"one mix, three answers (recipe: {report['unit']})")
    limit = report["max_seq_length"]
    for i, name in enumerate(names):
        sizes = [len(r.ids) for r in mixed.train if r.source == name]
        lengths.hist(
            sizes, bins=BINS, range=(0, limit), color=COLOURS[i % 6], alpha=0.65, label=f"{name} ({len(sizes):,} rows)"
        )
    lengths.axvline(limit, color="black", linestyle="--", linewidth=1)
    lengths.set(
        xlabel=f"tokens per row\n(dashed: max_seq_length {limit:,}; longer rows are dropped, never cut)",
        ylabel="rows",
        yscale="log",
    )
    lengths.legend(frameon=False)
    lengths.set_title("how long the rows are")
    for axes in (shares, lengths):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _chosen(mixed: Mix, count: int):
    """The first `count` training rows of each source and mode."""
    taken: Counter = Counter()
    for row in mixed.train:
        taken[row.source, row.mode] += 1
        if taken[row.source, row.mode] <= count:
            yield row


def terminal(mixed: Mix, chat: Chat, count: int):
    """Rows as the model sees them, for a rich console: what it is taught is green, what it is only shown is grey."""
    from rich.text import Text

    for row in _chosen(mixed, count):
        yield Text(
            f"{row.source} · row {row.number} · {row.mode} · {len(row.ids)} tokens, {row.size('supervised_tokens')} supervised",
            "bold",
        )
        prompt, completion = chat.decode(row.ids[: row.prompt_length]), chat.decode(row.ids[row.prompt_length :])
        yield Text.assemble((prompt, "bright_black"), (completion, "bold green"), "\n")


def html(mixed: Mix, chat: Chat, count: int) -> str:
    """The same as HTML, for a notebook: supervised tokens on green."""
    parts = [
        "<p><span style='color:#777'>what the model sees</span>, "
        f"<span style='background:{SUPERVISED};color:#111'>what it is taught</span></p>"
    ]
    for row in _chosen(mixed, count):
        prompt, completion = (
            escape(chat.decode(p)) for p in (row.ids[: row.prompt_length], row.ids[row.prompt_length :])
        )
        title = f"{escape(row.source)} · {row.mode} · {len(row.ids)} tokens, {row.size('supervised_tokens')} supervised"
        parts.append(
            f"<p><b>{title}</b></p><pre style='white-space:pre-wrap'><span style='color:#777'>{prompt}</span>"
            f"<span style='background:{SUPERVISED};color:#111'>{completion}</span></pre>"
        )
    return "\n".join(parts)
