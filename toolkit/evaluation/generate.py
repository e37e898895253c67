"""Replies of a chat model in each of its modes: batched, the reasoning split from the answer.

replies = generate(model, tokenizer, [[{"role": "user", "content": "12 + 30?"}]], "thinking", max_new_tokens=512, seed=3407)
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolkit.evaluation.decode import Row, decode, room_for_reply
from toolkit.family import KINDS, PROBE, THINK_CLOSE, THINK_OPEN, end_of_turn, family_of, kind_of, sampling_of
from toolkit.files import ToolkitError
from toolkit.records import Message, Messages

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Each up to a user turn.
Conversations = Sequence[Messages]
# Replies made at once, at most.
BATCH = 32
# Unsloth cuts a prompt to `max_seq_length` without an error unless this mark stands on the module (models/llama.py).
LONG_PROMPTS = "_unsloth_allow_packed_overlength"
# What generating may change on a module or its config. Unsloth's generate() switches checkpointing off and leaves its
# inference flag behind when it meets a model in eval mode: a later training step would run kernels without gradients.
STATE = ("training", "gradient_checkpointing", "_flag_for_generation", LONG_PROMPTS, "use_cache")


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
    before, opening, inside = text.partition(THINK_OPEN)
    opened = bool(opening) and THINK_CLOSE not in before
    if not opened:
        before, inside = "", text
    if not opened and THINK_CLOSE not in text:
        return "", text.strip(), False, False
    reasoning, closing, after = inside.partition(THINK_CLOSE)
    return reasoning.strip(), (before + after).strip(), opened, bool(closing)


# --- prompts ---------------------------------------------------------------------------------------------------------


def modes_of(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    """The modes a model has, found by rendering its chat template. Raises ToolkitError for a base model without one."""
    if not tokenizer.chat_template:
        raise ToolkitError(
            f"{tokenizer.name_or_path}: no chat template: a base model cannot hold a conversation. Choose an instruct "
            "or hybrid model, or save a chat_template.jinja beside its tokenizer.json"
        )
    return KINDS[kind_of(functools.partial(_template, tokenizer))]


def prompts(tokenizer: "PreTrainedTokenizerBase", conversations: Conversations, mode: str) -> list[list[int]]:
    """Token ids of what the model is shown. Raises ToolkitError for a mode that it does not have."""
    modes = modes_of(tokenizer)
    if mode not in modes:
        raise ToolkitError(f"mode {mode!r}: expected one of {', '.join(modes)}, which this model has")
    texts = [_template(tokenizer, messages, enable_thinking=mode == "thinking") for messages in conversations]
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def prompt_opens(tokenizer: "PreTrainedTokenizerBase", mode: str) -> bool:
    """Whether the prompt of a mode opens the think block itself, as those of thinking-only models do."""
    return _template(tokenizer, PROBE, enable_thinking=mode == "thinking").rstrip().endswith(THINK_OPEN)


def _template(tokenizer: "PreTrainedTokenizerBase", messages: Messages, enable_thinking: bool) -> str:
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=enable_thinking
    )


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
    conversations: Conversations,
    mode: str,
    *,
    max_new_tokens: int,
    seed: int,
    batch_size: int = BATCH,
    greedy: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Reply]:
    """One reply to each conversation, in their order; sampled with the model's values for the mode unless `greedy`.

    A reply depends on (seed, number of its conversation), not on the batch it falls into: every row draws its uniforms
    from a stream of its own, and neither torch's random state nor the model's training state is touched. What is left is
    rounding: another batch size pads otherwise, and a 16-bit model may then turn a near tie.
    `progress(n)` is called when n more are done. Raises ToolkitError if a prompt leaves no room for a reply."""
    rows = [
        Row(number, prompt, room_for_reply(model, len(prompt), max_new_tokens))
        for number, prompt in enumerate(prompts(tokenizer, conversations, mode))
    ]
    sampling = sampling_values(model, mode)
    chosen_by = None if greedy or not sampling["temperature"] else sampling
    # Llama 3 has no padding token
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with inference(model, tokenizer):
        for done in decode(model, pad, rows, end_tokens(model, tokenizer), chosen_by, seed, batch_size):
            progress(done)
    opened = prompt_opens(tokenizer, mode)
    return [read_reply(tokenizer, row, opened) for row in rows]


def read_reply(tokenizer: "PreTrainedTokenizerBase", row: Row, opened_before: bool) -> Reply:
    """What was generated, taken apart; `opened_before` by the prompt, or not."""
    text = tokenizer.decode(row.new, skip_special_tokens=False)
    reasoning, answer, opened, closed = split_reply(THINK_OPEN * opened_before + text)
    opening, closing = tokenizer([THINK_OPEN, THINK_CLOSE], add_special_tokens=False)["input_ids"]
    tokens = row.new
    if len(closing) > 1:  # the tags are ordinary text to this tokenizer
        thought = len(tokenizer(reasoning, add_special_tokens=False)["input_ids"])
    else:
        tokens = [token for token in row.new if token not in opening]
        thought = tokens.index(closing[0]) if closing[0] in tokens else len(tokens) * opened
        tokens = [token for token in tokens if token != closing[0]]
    return Reply(reasoning, answer, text, thought, len(tokens) - thought, opened, closed, row.ended)


def base_and_tuned(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", questions: Sequence[str], **options: Any
) -> list[dict]:
    """Every question in each mode of a PeftModel, with its adapter off and on: rows {"prompt", "mode", "base": Reply,
    "tuned": Reply}, by mode. `options` are those of `generate`."""
    conversations = [[Message(role="user", content=question)] for question in questions]
    rows = []
    for mode in modes_of(tokenizer):
        with switched(model, False):
            base = generate(model, tokenizer, conversations, mode, **options)
        tuned = generate(model, tokenizer, conversations, mode, **options)
        for question, before, after in zip(questions, base, tuned, strict=True):
            rows.append({"prompt": question, "mode": mode, "base": before, "tuned": after})
    return rows


def switched(model: "PreTrainedModel", adapter: bool) -> contextlib.AbstractContextManager[None]:
    """A PeftModel with its adapter, or without: its base."""
    return contextlib.nullcontext() if adapter else model.disable_adapter()


@contextlib.contextmanager
def plain_on_cpu(model: "PreTrainedModel", merge: bool) -> Iterator[None]:
    """A PeftModel that replies faster on a CPU, where memory allows: 4-bit weights dequantized once instead of for every
    token, and in float32 the adapter added to them (`merge`). In 16 bits the sum would be rounded to another model."""
    import psutil
    import torch
    from peft.tuners.lora import Linear, LoraLayer

    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    before = {layer: layer.base_layer for layer in layers if isinstance(layer.base_layer, torch.nn.Linear)}
    needed = 2 * 4 * sum(base.in_features * base.out_features for base in before.values())
    if model.device.type != "cpu" or needed > psutil.virtual_memory().available:
        before = {}
    try:
        for layer, base in before.items():
            layer.base_layer = plain_layer(base, model.dtype)
            if merge and layer.base_layer.weight.dtype == torch.float32:
                # what LoRA on a 4-bit layer calls merging would quantize again; a safe merge refuses a diverged adapter
                Linear.merge(layer, safe_merge=False)
        yield
    finally:
        for layer, base in before.items():
            layer.base_layer = base
            layer.merged_adapters.clear()


def plain_layer(base: Any, dtype: "torch.dtype") -> Any:
    """A linear layer with a copy of the same weights, of which 4-bit ones are dequantized."""
    import torch
    from bitsandbytes.functional import dequantize_4bit

    state = getattr(base.weight, "quant_state", None)
    # this layout has a fast kernel of its own, for processors with 16-bit products
    if getattr(state, "packing_format_for_cpu", False):
        return base
    weight = base.weight.data.clone() if state is None else dequantize_4bit(base.weight.data, state).to(dtype)
    plain = torch.nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    plain.weight, plain.bias = torch.nn.Parameter(weight, requires_grad=False), copy.deepcopy(base.bias)
    return plain


@contextlib.contextmanager
def inference(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> Iterator[None]:
    """Evaluation mode without gradients, prompts never cut; afterwards model and tokenizer are as they were, so it may
    interrupt a training."""
    import torch

    configs = [module.config for module in model.modules() if "config" in vars(module)]
    # a config is shared by many modules
    attributes = {id(owner): vars(owner) for owner in [*model.modules(), *configs]}.values()
    before = [{name: values[name] for name in STATE if name in values} for values in attributes]
    side = tokenizer.padding_side  # Unsloth's generate() sets it
    model.eval()
    try:
        for values in attributes:
            if "max_seq_length" in values:
                values[LONG_PROMPTS] = True
        # On a GPU in the precision Unsloth trains and generates in, since its LoRA weights are float32
        half = model.device.type == "cuda" and model.dtype in (torch.float16, torch.bfloat16)
        with torch.no_grad(), torch.autocast("cuda", dtype=model.dtype) if half else contextlib.nullcontext():
            yield
    finally:
        tokenizer.padding_side = side
        for values, state in zip(attributes, before, strict=True):
            for name in STATE:
                values.pop(name, None)
            values.update(state)
