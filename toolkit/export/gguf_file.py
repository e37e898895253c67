"""A folder of safetensors becomes a GGUF file, and an adapter a GGUF LoRA: pip packages only, no compiler.

write_gguf(Checkpoint(run / "merged"), run / "gguf" / "hybrid.q4_k_m.gguf", "q4_k_m", "hybrid")
"""

import ctypes
import functools
import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from toolkit.data.render import load_chat
from toolkit.evaluation.generate import closing_token, modes_of
from toolkit.export.merge import Adapter, Merged, filled, generation_config, load_tokenizer, progress, stop_tokens
from toolkit.family import family_of, mode_title, sampling_of
from toolkit.files import ToolkitError, complete, read_json
from toolkit.recipe import QUANTS, load

OLLAMA = "0.30.0"
"""The first Ollama that uses the chat template inside the GGUF when the Modelfile names no RENDERER."""
CHUNK = 1 << 22
"""Values converted at a time by a thread: 16 MB in fp32, whatever the size of the model."""


# llama.cpp, src/llama-quant.cpp: llama_tensor_get_type. Compared with llama_model_quantize itself on 28- and 36-layer
# shapes, tied and untied: data_recipes/measured/gguf_parity.json.
MORE_BITS = {"Q5_K": "Q6_K", "Q4_K": "Q6_K"}
"""What output.weight gets (or the embedding where it is the head too), and attn_v and ffn_down in some layers."""
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""GGML types that PyTorch has too."""
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
ROPE_TYPES = ("default", "linear", "yarn", "llama3")
YARN = {
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
SPLITS = {
    QWEN_WORDS + r"\p{N}" + QWEN_REST: "qwen2",
    QWEN_WORDS + r"\p{N}{1,3}" + QWEN_REST: "llama-bpe",
    "Digits": "smollm",
}
"""How tokenizer.json splits text before a byte-level BPE → llama.cpp's name for it (src/llama-vocab.cpp)."""


def convertible(config: dict, tokenizer: dict | None = None) -> str | None:
    """Why a model cannot become a GGUF file here, with the way out; None if it can.

    `config` is config.json, `tokenizer` the content of tokenizer.json (without it the vocabulary is not looked at)."""
    kind = config.get("model_type", "unknown")
    if family_of(kind).gguf is None or "text_config" in config:
        reason = f"model type {kind!r} is not among those converted here"
    else:
        reason = _unsupported(_full_config(config))
    if reason is None and tokenizer is not None and pre_tokenizer(tokenizer) is None:
        reason = "its pre-tokenizer is none that llama.cpp is known to have"
    return reason and f"{reason}. {WAY_OUT}"


def check_supported(model) -> None:
    """Raises ToolkitError, with the way out, for a Checkpoint or Merged that cannot be converted."""
    if reason := convertible(model.config):
        raise ToolkitError(f"{model.folder}: {reason}")


def _full_config(config: dict):
    """config.json with transformers' defaults, old and new spellings alike."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**config)


def _unsupported(config) -> str | None:
    """What llama.cpp's graph of this architecture does not compute."""
    found = {key: getattr(config, key, None) for key in NOT_COMPUTED}
    rope, activation = _rope(config), getattr(config, "hidden_activation", None) or config.hidden_act
    if rope["rope_type"] not in ROPE_TYPES:
        found["rope type"] = rope["rope_type"]
    if activation != ("gelu_pytorch_tanh" if config.model_type == "gemma3_text" else "silu"):
        found["activation"] = activation
    found |= {f"YaRN {key}": str(rope[key]) for key, usual in YARN.items() if rope.get(key, usual) not in (usual, None)}
    if config.model_type == "gemma3_text":
        # llama.cpp derives the scale from the head size, in its 62-layer model (27B) from the hidden size
        shared = config.hidden_size / config.num_attention_heads
        scale = shared if config.num_hidden_layers == 62 else config.head_dim
        found["query_pre_attn_scalar"] = config.query_pre_attn_scalar if config.query_pre_attn_scalar != scale else None
    return next((f"config.json: {key} {value!r} is not converted here" for key, value in found.items() if value), None)


