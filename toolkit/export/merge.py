"""Adapter + base → merged safetensors in the base's own type, a shard at a time: the whole model is never in memory.

merged = open_merged(Path("outputs/hybrid"), "16bit"); merged.tensor("model.norm.weight")
"""

import json
import math
import re
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from toolkit.evaluation.generate import closing_token
from toolkit.export.checkpoint import (
    BYTES,
    HEAD,
    INDEX,
    Adapter,
    Base,
    Checkpoint,
    ModelConfig,
    empty_model,
    find_base,
    generation_of,
    seen_as,
    text_settings,
)
from toolkit.export.record import Record, as_json
from toolkit.export.tokenizer import load_tokenizer, tokenizer_files
from toolkit.files import ToolkitError, read_if_there, read_json
from toolkit.recipe import Model
from toolkit.records import JsonObject
from toolkit.training import base as training_base
from toolkit.training.model import adapter_checksums
from toolkit.view.progress import Progress

if TYPE_CHECKING:
    import torch
    from huggingface_hub import StateDictSplit
    from transformers import PreTrainedTokenizerBase

SHARD_BYTES = 2 * 10**9
RUN_FILES = """manifest.json adapter/adapter_config.json adapter/adapter_model.safetensors adapter/tokenizer.json
adapter/tokenizer_config.json""".split()


QUANTIZED = r"^model\.layers\..*\.(\w+_proj|in_proj_\w+)\.weight$"
"""What bitsandbytes quantizes: the linear layers of the decoder, not embedding and head."""
SIGHT = "preprocessor_config.json video_preprocessor_config.json processor_config.json".split()
"""Files of a base that also sees, by which programs make its pictures."""


class Merged(Checkpoint):
    """Base and adapter seen as one checkpoint, each tensor computed when asked for."""

    def __init__(self, base: Base, adapter: Adapter):
        super().__init__(base.folder)
        self.base = base
        self.adapter = adapter
        # left out without a word, a factor would make an export that differs from its run
        if stray := sorted(adapter.factors.keys() - self.weights):
            raise ToolkitError(
                f"the adapter holds {stray[0]} ({len(stray)} such), which the base lacks: it was trained on another model, "
                "or on the head of one that shares it with the embedding"
            )
        if base.four_bit:  # as bitsandbytes computes with them
            self.weights = {name: stored._replace(dtype="bfloat16") for name, stored in self.weights.items()}
        types = [stored.dtype for stored in self.weights.values()]
        if strange := sorted(set(types) - BYTES.keys()):
            raise ToolkitError(f"{base.folder}: weights stored as {', '.join(strange)}, expected {', '.join(BYTES)}")
        # torch_dtype is the name of `dtype` before transformers 5, _name_or_path a path of another machine
        for key in ("quantization_config", "torch_dtype", "_name_or_path"):
            self.config.pop(key, None)
        # most have this type; some models keep a few norms in fp32
        said = {"dtype": max(types, key=types.count), "tie_word_embeddings": self.tied}
        text_settings(self.config).update(said)
        self.config |= said
        if adapter.scale != 1:
            self.config["adapter_scale"] = adapter.scale

    def base_tensor(self, name: str) -> "torch.Tensor":
        """The base's weight, before the adapter: as stored, or through NF4 as bitsandbytes does when it loads a model."""
        import torch

        weight = super().tensor(name).to(getattr(torch, self.weights[name].dtype))
        on_load = self.base.four_bit and not self.packed and re.search(QUANTIZED, name)
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


def four_bit_round_trip(
    weight: "torch.Tensor", blocksize: int = 64, compress_statistics: bool = True, quant_type: str = "nf4"
) -> "torch.Tensor":
    """A weight as bitsandbytes stores it in 4-bit and reads it back; by default as Unsloth loads a model: NF4 in blocks of 64
    with double quantization."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed = quantize_4bit(
        weight.contiguous(), blocksize=blocksize, compress_statistics=compress_statistics, quant_type=quant_type
    )
    return dequantize_4bit(*packed)


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


def inputs_of(run: Path, merged: Merged) -> JsonObject:
    """Everything an export's files depend on; another value of any of it makes them stale."""
    base = merged.base
    parent = read_json(run / "manifest.json").get("adapter_of")
    return ({"adapter_of": parent} if parent else {}) | {
        "onto": "4bit" if base.four_bit else "16bit",
        "scale": merged.adapter.scale,
        "base": base.label,
        "revision": base.revision,
        "base_files": training_base.base_checksums(base.folder),
        "adapter": adapter_checksums(run / "adapter"),
        "versions": {package: version(package) for package in ("gguf", "xllamacpp")},
    }


