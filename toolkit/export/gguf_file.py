"""A merged Qwen3 folder becomes a GGUF file, quantized by llama.cpp's own routine: pip packages only, no compiler.

write_gguf(Checkpoint(run / "merged"), run / "gguf" / "hybrid.q4_k_m.gguf", "q4_k_m", "hybrid")
"""

import ctypes
import functools
import importlib.util
import math
import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from toolkit.export.merge import Checkpoint
from toolkit.files import ToolkitError, read_json

LLAMA_CPP = "UNSLOTH_LLAMA_CPP_PATH"
CHUNK = 1 << 22  # values converted at a time by a thread: 16 MB in fp32, whatever the size of the model


@dataclass(frozen=True)
class Quant:
    """One of llama.cpp's file types, with the tensor types it mixes."""

    file_type: str
    usual: str
    more: str
    """attn_v and ffn_down in the layers of `use_more_bits`."""
    head: str
    """output.weight, or the embedding where it is the head too."""


# llama.cpp, src/llama-quant.cpp: llama_tensor_get_type. Held against llama_model_quantize itself on 28- and 36-layer
# shapes, tied and untied: data_recipes/measured/gguf_parity.json.
QUANTS = {
    "f16": Quant("MOSTLY_F16", "F16", "F16", "F16"),
    "bf16": Quant("MOSTLY_BF16", "BF16", "BF16", "BF16"),
    "q8_0": Quant("MOSTLY_Q8_0", "Q8_0", "Q8_0", "Q8_0"),
    "q6_k": Quant("MOSTLY_Q6_K", "Q6_K", "Q6_K", "Q6_K"),
    "q5_k_m": Quant("MOSTLY_Q5_K_M", "Q5_K", "Q6_K", "Q6_K"),
    "q4_k_m": Quant("MOSTLY_Q4_K_M", "Q4_K", "Q6_K", "Q6_K"),
}
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def use_more_bits(layer: int, layers: int) -> bool:
    """llama.cpp: the first and the last eighth of the layers, and every third in between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def tensor_type(name: str, shape: tuple[int, ...], quant: Quant, layers: int, tied: bool) -> str:
    """The type llama.cpp would store a tensor in (`name` is GGUF's, `shape` PyTorch's)."""
    if len(shape) == 1:
        return "F32"
    kind = quant.usual
    if name == "output.weight" or (name == "token_embd.weight" and tied):
        kind = quant.head
    elif re.search(r"\.(attn_v|ffn_down)\.weight$", name) and use_more_bits(int(name.split(".")[1]), layers):
        kind = quant.more
    if kind in FALLBACK and shape[-1] % 256:  # K-quants come in blocks of 256
        kind = FALLBACK[kind]
    return "F16" if kind.startswith("Q") and shape[-1] % 32 else kind


def check_supported(checkpoint: Checkpoint) -> None:
    """Raises ToolkitError, with the way to take instead, for anything but a dense Qwen3."""
    config = checkpoint.config
    odd = {k: config.get(k) for k in ("attention_bias", "use_sliding_window") if config.get(k)}
    if config.get("architectures") != ["Qwen3ForCausalLM"] or odd:
        what = ", ".join(map(str, config.get("architectures", ["no architecture"]))) + "".join(f", {k}" for k in odd)
        raise ToolkitError(
            f"{checkpoint.folder}: {what} is not converted here (dense Qwen3 is). The way to take: have llama.cpp "
            f"(github.com/ggml-org/llama.cpp) in a folder, set {LLAMA_CPP} to it, UNSLOTH_LLAMA_CPP_OFFLINE=1 and "
            "UNSLOTH_AUTO_INSTALL=0 before Python starts, then model.save_pretrained_gguf(...) of Unsloth on a GPU, or "
            f"python ${LLAMA_CPP}/convert_hf_to_gguf.py on the merged folder. Nothing was downloaded"
        )


def check_quant(quant: str) -> None:
    """Quantizations that are not ours need the user's own llama.cpp; says so before anything is written."""
    if quant not in QUANTS and _llama_quantize() is None:
        raise ToolkitError(
            f"quantization {quant!r}: expected one of {', '.join(QUANTS)}. For llama.cpp's others set {LLAMA_CPP} to a "
            "folder with a built llama-quantize; it is then used by itself. Nothing was downloaded"
        )


def _llama_quantize() -> Path | None:
    folder = Path(os.environ.get(LLAMA_CPP, "/nowhere"))
    names = ("llama-quantize", "llama-quantize.exe", "build/bin/llama-quantize", "bin/llama-quantize")
    return next((folder / n for n in names if (folder / n).is_file()), None)


def quantize_with_llama_cpp(source: Path, path: Path, quant: str) -> None:
    """A quantization only llama.cpp knows, from our F16 or BF16 file, by the user's own llama-quantize."""
    command = [str(_llama_quantize()), str(source), str(path), quant.upper()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ToolkitError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()[-400:]}")


def file_bytes(checkpoint, quant: str) -> int:
    """Size of the tensors in a GGUF of this quantization (an unknown one is taken for F16: the safe side)."""
    import gguf

    total = 0
    for _, name, shape in gguf_names(checkpoint):
        kind = tensor_type(name, shape, QUANTS.get(quant, QUANTS["f16"]), _layers(checkpoint), checkpoint.tied)
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        total += math.prod(shape) // block * size
    return total


