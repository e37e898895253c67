"""Rules copied from llama.cpp: which models it computes, and in which type and layout it expects each tensor.

convertible(read_json(folder / "config.json"), read_json(folder / "tokenizer.json")); use_more_bits(0, 28)
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.export.checkpoint import ModelConfig, full_config
from toolkit.export.tokenizer import NAMED_TEMPLATES, TokenizerJson, tokens_beyond
from toolkit.family import family_of
from toolkit.files import ToolkitError, read_json
from toolkit.recipe import QUANTS
from toolkit.records import JsonObject

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

# llama.cpp, src/llama-quant.cpp: llama_tensor_get_type. Compared with llama_model_quantize itself on 28- and 36-layer
# shapes, tied and untied: data_recipes/measured/gguf_parity.json.
MORE_BITS = {"Q5_K": "Q6_K", "Q4_K": "Q6_K"}
"""What output.weight gets (or the embedding where it is the head too), and attn_v and ffn_down in some layers."""
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""Types for rows that are no multiple of 256."""
LAYERS_OF_70B = 80

ROPE_TYPES = ("default", "linear", "yarn", "llama3")
YARN_DEFAULTS = {
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
    "truncate": True,
    "beta_fast": 32,
    "beta_slow": 1,
}
"""Settings of YaRN that llama.cpp does not read, and the values that it computes with."""
NOT_COMPUTED = ("attention_bias", "mlp_bias", "use_sliding_window", "attn_logit_softcapping")
WAY_OUT = (
    "Merged weights (--to merged) work; for a GGUF have llama.cpp (github.com/ggml-org/llama.cpp) in a folder and run "
    "its convert_hf_to_gguf.py on the merged folder"
)

QWEN_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
QWEN_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    QWEN_WORDS + r"\p{N}" + QWEN_REST: "qwen2",
    QWEN_WORDS + r"\p{N}{1,3}" + QWEN_REST: "llama-bpe",
    "Digits": "smollm",
}
"""How tokenizer.json splits text before a byte-level BPE → llama.cpp's name for it (src/llama-vocab.cpp)."""
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
"""The normalizer of SentencePiece's layout."""


# --- which models ----------------------------------------------------------------------------------------------------


def convertible(
    config: ModelConfig, tokenizer: TokenizerJson | None = None, templates: Sequence[str] = ()
) -> str | None:
    """Why a model cannot become a GGUF file here, with the way out; None if it can.

    `config` is config.json, `tokenizer` tokenizer.json (without it the vocabulary is not looked at), `templates` the names of
    the chat templates, where there are several."""
    kind = config.get("model_type", "unknown")
    if family_of(kind).gguf is None or "text_config" in config:
        return f"model type {kind!r} is not among those converted here. {WAY_OUT}"
    reason = not_computed(full_config(config)) or (not_tokenized(tokenizer) if tokenizer else None)
    if not reason and templates:
        reason = f"it has several chat templates ({', '.join(templates)}), a GGUF one: keep chat_template.jinja alone"
    return reason and f"{reason}. {WAY_OUT}"


def not_computed(config: "PreTrainedConfig") -> str | None:
    """What llama.cpp's graph of this architecture does not compute."""
    rope = rope_parameters(config)
    # what it says of each: (value, those that are computed)
    facts: dict[str, tuple[Any, tuple]] = {
        **{key: (getattr(config, key, None), (None, False)) for key in NOT_COMPUTED},
        **{f"YaRN {key}": (rope.get(key), (None, default)) for key, default in YARN_DEFAULTS.items()},
        "rope type": (rope["rope_type"], ROPE_TYPES),
        "partial_rotary_factor": (rope.get("partial_rotary_factor"), (None, 1)),
    }
    if config.model_type == "gemma3_text":
        # llama.cpp derives the scale from the head size, in its 62-layer model (27B) from the hidden size
        scale = config.hidden_size / config.num_attention_heads if config.num_hidden_layers == 62 else config.head_dim
        facts["query_pre_attn_scalar"] = (config.query_pre_attn_scalar, (scale,))
        facts["activation"] = (config.hidden_activation, ("gelu_pytorch_tanh",))
    else:
        facts["activation"] = (config.hidden_act, ("silu",))
    for key, (value, computed) in facts.items():
        if value not in computed:
            return f"config.json: {key} {value!r} is not converted here"
    return None


def rope_parameters(config: "PreTrainedConfig") -> JsonObject:
    """Position parameters; where layers differ (Gemma 3) those of full attention."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def pre_tokenizer(tokenizer: TokenizerJson) -> str | None:
    """llama.cpp's `tokenizer.ggml.pre` for a tokenizer.json; "default" for SentencePiece's layout, None if unknown."""
    if tokenizer["model"].get("byte_fallback"):
        return "default" if tokenizer["normalizer"] == SPACES and tokenizer["model"]["merges"] else None
    # one step, or a sequence of which the last turns bytes into letters
    outer = tokenizer["pre_tokenizer"] or {}
    steps = outer.get("pretokenizers", [outer])
    if steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    return PRE_TOKENIZERS.get(steps[0].get("pattern", {}).get("Regex", steps[0]["type"]))


def not_tokenized(tokenizer: TokenizerJson) -> str | None:
    """What llama.cpp's tokenizers do not do with a text, of what a tokenizer.json asks for."""
    if pre_tokenizer(tokenizer) is None:
        return "its pre-tokenizer is none that llama.cpp is known to have"
    outer = tokenizer.get("normalizer") or {"normalizers": []}
    for step in outer.get("normalizers", [outer]):
        # llama.cpp leaves NFC out for every model that has it: composed text, as people type it, is the same
        if step["type"] != "NFC" and step != SPACES:
            return f"its normalizer {step['type']} changes texts before they are tokenized, which llama.cpp does not"
    for token in tokenizer["added_tokens"]:
        if token["special"] and (token.get("lstrip") or token.get("rstrip")) and "mask" not in token["content"]:
            return (
                f"its token {token['content']} takes in the blanks beside it (lstrip, rstrip), in llama.cpp it does not"
            )
    return None


