"""What a run holds on the GPU, in RAM and on disk, part by part: arithmetic on a model's shape.

    memory.parts(memory.Settings(longest=2048), shapes.facts("4B"))["training"]     # {"4-bit weights": 1717986918, …}

Every part's formula and source stands in fit_facts.json, here `WHY`. Sizes are bytes.
"""

import math
from dataclasses import dataclass

from toolkit.fit.shapes import DATA, Facts, lora_tensors, matrices, nf4_bytes, other_parameters, parameters
from toolkit.recipe import Lora

WHY: dict[str, str] = DATA["why"]
GIB = 1024**3
CONTEXT = int(0.4 * GIB)
ROUNDING = 0.012
PROCESS = 3 * GIB
"""RAM of Python with torch, its CUDA libraries and Unsloth imported: an allowance."""
EIGHT_BIT = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
GGUF_BITS = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q6_k": 6.57, "q5_k_m": 5.7, "q4_k_m": 4.9, "q4_0": 4.6}


@dataclass(frozen=True)
class Settings:
    """What of a run decides its memory; names as in the recipe."""

    longest: int = 4096
    """Tokens of the longest row that trains: the compiled mix knows it, max_seq_length bounds it."""
    per_device_train_batch_size: int = 2
    gradient_accumulation_steps: int = 4
    per_device_eval_batch_size: int = 2
    longest_validation: int = 4096
    generation_batch: int = 32
    prompt_tokens: int = 512
    max_new_tokens: int = 1024
    r: int = 16
    target_modules: tuple[str, ...] = Lora.target_modules
    optim: str = "adamw_8bit"
    load_in_4bit: bool = True
    use_gradient_checkpointing: str | bool = "unsloth"
    bytes_per_logit: int = 0
    """0: Unsloth's fused loss. Otherwise all logits exist: 2 in 16-bit, 14 in an eager loss without Unsloth."""
    converted_at_load: bool = False
    """True for transformers 4 on cards without bf16 (T4): the checkpoint was turned into fp16 on the card."""
    quantization_method: tuple[str, ...] = ("q8_0",)


def _weights(s: Settings, m: Facts) -> dict[str, float]:
    lora = {"LoRA": 4 * sum(lora_tensors(m, s.r, s.target_modules))}
    if not s.load_in_4bit:
        return {"4-bit weights": 0, "16-bit modules": 2 * parameters(m)} | lora
    return {"4-bit weights": nf4_bytes(m), "16-bit modules": 2 * (other_parameters(m) + m.kept)} | lora


def optimizer_bytes(tensors: list[int], optim: str) -> int:
    """8-bit states, never below the 32,768 bytes of the largest tensor that stays in 32-bit; other optimizers: 2 x 32-bit."""
    if optim not in EIGHT_BIT:
        return 8 * sum(tensors)
    return sum(max(2 * n + 8 * math.ceil(n / 256), 32768) if n >= 4096 else 8 * n for n in tensors)


def _dequantized(s: Settings, m: Facts) -> float:
    largest = max(math.prod(shape) for shape in matrices(m).values())
    return largest * (2 * 2 + 4 / 64) if s.load_in_4bit else 0


def _mlp(m: Facts) -> int:
    """Elements a token holds inside the MLP: gate, up and their product; experts also copy their inputs and outputs."""
    routed = m.num_experts_per_tok
    return routed * (3 * m.intermediate_size + 2 * m.hidden_size) if routed else 3 * m.intermediate_size


def _layer_inputs(s: Settings, m: Facts, tokens: int) -> float:
    """What stays on the card of every layer between forward and backward."""
    one, layers = 2 * tokens * m.hidden_size, m.num_hidden_layers
    if (
        s.use_gradient_checkpointing == "unsloth"
    ):  # up to 2 MiB nothing is offloaded; then two buffers and the last layer
        return min(layers * one, max(3 * one, layers * 2 * 1024**2))
    if s.use_gradient_checkpointing:
        return layers * one
    return 2 * tokens * layers * (6 * m.hidden_size + 3 * m.q_dim + 3 * m.kv_dim + _mlp(m))


