"""Replies of a chat model in each of its modes: batched, the reasoning split from the answer.

replies = generate(model, tokenizer, [[{"role": "user", "content": "12 + 30?"}]], "thinking", max_new_tokens=512, seed=3407)
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from toolkit.family import KINDS, THINK_CLOSE, THINK_OPEN, family_of, kind_of, sampling_of
from toolkit.files import ToolkitError

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


def modes_of(tokenizer) -> tuple[str, ...]:
    """The modes a model has, found by rendering its chat template. Raises ToolkitError for a base model without one."""
    if not tokenizer.chat_template:
        raise ToolkitError(
            f"{tokenizer.name_or_path}: no chat template: a base model cannot hold a conversation. Choose an instruct "
            "or hybrid model, or save a chat_template.jinja beside its tokenizer.json"
        )
    return KINDS[kind_of(lambda messages, **switch: _template(tokenizer, messages, **switch))]


def prompts(tokenizer, conversations: Sequence[list[dict]], mode: str, tools=None) -> tuple[list[str], list[list[int]]]:
    """(texts, token ids) of what the model is shown. Raises ToolkitError for a mode that it does not have."""
    if mode not in (modes := modes_of(tokenizer)):
        raise ToolkitError(f"mode {mode!r}: expected one of {', '.join(modes)}, which this model has")
    texts = [_template(tokenizer, c, tools=tools, enable_thinking=mode == "thinking") for c in conversations]
    return texts, tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def _template(tokenizer, messages: list[dict], **values) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **values)


def end_tokens(model, tokenizer) -> set[int]:
    """Tokens that end a turn: those of generation_config.json and of the tokenizer, and the one with which the chat
    template closes a turn. Base checkpoints and some fine-tunes list only one of them."""
    listed = model.generation_config.eos_token_id
    listed = listed if isinstance(listed, list) else [listed]
    return {tokenizer.eos_token_id, closing_token(tokenizer), *listed} - {None}


def closing_token(tokenizer) -> int | None:
    """The token with which the chat template closes an assistant's turn; the end-of-sequence token where it has none."""
    turn = [{"role": "user", "content": "probe"}, {"role": "assistant", "content": "probe-reply"}]
    closing = tokenizer.apply_chat_template(turn, tokenize=False).rpartition("probe-reply")[2].strip()
    first = tokenizer(closing, add_special_tokens=False)["input_ids"][:1]
    return first[0] if first and first[0] in tokenizer.added_tokens_decoder else tokenizer.eos_token_id


def sampling_values(model, mode: str) -> dict:
    """The temperature, top_p, top_k and min_p that a model is sampled with."""
    return sampling_of(family_of(model.config.model_type), mode, model.generation_config.to_dict())


def generate(
    model,
    tokenizer,
    conversations: Sequence[list[dict]],
    mode: str,
    *,
    max_new_tokens: int,
    seed: int,
    batch_size: int = 32,
    tools: list[dict] | None = None,
    greedy: bool = False,
    numbers: Sequence[int] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Reply]:
    """One reply to each conversation, in their order; sampled with the model's values for the mode unless `greedy`.

    A reply depends on (seed, number of its conversation), not on the batch it falls into: every row draws its uniforms
    from a stream of its own, and neither torch's random state nor the model's training state is touched. `numbers` are 0,
    1, … unless told otherwise. What is left is rounding: another batch size pads otherwise, and a 16-bit model may then
    turn a near tie.
    `progress(n)` is called after each batch of n. Raises ToolkitError if a prompt leaves no room for a reply."""
    texts, ids = prompts(tokenizer, conversations, mode, tools)
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))  # the longest first: what does not fit fails at once
    values, ends, replies = sampling_values(model, mode), end_tokens(model, tokenizer), {}
    greedy = greedy or not values["temperature"]
    numbers = range(len(ids)) if numbers is None else numbers
    with inference(model, tokenizer):
        while rest := order[len(replies) :]:
            limit = _room(model, len(ids[rest[0]]), max_new_tokens)
            fit = rows_that_fit(model.config, len(ids[rest[0]]) + limit, free_memory(model), batch_size)
            # a prompt that leaves less room than the others is answered by itself: they may say more
            rows = [i for i in rest[:fit] if _room(model, len(ids[i]), max_new_tokens) == limit]
            chooser = None if greedy else sampler(values, _uniforms(seed, [numbers[i] for i in rows], limit))
            generated = _continue(model, tokenizer, [ids[i] for i in rows], limit, ends, chooser)
            for i, new in zip(rows, generated, strict=True):
                replies[i] = _reply(tokenizer, new, ends, texts[i].rstrip().endswith(THINK_OPEN))
            progress(len(rows))
    return [replies[i] for i in range(len(order))]


def base_and_tuned(model, tokenizer, asked: Sequence[str], **options) -> list[dict]:
    """Every question in each mode of a PeftModel, with its adapter off and on: rows {"prompt", "mode", "base": Reply,
    "tuned": Reply}, by mode. `options` are those of `generate`."""
    conversations, rows = [[{"role": "user", "content": question}] for question in asked], []
    for mode in modes_of(tokenizer):
        said = {}
        for name in ("base", "tuned"):
            with switched(model, name == "tuned"):
                said[name] = generate(model, tokenizer, conversations, mode, **options)
        replies = zip(asked, said["base"], said["tuned"], strict=True)
        rows += [{"prompt": question, "mode": mode, "base": base, "tuned": tuned} for question, base, tuned in replies]
    return rows


