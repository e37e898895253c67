"""A folder of safetensors becomes a GGUF file, and an adapter a GGUF LoRA: pip packages only, no compiler.

write_gguf(Checkpoint(run / "merged"), run / "gguf" / "hybrid.q4_k_m.gguf", "q4_k_m", "hybrid")
"""

import math
import os
import re
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import CDLL, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from toolkit.evaluation.generate import closing_token, modes_of
from toolkit.export.checkpoint import TYPES, Adapter, Checkpoint, ModelConfig, full_config, generation_of
from toolkit.export.gguf_types import (
    check_tokenizer,
    converted,
    gguf_names,
    pre_tokenizer,
    rope_factors,
    rope_parameters,
    tensor_type,
)
from toolkit.export.tokenizer import TokenizerJson, chat_template, load_tokenizer
from toolkit.family import family_of, stated_sampling
from toolkit.files import ToolkitError, complete, read_json

if TYPE_CHECKING:
    import torch
    from gguf import GGMLQuantizationType, GGUFWriter, SpecialVocab
    from transformers import PreTrainedConfig

CHUNK = 1 << 22
"""Values converted at a time by a thread: 16 MB in fp32, whatever the size of the model."""
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
    kind: "GGMLQuantizationType"
    rows: "Callable[[], torch.Tensor]"
    """Reads or computes the values, as llama.cpp's graph expects them: (rows, values of a row)."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Rows of bytes, as GGML stores them."""
        from gguf import quant_shape_to_byte_shape

        return quant_shape_to_byte_shape(self.shape, self.kind)

    @property
    def bytes(self) -> int:
        return math.prod(self.stored_shape)


def plan_tensors(model: Checkpoint, quant: str) -> list[Planned]:
    """Every tensor of a file, in the checkpoint's order."""
    from gguf import GGMLQuantizationType

    def rows(stored: str, shape: tuple[int, ...]) -> "torch.Tensor":
        return converted(model.config, stored, model.tensor(stored)).reshape(-1, shape[-1])

    plan = []
    for stored, name in gguf_names(model.config, model.weights):
        shape = model.weights[stored].shape
        kind = GGMLQuantizationType[tensor_type(name, shape, quant, model.config, model.tied)]
        plan.append(Planned(name, shape, kind, partial(rows, stored, shape)))
    # stored nowhere in a checkpoint: transformers computes them from config.json, llama.cpp reads them
    if (factors := rope_factors(model.config)) is not None:
        plan.append(Planned("rope_freqs.weight", tuple(factors.shape), GGMLQuantizationType.F32, lambda: factors[None]))
    return plan


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
    writer = header(model, tokenizer or model.folder, quant, name)
    plan = plan_tensors(model, quant)
    try:
        write_header(writer, plan, path)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for tensor in plan:
                # in parts: float32 copies of a whole embedding would take gigabytes
                parts = pool.map(partial(encode, kind=tensor.kind), in_parts(tensor.rows()))
                writer.write_tensor_data(np.concatenate([*parts]))
                advance(1)
    finally:
        writer.close()


def write_header(writer: "GGUFWriter", plan: list[Planned], path: Path) -> None:
    """Write all that a file has before the first tensor: GGUF states names, types and places of all tensors there."""
    for tensor in plan:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, tensor.kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def header_differences(writer: "GGUFWriter", plan: list[Planned], path: Path) -> tuple[list[str], int]:
    """(keys whose values in a file are not those of `writer`, bytes of the header). Compared byte by byte: gguf's own reader
    makes two arrays of every token and merge."""
    with tempfile.TemporaryDirectory() as folder:
        expected_file = Path(folder) / "header"
        write_header(writer, plan, expected_file)
        writer.close()
        expected = expected_file.read_bytes()
    with open(path, "rb") as file:
        stored = file.read(len(expected))
    if stored == expected:
        return [], len(expected)
    # which keys: those whose bytes are nowhere in the file's header
    differing = []
    for key, value in writer.kv_data[0].items():
        packed = writer._pack_val(value.value, value.type, add_vtype=True, sub_type=value.sub_type)
        if key.encode() + packed not in stored:
            differing.append(key)
    return differing or ["names, types or shapes of tensors, or keys that do not belong there"], len(expected)