def write_gguf(checkpoint: Checkpoint, path: Path, quant: str, name: str) -> None:
    """Writes `path`, a tensor at a time. Raises ToolkitError for what is not a dense Qwen3 in bf16."""
    import gguf

    check_supported(checkpoint)
    writer = gguf.GGUFWriter(path, "qwen3")
    plan = []
    for stored, new, shape in gguf_names(checkpoint):
        kind = gguf.GGMLQuantizationType[tensor_type(new, shape, QUANTS[quant], _layers(checkpoint), checkpoint.tied)]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(new, shape, np.dtype(np.float32), math.prod(shape) // block * size, kind)
        plan.append((stored, shape, kind))
    _metadata(writer, checkpoint, name, gguf.LlamaFileType[QUANTS[quant].file_type])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for stored, shape, kind in plan:
                writer.write_tensor_data(_convert(bf16_bits(checkpoint, stored), shape, kind, pool))
    finally:
        writer.close()


def _layers(checkpoint) -> int:
    return checkpoint.config["num_hidden_layers"]


def gguf_names(checkpoint) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(stored name, GGUF name, shape) of every tensor, layer by layer as the checkpoint has them."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, _layers(checkpoint))
    for stored in checkpoint.names():
        new = names.get_name(stored, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise ToolkitError(f"{stored}: a dense Qwen3 has no such tensor; is this another architecture?")
        yield stored, new, checkpoint.shape(stored)


def bf16_bits(checkpoint: Checkpoint, name: str) -> np.ndarray:
    if checkpoint.entries[name][1]["dtype"] != "BF16":
        raise ToolkitError(f"{checkpoint.folder}: {name} is {checkpoint.entries[name][1]['dtype']}, expected BF16")
    return checkpoint.raw(name).view(np.uint16)


def fp32(bits: np.ndarray) -> np.ndarray:
    """bf16 is the upper half of fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _convert(bits: np.ndarray, shape: tuple[int, ...], kind, pool: ThreadPoolExecutor) -> np.ndarray:
    """The tensor's bytes in GGML's type `kind`, a few rows at a time."""
    import gguf

    columns, rows = shape[-1], math.prod(shape[:-1])
    block, size = gguf.GGML_QUANT_SIZES[kind]
    bits = bits.reshape(rows, columns)
    out = np.empty((rows, columns // block * size), np.uint8)
    step = max(1, CHUNK // columns)

    def convert(start: int) -> None:
        out[start : start + step] = encode(bits[start : start + step], kind.name)

    for _ in pool.map(convert, range(0, rows, step)):
        pass
    return out


def encode(bits: np.ndarray, kind: str) -> np.ndarray:
    """Rows of bf16 bits → rows of bytes in a GGML type."""
    if kind == "BF16":
        return np.ascontiguousarray(bits).view(np.uint8)
    values = fp32(bits)
    if kind == "F32":
        return values.view(np.uint8)
    if kind == "F16":
        if np.abs(values).max(initial=0) > np.finfo(np.float16).max:
            raise ToolkitError("a weight is too large for F16: export bf16 or q8_0 instead of f16")
        return values.astype(np.float16).view(np.uint8)
    return _ggml_quantize(values, kind)


@functools.cache
def _ggml():
    """llama.cpp inside xllamacpp. The symbol is exported, not promised: the pinned version goes with the tests."""
    library = ctypes.CDLL(importlib.util.find_spec("xllamacpp.xllamacpp").origin)
    function = library.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return function


def _ggml_quantize(values: np.ndarray, kind: str) -> np.ndarray:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    out = np.empty((len(values), values.shape[1] // block * size), np.uint8)
    code = int(gguf.GGMLQuantizationType[kind])
    written = _ggml()(code, values.ctypes.data, out.ctypes.data, 0, *values.shape, None)
    if written != out.nbytes:
        raise ToolkitError(f"ggml_quantize_chunk wrote {written} bytes for {kind}, expected {out.nbytes}")
    return out


def _metadata(writer, checkpoint: Checkpoint, name: str, file_type) -> None:
    import gguf

    config = checkpoint.config
    writer.add_type("model")
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()[:3], 0))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    _rope(writer, config)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _vocabulary(writer, checkpoint.folder, config["vocab_size"])


def _rope(writer, config: dict) -> None:
    """transformers 5 writes `rope_parameters`, older checkpoints `rope_theta` and `rope_scaling`."""
    stretched = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope = {"rope_theta": config.get("rope_theta")} | stretched
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "yarn":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif kind != "default":
        raise ToolkitError(f"config.json: rope type {kind!r} is not converted here, only default and yarn")


def _vocabulary(writer, folder: Path, size: int) -> None:
    """Token list, merges, special ids and the chat template; ids beyond the tokenizer are marked unused."""
    import gguf

    tokenizer, settings = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for token, i in tokenizer["model"]["vocab"].items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        control = added["special"] or re.fullmatch(r"<\|.*\|>", added["content"])
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    _special_ids(writer, settings, {t["content"]: t["id"] for t in tokenizer["added_tokens"]}, folder)
    writer.add_add_bos_token(False)
    writer.add_chat_template(chat_template(folder))


def _special_ids(writer, settings: dict, ids: dict[str, int], folder: Path) -> None:
    add = {"eos": writer.add_eos_token_id, "pad": writer.add_pad_token_id, "bos": writer.add_bos_token_id}
    for kind, write in add.items():
        token = settings.get(f"{kind}_token")
        text = token["content"] if isinstance(token, dict) else token
        if text is not None and text not in ids:
            raise ToolkitError(f"{folder / 'tokenizer_config.json'}: {kind}_token {text!r} is not in tokenizer.json")
        if text is not None:
            write(ids[text])


def chat_template(folder: Path) -> str:
    """The inference template. TRL's training variants carry {% generation %}, which no other program understands."""
    file = folder / "chat_template.jinja"
    settings = read_json(folder / "tokenizer_config.json")
    text = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
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
