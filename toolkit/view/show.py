"""A mix and a run to look at: tables, pictures, and rows with the tokens they teach coloured.

from rich import print; from toolkit import recipe; from toolkit.data import mix; from toolkit.view import show; print(show.plan_table(mix.plan(recipe.load("pocket").data)))
"""

import itertools
from collections import Counter, namedtuple
from collections.abc import Sequence
from pathlib import Path

from toolkit.data.mix import UNITS, Mix
from toolkit.data.render import Chat, examples
from toolkit.data.sources import Rejected, conversations, detect, open_rows
from toolkit.family import mode_title
from toolkit.files import ToolkitError, read_jsonl
from toolkit.recipe import Source

PALETTE = ("#4c72b0", "#dd8452", "#55a868", "#8172b3", "#937860", "#da8bc3")
BASE, TUNED = "#9aa5b1", "#12355b"
Said = namedtuple("Said", "reasoning answer")
"""What a model said: the two fields of generate.py's `Reply` that are shown."""
BINS = 40
SMOOTH = 0.8
"""Weight of the past in the smoothed training loss; the raw values stay visible behind it."""


# --- tables ----------------------------------------------------------------------------------------------------------


def rich_table(rows: Sequence[dict], *, title: str | None = None, bold: Sequence[int] = ()):
    """Rows with equal keys as a table for a rich console, those at `bold` in bold: integers as 1,234, floats as 12.3%.

    No name, word or number is cut, since two may differ in their last letters only."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    cells = [[escape(_cell(value)) for value in row.values()] for row in rows]  # a source may be called set[zh]
    apart = any("\n" in cell for row in cells for cell in row)  # rows of several lines are told apart by an empty one
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False, leading=int(apart)
    )
    for i, heading in enumerate(rows[0]):
        words = [*heading.replace("_", " ").split(), *(line for row in cells for line in row[i].split("\n"))]
        width = max(map(len, words)) if i else None  # the first takes what the others leave
        table.add_column(heading.replace("_", " "), justify="right" if i else "left", overflow="fold", width=width)
    for i, row in enumerate(cells):
        table.add_row(*row, style="bold" if i in bold else None)
    return table


def _cell(value) -> str:
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.1%}"


def side_by_side(rows: Sequence[dict]):
    """Replies as a rich table: rows {"prompt", "mode", column: reply, …}; grey reasoning above the answer."""
    from rich.table import Table
    from rich.text import Text

    columns = dict.fromkeys(name for row in rows for name in row)
    table = Table(*columns, show_lines=True)
    for row in rows:
        cells = [Text(row["prompt"]), Text(mode_title(row["mode"]))]
        for name in list(columns)[2:]:
            thought, answer = row[name].reasoning, row[name].answer
            cells.append(Text.assemble((f"{thought}\n" if thought else "", "bright_black"), answer or "(no answer)"))
        table.add_row(*cells)
    return table


def plan_table(planned: dict[str, dict]):
    """What a recipe asks for (`mix.plan`), before anything is read."""
    return rich_table(
        [
            {
                "source": name,
                "share": "as it comes" if row["share"] is None else row["share"],
                "to train": "all there is" if row["quota"] is None else row["quota"],
                "held out": row["validation"],
            }
            for name, row in planned.items()
        ]
    )


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
    rows = []
    for name, row in report["sources"].items():
        modes = [f"{n:,} {mode_title(m)}" if len(row["modes"]) > 1 else mode_title(m) for m, n in row["modes"].items()]
        amounts = row["rows_kept"], row["tokens"], row["supervised_tokens"]
        shares = {u: f"{n:,}\n{report['achieved'][u].get(name, 0):.1%}" for u, n in zip(UNITS, amounts, strict=True)}
        rows.append({"source": "\n".join([name, *modes]), **shares, "planned": f"\n{report['planned'][name]:.1%}"})
    return rich_table(rows)


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


def coloured(mixed: Mix, chat: Chat, count: int):
    """The first `count` training rows of each source and mode as the model sees them, as one rich text: what it is taught
    is green, what it is only shown is grey."""
    from rich.text import Text

    taken, parts = Counter(), []
    for row in mixed.train:
        taken[row.source, row.mode] += 1
        if taken[row.source, row.mode] <= count:
            size = f"{len(row.ids)} tokens, {row.size('supervised_tokens')} supervised"
            head = f"{row.source} · row {row.number} · {mode_title(row.mode)} · {size}\n", "bold"
            texts = chat.decode(row.ids[: row.prompt_length]), chat.decode(row.ids[row.prompt_length :])
            parts.append(Text.assemble(head, _taught(*texts)))
    return Text("\n\n").join(parts)


def _taught(shown: str, taught: str):
    from rich.text import Text

    return Text.assemble((shown, "bright_black"), (taught, "bold green"))


def label_rule(conversation: dict, chat: Chat) -> tuple[str, str]:
    """(shown, taught) of the last assistant turn by the label rule."""
    example = examples(conversation, "auto", chat)[-1]
    return example.prompt, example.completion


def trl_masking(conversation: dict, chat: Chat) -> tuple[str, str]:
    """(shown, taught) as TRL's assistant_only_loss and Unsloth's train_on_responses_only mask a row of one turn: all that
    stands after the assistant header, so a direct answer teaches the empty think block that Qwen3's template writes.
    (Unsloth leaves out the last line break. Of a longer conversation both teach every assistant turn.)"""
    messages, tools = conversation["messages"], conversation.get("tools")
    whole = chat.render(messages, tools, add_generation_prompt=False)
    header = len(chat.render(messages[:-1], tools))  # without a mode, Qwen3's generation prompt has no think block
    return whole[:header], whole[header:]


def single_turns(mixed: Mix) -> list:
    """The held-out rows with one assistant turn, of which both ways of masking teach the same turn."""
    return [r for r in mixed.validation if [m["role"] for m in r.conversation["messages"]].count("assistant") == 1]


def compared(mixed: Mix, chat: Chat):
    """A held-out row of each source and mode: what is taught here, and what TRL / Unsloth masking would teach."""
    from rich.table import Table

    rows = {(row.source, row.mode): row.conversation for row in reversed(single_turns(mixed))}
    table = Table("row", "here", "TRL / Unsloth masking", show_lines=True)
    for (source, mode), row in sorted(rows.items()):
        table.add_row(
            f"{source}\n{mode_title(mode)}", _taught(*label_rule(row, chat)), _taught(*trl_masking(row, chat))
        )
    return table


def first_row(source: Source, chat: Chat, placeholders: dict):
    """The first conversation of a file as the model sees it: its format, and every turn it teaches coloured."""
    from rich.text import Text

    number, found = next(conversations(source, seed=0, placeholders=placeholders))
    if isinstance(found, Rejected):
        raise ToolkitError(f"{source.path}, row {number}: {found.detail}")
    turns = [_taught(e.prompt, e.completion) for e in examples(found, "auto", chat, source.turns)]
    title = f"{source.path} · {detect(source, open_rows(source))} · row {number}, {len(turns)} example(s)"
    return Text("\n\n").join([Text(title, "bold"), *turns])


# --- pictures --------------------------------------------------------------------------------------------------------


def panels(width: float, height: float, columns: int, rows: int = 1, **options):
    """(figure, axes in one list) in the style of every picture here."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flatten())
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", color="#eeeeee")
        one.set_axisbelow(True)
    return figure, axes


