"""A data file becomes a recipe: what it holds is guessed, said with three rows, and written down for its owner to change.

found = understand(Source("data_recipes/samples/jobs/general.csv")); print(recipe_text("faq", [found], "pocket"))
"""

import dataclasses
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from toolkit.data.formats import COLUMN_KEYS, likely_columns, recognise
from toolkit.data.readers import READERS, Rejected, Rows, ending
from toolkit.data.sources import conversations, open_rows, split_count
from toolkit.files import RECIPES, ToolkitError, find, read_text, write_text
from toolkit.recipe import RESERVED, Source, apply_override, load
from toolkit.records import Conversation

LOOKED_AT = 20_000
"""Rows that are read to guess and count; of more rows, validation takes its most anyway."""
FEWEST = 8
"""Rows below which nothing can be learned and held out."""
HELD_OUT = 20, 200
"""Least and most rows held out, of a tenth of all; never more than a third."""
WIDEST = 200
"""Columns of a table of questions and answers; a file with more is something else."""
SMALL = 1_000
"""Rows below which each is seen three times, since once would be few steps."""
SEED = 3407
"""The order in which rows are looked at, as in a recipe without a seed."""


@dataclass(frozen=True)
class Understood:
    """What a data file was found to hold."""

    source: Source
    format: str
    rows: int
    """As many as were read, LOOKED_AT at most."""
    modes: dict[str, int]
    """Rows with reasoning and without, by mode."""
    examples: list[Conversation]
    rejected: list[Rejected]

    def lines(self) -> list[str]:
        """What was understood, for people: the format, counts, and three rows."""
        columns = ", ".join(f"{role}: {column}" for role, column in self.source.columns.items())
        more = "more than " if self.rows == LOOKED_AT else ""
        modes = " and ".join(f"{count:,} {mode.replace('_', '-')}" for mode, count in self.modes.items() if count)
        text = [
            f"{self.source.path}: {more}{self.rows:,} rows, {self.format} ({columns or 'by its own names'}); {modes}"
        ]
        if self.rejected:
            text.append(f"· {len(self.rejected):,} rows cannot be trained on, e.g. {self.rejected[0].detail}")
        for number, conversation in enumerate(self.examples, start=1):
            text += [f"row {number}:", *rendered(conversation)]
        return text


def understand(source: Source) -> Understood:
    """Guess what a file, folder or data set holds; what the source says of format and columns is taken at its word.

    Raises ToolkitError that says what was seen, where it is no data or the one key to set is named."""
    check_is_data(split_count(source)[0].path)
    rows = open_rows(source)
    check_width(rows)
    source, format = with_columns(source, rows)
    examples: list[Conversation] = []
    rejected: list[Rejected] = []
    modes = {"thinking": 0, "non_thinking": 0}
    for _, conversation in itertools.islice(conversations(source, SEED, {}), LOOKED_AT):
        if isinstance(conversation, Rejected):
            rejected.append(conversation)
            continue
        modes["thinking" if conversation["messages"][-1].get("reasoning_content") else "non_thinking"] += 1
        examples.append(conversation)
    check_rows(source, rows, format, len(examples), rejected)
    return Understood(source, format, len(examples) + len(rejected), modes, examples[:3], rejected)


# --- what is no data ---------------------------------------------------------------------------------------------------


def check_is_data(path: str) -> None:
    """Raises ToolkitError for a folder that holds something else, and says what."""
    folder = find(path)
    if folder is None or not folder.is_dir():
        return
    endings = Counter(file.suffix.lower() or "no ending" for file in folder.rglob("[!.]*") if file.is_file())
    if not any(ending(file) for file in folder.rglob("[!.]*")):
        seen = ", ".join(f"{count:,} {name}" for name, count in endings.most_common(5)) or "no file"
        raise ToolkitError(f"{path}: holds {seen}: expected rows of text in {', '.join(READERS)} files")


def check_width(rows: Rows) -> None:
    """Raises ToolkitError for a table that is too wide to be questions and answers."""
    if len(rows.fields) > WIDEST:
        raise ToolkitError(
            f"{rows.location}: has {len(rows.fields):,} columns ({', '.join(rows.fields[:4])} …): expected a row for each "
            "conversation and a few columns such as question and answer. Write those columns to a file of their own"
        )


def check_rows(source: Source, rows: Rows, format: str, good: int, rejected: list[Rejected]) -> None:
    """Raises ToolkitError for too few rows, for two formats in one file, and for rows that are mostly unusable."""
    count = good + len(rejected)
    if count < FEWEST:
        what = "one row" if count == 1 else f"{count} rows"
        raise ToolkitError(f"{source.path}: has {what}, of which some must be held out: expected {FEWEST} or more")
    if 20 * len(rejected) <= good:
        return
    check_one_format(source, rows, format)
    reasons = Counter(reason.reason for reason in rejected).most_common(3)
    seen = ", ".join(f"{count:,} {reason}" for reason, count in reasons)
    raise ToolkitError(
        f"{source.path}: {len(rejected):,} of {count:,} rows cannot be trained on ({seen}), e.g. {rejected[0].detail}"
    )


def check_one_format(source: Source, rows: Rows, format: str) -> None:
    """Raises ToolkitError for a file that holds rows of another format than the one recognised by its first rows."""
    formats = {format} if format else set()
    for _, row in itertools.islice(rows.draw(SEED), LOOKED_AT):
        if isinstance(row, Rejected):
            continue
        filled = [name for name, value in row.items() if value not in (None, "", [])]
        try:
            formats.add(recognise(filled, "auto", {}, ""))
        except ToolkitError:  # a row of no format at all is counted as rejected
            continue
    if len(formats) > 1:
        raise ToolkitError(
            f"{source.path}: holds rows of several formats: {' and '.join(sorted(formats))}. Split it into a file for each, "
            "and give both to `init`"
        )


