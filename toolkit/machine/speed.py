"""How fast a card or this CPU trains: a table of common cards, and two seconds of measuring what is here.

from toolkit.machine import fit, speed; speed.of_card("RTX 3060"), speed.here(fit.shape("pocket"), rows=16, length=128)
"""

import functools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit.files import ToolkitError, did_you_mean
from toolkit.training.model import has_bf16, on_cuda

if TYPE_CHECKING:
    from toolkit.machine.fit import Shape

# What a QLoRA step reaches of a card's rate in large products: dequantizing, norms, attention and launches take the
# rest. A published T4 run of Qwen3-14B (240 rows of about 1,530 tokens, a fifth of padding, in 2,476 s) reaches 0.5.
TRAINING_SHARE = 0.5
# Rows and columns of the product that is timed.
SIDE = 4096
# Bytes that are copied to time memory.
COPIED = 2**28
# How long each is timed.
SECONDS = 0.7
# A step's seconds of those of its parts, which are timed one by one and each get a gradient of their own. With it a
# step of the pocket model is forecast 9% too short (0.64 CPU seconds), one of SmolLM2-135M 17% too long (1.78); two
# shared x86-64 cores, one thread, 2026-11-30.
PARTS_SHARE = 0.88
# Most that one timed repetition computes on a CPU; a longer one is scaled from fewer rows.
CPU_FLOP = 2e10


class Card(NamedTuple):
    """What a data sheet says of a card."""

    gigabytes: float
    """As torch sees it, so that 98% of it can be used: cards with ECC show less than they are sold with."""
    teraflops: float
    """Dense 16-bit products with 32-bit sums, as training makes them, in 10^12 operations a second."""
    gigabytes_per_second: float


# By the part of their name that every driver spells alike. A laptop's card of the same name is slower, by up to a half.
CARDS = {
    # data sheet: 65; at 70 W about half of it lasts
    "T4": Card(15, 30, 320),
    "L4": Card(22.6, 60, 300),
    "A10": Card(24, 70, 600),
    "A100": Card(40, 312, 1555),
    "H100": Card(80, 989, 3350),
    # GeForce: twice the shaders' rate in NVIDIA's architecture papers (Turing, Ampere GA102, Ada, Blackwell)
    "RTX 2060": Card(6, 25.8, 336),
    "RTX 2070": Card(8, 29.9, 448),
    "RTX 2080 Ti": Card(11, 53.8, 616),
    "RTX 3060": Card(12, 25.5, 360),
    "RTX 3060 Ti": Card(8, 32.4, 448),
    "RTX 3070": Card(8, 40.6, 448),
    "RTX 3080": Card(10, 59.5, 760),
    "RTX 3090": Card(24, 71, 936),
    "RTX 4060": Card(8, 30.2, 272),
    "RTX 4060 Ti": Card(16, 44.1, 288),
    "RTX 4070": Card(12, 58.3, 504),
    "RTX 4070 Ti": Card(12, 80.2, 504),
    "RTX 4080": Card(16, 97.5, 717),
    "RTX 4090": Card(24, 165.2, 1008),
    "RTX 5060 Ti": Card(16, 47.4, 448),
    "RTX 5070": Card(12, 61.7, 672),
    "RTX 5070 Ti": Card(16, 87.9, 896),
    "RTX 5080": Card(16, 112.6, 960),
    "RTX 5090": Card(32, 209.6, 1792),
}


@dataclass(frozen=True)
class Speed:
    """What decides how long a run takes."""

    name: str
    training: float
    """Operations a second that a training step reaches."""
    bandwidth: float
    """Bytes of the card's memory a second; 0 on a CPU, where nothing is forecast from it."""
    gigabytes: float = 0.0
    """As it is sold; 0 where it was not named."""
    is_measured: bool = False


def operations(shape: "Shape", length: float, recomputes: bool = True, trains: bool = True) -> float:
    """Floating-point operations for one token of a row of that length.

    A product takes two per weight: forward, the gradient of its input, and forward again where layers are recomputed.
    LoRA needs no gradient of the frozen weights. A token attends to half of its row on average, by two products."""
    passes = 1 + trains + (trains and recomputes)
    attention = 2 * shape.num_hidden_layers * shape.q_dim * length
    head = (1 + trains) * 2 * shape.vocab_size * shape.hidden_size
    return passes * (2 * shape.linear_parameters + attention) + head


def of_card(name: str) -> Speed:
    """The speed of a card by its name, from its data sheet. Raises ToolkitError for a card that the table lacks."""
    words = re.sub(r"[^A-Z0-9]+", " ", name.upper()).strip()
    # `RTX 3060 Ti` before `RTX 3060`
    for known in sorted(CARDS, key=len, reverse=True):
        spelled = known.upper()
        # `rtx4090` too
        is_joined = spelled.replace(" ", "") == words.replace(" ", "")
        if is_joined or re.search(rf"\b{spelled}\b", words):
            card = CARDS[known]
            share = TRAINING_SHARE * 1e12
            return Speed(known, share * card.teraflops, 1e9 * card.gigabytes_per_second, card.gigabytes)
    raise ToolkitError(f"--card {name}: not in the table{did_you_mean(name, CARDS)}")