def template_names(settings: JsonObject) -> list[str]:
    """The names of a tokenizer's chat templates where its tokenizer_config.json has several."""
    named = settings.get("chat_template")
    return [template["name"] for template in named] if isinstance(named, list) else []


def check_tokenizer(config: ModelConfig, folder: Path, *, gguf: bool) -> None:
    """Raises ToolkitError, with the way out, where a model and the tokenizer in a folder do not fit each other, or llama.cpp."""
    tokenizer = read_json(folder / "tokenizer.json")
    reason = tokens_beyond(tokenizer, config)
    if gguf and not reason:
        templates = template_names(read_json(folder / "tokenizer_config.json"))
        templates += [file.stem for file in folder.glob(f"{NAMED_TEMPLATES}/*.jinja")]
        reason = convertible(config, tokenizer, templates)
    if reason:
        raise ToolkitError(f"{folder}: {reason}")


def check_quant(quant: str) -> None:
    """Raises ToolkitError for a quantization that is not made here."""
    if "=" in quant:
        raise ToolkitError(
            f"{quant}: a finished run takes no overrides, and --quant one or more of {', '.join(QUANTS)}"
        )
    if quant not in QUANTS:
        raise ToolkitError(
            f"quantization {quant!r}: expected one of {', '.join(QUANTS)}. For others export f16 and run llama.cpp's "
            "llama-quantize on that file"
        )


# --- tensors ---------------------------------------------------------------------------------------------------------


def use_more_bits(layer: int, layers: int) -> bool:
    """llama.cpp: the first and the last eighth of the layers, and every third in between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def tensor_type(name: str, shape: tuple[int, ...], quant: str, config: ModelConfig, tied: bool) -> str:
    """The type llama.cpp would store a tensor in (`name` is GGUF's, `shape` PyTorch's)."""
    # norms and biases, as in every file of llama.cpp
    if len(shape) == 1:
        return "F32"
    kind = QUANTS[quant]
    part = re.fullmatch(r"blk\.(\d+)\.(attn_v|ffn_down)\.weight", name)
    head = name == "output.weight" or (name == "token_embd.weight" and tied)
    if head or (part and use_more_bits(int(part[1]), config["num_hidden_layers"])):
        kind = MORE_BITS.get(kind, kind)
    elif part and part[2] == "attn_v" and kind == "Q4_K" and is_70b(config):
        kind = "Q5_K"  # eight heads share it, so it is small and more bits cost little
    if shape[-1] % 256:  # K-quants come in blocks of 256
        kind = FALLBACK.get(kind, kind)
    return "F16" if kind.startswith("Q") and shape[-1] % 32 else kind


def is_70b(config: ModelConfig) -> bool:
    """What llama.cpp takes for a 70B (src/llama-model.cpp: LLM_TYPE_70B), of any width."""
    if config["num_hidden_layers"] != LAYERS_OF_70B:
        return False
    grouped = config.get("num_key_value_heads", config["num_attention_heads"]) != config["num_attention_heads"]
    return config["model_type"] == "qwen2" or (config["model_type"] == "llama" and grouped)


def gguf_names(config: ModelConfig, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(stored name, GGUF name) by gguf's map of the architecture. Raises ToolkitError for a tensor it lacks."""
    import gguf

    # the official package holds the names of every architecture
    arch = family_of(config["model_type"]).gguf or ""
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config["num_hidden_layers"])
    for stored in names:
        new = known.get_name(stored, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise ToolkitError(f"{stored}: llama.cpp's {arch} has no such tensor; is this another architecture?")
        yield stored, new


def converted(config: ModelConfig, name: str, tensor: "torch.Tensor") -> "torch.Tensor":
    """The values llama.cpp's graph expects (its convert_hf_to_gguf.py, modify_tensors), from those stored."""
    family = family_of(config["model_type"]).gguf
    if family == "gemma3" and name.endswith("norm.weight"):
        return tensor.float() + 1  # Gemma multiplies by 1 + weight
    projection = re.search(r"\.self_attn\.([qk])_proj\.", name)
    if family == "llama" and projection:  # rotated in neighbouring pairs there, in halves here
        heads = config["num_attention_heads"]
        if projection[1] == "k":
            heads = config.get("num_key_value_heads") or heads
        return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    return tensor


def rope_factors(config: ModelConfig) -> "torch.Tensor | None":
    """Llama 3.1's stretched positions as llama.cpp takes them: plain frequencies by stretched ones, (head_dim / 2,)."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    full = full_config(config)
    rope = rope_parameters(full)
    if rope["rope_type"] != "llama3":
        return None
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](full, "cpu")
    # in float64, rounded once at the end
    steps = torch.arange(len(stretched), dtype=torch.float64) / len(stretched)
    return (rope["rope_theta"] ** -steps / stretched.double()).float()
