"""Replies in thinking and non-thinking mode, batched, reasoning split from answer.

replies = generate(model, tokenizer, [[{"role": "user", "content": "12 + 30?"}]], "thinking", max_new_tokens=512, seed=3407)
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from toolkit.files import ToolkitError

SAMPLING = {
    "thinking": {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0},
    "non_thinking": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0},
}
"""Qwen3's own values for each mode (model card of Qwen/Qwen3-8B, "Best Practices")."""

STATE = ("training", "gradient_checkpointing", "_flag_for_generation")
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
    before, opening, after = text.partition("<think>")
    opened = bool(opening)
    inside, closing, rest = (after if opened else before).partition("</think>")
    if not opened and not closing:
        return "", text.strip(), False, False
    answer = (before + rest) if opened else rest
    return inside.strip(), answer.strip(), opened, bool(closing)


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
    progress: Callable[[int, int], None] | None = None,
) -> list[Reply]:
    """One reply to each conversation, in their order; sampled with `SAMPLING[mode]` unless `greedy`.

    A reply depends on (seed, index of its conversation), not on the batch it falls into: every row draws its uniforms
    from a stream of its own, and neither torch's random state nor the model's training state is touched. What is left
    is rounding: another batch size pads otherwise, and a 16-bit model may then turn a near tie.
    `progress(done, total)` is called after each batch. Raises ToolkitError if a prompt leaves no room for a reply."""
    texts = [_prompt(tokenizer, messages, mode, tools) for messages in conversations]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))  # the longest first: what does not fit fails at once
    replies: dict[int, Reply] = {}
    with inference(model, tokenizer):
        while len(replies) < len(order):
            longest = ids[order[len(replies)]]
            limit = _room(model, longest, max_new_tokens)
            fit = rows_that_fit(model.config, len(longest) + limit, _free_memory(model), batch_size)
            rows = order[len(replies) : len(replies) + fit]
            chooser = None if greedy else sampler(SAMPLING[mode], _uniforms(seed, rows, limit))
            generated = _continue(model, tokenizer, [ids[i] for i in rows], limit, chooser)
            opened = [texts[i].rstrip().endswith("<think>") for i in rows]
            replies.update(zip(rows, map(_reply(tokenizer, _ends(model, tokenizer)), generated, opened), strict=True))
            if progress:
                progress(len(replies), len(order))
    return [replies[i] for i in range(len(order))]


def think_probability(
    model,
    tokenizer,
    conversations: Sequence[list[dict]],
    mode: str,
    *,
    batch_size: int = 32,
    tools: list[dict] | None = None,
) -> list[float]:
    """Probability of `<think>` at the first generated position of each conversation; 1.0 where the prompt opens it."""
    texts = [_prompt(tokenizer, messages, mode, tools) for messages in conversations]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    token = _tag(tokenizer, "<think>")
    result: list[float] = []
    with inference(model, tokenizer):
        for start in range(0, len(ids), batch_size):
            logits = _first_logits(model, tokenizer, ids[start : start + batch_size])
            result += logits.float().softmax(-1)[:, token].tolist()
    return [1.0 if text.rstrip().endswith("<think>") else p for text, p in zip(texts, result, strict=True)]


