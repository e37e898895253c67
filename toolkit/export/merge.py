"""Adapter + base → merged safetensors in the base's own type, a shard at a time: the whole model is never in memory.

merged = open_merged(Path("outputs/hybrid"), "16bit"); merged.tensor("model.norm.weight")
"""

import functools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.evaluation.generate import closing_token
from toolkit.export.checkpoint import (
    BYTES,
    HEAD,
    INDEX,
    Adapter,
    Base,
    Checkpoint,
    Stored,
    find_base,
    full_config,
)
from toolkit.export.record import Record, as_json
from toolkit.export.tokenizer import load_tokenizer, tokenizer_files
from toolkit.files import ToolkitError, read_json
from toolkit.training.base import base_checksums
from toolkit.view.progress import Progress

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

SHARD_BYTES = 2 * 10**9
RUN_FILES = """manifest.json adapter/adapter_config.json adapter/adapter_model.safetensors adapter/tokenizer.json
adapter/tokenizer_config.json""".split()


class Merged(Checkpoint):
    """Base and adapter seen as one checkpoint, each tensor computed when asked for."""

    def __init__(self, base: Base, adapter: Adapter):
        super().__init__(base.folder)
        self.base = base
        self.adapter = adapter
        # left out without a word, a factor would make an export that differs from its run
        if stray := sorted(adapter.factors.keys() - self.weights):
            raise ToolkitError(
                f"the adapter holds {stray[0]} ({len(stray)} such), which belongs to no weight of the base: it was "
                "trained on another model, or on the head of one that shares it with the embedding"
            )
        if base.four_bit:  # as bitsandbytes computes with them
            self.weights = {name: stored._replace(dtype="bfloat16") for name, stored in self.weights.items()}
        for name, stored in self.weights.items():
            if stored.dtype not in BYTES:
                raise ToolkitError(f"{stored.file}: {name} is stored as {stored.dtype}: expected {', '.join(BYTES)}")
        self.quantized = self.config.pop("quantization_config", None) is not None
        self.config = merged_config(self.config, self.weights, self.tied, adapter.scale)

    def base_tensor(self, name: str) -> "torch.Tensor":
        """The base's weight, before the adapter: as stored, or through NF4 as bitsandbytes does when it loads a model."""
        import torch

        weight = super().tensor(name).to(getattr(torch, self.weights[name].dtype))
        # what bitsandbytes quantizes: the linear layers of the decoder, not embedding and head
        on_load = self.base.four_bit and not self.quantized and name.endswith("_proj.weight")
        return four_bit_round_trip(weight) if on_load else weight

    def tensor(self, name: str) -> "torch.Tensor":
        """The merged weight: delta in fp32 as PEFT computes it, added in fp32, then rounded to the base's type once."""
        weight = self.base_tensor(name)
        if name not in self.adapter.factors:
            return weight
        a, b, scaling = self.adapter.factors[name]
        merged = (weight.float() + (b @ a) * scaling).to(weight.dtype)
        if not merged.isfinite().all():
            raise ToolkitError(
                f"{name}: base and adapter together are too large for {weight.dtype}: convert the base to bfloat16 "
                "(model.to(torch.bfloat16).save_pretrained(...)) and export onto that"
            )
        return merged

    def size(self, name: str) -> int:
        """Bytes of a merged tensor."""
        stored = self.weights[name]
        return BYTES[stored.dtype] * math.prod(stored.shape)

    def total_size(self) -> int:
        """Bytes of all merged tensors."""
        return sum(self.size(name) for name in self.weights)


def merged_config(config: dict[str, Any], weights: dict[str, Stored], tied: bool, scale: float) -> dict[str, Any]:
    """The base's config.json as it is for merged weights: their type and tie are stated, no path of another machine is."""
    # the name of `dtype` before transformers 5; a path; a file name that is not that of the merged weights
    left_out = {"torch_dtype", "_name_or_path", "transformers_weights"}
    kept = {key: value for key, value in config.items() if key not in left_out}
    types = [stored.dtype for stored in weights.values()]
    # some models keep a few norms in fp32
    kept |= {"dtype": max(types, key=types.count), "tie_word_embeddings": tied}
    if scale != 1:
        kept["adapter_scale"] = scale
    return kept


def four_bit_round_trip(
    weight: "torch.Tensor", blocksize: int = 64, compress_statistics: bool = True, quant_type: str = "nf4"
) -> "torch.Tensor":
    """A weight as bitsandbytes stores it in 4-bit and reads it back; by default as Unsloth loads a model: NF4 in blocks of 64
    with double quantization."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    settings = {"blocksize": blocksize, "compress_statistics": compress_statistics, "quant_type": quant_type}
    return dequantize_4bit(*quantize_4bit(weight.contiguous(), **settings))


def check_run(run: Path) -> None:
    """Raises ToolkitError where a file is missing that an export is made from and compared with."""
    if missing := [name for name in RUN_FILES if not (run / name).is_file()]:
        raise ToolkitError(
            f"{run}: {', '.join(missing)} not found: expected the folder of a finished run; restore it, or train it again"
        )


def open_merged(run: Path, onto: str, *, scale: float = 1.0, local_only: bool = False) -> Merged:
    """A run's base and adapter, seen as one checkpoint. `onto` "4bit" is the base exactly as it was trained on."""
    model = read_json(run / "manifest.json")["model"]
    if onto == "4bit" and not model.get("load_in_4bit"):
        raise ToolkitError(f"{run}: trained on 16-bit weights: there is no 4-bit base to merge onto, use --onto 16bit")
    adapter = Adapter(run / "adapter", scale)
    return Merged(find_base(model, onto, local_only=local_only), adapter)