# --- which columns -----------------------------------------------------------------------------------------------------


def with_columns(source: Source, rows: Rows) -> tuple[Source, str]:
    """(source with its columns named where they have to be, the name of its format).

    Raises ToolkitError that names the one key to set where a column cannot be told."""
    try:
        return source, recognise(rows.fields, source.format, source.columns, rows.location)
    except ToolkitError as error:
        if "fits several formats" in str(error):
            check_one_format(source, rows, "")
        # a lone column holds no question and answer to tell apart
        if source.format != "auto" or "fits several formats" in str(error) or len(rows.fields) == 1:
            raise
    guessed = likely_columns(rows.fields) | source.columns
    for role in ("user", "assistant"):
        if role not in guessed and "messages" not in guessed:
            rest = [name for name in rows.fields if name not in guessed.values()]
            known = ", ".join(f"{known_role} is in {column!r}" for known_role, column in guessed.items())
            raise ToolkitError(
                f"{rows.location}: has the columns {', '.join(rows.fields[:20])}: which of them holds what the {role} says? "
                f"{f'What {known}. ' if known else ''}Add data.sources.0.columns.{role}={rest[0] if rest else 'NAME'} to "
                "this command (sources are counted from 0)"
            )
    ordered = {role: guessed[role] for role in COLUMN_KEYS if role in guessed}
    return replace(source, columns=ordered), recognise(rows.fields, "columns", ordered, rows.location)


# --- for people --------------------------------------------------------------------------------------------------------


def rendered(conversation: Conversation, width: int = 66) -> list[str]:
    """A conversation, a line for each part of a turn, shortened; the part that is trained on is marked."""
    lines = []
    messages = conversation["messages"]
    for number, message in enumerate(messages, start=1):
        trained = " ← trained on" if number == len(messages) else ""
        calls = ", ".join(call["function"]["name"] for call in message.get("tool_calls", []))
        parts = [
            ("reasoning", message.get("reasoning_content", "")),
            (message["role"], message.get("content", "")),
            ("calls", calls),
        ]
        for name, text in parts:
            if text:
                lines.append(f"  {name:<10} {shortened(text, width - len(trained))}{trained}")
    return lines


def shortened(text: str, width: int) -> str:
    """A text on one line, at most so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 1]}…"


# --- the recipe --------------------------------------------------------------------------------------------------------


def held_out(rows: int) -> int:
    """How many rows validation takes: a tenth, within HELD_OUT, and at most a third."""
    least, most = HELD_OUT
    return min(most, max(least, rows // 10), rows // 3)


def questions_of(understood: Sequence[Understood]) -> list[str]:
    """Up to three short questions of the files' own rows: what a run is shown to answer before and after."""
    questions = []
    for conversation in itertools.chain.from_iterable(one.examples for one in understood):
        asked = [message for message in conversation["messages"] if message["role"] == "user"]
        if len(asked) == 1 and len(asked[0]["content"]) <= 200:
            questions.append(asked[0]["content"])
    return questions[:3] or ["Who are you?"]


def source_line(understood: Understood) -> str:
    """A source as a line of YAML: its path and what is not as by default."""
    named = dataclasses.asdict(understood.source)
    default = dataclasses.asdict(Source(path=""))
    keys = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in named.items() if value != default[key]]
    return f"    - {{{', '.join(keys)}}}   # {understood.format}, {understood.rows:,} rows"


MADE_FROM = "# Made by `init` from "


def recipe_text(name: str, understood: Sequence[Understood], model: str) -> str:
    """A commented recipe that holds only what matters. Its keys are explained in docs/recipe.md."""
    rows = sum(one.rows for one in understood)
    prompts = [f"    - {json.dumps(question, ensure_ascii=False)}" for question in questions_of(understood)]
    return "\n".join(
        [
            MADE_FROM + ", ".join(one.source.path for one in understood),
            f"# Run: python -m toolkit train {name}.yaml",
            f"name: {name}",
            "data:",
            f"  validation_size: {held_out(rows)}   # rows held out before anything trains: what the run is measured on",
            "  sources:",
            *map(source_line, understood),
            "    # General chat beside your rows keeps what the model can do. Remove the # to take 200 rows that ship:",
            '    # - {path: "data_recipes/samples/finetome_sample.jsonl#200", mode: non_thinking}',
            '    # With a network: {path: "mlabonne/FineTome-100k#2000", mode: non_thinking}',
            "model:",
            f"  model_name: {json.dumps(model)}   # auto: the largest Qwen3 that fits this card; or a Hub name, or a folder",
            "train:",
            f"  num_train_epochs: {3 if rows < SMALL else 1}   # how often every row is seen",
            "evaluate:",
            "  prompts:   # answered without and with the adapter when the run ends",
            *prompts,
            "",
        ]
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
    is_recipe = (RECIPES / f"{name}.yaml").is_file()
    return not is_recipe and any(ending(file) for file in place.iterdir())


def start(
    paths: Sequence[str], model: str, name: str | None, overrides: Sequence[str], say: Callable[[str], Any]
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
    values: dict[str, Any] = {"data": {"sources": [{"path": path} for path in paths]}}
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
