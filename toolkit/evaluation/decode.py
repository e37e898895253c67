"""New tokens of a batch of prompts: sampled by streams of their own, as many rows at once as memory and kernels like.

rows = rows_at_once(model, tokens=3000, batch_size=32)
"""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from toolkit.files import ToolkitError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

# New tokens after which finished rows leave their batch. Every further part is as long as all before it: what is read
# again at its beginning (prompt and reply so far, in one pass) is then at most as much as what is generated.
FIRST_PART = 256
# Compute capability → rows up to which Unsloth multiplies 4-bit weights as they are; 1 elsewhere. With more rows it
# dequantizes all weights for every token (unsloth/kernels/utils.py, _GEMV_ROWS_BY_ARCH).
GEMV_ROWS = {(7, 5): 4, (8, 0): 2, (8, 9): 4, (12, 0): 4}
# How many times as long a step with dequantized weights takes: 157 ms against 25 ms (calculated: Qwen3-32B, RTX 4090).
DEQUANTIZED_STEP = 6
# Rows up to which bitsandbytes has a 4-bit kernel for a T4, faster than to dequantize (_BNB_GEMM_4BIT_MAX_ROWS).
T4, T4_ROWS = (7, 5), 16
GRAPHS = "UNSLOTH_DECODE_CUDA_GRAPHS"


@dataclass
class Row:
    """One reply in the making."""

    number: int
    """Its conversation's, which decides its stream of uniforms."""
    prompt: list[int]
    limit: int
    """New tokens that it may have."""
    new: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def left(self) -> int:
        """New tokens that are still to be generated, at most."""
        return 0 if self.ended else self.limit - len(self.new)


def decode(
    model: "PreTrainedModel",
    pad: int,
    rows: Sequence[Row],
    ends: set[int],
    sampling: dict[str, float] | None,
    seed: int,
    batch_size: int,
) -> Iterator[int]:
    """Generate every row to its end or limit; yields how many more are done, batch by batch. Greedy without `sampling`.

    Long replies are generated in parts: between two parts finished rows leave and batches are filled again, so that
    short replies do not wait for long ones, and key-value memory is taken for what is used, not for the limit."""
    unfinished = list(rows)
    while unfinished:
        # the longest first: what does not fit fails at once
        waiting, unfinished = sorted(unfinished, key=lambda row: -len(row.prompt)), []
        length = max(part_length(len(row.new), row.limit) for row in waiting)
        while waiting:
            longest = len(waiting[0].prompt) + len(waiting[0].new) + length
            fit = rows_at_once(model, longest, batch_size)
            batch, waiting = waiting[:fit], waiting[fit:]
            # a row with little room ends the part of its batch: the others go on in the next
            continue_rows(model, pad, batch, min(length, *(row.left for row in batch)), ends, sampling, seed)
            left = [row for row in batch if row.left]
            unfinished += left
            yield len(batch) - len(left)


def part_length(generated: int, limit: int) -> int:
    """New tokens of the next part: short replies in one part, long ones in parts of 256, 256, 512, 1,024, …"""
    if limit <= 2 * FIRST_PART:
        return limit
    return min(max(FIRST_PART, generated), limit - generated)


def rows_at_once(model: "PreTrainedModel", tokens: int, batch_size: int) -> int:
    """Rows of a batch that memory holds and that the card's 4-bit kernels make the most of."""
    import torch

    fit = rows_that_fit(model.config, tokens, free_memory(model), batch_size)
    # transformers sets it on 4-bit models only
    if model.device.type != "cuda" or not getattr(model, "is_loaded_in_4bit", False):
        return fit
    return rows_for_kernels(fit, torch.cuda.get_device_capability(model.device))


def rows_for_kernels(fit: int, capability: tuple[int, int]) -> int:
    """Rows at once of those that fit: few that need no dequantizing are sooner done than some more that do."""
    if capability == T4:
        return min(fit, T4_ROWS)
    undequantized = GEMV_ROWS.get(capability, 1)
    return fit if fit > undequantized * DEQUANTIZED_STEP else min(fit, undequantized)


def rows_that_fit(config: "PretrainedConfig", tokens: int, free_bytes: float, batch_size: int) -> int:
    """Rows of a batch whose 16-bit key-value cache of so many tokens fits, with 30% left for everything else: 32 rows of
    8,192 tokens would take Qwen3-4B 38 GB."""
    text = config.get_text_config()
    # Qwen2 does not state it
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # GPT-NeoX and other models without grouped heads do not state them
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    with_cache = text.num_hidden_layers - delta_layers(text)
    row = 2 * 2 * with_cache * heads * head_dim * tokens + state_bytes(text)
    return int(max(1, min(batch_size, 0.7 * free_bytes / row)))


def delta_layers(text: "PretrainedConfig") -> int:
    """Layers that keep a state of fixed size instead of keys and values: gated delta nets (Qwen3.5)."""
    return (getattr(text, "layer_types", None) or []).count("linear_attention")


