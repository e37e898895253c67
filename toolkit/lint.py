"""What a recipe will probably do that its writer did not mean: warnings with their reasons.

for warning in lint(recipe, chat, rows): print(warning)
"""

from toolkit.recipe import Recipe
from toolkit.render import Chat


def lint(recipe: Recipe, chat: Chat, rows: list) -> list[str]:
    """Warnings for a compiled mix: `rows` need `.mode` and `.ids`. The model's kind is found by rendering its template."""
    checks = (
        _tokenizer(chat),
        _modes(chat, rows),
        _end_of_turn(chat, rows),
        _adapter(recipe.lora),
        _coverage(recipe.train, len(rows)),
    )
    return [warning for found in checks for warning in found]


def _tokenizer(chat: Chat):
    if chat.fast is None:
        why = chat.distrust or "fastokens does not know this kind of tokenizer"
        yield f"ids come from the Hugging Face tokenizer, which is several times slower: {why}"


def _modes(chat: Chat, rows: list):
    modes = {r.mode for r in rows}
    if chat.kind == "thinking_only" and "non_thinking" in modes:
        yield (
            f"{chat.name} always thinks (its template opens <think> for every reply), but the mix has non-thinking rows: "
            "they teach it to close the block at once. Use a hybrid Qwen3, or drop those sources"
        )
    if chat.kind == "hybrid" and modes == {"thinking"}:
        yield "the mix has no non-thinking row: nothing holds the model's direct answers in place. Add chat (data.reasoning=0.75)"
    if chat.kind == "hybrid" and modes == {"non_thinking"}:
        yield "the mix has no thinking row: nothing holds the model's reasoning in place. Add reasoning rows (data.reasoning=0.25)"


def _end_of_turn(chat: Chat, rows: list):
    eos = chat.encode([chat.eos])[0]
    missing = sum(list(r.ids[-len(eos) :]) != eos for r in rows)
    if missing:
        yield f"{missing} rows do not end in {chat.eos!r}: the model would not learn to stop"
    if chat.pad == chat.eos:
        yield f"pad and end-of-turn are the same token ({chat.eos!r}): other trainers would mask the end of every reply"


def _adapter(lora):
    scale = lora.lora_alpha / (lora.r**0.5 if lora.use_rslora else lora.r)
    if not 0.25 <= scale <= 4 and not lora.use_rslora:
        yield f"lora_alpha/r = {scale:g}: usual values are 1 and 2; the update is scaled by it"
    if lora.r > 256:
        yield f"lora r = {lora.r}: above 256 an adapter costs memory and rarely gains"


def _coverage(train: dict, rows: int):
    if train["max_steps"] > 0 and rows:
        seen = train["max_steps"] * train["per_device_train_batch_size"] * train["gradient_accumulation_steps"]
        if seen < 0.05 * rows:
            yield (
                f"max_steps={train['max_steps']} sees {seen} of {rows} rows ({seen / rows:.1%}): "
                "lower data.budget to what is trained, so that the reported shares are the trained ones"
            )