@contextlib.contextmanager
def switched(model, adapter: bool) -> Iterator[None]:
    """A PeftModel with its adapter, or without: its base."""
    with contextlib.nullcontext() if adapter else model.disable_adapter():
        yield


@contextlib.contextmanager
def inference(model, tokenizer) -> Iterator[None]:
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


def sampler(values: dict, uniforms: np.ndarray) -> Callable:
    """A logits processor that leaves one token per row: drawn by temperature, top-k, top-p, min-p (Hugging Face's order)
    through the inverse of the cumulative distribution, with `uniforms` (rows × steps) as the only randomness."""
    import torch

    step = 0

    def choose(_input_ids, scores):
        nonlocal step
        count = min(values["top_k"] or scores.shape[-1], scores.shape[-1])  # 0 means all
        top = torch.topk(scores.float() / values["temperature"], count, dim=-1)
        share = top.values.softmax(-1)
        # a token stays while those before it have not reached top_p, so that the first always does
        nucleus = share.cumsum(-1) - share < values["top_p"]
        share = share * (nucleus & (share >= values["min_p"] * share[:, :1]))
        mass = share.cumsum(-1)
        # the inverse of the cumulative distribution: the first token whose mass exceeds the uniform
        draw = torch.as_tensor(uniforms[:, step], dtype=mass.dtype, device=mass.device)[:, None] * mass[:, -1:]
        step += 1
        token = top.indices.gather(-1, (mass <= draw).sum(-1, keepdim=True).clamp(max=share.shape[-1] - 1))
        return torch.full_like(scores, float("-inf")).scatter(-1, token, 0.0)

    return choose


def _uniforms(seed: int, rows: list[int], steps: int) -> np.ndarray:
    # 1 - 2^-24 at most: a uniform that rounds to 1.0 in float32 would fall off the end of the distribution
    drawn = np.stack([np.random.Generator(np.random.Philox([seed, row])).random(steps) for row in rows])
    return np.minimum(drawn, 1 - 2.0**-24)


def _room(model, prompt_tokens: int, max_new_tokens: int) -> int:
    """New tokens that fit behind the longest prompt of a batch; Unsloth refuses to go beyond the model's positions."""
    positions = model.config.get_text_config().max_position_embeddings
    if prompt_tokens >= positions:
        raise ToolkitError(
            f"a prompt of {prompt_tokens} tokens leaves no room for a reply: the model was loaded for {positions}; "
            "shorten it or raise model.max_seq_length"
        )
    return min(max_new_tokens, positions - prompt_tokens)


def rows_that_fit(config, tokens: int, free_bytes: float, batch_size: int) -> int:
    """Rows of a batch whose 16-bit key-value cache fits at full length, with 30% left for everything else: 32 rows of
    8,192 tokens would take Qwen3-4B 38 GB."""
    text = config.get_text_config()
    # Qwen2 does not state it
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    row = 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * tokens
    return int(max(1, min(batch_size, 0.7 * free_bytes / row)))


def free_memory(model) -> float:
    """Bytes of GPU memory that torch can still use, its own reserve included; infinite on a CPU."""
    import torch

    if model.device.type != "cuda":
        return float("inf")
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def _continue(model, tokenizer, ids: list[list[int]], limit: int, ends: set[int], chooser) -> list[list[int]]:
    """The new tokens of each row: prompts are padded on the left, replies end in padding."""
    import torch

    # Llama 3 has no padding token
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    width = max(map(len, ids))
    output = model.generate(
        input_ids=torch.tensor([[pad] * (width - len(row)) + row for row in ids], device=model.device),
        attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=model.device),
        max_new_tokens=limit,
        do_sample=False,
        use_cache=True,
        repetition_penalty=1.0,  # Qwen2.5's file says 1.1, which would also count the padding of a row
        eos_token_id=sorted(ends),
        pad_token_id=pad,
        logits_processor=[chooser] if chooser else [],
    )
    if model.device.type == "cuda" and "unsloth" in sys.modules:
        from unsloth.models._decode_graphs import release_for_training

        release_for_training(model)  # its key-value buffers would stay, and the next batch be planned smaller
    return output[:, width:].tolist()


def _reply(tokenizer, ids: list[int], ends: set[int], prompt_opens: bool) -> Reply:
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    body = ids[:end]
    text = tokenizer.decode(body, skip_special_tokens=False)
    reasoning, answer, opened, closed = split_reply(THINK_OPEN * prompt_opens + text)
    opening, closing = tokenizer([THINK_OPEN, THINK_CLOSE], add_special_tokens=False)["input_ids"]
    if len(closing) > 1:  # the tags are ordinary text to this tokenizer
        tags, thought = 0, len(tokenizer(reasoning, add_special_tokens=False)["input_ids"])
    else:
        tags = sum(token in opening + closing for token in body)
        inside = body.index(closing[0]) if closing[0] in body else len(body) if opened else 0
        thought = sum(token not in opening for token in body[:inside])
    return Reply(reasoning, answer, text, thought, len(body) - thought - tags, opened, closed, end is not None)