@contextlib.contextmanager
def inference(model, tokenizer) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards model and tokenizer are as they were, so it may interrupt a training."""
    import torch

    states = [(vars(module), {k: vars(module)[k] for k in STATE if k in vars(module)}) for module in model.modules()]
    configs = {id(m.config): m.config for m in model.modules() if "config" in vars(m)}.values()
    caches = [(vars(config), vars(config)["use_cache"]) for config in configs if "use_cache" in vars(config)]
    side = tokenizer.padding_side  # Unsloth's generate() sets it
    model.eval()
    try:
        with torch.no_grad(), autocast(model):
            yield
    finally:
        tokenizer.padding_side = side
        for attributes, state in states:
            for name in STATE:
                attributes.pop(name, None)
            attributes.update(state)
        for attributes, use_cache in caches:
            attributes["use_cache"] = use_cache


def autocast(model):
    """The precision Unsloth trains and generates in on a GPU (its LoRA weights are float32); nothing on a CPU."""
    import torch

    half = model.dtype in (torch.float16, torch.bfloat16)
    return (
        torch.autocast("cuda", dtype=model.dtype) if model.device.type == "cuda" and half else contextlib.nullcontext()
    )


def sampler(values: dict, uniforms: np.ndarray) -> Callable:
    """A logits processor that leaves one token per row: drawn by temperature, top-k, top-p, min-p (Hugging Face's order)
    through the inverse of the cumulative distribution, with `uniforms` (rows × steps) as the only randomness."""
    import torch

    step = 0

    def choose(_input_ids, scores):
        nonlocal step
        top = torch.topk(scores.float() / values["temperature"], min(values["top_k"], scores.shape[-1]), dim=-1)
        share = top.values.softmax(-1)
        nucleus = share.cumsum(-1) - share < values["top_p"]
        share = share * (nucleus & (share >= values["min_p"] * share[:, :1]))
        mass = share.cumsum(-1)
        draw = torch.as_tensor(uniforms[:, step], dtype=mass.dtype, device=mass.device)[:, None] * mass[:, -1:]
        step += 1
        token = top.indices.gather(-1, (mass <= draw).sum(-1, keepdim=True).clamp(max=share.shape[-1] - 1))
        return torch.full_like(scores, float("-inf")).scatter(-1, token, 0.0)

    return choose


def _prompt(tokenizer, messages: list[dict], mode: str, tools: list[dict] | None) -> str:
    if mode not in SAMPLING:
        raise ToolkitError(f"mode {mode!r}: expected one of {', '.join(SAMPLING)}")
    return tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=True, enable_thinking=mode == "thinking"
    )


def _uniforms(seed: int, rows: list[int], steps: int) -> np.ndarray:
    # 1 - 2^-24 at most: a uniform that rounds to 1.0 in float32 would fall off the end of the distribution
    drawn = np.stack([np.random.Generator(np.random.Philox([seed, row])).random(steps) for row in rows])
    return np.minimum(drawn, 1 - 2.0**-24)


def _room(model, prompt: list[int], max_new_tokens: int) -> int:
    """New tokens that fit behind the longest prompt of a batch; Unsloth refuses to go beyond the model's positions."""
    room = model.config.max_position_embeddings - len(prompt)
    if room < 1:
        raise ToolkitError(
            f"a prompt of {len(prompt)} tokens leaves no room for a reply: the model was loaded for "
            f"{model.config.max_position_embeddings}; shorten it or raise model.max_seq_length"
        )
    return min(max_new_tokens, room)


def rows_that_fit(config, tokens: int, free_bytes: float, batch_size: int) -> int:
    """Rows of a batch whose 16-bit key-value cache fits at full length, with 30% left for everything else: 32 rows of
    8,192 tokens would take Qwen3-4B 38 GB."""
    row = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens
    return int(max(1, min(batch_size, 0.7 * free_bytes / row)))


def _free_memory(model) -> float:
    import torch

    if model.device.type != "cuda":
        return float("inf")
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def _pad(model, tokenizer, ids: list[list[int]]) -> dict:
    import torch

    width = max(map(len, ids))
    rows = [[tokenizer.pad_token_id] * (width - len(row)) + row for row in ids]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in ids]
    return {
        "input_ids": torch.tensor(rows, device=model.device),
        "attention_mask": torch.tensor(mask, device=model.device),
    }


def _ends(model, tokenizer) -> list[int]:
    """Tokens that end a turn. Qwen3 lists two; its base checkpoints and some fine-tunes list one, or the other."""
    listed = model.generation_config.eos_token_id
    listed = listed if isinstance(listed, list) else [listed]
    return sorted({tokenizer.eos_token_id, *(token for token in listed if token is not None)})


def _continue(model, tokenizer, ids: list[list[int]], limit: int, chooser: Callable | None) -> list[list[int]]:
    batch = _pad(model, tokenizer, ids)
    output = model.generate(
        **batch,
        max_new_tokens=limit,
        do_sample=False,
        use_cache=True,
        eos_token_id=_ends(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        logits_processor=[chooser] if chooser else [],
    )
    return output[:, batch["input_ids"].shape[1] :].tolist()


def _first_logits(model, tokenizer, ids: list[list[int]]):
    # Through generate(): it is the one call whose left padding means the same in Hugging Face and in Unsloth's kernels
    output = model.generate(
        **_pad(model, tokenizer, ids),
        max_new_tokens=1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    return output.logits[0]


def _tag(tokenizer, tag: str) -> int:
    token = tokenizer.convert_tokens_to_ids(tag)
    if token is None or token == tokenizer.unk_token_id:
        raise ToolkitError(
            f"this tokenizer has no {tag} token, so it is not a Qwen3 with both modes: use a Qwen3 checkpoint"
        )
    return token


def _reply(tokenizer, ends: list[int]) -> Callable[[list[int], bool], Reply]:
    opening, closing = _tag(tokenizer, "<think>"), _tag(tokenizer, "</think>")

    def build(ids: list[int], prompt_opens: bool) -> Reply:
        end = next((i for i, token in enumerate(ids) if token in ends), None)
        body = ids[:end]
        text = tokenizer.decode(body, skip_special_tokens=False)
        reasoning, answer, opened, closed = split_reply("<think>" * prompt_opens + text)
        inside = body.index(closing) if closing in body else len(body) if opened else 0
        tags = sum(token in (opening, closing) for token in body)
        thought = sum(token != opening for token in body[:inside])
        return Reply(reasoning, answer, text, thought, len(body) - thought - tags, opened, closed, end is not None)

    return build
