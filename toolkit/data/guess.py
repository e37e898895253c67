"""A data file becomes a recipe: what it holds is guessed, said with three rows, and written down for its owner to change.

found = understand(Source("data_recipes/samples/jobs/general.csv")); print(recipe_text("faq", [found], "pocket"))
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from toolkit.data.conversation import asked
from toolkit.data.formats import COLUMN_KEYS, Columns, fitting, likely_columns, recognise
from toolkit.data.readers import Rejected, Rows, ending
from toolkit.data.sources import conversations, open_rows, split_count
from toolkit.files import RECIPES, ToolkitError, find, read_text, write_text
from toolkit.recipe import RESERVED, Source, apply_override, load
from toolkit.records import Conversation, JsonObject

# Rows that are read to guess and count; of more rows, validation takes its most anyway.
LOOKED_AT = 20_000
# Rows below which nothing can be learned and held out.
FEWEST = 8
# Columns of a table of questions and answers; a file with more is something else.
WIDEST = 200
# Rows below which each is seen three times, since once would be few steps.
SMALL = 1_000
# The order in which rows are looked at, as in a recipe without a seed.
SEED = 3407
MADE_FROM = "# Made by `init` from "
# Only what matters; every key is explained in docs/recipe.md.
RECIPE = """\
{made_from}
# Run: python -m toolkit train {name}.yaml
name: {name}
data:
  validation_size: {held_out}   # rows held out before anything trains: what the run is measured on
  sources:
{sources}
    # General chat beside your rows keeps what the model can do. Remove the # to take 200 rows that ship:
    # - {{path: "data_recipes/samples/finetome_sample.jsonl#200", mode: non_thinking}}
    # With a network: {{path: "mlabonne/FineTome-100k#2000", mode: non_thinking}}
model:
  model_name: {model}   # auto: the largest Qwen3 that fits this card; or a Hub name, or a folder
train:
  num_train_epochs: {epochs}   # how often every row is seen
evaluate:
  prompts: {prompts}   # answered without and with the adapter when the run ends
"""


@dataclass(frozen=True)
class Understood:
    """What a data file was found to hold."""

    source: Source
    format: str
    rows: int
    """As many as were read, LOOKED_AT at most."""
    modes: Counter[str]
    """Rows with reasoning and without, by mode."""
    examples: list[Conversation]
    """The first three."""
    rejected: list[Rejected]

    def lines(self) -> list[str]:
        """What was understood, for people: the format, counts, and three rows."""
        names = ", ".join(map(": ".join, self.source.columns.items())) or "by its own names"
        modes = " and ".join(f"{count:,} {mode}" for mode, count in self.modes.items())
        text = [f"{self.source.path}: {self.rows:,} rows, {self.format} ({names}); {modes}"]
        if self.rejected:
            text.append(f"· {len(self.rejected):,} rows cannot be trained on, e.g. {self.rejected[0].detail}")
        for number, conversation in enumerate(self.examples, start=1):
            text += [f"row {number}, of which the last turn is trained on:", *shown(conversation)]
        return text


def understand(source: Source) -> Understood:
    """Guess what a file, folder or data set holds; what the source says of format and columns is taken at its word.

    Raises ToolkitError that says what was seen, where it is no data or the one key to set is named."""
    rows = open_rows(source)
    if len(rows.fields) > WIDEST:
        raise ToolkitError(
            f"{rows.location}: has {len(rows.fields):,} columns: keep the question, the answer and a few more"
        )
    try:
        source, format = with_columns(source, rows)
        return read(source, format)
    except ToolkitError as error:
        formats = formats_in(rows)
        if len(formats) > 1:  # which explains whatever went wrong
            raise ToolkitError(
                f"{source.path}: holds rows of several formats: {' and '.join(sorted(formats))}. Split it into a file for "
                "each, and give both to `init`"
            ) from error
        raise


def read(source: Source, format: str) -> Understood:
    """The rows of a source, counted. Raises ToolkitError for too few, and where more than one in twenty is unusable."""
    rows = [row for _, row in itertools.islice(conversations(source, SEED, {}), LOOKED_AT)]
    rejected = [row for row in rows if isinstance(row, Rejected)]
    good = [row for row in rows if not isinstance(row, Rejected)]
    if len(rows) < FEWEST:
        raise ToolkitError(f"{source.path}: rows found: {len(rows)}. Some are held out: expected {FEWEST} or more")
    if len(rejected) > 0.05 * len(rows):
        raise ToolkitError(
            f"{source.path}: {len(rejected):,} of {len(rows):,} rows cannot be trained on, e.g. {rejected[0].detail}"
        )
    last = [conversation["messages"][-1] for conversation in good]
    modes = Counter("thinking" if "reasoning_content" in message else "non_thinking" for message in last)
    return Understood(source, format, len(rows), modes, good[:3], rejected)


def formats_in(rows: Rows) -> set[str]:
    """The formats of rows, each recognised by the columns that it fills."""
    read = [row for _, row in itertools.islice(rows.draw(SEED), LOOKED_AT) if not isinstance(row, Rejected)]
    filled = {tuple(name for name, value in row.items() if value) for row in read}
    return {format for fields in filled for format in fitting([*fields])}


def with_columns(source: Source, rows: Rows) -> tuple[Source, str]:
    """(source with its columns named where they have to be, the name of its format).

    Raises ToolkitError that names the one key to set where a column cannot be told."""
    # a lone column holds no question and answer to tell apart
    if source.format == "auto" and not fitting(rows.fields) and len(rows.fields) > 1:
        columns = likely_columns(rows.fields) | source.columns
        for role in ("user", "assistant"):
            if role not in columns:
                raise ToolkitError(f"{rows.location}: {which_column(role, columns, rows.fields)}")
        source = replace(source, columns={role: columns[role] for role in COLUMN_KEYS if role in columns})
    return source, recognise(rows.fields, source.format, source.columns, rows.location)


def which_column(role: str, columns: Columns, fields: list[str]) -> str:
    """The question that is left to its reader where a role has no likely column."""
    known = "".join(f"What {other} is in {column!r}. " for other, column in columns.items())
    example = next((name for name in fields if name not in columns.values()), "NAME")
    return (
        f"has the columns {', '.join(fields)}: which of them holds what the {role} says? {known}"
        f"Add data.sources.0.columns.{role}={example} to this command (sources count from 0)"
    )


def shown(conversation: Conversation) -> list[str]:
    """A conversation, a line for each part of a turn, shortened."""
    keys = ("reasoning_content", "content", "tool_calls")
    parts = [(message["role"], message.get(key)) for message in conversation["messages"] for key in keys]
    return [f"  {role}: {' '.join(str(part).split())}"[:78] for role, part in parts if part]


# --- the recipe --------------------------------------------------------------------------------------------------------


def held_out(rows: int) -> int:
    """How many rows validation takes: a tenth, from 20 to 200, and at most a third."""
    return min(200, max(20, rows // 10), rows // 3)


def questions_of(understood: Sequence[Understood]) -> list[str]:
    """Up to three short questions of the files' own rows: what a run is shown to answer before and after."""
    conversations = [asked(conversation["messages"]) for one in understood for conversation in one.examples]
    questions = [texts[0] for texts in conversations if len(texts) == 1 and len(texts[0]) <= 200]
    return questions[:3] or ["Who are you?"]


