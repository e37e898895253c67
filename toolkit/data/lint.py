"""What a recipe will probably do that its writer did not intend: warnings with their reasons.

from toolkit.data.lint import lint; lint(chat, mixed.report, recipe.lora, recipe.train)
"""

from toolkit.data.render import Chat
from toolkit.recipe import Lora

DUPLICATES = ("duplicate", "near_duplicate")


def lint(chat: Chat, report: dict, lora: Lora, train: dict) -> list[str]:
    """Warnings for a compiled mix (`report` is mix.json's content), an adapter and TRL settings."""
    checks = (_tokenizer(report), _modes(chat, report), _rows(report), _adapter(lora), _coverage(train, report))
    return [warning for found in checks for warning in found]


def _tokenizer(report: dict):
    if why := report["slow_tokenizer"]:
        yield f"token ids come from the Hugging Face tokenizer, which is several times slower: {why}"


def _modes(chat: Chat, report: dict):
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


def _rows(report: dict):
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


def _adapter(lora: Lora):
    scale = lora.lora_alpha / (lora.r**0.5 if lora.use_rslora else lora.r)
    if not 0.25 <= scale <= 4 and not lora.use_rslora:
        yield f"lora_alpha/r = {scale:g}: common values are 1 and 2; the update is multiplied by it"
    if lora.r > 256:
        yield f"lora r = {lora.r}: above 256 an adapter costs memory and rarely gains"


def _coverage(train: dict, report: dict):
    rows = report["total"]["examples"]
    if train["max_steps"] > 0 and rows:
        seen = train["max_steps"] * train["per_device_train_batch_size"] * train["gradient_accumulation_steps"]
        if seen < 0.05 * rows:
            yield (
                f"max_steps={train['max_steps']} sees {seen} of {rows} rows ({seen / rows:.1%}): "
                "lower data.budget to what is trained, so that the reported shares are the trained ones"
            )
