"""A folder of safetensors becomes a GGUF file, and an adapter a GGUF LoRA: pip packages only, no compiler.

write_gguf(Checkpoint(run / "merged"), run / "gguf" / "hybrid.q4_k_m.gguf", "q4_k_m", "hybrid")
"""

import ctypes
import functools
import math
import mmap
import os
import re
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from toolkit.evaluation.generate import closing_token, modes_of
from toolkit.export.checkpoint import Adapter, Checkpoint, ModelConfig, full_config
from toolkit.export.gguf_types import (
    WAY_OUT,
    check_supported,
    converted,
    gguf_names,
    pre_tokenizer,
    rope_factors,
    rope_parameters,
    tensor_type,
)
from toolkit.export.tokenizer import TokenizerJson, chat_template, load_tokenizer, tokens_beyond
from toolkit.family import family_of, stated_sampling
from toolkit.files import ToolkitError, complete, read_json

if TYPE_CHECKING:
    import torch
    from gguf import GGUFWriter, SpecialVocab
    from transformers import PreTrainedConfig

CHUNK = 1 << 22
"""Values converted at a time by a thread: 16 MB in fp32, whatever the size of the model."""
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""GGML types that PyTorch has too."""
SAMPLING_KEYS = {"temperature": "temp", "repetition_penalty": "penalty_repeat"}
"""generation_config.json's names where GGUF has others (general.sampling.*)."""
KEEP_TEMPLATE = (
    "{# The chat template of the model that this file was exported from. This comment keeps Ollama from replacing it: at "
    "`create` it puts a template of its own list in the place of one that is nearly the same. #}"
)
"""Ollama (template/template.go) takes templates within an edit distance of 100 for its own, whose default turns differ."""


# --- writing ---------------------------------------------------------------------------------------------------------


@dataclass
class Planned:
    """A tensor on its way into a GGUF file."""

    name: str
    shape: tuple[int, ...]
    kind: str
    """GGML type."""
    values: "Callable[[], torch.Tensor]"
    """Reads or computes the values, as llama.cpp's graph expects them."""

    @property
    def bytes(self) -> int:
        import gguf

        return math.prod(gguf.quant_shape_to_byte_shape(self.shape, gguf.GGMLQuantizationType[self.kind]))


def plan_tensors(model: Checkpoint, quant: str) -> list[Planned]:
    """Every tensor of a file, in the checkpoint's order."""
    plan = []
    for stored, name in gguf_names(model.config, model.weights):
        shape = model.weights[stored].shape
        kind = tensor_type(name, shape, quant, model.config, model.tied)
        plan.append(Planned(name, shape, kind, functools.partial(_values, model, stored)))
    factors = rope_factors(model.config)
    if factors is not None:
        plan.append(Planned("rope_freqs.weight", tuple(factors.shape), "F32", lambda: factors))
    return plan


def _values(model: Checkpoint, stored: str) -> "torch.Tensor":
    return converted(model.config, stored, model.tensor(stored))


