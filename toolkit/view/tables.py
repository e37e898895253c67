"""Tables for a rich console: every one is whole at 80 columns.

from rich import print; from toolkit import recipe; from toolkit.data import mix; from toolkit.view import tables; print(tables.plan_table(mix.plan(recipe.load("pocket").data)))
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from toolkit.data.mix import UNITS
from toolkit.evaluation import words
from toolkit.family import mode_title
from toolkit.records import Evaluation

# Reasons for a drop whose name does not say it all.
MEANING = {
    "validation_prompt": " (asks what a held-out row asks)",
    "contaminated": " (holds a question of the evaluation)",
}


class ShownReply(NamedTuple):
    """The two parts of a reply that people read."""

    reasoning: str
    answer: str


def rich_table(
    rows: Sequence[Mapping[str, object]],
    *,
    title: str | None = None,
) -> Table:
    """Rows with equal keys as a table: integers as 1,234, floats as 12.3%.

    No name, word or number is cut, since two may differ in their last letters only."""
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
    )
    for place, key in enumerate(rows[0]):
        heading = key.replace("_", " ")
        if place == 0:  # the first column takes what the others leave
            table.add_column(heading, overflow="fold")
            continue
        lines = heading.split()
        for row in rows:
            lines += cell_text(row[key]).split("\n")
        table.add_column(heading, justify="right", overflow="fold", width=max(map(len, lines)))
    for row in rows:
        cells = [Text(cell_text(value)) for value in row.values()]
        # an empty line tells rows of several lines apart
        table.leading |= any("\n" in cell.plain for cell in cells)
        table.add_row(*cells)
    return table


def cell_text(value: object) -> str:
    """`1,234`, `12.3%`, or the text as it is."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.1%}" if isinstance(value, float) else str(value)


def side_by_side(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Replies beside each other: rows {"prompt", "mode", column: ShownReply, …}; grey reasoning above the answer."""
    table = Table(*rows[0], show_lines=True)
    for row in rows:
        prompt, mode, *replies = row.values()
        cells = [Text(prompt), Text(mode_title(mode))]
        for reply in replies:  # a ShownReply, or a Reply of `generate`
            grey = (f"{reply.reasoning}\n" if reply.reasoning else "", "bright_black")
            cells.append(Text.assemble(grey, reply.answer or "(no answer)"))
        table.add_row(*cells)
    return table


def score_table(result: Evaluation) -> Table:
    """Every metric of an evaluation: base, tuned, difference with its interval."""
    title = f"{result['level']} evaluation, seed {result['seed']}, paired over questions"
    return rich_table(words.score_rows(result), title=title)


# --- a mix -----------------------------------------------------------------------------------------------------------


def plan_table(planned: Mapping[str, Mapping[str, Any]]) -> Table:
    """What a recipe asks for (`mix.plan`), before anything is read."""
    rows = []
    for name, row in planned.items():
        share, quota = row["share"], row["quota"]
        rows.append(
            {
                "source": name,
                "share": "as it comes" if share is None else share,
                "to train": "all there is" if quota is None else quota,
                "held out": row["validation"],
            }
        )
    return rich_table(rows)


def verdict(report: Mapping[str, Any]) -> str:
    """One sentence on a compiled mix (`report` is mix.json's content): its size, and how near it is to its plan."""
    unit = report["unit"]
    achieved = report["achieved"][unit]
    farthest = max(abs(achieved.get(name, 0) - share) for name, share in report["planned"].items())
    size = "{examples:,} examples, {supervised_tokens:,} supervised of {tokens:,} tokens".format(**report["total"])
    # in the unit of the recipe, which is the one that was planned
    return f"{size}; shares of {unit.replace('_', ' ')} within {100 * farthest:.1f} points of the plan"


def mix_table(report: Mapping[str, Any]) -> Table:
    """What a mix achieved: each source's amount and share in all three units."""
    rows = []
    for name, source in report["sources"].items():
        lines, modes = [name], source["modes"]
        for mode, count in modes.items():
            # of a source of one mode the number of rows stands beside it
            lines.append(f"{count:,} {mode_title(mode)}" if len(modes) > 1 else mode_title(mode))
        row = {"source": "\n".join(lines)}
        amounts = (source["rows_kept"], source["tokens"], source["supervised_tokens"])
        for unit, amount in zip(UNITS, amounts, strict=True):
            share = report["achieved"][unit].get(name, 0)
            row[unit] = f"{amount:,}\n{share:.1%}"
        row["planned"] = f"\n{report['planned'][name]:.1%}"
        rows.append(row)
    return rich_table(rows)


def notes(report: Mapping[str, Any]) -> list[str]:
    """What a reader of the table should also know: drops by reason, repeats, the limiting source, warnings."""
    lines = []
    for name, row in report["sources"].items():
        dropped = [f"{count} {reason}{MEANING.get(reason, '')}" for reason, count in row["dropped"].items()]
        if dropped:
            lines.append(f"{name}: dropped {', '.join(dropped)}")
        repeated = row["rows_repeated"]
        if repeated:
            # more rows were asked for than the file holds, or the recipe allows repeats
            cause = f"path#{row['rows_asked']}" if row["rows_asked"] else "max_repeats"
            lines.append(f"{name}: {repeated} of {row['rows_kept']} rows are repeats ({cause})")
    if report["limited_by"]:
        lines.append(f"{report['limited_by']} is exhausted: the mix was reduced to keep the planned shares")
    return lines + [f"warning: {warning}" for warning in report["warnings"]]