def loss_bytes(s: Settings, m: Facts, tokens: int) -> float:
    hidden_gradient = 2 * tokens * m.hidden_size
    if s.bytes_per_logit:
        return tokens * m.vocab_size * s.bytes_per_logit + hidden_gradient
    tile = min(tokens, 4096)
    chunk = min(max(min(tokens, 512) * m.vocab_size, tokens * m.hidden_size), 4096 * m.vocab_size, GIB // 2)
    return 4 * max(chunk, tile * 16384) + 4 * tile * m.hidden_size + hidden_gradient


def _worse(*moments: dict[str, float]) -> dict[str, float]:
    return max(moments, key=lambda moment: sum(moment.values()))


def _training(s: Settings, m: Facts) -> dict[str, float]:
    """The worse of two moments: the loss, where logits exist, or the backward of one layer's MLP."""
    tokens = s.per_device_train_batch_size * s.longest
    inputs, dequantized = _layer_inputs(s, m, tokens), _dequantized(s, m)
    layer = 2 * tokens * (8 * m.hidden_size + 3 * m.q_dim + 3 * m.kv_dim + _mlp(m)) + 4 * tokens * m.num_attention_heads
    at_loss = {"activations": inputs + 6 * tokens * m.hidden_size, "logits and loss": loss_bytes(s, m, tokens)}
    return _worse(
        at_loss | {"dequantized weights": dequantized / 2},
        {"activations": inputs + layer, "logits and loss": 0, "dequantized weights": dequantized},
    )


def _forward(m: Facts, batch: int, length: int) -> float:
    """One layer without gradients; a padded batch also carries a mask and its keys and values once per query head."""
    per_token = 5 * m.hidden_size + 5 * m.q_dim + 3 * m.kv_dim + _mlp(m)
    return 2 * batch * length * per_token + 3 * batch * length**2


def _evaluation(s: Settings, m: Facts) -> dict[str, float]:
    tokens = s.per_device_eval_batch_size * s.longest_validation
    layer = _forward(m, s.per_device_eval_batch_size, s.longest_validation)
    at_loss = {"activations": 6 * tokens * m.hidden_size, "logits and loss": loss_bytes(s, m, tokens)}
    return _worse(at_loss, {"activations": layer, "logits and loss": 0}) | {"dequantized weights": _dequantized(s, m)}


def _generation(s: Settings, m: Facts) -> dict[str, float]:
    cached = s.generation_batch * (2 * s.prompt_tokens + max(s.max_new_tokens, 512))
    return {
        "activations": _forward(m, s.generation_batch, s.prompt_tokens),
        "dequantized weights": _dequantized(s, m),
        "logits and loss": 26 * s.generation_batch * m.vocab_size,
        "KV cache": 4 * m.num_hidden_layers * m.kv_dim * cached,
    }


def _closed(parts: dict[str, float], left_behind: float = 0) -> dict[str, int]:
    whole = {name: math.ceil(size) for name, size in parts.items()}
    whole["fragmentation"] = math.ceil(ROUNDING * sum(whole.values()) + left_behind)
    return whole | {"CUDA context": CONTEXT}


def parts(s: Settings, m: Facts) -> dict[str, dict[str, int]]:
    """Phase → part → bytes on the GPU at that phase's worst moment. Merging needs none: it runs in RAM."""
    weights, tensors = _weights(s, m), lora_tensors(m, s.r, s.target_modules)
    converted = 2 * m.vocab_size * m.hidden_size if s.converted_at_load else 0
    optimizer = {"optimizer": optimizer_bytes(tensors, s.optim)}
    gradients = {"gradients": 4 * sum(tensors)}
    return {
        "load": _closed(weights | {"load buffer": max(0, converted - weights["LoRA"])}),
        "training": _closed(weights | gradients | optimizer | _training(s, m), converted),
        "evaluation": _closed(weights | optimizer | _evaluation(s, m), converted),
        "generation": _closed(weights | optimizer | _generation(s, m), converted),
    }


def ram(s: Settings, m: Facts) -> dict[str, int]:
    """Training offloads every layer's input; merging holds the model in 16-bit and one matrix twice in float32."""
    tokens = s.per_device_train_batch_size * s.longest * (s.use_gradient_checkpointing == "unsloth")
    largest = max(inputs * outputs for inputs, outputs, _ in matrices(m).values())
    training = PROCESS + 2 * tokens * m.hidden_size * m.num_hidden_layers
    return {"training": training, "merge": PROCESS + 2 * parameters(m) + 8 * largest}


def disk(s: Settings, m: Facts) -> dict[str, int]:
    """The download, the adapter, and for export the 16-bit download, the merged model and each GGUF."""
    weights = _weights(s, m)
    ggufs = {f"gguf {q}": math.ceil(parameters(m) * GGUF_BITS.get(q, 16) / 8) for q in s.quantization_method}
    base = {"base": math.ceil(weights["4-bit weights"] + weights["16-bit modules"]), "adapter": weights["LoRA"]}
    return base | {"base in 16-bit": 2 * parameters(m), "merged": 2 * parameters(m)} | ggufs