def _rope(config) -> dict:
    """Position parameters; where layers differ (Gemma 3) those of full attention."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def use_more_bits(layer: int, layers: int) -> bool:
    """llama.cpp: the first and the last eighth of the layers, and every third in between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def tensor_type(name: str, shape: tuple[int, ...], quant: str, layers: int, tied: bool) -> str:
    """The type llama.cpp would store a tensor in (`name` is GGUF's, `shape` PyTorch's)."""
    # norms and biases, as in every file of llama.cpp
    if len(shape) == 1:
        return "F32"
    kind, part = QUANTS[quant], re.fullmatch(r"blk\.(\d+)\.(?:attn_v|ffn_down)\.weight", name)
    head = name == "output.weight" or (name == "token_embd.weight" and tied)
    if head or (part and use_more_bits(int(part[1]), layers)):
        kind = MORE_BITS.get(kind, kind)
    if shape[-1] % 256:  # K-quants come in blocks of 256
        kind = FALLBACK.get(kind, kind)
    return "F16" if kind.startswith("Q") and shape[-1] % 32 else kind


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


@dataclass
class Planned:
    """A tensor on its way into a GGUF file."""

    name: str
    shape: tuple[int, ...]
    kind: str
    """GGML type."""
    values: Callable
    """Reads or computes the values, as llama.cpp's graph expects them."""

    @property
    def bytes(self) -> int:
        import gguf

        return math.prod(gguf.quant_shape_to_byte_shape(self.shape, gguf.GGMLQuantizationType[self.kind]))


def plan_tensors(model, quant: str) -> list[Planned]:
    """Every tensor of a file, in the checkpoint's order."""
    config, plan = model.config, []
    for stored, name in gguf_names(config, model.shapes):
        shape = model.shapes[stored]
        kind = tensor_type(name, shape, quant, config["num_hidden_layers"], model.tied)
        plan.append(Planned(name, shape, kind, functools.partial(_values, model, stored)))
    factors = rope_factors(config)
    if factors is not None:
        plan.append(Planned("rope_freqs.weight", tuple(factors.shape), "F32", lambda: factors))
    return plan


def _values(model, stored: str):
    return converted(model.config, stored, model.tensor(stored))


def gguf_names(config: dict, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(stored name, GGUF name) by gguf's map of the architecture. Raises ToolkitError for a tensor it lacks."""
    import gguf

    arch = family_of(config["model_type"]).gguf
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config["num_hidden_layers"])
    for stored in names:
        new = known.get_name(stored, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise ToolkitError(f"{stored}: llama.cpp's {arch} has no such tensor; is this another architecture?")
        yield stored, new


def converted(config: dict, name: str, tensor):
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


def write_gguf(
    model, path: Path, quant: str, name: str, tokenizer: Path | None = None, say: Callable[[str], None] = lambda _: None
) -> None:
    """Write `path`, a tensor at a time, from a Checkpoint or a Merged.

    `tokenizer` is the folder of tokenizer and template (the model's own by default). Raises ToolkitError for a model
    that cannot be converted."""
    import gguf

    check_supported(model)
    # the header first: GGUF states names, types and places of all tensors before the first of them
    writer, plan = header(model, tokenizer or model.folder, quant, name, path), plan_tensors(model, quant)
    for tensor in plan:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for tensor in progress(plan, lambda t: t.bytes, f"writing {quant}", say):
                writer.write_tensor_data(_encode_whole(tensor.values(), tensor.kind, pool))
    finally:
        writer.close()


def write_lora_gguf(lora: Adapter, config: dict, path: Path) -> None:
    """Write a PEFT adapter as a GGUF LoRA (F32) for the GGUF of its base, whose config.json is `config`.

    llama.cpp multiplies the factors by alpha / rank."""
    import gguf

    with complete(path) as partial:
        writer = gguf.GGUFWriter(partial, family_of(config["model_type"]).gguf)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, lora.scaling * lora.config["r"])
        for stored, name in gguf_names(config, sorted(lora.factors)):
            a, b = lora.factors[stored]
            writer.add_tensor(f"{name}.lora_a", a.numpy())
            writer.add_tensor(f"{name}.lora_b", converted(config, stored, b).contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _encode_whole(tensor, kind: str, pool: ThreadPoolExecutor) -> np.ndarray:
    """The tensor's bytes in GGML type `kind`, a few rows at a time: (rows, bytes of a row)."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    # in parts: float32 copies of a whole embedding would take gigabytes
    step = max(1, CHUNK // rows.shape[1])
    parts = pool.map(lambda start: encode(rows[start : start + step], kind), range(0, len(rows), step))
    return np.concatenate(list(parts))


def encode(rows, kind: str) -> np.ndarray:
    """Rows of a torch tensor → rows of bytes in a GGML type."""
    import gguf
    import torch

    if kind in PLAIN:
        stored = rows.to(getattr(torch, PLAIN[kind]))
        if kind == "F16" and not stored.isfinite().all():
            raise ToolkitError("a weight is too large for F16: export bf16 or q8_0 instead of f16")
        return stored.contiguous().view(torch.uint8).numpy()
    values = rows.float().contiguous().numpy()
    code = gguf.GGMLQuantizationType[kind]
    out = np.empty(gguf.quant_shape_to_byte_shape(values.shape, code), np.uint8)
    written = _ggml()(int(code), values.ctypes.data, out.ctypes.data, 0, *values.shape, None)
    if written != out.nbytes:
        raise ToolkitError(f"ggml_quantize_chunk wrote {written} bytes for {kind}, expected {out.nbytes}")
    return out


@functools.cache
def _ggml():
    """llama.cpp inside xllamacpp. The symbol is exported, not promised: the version is pinned and a test uses it."""
    library = ctypes.CDLL(importlib.util.find_spec("xllamacpp.xllamacpp").origin)
    function = library.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return function


def header(model, tokenizer: Path, quant: str, name: str, path: Path | None = None):
    """A GGUFWriter that holds every key of the header and no tensor; `.kv_data[0]` is what a file must say."""
    import gguf

    config = _full_config(model.config)
    writer = gguf.GGUFWriter(path, family_of(config.model_type).gguf)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type("model")
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(sum(map(math.prod, model.shapes.values())), 0, 0, 0))
    sizes = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "key_length": head,
        "value_length": head,
        "layer_norm_rms_eps": config.rms_norm_eps,
    }
    for key, value in sizes.items():  # gguf's writer has a method for each key, named after it
        getattr(writer, f"add_{key}")(value)
    _positions(writer, config)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{quant.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _vocabulary(writer, tokenizer, config.vocab_size)
    return writer


def _positions(writer, config) -> None:
    """Rotary positions, and Gemma 3's layers that see only a window."""
    import gguf

    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if config.model_type == "gemma3_text":
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)


