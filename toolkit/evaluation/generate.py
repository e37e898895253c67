"""Replies of a chat model in each of its modes: batched, the reasoning split from the answer.

replies = generate(model, tokenizer, [[{"role": "user", "content": "12 + 30?"}]], "thinking", max_new_tokens=512, seed=3407)
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolkit.evaluation.decode import Row, decode, room_for_reply
from toolkit.family import KINDS, THINK_CLOSE, THINK_OPEN, end_of_turn, family_of, kind_of, sampling_of
from toolkit.files import ToolkitError
from toolkit.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Messages = list[Message]
"""A conversation up to a user turn."""
LONG_PROMPTS = "_unsloth_allow_packed_overlength"
"""Unsloth cuts a prompt to `max_seq_length` without an error unless this mark stands on the module (models/llama.py)."""
STATE = ("training", "gradient_checkpointing", "_flag_for_generation", LONG_PROMPTS)
"""What generating may change on a module. Unsloth's generate() switches checkpointing off and leaves its inference flag
behind when it meets a model in eval mode; with that flag a later training step would run kernels without gradients."""


@dataclass(frozen=True)
class Reply:
    """One reply, taken apart. Token counts leave out the tags and the end-of-turn token."""

    reasoning: str
    answer: str
    text: str
    """As generated: tags and other special tokens kept, end-of-turn and padding removed."""
    reasoning_tokens: int
    answer_tokens: int
    opened: bool
    """A think block was opened, by the reply or (thinking-only models) by the prompt."""
    closed: bool
    """`</think>` was generated."""
    finished: bool
    """Ended by an end-of-turn token, not by the limit."""


def split_reply(text: str) -> tuple[str, str, bool, bool]:
    """(reasoning, answer, opened, closed): what stands before the first `</think>` and what after it.

    Text before `<think>` belongs to the answer. A block that never closes leaves no answer but what stood before it."""
    before, opening, after = text.partition(THINK_OPEN)
    opened = bool(opening) and THINK_CLOSE not in before
    inside, closing, rest = (after if opened else text).partition(THINK_CLOSE)
    if not opened and not closing:
        return "", text.strip(), False, False
    answer = (before + rest) if opened else rest
    return inside.strip(), answer.strip(), opened, bool(closing)


# --- prompts ---------------------------------------------------------------------------------------------------------


def modes_of(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    """The modes a model has, found by rendering its chat template. Raises ToolkitError for a base model without one."""
    if not tokenizer.chat_template:
        raise ToolkitError(
            f"{tokenizer.name_or_path}: no chat template: a base model cannot hold a conversation. Choose an instruct "
            "or hybrid model, or save a chat_template.jinja beside its tokenizer.json"
        )
    return KINDS[kind_of(lambda messages, **switch: _template(tokenizer, messages, **switch))]


def prompts(
    tokenizer: "PreTrainedTokenizerBase",
    conversations: Sequence[Messages],
    mode: str,
    tools: Sequence[dict] | None = None,
) -> tuple[list[str], list[list[int]]]:
    """(texts, token ids) of what the model is shown. Raises ToolkitError for a mode that it does not have."""
    modes = modes_of(tokenizer)
    if mode not in modes:
        raise ToolkitError(f"mode {mode!r}: expected one of {', '.join(modes)}, which this model has")
    texts = [_template(tokenizer, c, tools=tools, enable_thinking=mode == "thinking") for c in conversations]
    return texts, tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def _template(tokenizer: "PreTrainedTokenizerBase", messages: Messages, **values: object) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **values)


def end_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Tokens that end a turn: those of generation_config.json and of the tokenizer, and the one with which the chat
    template closes a turn. Base checkpoints and some fine-tunes list only one of them."""
    listed = model.generation_config.eos_token_id
    listed = listed if isinstance(listed, list) else [listed]
    return {tokenizer.eos_token_id, closing_token(tokenizer), *listed} - {None}


def closing_token(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The token with which the chat template closes an assistant's turn; the end-of-sequence token where it has none."""
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    end = end_of_turn(functools.partial(tokenizer.apply_chat_template, tokenize=False), added)
    return tokenizer.convert_tokens_to_ids(end) if end else tokenizer.eos_token_id


def sampling_values(model: "PreTrainedModel", mode: str) -> dict[str, float]:
    """The temperature, top_p, top_k and min_p that a model is sampled with."""
    return sampling_of(family_of(model.config.model_type), mode, model.generation_config.to_dict())


# --- replies ---------------------------------------------------------------------------------------------------------


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    conversations: Sequence[Messages],
    mode: str,
    *,
    max_new_tokens: int,
    seed: int,
    batch_size: int = 32,
    tools: Sequence[dict] | None = None,
    greedy: bool = False,
    numbers: Sequence[int] | None = None,
    progress: Callable[[int], None] = lambda _: None,
    keep: Callable[[dict[int, Reply]], None] = lambda _: None,
) -> list[Reply]:
    """One reply to each conversation, in their order; sampled with the model's values for the mode unless `greedy`.

    A reply depends on (seed, number of its conversation), not on the batch it falls into: every row draws its uniforms
    from a stream of its own, and neither torch's random state nor the model's training state is touched. `numbers` are 0,
    1, … unless told otherwise. What is left is rounding: another batch size pads otherwise, and a 16-bit model may then
    turn a near tie.
    `progress(n)` is called when n more are there, `keep` with them by their place. Raises ToolkitError if a prompt leaves
    no room for a reply."""
    texts, ids = prompts(tokenizer, conversations, mode, tools)
    numbers = range(len(ids)) if numbers is None else numbers
    rows = [
        Row(place, number, prompt, room_for_reply(model, len(prompt), max_new_tokens))
        for place, (number, prompt) in enumerate(zip(numbers, ids, strict=True))
    ]
    rows.sort(key=lambda row: -len(row.prompt))  # the longest first: what takes too much memory fails at once
    sampling = sampling_values(model, mode)
    # Llama 3 has no padding token
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    chosen_by = None if greedy or not sampling["temperature"] else sampling
    replies: dict[int, Reply] = {}
    with inference(model, tokenizer):
        for done in decode(model, pad, rows, end_tokens(model, tokenizer), chosen_by, seed, batch_size):
            batch = {row.place: read_reply(tokenizer, row, texts[row.place]) for row in done}
            replies |= batch
            keep(batch)
            progress(len(batch))
    return [replies[place] for place in range(len(rows))]


