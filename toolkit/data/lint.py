"""What a recipe will probably do that its writer did not intend: warnings with their reasons.

from toolkit.data.lint import lint; lint(chat, mixed.report, recipe.lora, recipe.train)
"""

import re
from collections.abc import Iterator

from toolkit.data.conversation import Placeholders
from toolkit.data.render import Chat
from toolkit.data.rows import Row
from toolkit.recipe import Lora
from toolkit.records import JsonObject, MixReport, SourceReport

# How replies begin that are a model's thinking without its tags, in lower case.
OPENINGS = re.compile(
    r"(?:okay|ok|alright|hmm+|wait|so),? (?:so |let|the user|i need|i should|first)|let me (?:think|see|break)|let's think"
    r"|first, i (?:need to|should)|(?:i|we) need to (?:find|figure)|嗯[,，]|好的[,，]用户|首先[,，]我需要|让我想想"
)
# What such replies hold.
ALOUD = re.compile(
    "wait, (?:no|but|let|that|actually)|hmm, (?:but|let|that)|<(?:thought|(?:thinking|reasoning|scratchpad|reflection|analysis)>)"
)
# The same in the tags of other models, with which replies begin: <|begin_of_thought|>, [THINK], ## Thinking.
TAGGED = re.compile(
    r"(?:<|\[|◁|&lt;)[\w|: ]*(?:think|thought|reason|scratch_?pad|reflection|\bcot\b)[\w| ]*(?:>|\]|▷|&gt;)"
    r"|<\|channel\|>\s*analysis|<unused\d+>\s*thought|#+ ?\**(?:thinking|reasoning|thought process)\**:?\s*\n"
)
# Characters of a reply in which to look: thinking comes first.
LOOKED_AT = 1000
# Share of a source's rows above which replies that look like reasoning are warned of.
MANY = 0.02


def looks_like(row: Row) -> list[str]:
    """What a row's reply looks as if it held: `reasoning` in a non-thinking row, a `placeholder` in any."""
    reply = row.conversation["messages"][-1]["content"]
    kinds = []
    if row.mode == "non_thinking":
        start = reply[:LOOKED_AT].lstrip().lower()
        if OPENINGS.match(start) or TAGGED.match(start) or ALOUD.search(start):
            kinds.append("reasoning")
    if "{{" in reply and Placeholders.PATTERN.search(reply):
        kinds.append("placeholder")
    return kinds


def lint(
    chat: Chat,
    report: MixReport,
    lora: Lora,
    train: JsonObject,
) -> list[str]:
    """Warnings for a compiled mix (`report` is mix.json's content), an adapter and TRL settings."""
    warnings = [*_modes(chat, report)]
    if why := report["slow_tokenizer"]:
        warnings.append(f"token ids come from the Hugging Face tokenizer, which is several times slower: {why}")
    for name, source in report["sources"].items():
        # with a budget most of a source stays undrawn: what is held out is small beside the rest
        allowed = 0.5 if report["budget"] else 0.2
        warnings += [f"{name}: {text}" for text in _source(source, allowed)]
    return [*warnings, *_settings(lora, train, report["total"]["examples"])]


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


def _source(row: SourceReport, allowed: float) -> Iterator[str]:
    """What is odd in one source, of which at most a share of `allowed` should be held out."""
    seen = row["rows_seen"]
    keys = [f"{key} (row, {n:,} of {seen:,})" for key, n in row["not_read"]["row"].items()]
    keys += [f"{key} (turn, {n:,})" for key, n in row["not_read"]["turn"].items()]
    if keys:
        yield f"not read: {', '.join(keys)}"
    # a hybrid model that learns such replies thinks aloud in its direct mode
    direct = row["modes"].get("non_thinking", 0)
    reasoned = row["looks_like"].get("reasoning", 0)
    if reasoned > MANY * direct:
        yield (
            f"{reasoned:,} of {direct:,} non-thinking replies read like reasoning (Okay, so …; Wait, …): they teach it to "
            "think aloud in the answer. Put it between <think> and </think> or in reasoning_content"
        )
    if placeholders := row["looks_like"].get("placeholder"):
        yield (
            f"{placeholders:,} replies hold {{{{name}}}} or {{{{author}}}} as text. To fill them: placeholders: "
            "{NAME: …, AUTHOR: …} in this source"
        )
    repeated = row["dropped"].get("duplicate", 0) + row["dropped"].get("near_duplicate", 0)
    if repeated > 0.1 * seen:
        yield (
            f"{repeated} of {seen} rows repeat the prompt and the reply of another; quarantine.jsonl lists the pairs. "
            "To keep them: data.duplicates=keep, or exact to drop only equal ones"
        )
    held = row["rows_held_out"]
    if held > allowed * (held + row["rows_kept"]):
        yield f"{held} rows are held out, {row['rows_kept']} train: lower data.validation_size"


def _settings(lora: Lora, train: JsonObject, rows: int) -> Iterator[str]:
    """What is odd in the adapter, and in the steps for so many rows."""
    scale = lora.lora_alpha / lora.r
    if not 0.25 <= scale <= 4 and not lora.use_rslora:
        yield f"lora_alpha/r = {scale:g}: common values are 1 and 2; the update is multiplied by it"
    if lora.r > 256:
        yield f"lora r = {lora.r}: above 256 an adapter costs memory and rarely gains"
    seen = train["max_steps"] * train["per_device_train_batch_size"] * train["gradient_accumulation_steps"]
    if 0 < seen < 0.05 * rows:
        yield (
            f"max_steps={train['max_steps']} sees {seen} of {rows} rows ({seen / rows:.1%}): "
            "lower data.budget to what is trained, so that the reported shares are the trained ones"
        )