def write_gguf(
    model: Checkpoint,
    path: Path,
    quant: str,
    name: str,
    tokenizer: Path | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> None:
    """Write `path`, a tensor at a time, from a Checkpoint or a Merged.

    `tokenizer` is the folder of tokenizer and template (the model's own by default); `advance` is told of each tensor. Raises
    ToolkitError for a model that cannot be converted."""
    import gguf

    check_supported(model.config, model.folder)
    writer = header(model, tokenizer or model.folder, quant, name, path)
    plan = plan_tensors(model, quant)
    # the header first: GGUF states names, types and places of all tensors before the first of them
    for tensor in plan:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for tensor in plan:
                writer.write_tensor_data(_encode_whole(tensor.values(), tensor.kind, pool))
                advance(1)
    finally:
        writer.close()


def write_lora_gguf(lora: Adapter, config: ModelConfig, path: Path) -> None:
    """Write a PEFT adapter as a GGUF LoRA (F32) for the GGUF of its base, whose config.json is `config`.

    llama.cpp multiplies the factors of each weight by one alpha / rank: the rank of this weight."""
    import gguf

    alpha = lora.scale * lora.config["lora_alpha"]
    with complete(path) as partial:
        writer = gguf.GGUFWriter(partial, family_of(config["model_type"]).gguf)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for stored, name in gguf_names(config, sorted(lora.factors)):
            a, b, scaling = lora.factors[stored]
            rank = b.shape[1]
            # √rank, or an alpha of this weight's own: what the file's one alpha leaves out
            b = converted(config, stored, b) * (scaling * rank / alpha if alpha else 0)
            writer.add_tensor(f"{name}.lora_a", a.numpy())
            writer.add_tensor(f"{name}.lora_b", b.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _encode_whole(tensor: "torch.Tensor", kind: str, pool: ThreadPoolExecutor) -> np.ndarray:
    """The tensor's bytes in GGML type `kind`, a few rows at a time: (rows, bytes of a row)."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    # in parts: float32 copies of a whole embedding would take gigabytes
    step = max(1, CHUNK // rows.shape[1])
    parts = pool.map(lambda start: encode(rows[start : start + step], kind), range(0, len(rows), step))
    return np.concatenate(list(parts))


def encode(rows: "torch.Tensor", kind: str) -> np.ndarray:
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
def _ggml() -> Callable[..., int]:
    """llama.cpp inside xllamacpp. The symbol is exported, not promised: the version is pinned and a test uses it."""
    import xllamacpp.xllamacpp as module

    function = ctypes.CDLL(module.__file__).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return function


def header(model: Checkpoint, tokenizer: Path, quant: str, name: str, path: Path | None = None) -> "GGUFWriter":
    """A GGUFWriter that holds every key of the header and no tensor; `.kv_data[0]` is what a file must say."""
    import gguf

    config = full_config(model.config)
    writer = gguf.GGUFWriter(path, family_of(config.model_type).gguf)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(sum(map(math.prod, model.shapes.values())), 0, 0, 0))
    if scale := model.config.get("adapter_scale"):
        writer.add_description(f"fine-tuned with a LoRA adapter at {scale:g} of its trained strength")
    _sampling(writer, model, tokenizer)
    _sizes(writer, config)
    _positions(writer, config)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{quant.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _vocabulary(writer, tokenizer, config)
    return writer


def _sizes(writer: "GGUFWriter", config: "PreTrainedConfig") -> None:
    """What the tensors' shapes alone do not say."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _sampling(writer: "GGUFWriter", model: Checkpoint, tokenizer: Path) -> None:
    """general.sampling.*: the model's own values in its first mode, which llama-server and LM Studio sample by."""
    file = model.folder / "generation_config.json"
    generation = read_json(file) if file.is_file() else {}
    mode = modes_of(load_tokenizer(tokenizer))[0]
    values: dict[str, Any] = dict(stated_sampling(family_of(model.config["model_type"]), mode, generation))
    if generation.get("repetition_penalty") not in (None, 1.0):
        values["repetition_penalty"] = generation["repetition_penalty"]
    for key, value in values.items():  # gguf's writer has a method for each key, named after it
        getattr(writer, f"add_sampling_{SAMPLING_KEYS.get(key, key)}")(value)


def _positions(writer: "GGUFWriter", config: "PreTrainedConfig") -> None:
    """Rotary positions, and Gemma 3's layers that see only a window."""
    import gguf

    rope = rope_parameters(config)
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


# --- the vocabulary --------------------------------------------------------------------------------------------------


def _vocabulary(writer: "GGUFWriter", folder: Path, config: "PreTrainedConfig") -> None:
    """Tokens, types, merges or scores, special ids and the chat template; ids beyond the tokenizer are unused."""
    tokenizer = read_json(folder / "tokenizer.json")
    size = config.vocab_size
    pre = pre_tokenizer(tokenizer)
    if pre is None:
        raise ToolkitError(f"{folder / 'tokenizer.json'}: llama.cpp is not known to have its pre-tokenizer. {WAY_OUT}")
    if reason := tokens_beyond(tokenizer, {"vocab_size": size}):
        raise ToolkitError(f"{folder}: {reason}")
    # SentencePiece's layout: whole pieces with scores in place of bytes with merges
    pieces = pre == "default"
    tokens, types = _tokens(tokenizer, size, pieces)
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    if pieces:
        writer.add_token_scores(_scores(tokenizer, size))
        writer.add_add_space_prefix(False)
    writer.add_token_types(types)
    _special(folder, config, merges=not pieces).add_to_gguf(writer, quiet=True)


def _tokens(tokenizer: TokenizerJson, size: int, pieces: bool) -> tuple[list[str], list[int]]:
    """(texts, llama.cpp's types) of the tokens by id. The embedding of most models has more rows than there are tokens."""
    from gguf import TokenType

    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [TokenType.UNUSED] * size
    for token, i in tokenizer["model"]["vocab"].items():
        tokens[i] = token
        is_byte = pieces and re.fullmatch(r"<0x[0-9A-F]{2}>", token)
        types[i] = TokenType.BYTE if is_byte else TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        text = added["content"]
        i = added["id"]
        control = added["special"] or re.fullmatch(r"<\|.*\|>", text)
        types[i] = TokenType.CONTROL if control else TokenType.USER_DEFINED
        # llama.cpp looks for these in the raw text, before spaces become ▁
        tokens[i] = text.replace("▁", " ") if pieces and not control else text
    unknown = tokenizer["model"].get("unk_token")
    if pieces and unknown:
        types[tokens.index(unknown)] = TokenType.UNKNOWN
    return tokens, types


def _scores(tokenizer: TokenizerJson, size: int) -> list[float]:
    """SentencePiece scores: llama.cpp joins the pair whose piece scores highest, tokenizers the pair ranked first.

    All pairs that make one piece have neighbouring ranks, so a piece's first rank orders them alike."""
    first_rank: dict[str, float] = {}
    for rank, merge in enumerate(tokenizer["model"]["merges"]):
        piece = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        if piece not in first_rank:
            first_rank[piece] = -float(rank)
    scores = [0.0] * size
    for token, i in tokenizer["model"]["vocab"].items():
        scores[i] = first_rank.get(token, 0.0)
    return scores


def _special(folder: Path, config: "PreTrainedConfig", merges: bool) -> "SpecialVocab":
    """gguf's reading of special ids, merges and template, with what it leaves to llama.cpp's defaults stated."""
    import gguf

    special = gguf.SpecialVocab(folder, load_merges=merges, n_vocab=config.vocab_size)
    special.chat_template = KEEP_TEMPLATE + chat_template(folder)
    # llama.cpp adds one where the header is silent, and the prompt would begin otherwise than in training; an
    # end-of-sequence token after the prompt would end the reply before it begins
    special.add_special_token = {"bos": False} | special.add_special_token
    if "eos" in special.add_special_token:
        special.add_special_token["eos"] = False
    # Qwen's tokenizer has none, its config.json has
    if config.bos_token_id is not None:
        special.special_token_ids.setdefault("bos", config.bos_token_id)
    end = closing_token(load_tokenizer(folder))
    # both end generation in llama.cpp
    if special.special_token_ids.get("eos") != end:
        special.special_token_ids["eot"] = end
    return special


# --- reading ---------------------------------------------------------------------------------------------------------

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's numbers of types: struct's letters; 8 is a text, 9 a list."""
TEXT, LIST = 8, 9


class GgufTensor(NamedTuple):
    """A tensor of a file; `data` holds its bytes, (rows, bytes of a row), memory-mapped."""

    name: str
    shape: tuple[int, ...]
    """As PyTorch has it."""
    kind: str
    """GGML type."""
    offset: int
    data: np.ndarray


class GgufFile:
    """A GGUF read back, memory-mapped. gguf's own reader takes 25 times as long for a vocabulary, and a gigabyte."""

    def __init__(self, path: Path):
        """Raises ToolkitError for a file that is cut short or something else."""
        self.values: dict[str, Any] = {}
        """The header."""
        self.tensors: dict[str, GgufTensor] = {}
        try:
            with open(path, "rb") as file:
                self._buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._read()
        except (struct.error, ValueError, KeyError, OverflowError) as error:  # what broken bytes lead to
            raise ToolkitError(f"{path}: is no whole GGUF file ({error}): export it again") from error

    def value(self, key: str) -> Any:
        """A key of the header, None where the file has no such key."""
        return self.values.get(key)

    def _read(self) -> None:
        self._at = 0
        if self._buffer[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._at = 8
        tensors = self._number("Q")
        for _ in range(self._number("Q")):
            key = self._text()
            self.values[key] = self._value(self._number("I"))
        infos = [self._info() for _ in range(tensors)]
        alignment = self.values.get("general.alignment", 32)
        start = -(-self._at // alignment) * alignment
        for name, shape, code, offset in infos:
            self.tensors[name] = self._tensor(name, shape, code, start + offset)

    def _number(self, letter: str) -> Any:
        (value,) = struct.unpack_from("<" + letter, self._buffer, self._at)
        self._at += struct.calcsize("<" + letter)
        return value

    def _text(self) -> str:
        end = self._number("Q") + self._at
        if end > len(self._buffer):
            raise ValueError("a text ends beyond the file")
        text = self._buffer[self._at : end].decode()
        self._at = end
        return text

    def _value(self, kind: int) -> Any:
        if kind == TEXT:
            return self._text()
        if kind != LIST:
            return self._number(SCALARS[kind])
        item = self._number("I")
        count = self._number("Q")
        if item == TEXT:
            return [self._text() for _ in range(count)]
        values = np.frombuffer(self._buffer, np.dtype(SCALARS[item]), count, self._at)
        self._at += values.nbytes
        return values.tolist()

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape, type's number, offset) of a tensor; GGUF states shapes from the last dimension to the first."""
        name = self._text()
        dimensions = [self._number("Q") for _ in range(self._number("I"))]
        return name, tuple(reversed(dimensions)), self._number("I"), self._number("Q")

    def _tensor(self, name: str, shape: tuple[int, ...], code: int, offset: int) -> GgufTensor:
        import gguf

        kind = gguf.GGMLQuantizationType(code)
        rows = gguf.quant_shape_to_byte_shape(shape, kind)
        data = np.frombuffer(self._buffer, np.uint8, math.prod(rows), offset)
        return GgufTensor(name, shape, kind.name, offset, data.reshape(-1, rows[-1]))


def gguf_path(run: Path, quant: str) -> Path:
    """Where the GGUF of a quantization goes."""
    return run / "gguf" / f"{run.resolve().name}.{quant}.gguf"