def read_reply(tokenizer: "PreTrainedTokenizerBase", row: Row, prompt: str) -> Reply:
    """What was generated, taken apart."""
    text = tokenizer.decode(row.new, skip_special_tokens=False)
    prompt_opens = prompt.rstrip().endswith(THINK_OPEN)
    reasoning, answer, opened, closed = split_reply(THINK_OPEN * prompt_opens + text)
    opening, closing = tokenizer([THINK_OPEN, THINK_CLOSE], add_special_tokens=False)["input_ids"]
    if len(closing) > 1:  # the tags are ordinary text to this tokenizer
        tags = 0
        thought = len(tokenizer(reasoning, add_special_tokens=False)["input_ids"])
    else:
        tags = sum(token in opening + closing for token in row.new)
        inside = row.new.index(closing[0]) if closing[0] in row.new else len(row.new) if opened else 0
        thought = sum(token not in opening for token in row.new[:inside])
    return Reply(reasoning, answer, text, thought, len(row.new) - thought - tags, opened, closed, row.ended)


def base_and_tuned(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", questions: Sequence[str], **options: Any
) -> list[dict]:
    """Every question in each mode of a PeftModel, with its adapter off and on: rows {"prompt", "mode", "base": Reply,
    "tuned": Reply}, by mode. `options` are those of `generate`."""
    conversations: list[Messages] = [[{"role": "user", "content": question}] for question in questions]
    rows = []
    for mode in modes_of(tokenizer):
        with switched(model, False):
            base = generate(model, tokenizer, conversations, mode, **options)
        tuned = generate(model, tokenizer, conversations, mode, **options)
        for question, before, after in zip(questions, base, tuned, strict=True):
            rows.append({"prompt": question, "mode": mode, "base": before, "tuned": after})
    return rows


@contextlib.contextmanager
def switched(model: "PreTrainedModel", adapter: bool) -> Iterator[None]:
    """A PeftModel with its adapter, or without: its base."""
    with contextlib.nullcontext() if adapter else model.disable_adapter():
        yield


@contextlib.contextmanager
def merged_on_cpu(model: "PreTrainedModel") -> Iterator[None]:
    """On a CPU, a PeftModel whose adapter is added into copies of the weights: token by token the adapter would cost more
    than its base. In float32 alone, since 16 bits would round the sum to another model, and where memory allows."""
    import psutil
    import torch
    from peft.tuners.lora import Linear

    # a 4-bit layer is of another class and stays as it is
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    weights = [layer.get_base_layer().weight.data for layer in layers]
    plain = model.device.type == "cpu" and all(weight.dtype == torch.float32 for weight in weights)
    if not plain or 2 * sum(weight.nbytes for weight in weights) > psutil.virtual_memory().available:
        yield
        return
    try:
        for layer in layers:
            layer.merge(safe_merge=True)  # into a copy; the weights that are kept here stay what they are
        yield
    finally:
        for layer, weight in zip(layers, weights, strict=True):
            layer.get_base_layer().weight.data = weight
            layer.merged_adapters.clear()


@contextlib.contextmanager
def inference(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> Iterator[None]:
    """Evaluation mode without gradients, prompts never cut; afterwards model and tokenizer are as they were, so it may
    interrupt a training."""
    import torch

    states = [(vars(module), {k: vars(module)[k] for k in STATE if k in vars(module)}) for module in model.modules()]
    configs = {id(m.config): m.config for m in model.modules() if "config" in vars(m)}.values()
    caches = [(vars(config), vars(config)["use_cache"]) for config in configs if "use_cache" in vars(config)]
    side = tokenizer.padding_side  # Unsloth's generate() sets it
    model.eval()
    try:
        for attributes, _ in states:
            if "max_seq_length" in attributes:
                attributes[LONG_PROMPTS] = True
        # On a GPU in the precision Unsloth trains and generates in, since its LoRA weights are float32
        half = model.device.type == "cuda" and model.dtype in (torch.float16, torch.bfloat16)
        with torch.no_grad(), torch.autocast("cuda", dtype=model.dtype) if half else contextlib.nullcontext():
            yield
    finally:
        tokenizer.padding_side = side
        for attributes, state in states:
            for name in STATE:
                attributes.pop(name, None)
            attributes.update(state)
        for attributes, use_cache in caches:
            attributes["use_cache"] = use_cache
