"""Rows as the model sees them, with the tokens they teach coloured: green is taught, grey is only shown.

from toolkit.data import render; from toolkit.view import labels; labels.label_rule({"messages": []}, render.load_chat("pocket"))
"""

from collections import Counter
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from toolkit.data.conversation import Fillings
from toolkit.data.mix import Mix, Row
from toolkit.data.render import Chat, examples
from toolkit.data.sources import Rejected, conversations, detect, open_rows
from toolkit.family import mode_title
from toolkit.files import ToolkitError
from toolkit.recipe import Source
from toolkit.records import Conversation


class TaughtRow(NamedTuple):
    """A training row as text: what is only shown to the model, and what the loss counts."""

    heading: str
    shown: str
    taught: str


def first_rows(mixed: Mix, chat: Chat, count: int) -> list[TaughtRow]:
    """The first `count` training rows of each source and mode."""
    seen: Counter[tuple[str, str]] = Counter()
    rows = []
    for row in mixed.train:
        kind = row.source, row.mode
        seen[kind] += 1
        if seen[kind] <= count:
            place = f"{row.source} · row {row.number} · {mode_title(row.mode)}"
            supervised = row.size("supervised_tokens")
            shown = chat.decode(row.ids[: row.prompt_length])
            taught = chat.decode(row.ids[row.prompt_length :])
            rows.append(TaughtRow(f"{place} · {len(row.ids)} tokens, {supervised} supervised", shown, taught))
    return rows


def coloured(mixed: Mix, chat: Chat, count: int) -> Text:
    """The same with colours, for a terminal or a notebook."""
    parts = []
    for row in first_rows(mixed, chat, count):
        parts += [Text(row.heading, "bold"), in_colour(row.shown, row.taught)]
    return Text("\n").join(parts)


def in_colour(prompt: str, completion: str) -> Text:
    """What is shown in grey, then what is taught in green."""
    return Text.assemble((prompt, "bright_black"), (completion, "bold green"))


def label_rule(conversation: Conversation, chat: Chat) -> tuple[str, str]:
    """(shown, taught) of the last assistant turn by the label rule."""
    example = examples(conversation, "auto", chat)[-1]
    return example.prompt, example.completion


def trl_masking(conversation: Conversation, chat: Chat) -> tuple[str, str]:
    """(shown, taught) as TRL's assistant_only_loss and Unsloth's train_on_responses_only mask a row of one turn: all that
    stands after the assistant header, so a direct answer teaches the empty think block that Qwen3's template writes.
    (Unsloth leaves out the last line break. Of a longer conversation both teach every assistant turn.)"""
    messages, tools = conversation["messages"], conversation.get("tools")
    text = chat.render(messages, tools, add_generation_prompt=False)
    header = len(chat.render(messages[:-1], tools))  # without a mode, Qwen3's generation prompt has no think block
    return text[:header], text[header:]


def single_turns(mixed: Mix) -> list[Row]:
    """The held-out rows with one assistant turn, of which both ways of masking teach the same turn."""
    rows = []
    for row in mixed.validation:
        roles = [message["role"] for message in row.conversation["messages"]]
        if roles.count("assistant") == 1:
            rows.append(row)
    return rows


def compared(mixed: Mix, chat: Chat) -> Table:
    """A held-out row of each source and mode: what is taught here, and what TRL / Unsloth masking would teach."""
    rows = {(row.source, row.mode): row.conversation for row in reversed(single_turns(mixed))}
    table = Table("row", "here", "TRL / Unsloth masking", show_lines=True)
    for (source, mode), conversation in sorted(rows.items()):
        here = in_colour(*label_rule(conversation, chat))
        usual = in_colour(*trl_masking(conversation, chat))
        table.add_row(f"{source}\n{mode_title(mode)}", here, usual)
    return table


def first_row(source: Source, chat: Chat, placeholders: Fillings) -> Text:
    """The first conversation of a file: its format, and every turn it teaches coloured. Raises ToolkitError."""
    number, row = next(conversations(source, seed=0, placeholders=placeholders))
    if isinstance(row, Rejected):
        raise ToolkitError(f"{source.path}, row {number}: {row.detail}")
    turns = []
    for example in examples(row, "auto", chat, source.turns):
        turns.append(in_colour(example.prompt, example.completion))
    # as `mix` reads it, where the recipe names no format
    form = detect(source, open_rows(source))
    title = f"{source.path} · {form} · row {number}, {len(turns)} example(s)"
    return Text("\n\n").join([Text(title, "bold"), *turns])