def source_line(understood: Understood) -> str:
    """A source as a line of YAML: its path and what is not as by default."""
    default = vars(Source(path="")).items()
    named = dict(pair for pair in vars(understood.source).items() if pair not in default)
    return f"    - {in_yaml(named)}   # {understood.format}, {understood.rows:,} rows"


def in_yaml(value: Any) -> str:
    """A value on one line: JSON is YAML too."""
    return json.dumps(value, ensure_ascii=False)


def recipe_text(name: str, understood: Sequence[Understood], model: str) -> str:
    """A commented recipe that holds only what matters."""
    rows = sum(one.rows for one in understood)
    return RECIPE.format(
        made_from=MADE_FROM + ", ".join(one.source.path for one in understood),
        name=name,
        held_out=held_out(rows),
        sources="\n".join(map(source_line, understood)),
        model=in_yaml(model),
        epochs=3 if rows < SMALL else 1,
        prompts=in_yaml(questions_of(understood)),
    )


def run_name(path: str) -> str:
    """A run's name from its data file; not the name of a recipe that ships, nor one that no run may have."""
    stem = Path(re.sub(r"#\d+$", "", path)).name.partition(".")[0]
    word = re.sub(r"[^\w\-]+", "-", stem).strip("-_")[:50] or "mine"
    is_taken = (RECIPES / f"{word}.yaml").is_file() or RESERVED.match(word)
    return f"{word}-run" if is_taken else word


def is_data(path: str) -> bool:
    """Whether a path is meant as a data file, or is a folder that holds some, and not a recipe."""
    name = split_count(Source(path=path))[0].path
    place = find(name)
    if place is None or not place.is_dir():
        return bool(ending(Path(name)))
    return not (RECIPES / f"{name}.yaml").is_file() and any(map(ending, place.iterdir()))


def start(
    paths: Sequence[str],
    model: str,
    name: str | None,
    overrides: Sequence[str],
    say: Callable[[str], Any],
) -> Path:
    """Write a recipe for data files into the current folder and say what was understood; returns the file.

    `overrides` are keys of the sources (`data.sources.0.columns.user=Frage`). A file that was written before for the same
    data is left as it is, since its owner may have changed it. Raises ToolkitError."""
    name = name or run_name(paths[0])
    file = Path(f"{name}.yaml")
    if file.is_file():
        if not read_text(file).startswith(MADE_FROM + ", ".join(paths)):
            raise ToolkitError(f"{file}: is here already, for something else: choose another name (--name)")
        say(f"{file} is here already and is left as it is")
        return file
    values: JsonObject = {"data": {"sources": [{"path": path} for path in paths]}}
    for override in overrides:
        apply_override(values, override)
    understood = [understand(Source(**source)) for source in values["data"]["sources"]]
    for one in understood:
        say("\n".join(one.lines()))
    write_text(file, recipe_text(name, understood, model))
    try:
        load(file)
    except ToolkitError:  # a name or a key that no recipe may have
        file.unlink()
        raise
    return file
