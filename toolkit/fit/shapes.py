"""The shape of a Qwen3: parameters, 4-bit and LoRA sizes, from config.json facts that ship with the package.

shapes.parameters(shapes.facts("unsloth/Qwen3-4B"))     # 4022468096
"""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit.files import POCKET, ToolkitError, find

DATA = json.loads((Path(__file__).parent / "fit_facts.json").read_text(encoding="utf-8"))
SIZES = tuple(DATA["shapes"])
DENSE = tuple(size for size in SIZES if "-A" not in size)
_KEYS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"
)  # fmt: skip
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Facts:
    """A model's shape, as its config.json names it (`intermediate_size`: of one expert, where there are experts)."""

    name: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    num_experts: int = 0
    num_experts_per_tok: int = 0
    kept: int = 0
    """Linear parameters that the 4-bit checkpoint keeps in 16-bit."""

    @property
    def q_dim(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.num_key_value_heads * self.head_dim


def facts(name: str) -> Facts:
    """Facts of a Hub name (`unsloth/Qwen3-4B`), a size (`4B`), `pocket`, or a local folder or config.json.

    Raises ToolkitError for a model that is neither shipped nor local.
    """
    local = POCKET if name == "pocket" else find(name)
    if local is not None:
        return _from_config(local / "config.json" if local.is_dir() else local)
    sizes = "|".join(re.escape(size) for size in sorted(SIZES, key=len, reverse=True))
    match = re.fullmatch(f"({sizes})", name) or re.search(rf"Qwen3-(?:Coder-)?({sizes})(?=$|-)", name, re.IGNORECASE)
    if match is None:
        raise ToolkitError(
            f"model_name: {name!r}: its memory needs are not known. Known are Qwen3-{', Qwen3-'.join(SIZES)}; "
            "for another Qwen3 give the local folder that holds its config.json"
        )
    shape = DATA["shapes"][match[1].upper()]
    lower = name.lower()
    plain = lower.endswith("-bnb-4bit") and not lower.endswith("-unsloth-bnb-4bit")
    return _build(name, shape, 0 if plain else shape["kept_mlps"])


def _from_config(path: Path) -> Facts:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ToolkitError(f"{path}: expected a model's config.json: {error}") from error
    missing = [key for key in _KEYS if key not in config]
    if missing or not str(config.get("model_type", "")).startswith("qwen3"):
        raise ToolkitError(
            f"{path}: expected a Qwen3 config.json with {', '.join(_KEYS)}; "
            f"model_type is {config.get('model_type')!r}, missing: {', '.join(missing) or 'nothing'}"
        )
    found = _build(str(path.parent), config, 0)
    skipped = (config.get("quantization_config") or {}).get("llm_int8_skip_modules") or []
    return dataclasses.replace(found, kept=sum(module_size(found, name) for name in skipped))


def _build(name: str, config: dict, kept_mlps: int) -> Facts:
    experts = config.get("num_experts", 0)
    values = {key: config[key] for key in _KEYS}
    built = Facts(
        name,
        **values | {"intermediate_size": config["moe_intermediate_size" if experts else "intermediate_size"]},
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        num_experts=experts,
        num_experts_per_tok=config.get("num_experts_per_tok", 0) if experts else 0,
    )
    return dataclasses.replace(built, kept=kept_mlps * module_size(built, "model.layers.0.mlp"))


def matrices(model: Facts) -> dict[str, tuple[int, int, int]]:
    """Linear layers of one decoder layer: name → (inputs, outputs, copies). Experts hold gate and up as one matrix."""
    hidden, inner, experts = model.hidden_size, model.intermediate_size, model.num_experts
    attention = {
        "q_proj": (hidden, model.q_dim, 1),
        "k_proj": (hidden, model.kv_dim, 1),
        "v_proj": (hidden, model.kv_dim, 1),
        "o_proj": (model.q_dim, hidden, 1),
    }
    if experts:
        return attention | {"gate_up_proj": (hidden, 2 * inner, experts), "down_proj": (inner, hidden, experts)}
    return attention | {"gate_proj": (hidden, inner, 1), "up_proj": (hidden, inner, 1), "down_proj": (inner, hidden, 1)}


def module_size(model: Facts, module: str) -> int:
    """Parameters under a name of llm_int8_skip_modules; 0 for names outside the decoder's linear layers."""
    match = re.fullmatch(r"(?:model\.)?layers\.\d+(?:\.(self_attn|mlp))?(?:\.(\w+_proj))?", module)
    if match is None:
        return 0
    sizes = {name: math.prod(shape) for name, shape in matrices(model).items()}
    inside = [name for name in sizes if match[1] is None or (name in _ATTENTION) == (match[1] == "self_attn")]
    return sum(sizes[name] for name in inside if match[2] in (None, name))


def linear_parameters(model: Facts) -> int:
    """Parameters in the decoder's linear layers: what 4-bit loading quantizes."""
    return model.num_hidden_layers * sum(math.prod(shape) for shape in matrices(model).values())


def other_parameters(model: Facts) -> int:
    """Embeddings, an untied lm_head, norms and routers: always 16-bit."""
    hidden = model.hidden_size
    per_layer = 2 * hidden + 2 * model.head_dim + hidden * model.num_experts
    tables = 1 if model.tie_word_embeddings else 2
    return model.num_hidden_layers * per_layer + hidden + tables * model.vocab_size * hidden


def parameters(model: Facts) -> int:
    return linear_parameters(model) + other_parameters(model)


def lora_tensors(model: Facts, r: int, target_modules: Sequence[str]) -> list[int]:
    """Elements of every LoRA matrix: A (r x inputs) and B (outputs x r) of each target in each layer."""
    asked = set(target_modules) | ({"gate_up_proj"} if {"gate_proj", "up_proj"} & set(target_modules) else set())
    per_layer = [n * r * copies for name, (*sides, copies) in matrices(model).items() if name in asked for n in sides]
    return per_layer * model.num_hidden_layers


def nf4_bytes(model: Facts) -> float:
    """NF4 with double quantization: half a byte, 1/64 byte of absmax, a float32 per 64 x 256, tables a matrix."""
    n = linear_parameters(model) - model.kept
    return n / 2 + n / 64 + 4 * n / (64 * 256) + 1092 * model.num_hidden_layers * len(matrices(model))