def mix_figure(mixed: Mix):
    """Shares in three units side by side, and a length histogram per source with the max_seq_length line."""
    import pandas

    report, limit = mixed.report, mixed.report["max_seq_length"]
    figure, (shares, lengths) = panels(10, 3.6, 2, width_ratios=(2, 3))
    achieved = pandas.DataFrame(report["achieved"]).reindex(list(report["sources"])).T
    achieved.index = [unit.replace("_", "\n") for unit in UNITS]
    achieved.plot.bar(stacked=True, ax=shares, color=PALETTE, rot=0, legend=False, width=0.8)
    for bars in shares.containers:
        shares.bar_label(bars, fmt=lambda v: f"{v:.0%}" if v > 0.04 else "", label_type="center", color="white")
    shares.set(ylabel="share of the mix", ylim=(0, 1), title=f"one mix, three answers (recipe: {report['unit']})")
    for name, colour in zip(achieved, itertools.cycle(PALETTE), strict=False):
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

    # a step has a line for the loss and one for each validation; `last` takes each column's value
    lines = pandas.DataFrame(logged(folder)).groupby("step").last()
    figure, (left, right) = panels(10, 3.4, 2)
    # no loss yet, where it is evaluated before the first step
    loss = lines.get("loss", pandas.Series(dtype=float)).dropna()
    left.plot(loss, color=BASE, linewidth=1, label="each step")
    left.plot(loss.ewm(alpha=1 - SMOOTH).mean(), color=TUNED, linewidth=2, label="smoothed")
    left.set(title="training loss", xlabel="optimizer step", ylabel="nats per supervised token", ylim=(0, None))
    for colour, key in zip(itertools.cycle(PALETTE), lines.filter(regex="^eval_.*loss$"), strict=False):
        source, _, mode = key.removeprefix("eval_").removesuffix("_loss").rpartition("/")
        label = f"{source}, {mode_title(mode)}" if source else "all, as mixed"
        right.plot(lines[key].dropna(), color=colour, marker="o", markersize=4, label=label)
    right.set(title="validation loss, by source and mode", xlabel="optimizer step", ylim=(0, None))
    for axes in (left, right) if right.lines else (left,):  # no validation yet: nothing to name
        axes.legend(frameon=False, fontsize=9)
    return figure
