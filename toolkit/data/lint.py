"""What a recipe will probably do that its writer did not intend: warnings with their reasons.

from toolkit.data.lint import lint; lint(chat, mixed.report, recipe.lora, recipe.train)
"""

import re
from collections.abc import Iterator

from toolkit.data.conversation import Placeholders
from toolkit.data.render import Chat
from toolkit.data.rows import Row
from toolkit.recipe import Lora
from toolkit.records import Json, MixReport

DUPLICATES = ("duplicate", "near_duplicate")
OPENINGS = re.compile(
    r"(?:okay|ok|alright|hmm+|wait|so),? (?:so |let|the user|i need|i should|first)|let me (?:think|see|break)|let's think"
    r"|first, i need to|嗯,|好的,用户|让我想想"
)
ALOUD = ("wait, no", "wait, but", "wait, let", "wait, that", "wait, actually", "hmm, but", "hmm, let", "hmm, that", "<thought",
         "<thinking>", "<reasoning>", "<scratchpad>", "<reflection>", "<analysis>")  # fmt: skip
"""How replies begin, and what they hold, that are a model's thinking without its tags, in lower case."""
LOOKED_AT = 1000
"""Characters of a reply in which to look: thinking comes first."""
MANY = 0.02
"""Share of a source's rows above which replies that look like reasoning are warned of."""


def looks_like(row: Row) -> list[str]:
    """What a row's reply looks as if it held: `reasoning` in a non-thinking row, a `placeholder` in any."""
    reply = row.conversation["messages"][-1]["content"]
    kinds = []
    if row.mode == "non_thinking":
        start = reply[:LOOKED_AT].lstrip().lower()
        if OPENINGS.match(start) or any(words in start for words in ALOUD):
            kinds.append("reasoning")
    if "{{" in reply and Placeholders.PATTERN.search(reply):
        kinds.append("placeholder")
    return kinds


def lint(chat: Chat, report: MixReport, lora: Lora, train: dict[str, Json]) -> list[str]:
    """Warnings for a compiled mix (`report` is mix.json's content), an adapter and TRL settings."""
    warnings = [*_tokenizer(report), *_modes(chat, report), *_not_read(report), *_texts(report)]
    return [*warnings, *_rows(report), *_adapter(lora), *_coverage(train, report)]


def _tokenizer(report: MixReport) -> Iterator[str]:
    if why := report["slow_tokenizer"]:
        yield f"token ids come from the Hugging Face tokenizer, which is several times slower: {why}"


def _modes(chat: Chat, report: MixReport) -> Iterator[str]:
    modes = set(report["achieved_modes"]["examples"])
    if chat.kind == "thinking_only" and "non_thinking" in modes:
        yield (
            f"{chat.name} always thinks (its template opens <think> for every reply), but the mix has rows without "
            "reasoning: they teach it to close the block at once. Use a hybrid model, or leave those sources out"
        )
    if chat.kind == "hybrid" and modes == {"thinking"}:
        yield "the mix has no non-thinking row: the model may lose that mode. Add a source of chat rows"
    if chat.kind == "hybrid" and modes == {"non_thinking"}:
        yield "the mix has no thinking row: the model may lose that mode. Add a source of reasoning rows"


def _not_read(report: MixReport) -> Iterator[str]:
    """One line for each source with keys that no rule reads."""
    for name, row in report["sources"].items():
        seen = row["rows_seen"]
        keys = [f"{key} (row, {n:,} of {seen:,})" for key, n in row["not_read"]["row"].items()]
        keys += [f"{key} (turn, {n:,})" for key, n in row["not_read"]["turn"].items()]
        if keys:
            yield f"{name}: not read: {', '.join(keys)}"


def _texts(report: MixReport) -> Iterator[str]:
    """Replies that look as if they held what belongs elsewhere."""
    # a hybrid model that learns such replies thinks aloud in its direct mode
    for name, row in report["sources"].items():
        direct = row["modes"].get("non_thinking", 0)
        reasoned = row["looks_like"].get("reasoning", 0)
        if reasoned > MANY * direct:
            yield (
                f"{name}: {reasoned:,} of {direct:,} non-thinking replies read like reasoning (Okay, so …; Wait, …): they "
                "teach it to think aloud in the answer. Put it between <think> and </think> or in reasoning_content"
            )
        if placeholders := row["looks_like"].get("placeholder"):
            yield (
                f"{name}: {placeholders:,} replies hold {{{{name}}}} or {{{{author}}}} as text. To fill them: placeholders: "
                "{NAME: …, AUTHOR: …} in this source"
            )


def _rows(report: MixReport) -> Iterator[str]:
    for name, row in report["sources"].items():
        repeated = sum(row["dropped"].get(reason, 0) for reason in DUPLICATES)
        if repeated > 0.1 * row["rows_seen"]:
            yield (
                f"{name}: {repeated} of {row['rows_seen']} rows repeat the prompt and the reply of another; quarantine.jsonl "
                "lists the pairs. To keep them: data.duplicates=keep, or exact to drop only equal ones"
            )
        # with a budget most of a source stays undrawn: what is held out is small beside the rest
        if row["rows_held_out"] > (0.5 if report["budget"] else 0.2) * (row["rows_held_out"] + row["rows_kept"]):
            yield f"{name}: {row['rows_held_out']} rows are held out, {row['rows_kept']} train: lower data.validation_size"


def _adapter(lora: Lora) -> Iterator[str]:
    scale = lora.lora_alpha / (lora.r**0.5 if lora.use_rslora else lora.r)
    if not 0.25 <= scale <= 4 and not lora.use_rslora:
        yield f"lora_alpha/r = {scale:g}: common values are 1 and 2; the update is multiplied by it"
    if lora.r > 256:
        yield f"lora r = {lora.r}: above 256 an adapter costs memory and rarely gains"


def _coverage(train: dict[str, Json], report: MixReport) -> Iterator[str]:
    rows = report["total"]["examples"]
    if train["max_steps"] > 0 and rows:
        seen = train["max_steps"] * train["per_device_train_batch_size"] * train["gradient_accumulation_steps"]
        if seen < 0.05 * rows:
            yield (
                f"max_steps={train['max_steps']} sees {seen} of {rows} rows ({seen / rows:.1%}): "
                "lower data.budget to what is trained, so that the reported shares are the trained ones"
            )