def rope_factors(config: dict):
    """Llama 3.1's stretched positions as llama.cpp takes them: plain frequencies by stretched ones, (head_dim / 2,)."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    full = _full_config(config)
    if _rope(full)["rope_type"] != "llama3":
        return None
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](full, "cpu")
    steps = torch.arange(len(stretched), dtype=torch.float64) / len(stretched)
    return (_rope(full)["rope_theta"] ** -steps / stretched.double()).float()


def pre_tokenizer(tokenizer: dict) -> str | None:
    """llama.cpp's `tokenizer.ggml.pre` for a tokenizer.json; "default" for SentencePiece's layout, None if unknown."""
    if tokenizer["model"].get("byte_fallback"):
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        return "default" if tokenizer["normalizer"] == spaces and tokenizer["model"]["merges"] else None
    outer = tokenizer["pre_tokenizer"] or {}
    steps = outer.get("pretokenizers", [outer])
    if steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    first = steps[0]
    return SPLITS.get(first["pattern"].get("Regex") if first["type"] == "Split" else first["type"])


def _vocabulary(writer, folder: Path, size: int) -> None:
    """Tokens, types, merges or scores, special ids and the chat template; ids beyond the tokenizer are unused."""
    import gguf

    tokenizer = read_json(folder / "tokenizer.json")
    pre = pre_tokenizer(tokenizer)
    if pre is None:
        raise ToolkitError(f"{folder / 'tokenizer.json'}: llama.cpp is not known to have its pre-tokenizer. {WAY_OUT}")
    # SentencePiece's layout: whole pieces with scores in place of bytes with merges
    pieces = pre == "default"
    # the embedding of most models has more rows than the tokenizer has tokens
    if (last := max([*tokenizer["model"]["vocab"].values(), *(t["id"] for t in tokenizer["added_tokens"])])) >= size:
        raise ToolkitError(
            f"{folder / 'tokenizer.json'}: has a token {last}, the model's embedding {size} rows: tokens were added without "
            "resize_token_embeddings"
        )
    tokens, types = [f"[PAD{i}]" for i in range(size)], [gguf.TokenType.UNUSED] * size
    for token, i in tokenizer["model"]["vocab"].items():
        byte = pieces and re.fullmatch(r"<0x[0-9A-F]{2}>", token)
        tokens[i], types[i] = token, gguf.TokenType.BYTE if byte else gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        text, i = added["content"], added["id"]
        control = added["special"] or re.fullmatch(r"<\|.*\|>", text)
        types[i] = gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED
        # llama.cpp looks for these in the raw text, before spaces become ▁
        tokens[i] = text.replace("▁", " ") if pieces and not control else text
    unknown = tokenizer["model"].get("unk_token")
    if pieces and unknown:
        types[tokens.index(unknown)] = gguf.TokenType.UNKNOWN
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    if pieces:
        writer.add_token_scores(_scores(tokenizer, size))
        writer.add_add_space_prefix(False)
    writer.add_token_types(types)
    _special(folder, size, merges=not pieces).add_to_gguf(writer, quiet=True)


def _scores(tokenizer: dict, size: int) -> list[float]:
    """SentencePiece scores: llama.cpp joins the pair whose piece scores highest, tokenizers the pair ranked first.

    All pairs that make one piece have neighbouring ranks, so a piece's first rank orders them alike."""
    scores = {}
    for rank, merge in enumerate(tokenizer["model"]["merges"]):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        scores.setdefault("".join(pair), -float(rank))
    by_id = {i: scores.get(token, 0.0) for token, i in tokenizer["model"]["vocab"].items()}
    return [by_id.get(i, 0.0) for i in range(size)]