def write_lora_gguf(lora: Adapter, config: ModelConfig, path: Path) -> None:
    """Write a PEFT adapter as a GGUF LoRA (F32) for the GGUF of its base, whose config.json is `config`."""
    from gguf import GGUFType, GGUFWriter, Keys

    with complete(path) as unfinished:
        writer = GGUFWriter(unfinished, family_of(config["model_type"]).gguf)
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        # llama.cpp divides one alpha by each weight's rank; with 0 it takes the factors as they are (llama-adapter.h)
        writer.add_float32(Keys.Adapter.LORA_ALPHA, 0)
        for stored, name in gguf_names(config, sorted(lora.factors)):
            a, b, scaling = lora.factors[stored]
            writer.add_tensor(f"{name}.lora_a", a.numpy())
            writer.add_tensor(f"{name}.lora_b", (converted(config, stored, b) * scaling).contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def in_parts(rows: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
    """Views of so many rows that a float32 copy of each takes 16 MB."""
    return rows.split(max(1, CHUNK // rows.shape[1]))


def encode(rows: "torch.Tensor", kind: "GGMLQuantizationType") -> np.ndarray:
    """Rows of a torch tensor → rows of bytes in a GGML type."""
    import torch
    from gguf import quant_shape_to_byte_shape

    if kind.name in TYPES:
        stored = rows.to(getattr(torch, TYPES[kind.name]))
        if kind.name == "F16" and not stored.isfinite().all():
            raise ToolkitError("a weight is too large for F16: export bf16 or q8_0 instead of f16")
        return stored.contiguous().view(torch.uint8).numpy()
    values = rows.float().contiguous().numpy()
    out = np.empty(quant_shape_to_byte_shape(values.shape, kind), np.uint8)
    _ggml()(kind, values.ctypes.data, out.ctypes.data, 0, *values.shape, None)
    return out


@cache
def _ggml() -> Callable[..., int]:
    """llama.cpp inside xllamacpp. The symbol is exported, not promised: the version is pinned and a test uses it."""
    import xllamacpp.xllamacpp as module

    function = CDLL(module.__file__).ggml_quantize_chunk
    function.restype = c_size_t
    function.argtypes = [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]
    return function


def header(model: Checkpoint, tokenizer: Path, quant: str, name: str) -> "GGUFWriter":
    """A GGUFWriter that holds every key of the header and no tensor; `.kv_data[0]` is what a file must say.

    Raises ToolkitError for a model or tokenizer that cannot be converted."""
    from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType, size_label

    config = full_config(model.config)
    check_tokenizer(model.config, tokenizer, gguf=True)
    writer = GGUFWriter(None, family_of(config.model_type).gguf)
    scale = model.config.get("adapter_scale")
    values = {
        "type": "model",
        "name": name,
        "size_label": size_label(sum(map(math.prod, model.shapes.values())), 0, 0, 0),
        "description": f"fine-tuned with a LoRA adapter at {scale:g} of its trained strength" if scale else None,
        **_sampling(model, tokenizer),
        **_sizes(config),
        **_positions(config),
        "file_type": LlamaFileType[f"MOSTLY_{quant.upper()}"],
        "quantization_version": GGML_QUANT_VERSION,
        **_vocabulary(read_json(tokenizer / "tokenizer.json"), config.vocab_size),
    }
    # the order is that of the file, byte by byte; gguf's writer has a method for each key, named after it
    for key, value in values.items():
        if value is not None:
            getattr(writer, f"add_{key}")(value)
    _special(tokenizer, config, merges=values["token_scores"] is None).add_to_gguf(writer, quiet=True)
    return writer


def _sampling(model: Checkpoint, tokenizer: Path) -> dict[str, float]:
    """general.sampling.*: the model's own values in its first mode, which llama-server and LM Studio sample by."""
    generation = generation_of(model.folder)
    mode = modes_of(load_tokenizer(tokenizer))[0]
    values = stated_sampling(family_of(model.config["model_type"]), mode, generation)
    penalty = generation.get("repetition_penalty")
    if penalty not in (None, 1.0):
        values["repetition_penalty"] = penalty
    return {f"sampling_{SAMPLING_KEYS.get(key, key)}": value for key, value in values.items()}


def _sizes(config: "PreTrainedConfig") -> dict[str, Any]:
    """What the tensors' shapes alone do not say."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
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


def _positions(config: "PreTrainedConfig") -> dict[str, Any]:
    """Rotary positions, and Gemma 3's layers that see only a window."""
    from gguf import RopeScalingType

    rope = rope_parameters(config)
    values = {"rope_freq_base": rope["rope_theta"]}
    if rope["rope_type"] in ("linear", "yarn"):
        values |= {"rope_scaling_type": RopeScalingType(rope["rope_type"]), "rope_scaling_factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        values["rope_scaling_orig_ctx_len"] = rope["original_max_position_embeddings"]
    if config.model_type == "gemma3_text":
        values |= {
            "rope_freq_base_swa": config.rope_parameters["sliding_attention"]["rope_theta"],
            "sliding_window": config.sliding_window,
            "sliding_window_pattern": [kind == "sliding_attention" for kind in config.layer_types],
            "final_logit_softcapping": config.final_logit_softcapping,
        }
    return values


# --- the vocabulary --------------------------------------------------------------------------------------------------


def _vocabulary(tokenizer: TokenizerJson, size: int) -> dict[str, Any]:
    """Tokens, types and scores; ids beyond the tokenizer are unused."""
    pre = pre_tokenizer(tokenizer)
    # SentencePiece's layout: whole pieces with scores in place of bytes with merges
    pieces = pre == "default"
    tokens, types = _tokens(tokenizer, size, pieces)
    return {
        "tokenizer_model": "llama" if pieces else "gpt2",
        "tokenizer_pre": pre,
        "token_list": tokens,
        "token_scores": _scores(tokenizer, size) if pieces else None,
        "add_space_prefix": False if pieces else None,
        "token_types": types,
    }


def _tokens(tokenizer: TokenizerJson, size: int, pieces: bool) -> tuple[list[str], list[int]]:
    """(texts, llama.cpp's types) of the tokens by id. The embedding of most models has more rows than there are tokens."""
    from gguf import TokenType

    # as llama.cpp's own converter names them
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [TokenType.UNUSED] * size
    for token, i in tokenizer["model"]["vocab"].items():
        tokens[i] = token
        types[i] = TokenType.NORMAL
        if pieces and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            types[i] = TokenType.BYTE
    for added in tokenizer["added_tokens"]:
        text = added["content"]
        i = added["id"]
        control = added["special"] or re.fullmatch(r"<\|.*\|>", text)
        types[i] = TokenType.CONTROL if control else TokenType.USER_DEFINED
        # llama.cpp looks for these in the raw text, before spaces become ▁
        tokens[i] = text.replace("▁", " ") if pieces and not control else text
    if pieces and (unknown := tokenizer["model"].get("unk_token")):
        types[tokens.index(unknown)] = TokenType.UNKNOWN
    return tokens, types


def _scores(tokenizer: TokenizerJson, size: int) -> list[float]:
    """SentencePiece scores: llama.cpp joins the pair whose piece scores highest, tokenizers the pair ranked first.

    All pairs that make one piece have neighbouring ranks, so a piece's first rank orders them alike."""
    scores = [0.0] * size
    ids = tokenizer["model"]["vocab"]
    # the first rank of a piece is written last; a merge is a pair, in older files one text
    for rank, merge in reversed([*enumerate(tokenizer["model"]["merges"])]):
        scores[ids["".join(merge).replace(" ", "")]] = -float(rank)
    return scores


def _special(folder: Path, config: "PreTrainedConfig", merges: bool) -> "SpecialVocab":
    """gguf's reading of special ids, merges and template, with what it leaves to llama.cpp's defaults stated."""
    from gguf import SpecialVocab

    special = SpecialVocab(folder, load_merges=merges, n_vocab=config.vocab_size)
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


def gguf_path(run: Path, quant: str) -> Path:
    """Where the GGUF of a quantization goes."""
    return run / "gguf" / f"{run.resolve().name}.{quant}.gguf"