@functools.cache
def here(shape: "Shape", rows: int, length: int) -> Speed:
    """The speed of the card here, or of this CPU with micro-batches of so many rows and tokens of a model."""
    if on_cuda():
        return measured_card()
    # the operations of one micro-batch, of which a layer and the head are timed on random numbers
    per_token = operations(shape, length, recomputes=False)
    # few rows stand for many where one repetition would take seconds
    timed_rows = max(1, min(rows, int(CPU_FLOP * shape.num_hidden_layers / (per_token * length))))
    layer = seconds_of(layer_pass(shape, timed_rows, length))
    head = seconds_of(head_pass(shape, timed_rows, length))
    seconds = PARTS_SHARE * (shape.num_hidden_layers * layer + head)
    return Speed("this CPU", timed_rows * length * per_token / seconds, 0.0, is_measured=True)


def measured_card() -> Speed:
    """Two seconds on the card here: a large product in its 16-bit type, and a copy within its memory."""
    import torch

    half = torch.bfloat16 if has_bf16() else torch.float16
    matrix = torch.randn(SIDE, SIDE, dtype=half, device="cuda")
    product_seconds = seconds_of(lambda: torch.mm(matrix, matrix), torch.cuda.synchronize)
    block = torch.zeros(COPIED, dtype=torch.uint8, device="cuda")
    copy_seconds = seconds_of(lambda: block.clone(), torch.cuda.synchronize)
    rate = TRAINING_SHARE * 2 * SIDE**3 / product_seconds
    return Speed(torch.cuda.get_device_name(0), rate, 2 * COPIED / copy_seconds, is_measured=True)


def seconds_of(work: Callable[[], Any], finish: Callable[[], None] = lambda: None) -> float:
    """Seconds of one repetition, over about a second."""
    # the first ones compile, choose kernels and warm the memory up
    for _ in range(2):
        work()
    finish()
    began = time.perf_counter()
    repetitions = 0
    while time.perf_counter() - began < SECONDS or repetitions < 2:
        work()
        finish()
        repetitions += 1
    return (time.perf_counter() - began) / repetitions


def layer_pass(shape: "Shape", rows: int, length: int) -> Callable[[], None]:
    """One decoder layer with LoRA, forward and backward, as a training step on a CPU computes it: its parts one by one."""
    import torch
    from torch.nn import functional

    def trained(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, requires_grad=True)

    tokens = rows * length
    heads = shape.num_attention_heads
    # input, weight, LoRA's A and B
    products = [
        (trained(tokens, inputs), torch.randn(outputs, inputs), trained(16, inputs), trained(outputs, 16))
        for _, inputs, outputs, _ in shape.matrices
    ]
    hidden = trained(tokens, shape.hidden_size)
    inner = trained(tokens, shape.intermediate_size)
    queries = trained(rows, heads, length, shape.q_dim // heads)
    # as transformers passes it for padded rows: attention then computes the later tokens, too
    keep = torch.ones(rows, 1, length, length, dtype=torch.bool).tril()

    def both() -> None:
        results = []
        for x, weight, lora_a, lora_b in products:
            added = functional.linear(functional.linear(x, lora_a), lora_b)
            results.append(functional.linear(x, weight) + added)
        # two norms with their residuals, and those of queries and keys, as transformers writes them
        for x in (hidden, hidden, queries, queries):
            squares = x.float().pow(2).mean(-1, keepdim=True)
            results.append(x + x * torch.rsqrt(squares + 1e-6))
        # rotary positions: half of each vector is turned by the other half
        turned = torch.cat((-queries, queries), -1)[..., : queries.shape[-1]]
        rotated = queries * 0.5 + turned * 0.5
        results.append(functional.scaled_dot_product_attention(rotated, rotated, queries, keep))
        results.append(functional.silu(inner) * inner)
        torch.autograd.backward(results, [torch.ones_like(result) for result in results])

    return both


def head_pass(shape: "Shape", rows: int, length: int) -> Callable[[], None]:
    """The logits and their loss, forward and backward."""
    import torch
    from torch.nn import functional

    weight = torch.randn(shape.vocab_size, shape.hidden_size)
    hidden = torch.randn(rows * length, shape.hidden_size, requires_grad=True)
    labels = torch.randint(shape.vocab_size, (rows * length,))

    def both() -> None:
        functional.cross_entropy(functional.linear(hidden, weight), labels).backward()

    return both