def state_bytes(text: "PretrainedConfig") -> int:
    """What delta nets keep of a sequence: a float32 matrix per head, and the last inputs of a convolution in 16 bits."""
    layers = delta_layers(text)
    if not layers:
        return 0
    values = text.linear_num_value_heads * text.linear_value_head_dim
    keys = text.linear_num_key_heads * text.linear_key_head_dim
    inputs = 2 * text.linear_conv_kernel_dim * (2 * keys + values)
    return layers * (4 * values * text.linear_key_head_dim + inputs)


def free_memory(model: "PreTrainedModel") -> float:
    """Bytes of GPU memory that torch can still use, its own reserve included; infinite on a CPU."""
    import torch

    if model.device.type != "cuda":
        return float("inf")
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def room_for_reply(model: "PreTrainedModel", prompt_tokens: int, max_new_tokens: int) -> int:
    """New tokens that fit behind a prompt; Unsloth refuses to go beyond the model's positions. Raises ToolkitError."""
    positions = model.config.get_text_config().max_position_embeddings
    if prompt_tokens >= positions:
        raise ToolkitError(
            f"a prompt of {prompt_tokens} tokens leaves no room for a reply: the model was loaded for {positions}; "
            "shorten it or raise model.max_seq_length"
        )
    return min(max_new_tokens, positions - prompt_tokens)


def continue_rows(
    model: "PreTrainedModel",
    pad: int,
    rows: Sequence[Row],
    length: int,
    ends: set[int],
    sampling: dict[str, float] | None,
    seed: int,
) -> None:
    """Add up to `length` new tokens to each row: prompts are padded on the left, replies end in padding."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    pad_left = functools.partial(pad_sequence, batch_first=True, padding_side="left")
    texts = [torch.tensor(row.prompt + row.new) for row in rows]
    input_ids = pad_left(texts, padding_value=pad).to(model.device)
    attention_mask = pad_left([torch.ones_like(ids) for ids in texts]).to(model.device)
    with decode_graphs(model):
        output = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=length,
            do_sample=False,
            use_cache=True,
            repetition_penalty=1.0,  # Qwen2.5's file says 1.1, which would also count the padding of a row
            eos_token_id=sorted(ends),
            pad_token_id=pad,
            logits_processor=[sampler(sampling, uniforms(seed, rows, length))] if sampling else [],
        )
    for row, new in zip(rows, output[:, input_ids.shape[1] :].tolist(), strict=True):
        end = next((place for place, token in enumerate(new) if token in ends), None)
        row.ended = end is not None
        row.new += new[:end]


@contextlib.contextmanager
def decode_graphs(model: "PreTrainedModel") -> Iterator[None]:
    """Unsloth's decode step replayed as CUDA graphs, bit for bit the same without the host's part of it; off where the
    environment says 0. Its key-value buffers are freed afterwards: the next batch would be planned smaller."""
    if model.device.type != "cuda" or "unsloth" not in sys.modules:
        yield
        return
    from unsloth.models import _decode_graphs as graphs

    before = os.environ.get(GRAPHS), graphs.PREALLOC
    os.environ.setdefault(GRAPHS, "1")
    graphs.PREALLOC = True  # buffers that grow would be captured again at each size
    try:
        yield
    finally:
        environment, graphs.PREALLOC = before
        if environment is None:
            del os.environ[GRAPHS]
        graphs.release_for_training(model)


def sampler(values: dict[str, float], uniforms: np.ndarray) -> Callable:
    """A logits processor that leaves one token per row: drawn by temperature, top-k, top-p, min-p (Hugging Face's order)
    through the inverse of the cumulative distribution, with `uniforms` (rows × steps) as the only randomness."""
    import torch

    columns = iter(uniforms.T)

    def choose(_input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        count = min(int(values["top_k"]) or scores.shape[-1], scores.shape[-1])  # 0 means all
        top = torch.topk(scores.float() / values["temperature"], count, dim=-1)
        share = top.values.softmax(-1)
        # a token stays while those before it have not reached top_p, so that the first always does
        nucleus = share.cumsum(-1) - share < values["top_p"]
        share = share * (nucleus & (share >= values["min_p"] * share[:, :1]))
        mass = share.cumsum(-1)
        # the inverse of the cumulative distribution: the first token whose mass exceeds the uniform
        draw = torch.as_tensor(next(columns), dtype=mass.dtype, device=mass.device)[:, None] * mass[:, -1:]
        place = (mass <= draw).sum(-1, keepdim=True).clamp(max=count - 1)
        return torch.full_like(scores, float("-inf")).scatter(-1, top.indices.gather(-1, place), 0.0)

    return choose


def uniforms(seed: int, rows: Sequence[Row], steps: int) -> np.ndarray:
    """(rows, steps): the next numbers of each row's own stream, from where its last part ended."""
    drawn = []
    for row in rows:
        stream = np.random.Generator(np.random.Philox([seed, row.number]))
        drawn.append(stream.random(len(row.new) + steps)[len(row.new) :])
    # 1 - 2^-24 at most: a uniform that rounds to 1.0 in float32 would fall off the end of the distribution
    return np.minimum(np.stack(drawn), 1 - 2.0**-24)