def _special(folder: Path, size: int, merges: bool):
    """gguf's reading of special ids, merges and template, with what it leaves to llama.cpp's defaults stated."""
    import gguf

    special = gguf.SpecialVocab(folder, load_merges=merges, n_vocab=size)
    special.chat_template = chat_template(folder)
    # llama.cpp adds one where the header is silent, and the prompt would begin otherwise than in training
    special.add_special_token = {"bos": False} | special.add_special_token
    end = closing_token(load_tokenizer(folder))
    # both end generation in llama.cpp
    if special.special_token_ids.get("eos") != end:
        special.special_token_ids["eot"] = end
    return special


def chat_template(folder: Path) -> str:
    """The inference template. TRL's training variants carry {% generation %}, which no other program understands."""
    text = load_chat(str(folder)).template_text
    if not text or re.search(r"{%-?\s*generation\b", text):
        raise ToolkitError(
            f"{folder}: {'a training' if text else 'no'} chat template; expected the model's inference "
            "template in chat_template.jinja (copy it from the base model's folder)"
        )
    return text


class GgufFile:
    """A GGUF read back, memory-mapped. Opened once: the vocabulary makes opening take seconds."""

    def __init__(self, path: Path):
        import gguf

        reader = gguf.GGUFReader(path)
        self.fields = reader.fields
        self.tensors = {t.name: t for t in reader.tensors}

    def value(self, key: str):
        """A key of the header, None where the file has no such key."""
        return self.fields[key].contents() if key in self.fields else None


def gguf_path(run: Path, quant: str) -> Path:
    return run / "gguf" / f"{run.resolve().name}.{quant}.gguf"


def written_files(run: Path) -> list[Path]:
    """The GGUF files that `export` wrote and that are still there, whatever else lies beside them; the folder may have been
    renamed since. All there are where it left no record."""
    if not (run / "export.json").is_file():
        return sorted((run / "gguf").glob("*.gguf"))
    names = read_json(run / "export.json")["files"]
    return [run / name for name in names if name.endswith(".gguf") and (run / name).is_file()]


def modelfile(run: Path, merged: Merged, tokenizer) -> str:
    """An Ollama Modelfile for the smallest GGUF of a run: stop tokens, context, and the family's sampling by mode."""
    recipe, generation = run / "recipe.yaml", generation_config(merged, tokenizer)
    wanted = load(recipe).model.max_seq_length if recipe.is_file() else 8192
    family = family_of(merged.config["model_type"])
    smallest = min(written_files(run), key=lambda path: path.stat().st_size)
    values = {
        "ollama": OLLAMA,
        "name": smallest.name.rsplit(".", 2)[0],  # not the folder's, which may be renamed
        "smallest": smallest.name,
        "stops": map(tokenizer.decode, sorted({*stop_tokens(generation, merged.config), closing_token(tokenizer)})),
        "context": min(merged.config["max_position_embeddings"], max(4096, wanted)),
        "penalty": generation.get("repetition_penalty"),
        "modes": {mode_title(mode): sampling_of(family, mode, generation) for mode in modes_of(tokenizer)},
    }
    return filled("Modelfile", values)