def check_base(run: Path, base: Base) -> None:
    """Compare a base with the checksums that training recorded of it. Raises ToolkitError where it has changed since.

    What was trained on in 4 bits may be another folder than the 16-bit one that is merged onto: then there is nothing to compare."""
    model = read_json(run / "manifest.json")["model"]
    if base.name == model["name"]:
        training_base.check_base(Model(model["name"]), model.get("files") or {})


def check_weights(model: Checkpoint) -> None:
    """Raises ToolkitError for weights that are not those of config.json, which transformers would fill with random values, or
    are elsewhere than the index says."""
    shapes = model.shapes
    for name, parameter in empty_model(model.config).named_parameters():
        found = shapes.get(name, "missing")
        # the head may be listed beside the embedding that it shares
        if found != parameter.shape and not (model.tied and name == HEAD):
            raise ToolkitError(
                f"{model.folder}: {name} is {found}, expected {tuple(parameter.shape)} by config.json: fetch the model again"
            )
    if len({stored.file for stored in model.entries.values()}) > 1:
        index = model.folder / INDEX
        places = {stored.name: stored.file.name for stored in model.weights.values()}
        if not places.items() <= read_json(index)["weight_map"].items():
            raise ToolkitError(f"{index}: does not say where the weights of these files are: fetch the model again")


# --- the merged folder -----------------------------------------------------------------------------------------------


def shards(merged: Merged) -> "StateDictSplit":
    """How merged weights are divided among files: `filename_to_tensors`, and `metadata["total_size"]` in bytes."""
    from huggingface_hub import split_state_dict_into_shards_factory

    sizes = {stored.name: BYTES[stored.dtype] * math.prod(stored.shape) for stored in merged.weights.values()}
    return split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )


def merge(merged: Merged, run: Path, record: Record, console: Console) -> None:
    """Write run/merged in the Hugging Face layout; `config.json` comes last, so a folder that loads is whole."""
    folder = run / "merged"
    with Progress(console, "merging", total=len(merged.weights)) as progress:
        for file, names in shards(merged).filename_to_tensors.items():
            if not record.make(folder / file, partial(_write_shard, merged, names, progress)):
                progress.skip(len(names))
    for name, content in settings_files(merged, run / "adapter").items():
        record.make(folder / name, content)


def _write_shard(merged: Merged, names: list[str], progress: Progress, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {}
    for name in names:
        tensors[name] = merged.tensor(seen_as(name)).contiguous()
        progress.advance(1)
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, told as every other failed write
        raise OSError(str(error)) from error


def settings_files(merged: Merged, tokenizer: Path) -> dict[str, bytes]:
    """{file: content} of a merged folder besides its weights: the index, the run's tokenizer, the base's settings.

    `model_max_length` is the base's: training may set it to the recipe's `max_seq_length`, which vLLM and transformers
    would take for the model's limit."""
    # byte for byte the run's, but for what below is said of tokenizer_config.json
    files = tokenizer_files(tokenizer)
    settings = json.loads(files["tokenizer_config.json"])
    longest = read_if_there(merged.base.folder / "tokenizer_config.json").get("model_max_length")
    settings["model_max_length"] = longest or text_settings(merged.config)["max_position_embeddings"]
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # its name in transformers 4, which older vLLM has
    files["tokenizer_config.json"] = as_json(settings)
    split = shards(merged)
    if split.is_sharded:
        files[INDEX] = as_json({"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    if generation := generation_config(merged, load_tokenizer(tokenizer)):
        files["generation_config.json"] = as_json(generation)
    sight = [merged.base.folder / name for name in SIGHT]
    files |= {path.name: path.read_bytes() for path in sight if path.is_file()}
    # last, as what is written in this order is whole once it loads
    return files | {"config.json": as_json(merged.config)}


def generation_config(merged: Merged, tokenizer: "PreTrainedTokenizerBase") -> JsonObject:
    """The base's generation_config.json, with the end of a turn among its stop tokens (a base model's lacks it)."""
    generation = generation_of(merged.base.folder)
    stops = stop_tokens(generation, merged.config)
    end = closing_token(tokenizer)
    return generation if end in (None, *stops) else generation | {"eos_token_id": [*stops, end]}


def stop_tokens(generation: JsonObject, config: ModelConfig) -> list[int]:
    """Ids that end generation in transformers."""
    stops = generation.get("eos_token_id", text_settings(config).get("eos_token_id"))
    if stops is None:
        return []
    return stops if isinstance(stops, list) else [stops]