def check_base(run: Path, base: Base) -> None:
    """Compare a base with the checksums that training recorded of it. Raises ToolkitError where it has changed since.

    What was trained on in 4 bits may be another folder than the 16-bit one that is merged onto: then there is nothing to compare."""
    model = read_json(run / "manifest.json")["model"]
    recorded = model.get("files") or {}
    if base.name != model["name"] or not recorded:
        return
    now = base_checksums(base.folder)
    if changed := [name for name, checksum in recorded.items() if now.get(name) != checksum]:
        raise ToolkitError(
            f"{base.folder / changed[0]}: changed since the run was trained on it: put the file back that has the SHA-256 in "
            f"{run / 'manifest.json'} (model.files), or train the run again"
        )


def check_weights(merged: Merged) -> None:
    """Raises ToolkitError where the base lacks a weight of its architecture, which transformers would fill with random values."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(full_config(merged.config))
    expected = dict(model.named_parameters())
    if merged.tied:
        expected.pop(HEAD, None)
    if missing := sorted(expected.keys() - merged.weights):
        raise ToolkitError(
            f"{merged.folder}: has no {missing[0]} ({len(missing)} weights are missing), which transformers would fill with "
            "random values: fetch the model again"
        )
    for name, parameter in expected.items():
        if tuple(parameter.shape) != merged.shapes[name]:
            raise ToolkitError(
                f"{merged.folder}: {name} has the shape {merged.shapes[name]}, config.json says {tuple(parameter.shape)}: "
                "weights and config.json are of different models"
            )


# --- the merged folder -----------------------------------------------------------------------------------------------


class Shards:
    """How merged weights are divided among files."""

    def __init__(self, merged: Merged):
        from huggingface_hub import split_state_dict_into_shards_factory

        sizes = {name: merged.size(name) for name in merged.weights}
        split = split_state_dict_into_shards_factory(
            sizes,
            get_storage_size=lambda size: size,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=SHARD_BYTES,
        )
        self.files: dict[str, list[str]] = split.filename_to_tensors
        """{file: its tensors}."""
        self.index = None
        """The index's text; None where one file holds all."""
        if split.is_sharded:
            self.index = as_json({"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def merge(merged: Merged, run: Path, record: Record, console: "Console") -> None:
    """Write run/merged in the Hugging Face layout; `config.json` comes last, so a folder that loads is whole."""
    folder = run / "merged"
    shards = Shards(merged)
    with Progress(console, "merging", total=len(merged.weights)) as progress:
        for file, names in shards.files.items():
            if record.make(folder / file, functools.partial(_write_shard, merged, names, progress)):
                console.print(f"merged: {file}, {(folder / file).stat().st_size / 1e9:.2f} GB", markup=False)
            else:
                progress.skip(len(names))
    settings = settings_files(merged, run / "adapter")
    if shards.index:
        settings = {INDEX: shards.index.encode()} | settings
    written = {f"merged/{name}" for name in [*shards.files, *settings]}
    for name in [name for name in record.files if name.startswith("merged/") and name not in written]:
        record.drop(name)
    for name, content in settings.items():
        record.make(folder / name, content)


def _write_shard(merged: Merged, names: Iterable[str], progress: Progress, partial: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {}
    for name in names:
        tensors[name] = merged.tensor(name).contiguous()
        progress.advance(1)
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, told as every other failed write
        raise OSError(str(error)) from error


def settings_files(merged: Merged, tokenizer: Path) -> dict[str, bytes]:
    """{file: content} of a merged folder besides its weights: the run's tokenizer, the base's settings.

    `model_max_length` is the base's: training may set it to the recipe's `max_seq_length`, which vLLM and transformers
    would take for the model's limit."""
    files = tokenizer_files(tokenizer)
    settings = json.loads(files["tokenizer_config.json"])
    base = merged.base.folder / "tokenizer_config.json"
    longest = read_json(base).get("model_max_length") if base.is_file() else None
    settings["model_max_length"] = longest or merged.config["max_position_embeddings"]
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # its name in transformers 4, which older vLLM has
    files["tokenizer_config.json"] = as_json(settings).encode()
    if generation := generation_config(merged, load_tokenizer(tokenizer)):
        files["generation_config.json"] = as_json(generation).encode()
    files["config.json"] = as_json(merged.config).encode()
    return files


def generation_config(merged: Merged, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """The base's generation_config.json, with the end of a turn among its stop tokens (a base model's lacks it)."""
    file = merged.base.folder / "generation_config.json"
    generation = read_json(file) if file.is_file() else {}
    stops = stop_tokens(generation, merged.config)
    end = closing_token(tokenizer)
    return generation if end in stops else generation | {"eos_token_id": [*stops, end]}


def stop_tokens(generation: dict[str, Any], config: dict[str, Any]) -> list[int]:
    """Ids that end generation in transformers."""
    stops = generation.get("eos_token_id", config.get("eos_token_id"))
    if stops is None:
        return []
    return stops if isinstance(stops, list) else [stops]
