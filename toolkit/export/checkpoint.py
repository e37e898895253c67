"""Readers of a base model's folder and of an adapter: names, shapes and types at once, tensors when they are asked for.

base = find_base({"name": "pocket"}, "16bit"); Checkpoint(base.folder).tensor("model.norm.weight")
"""

import copy
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit.files import POCKET, ToolkitError, download, find, read_json
from toolkit.recipe import INITS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

ModelConfig = dict[str, Any]
"""The content of a config.json."""
FOUR_BIT_NAME = re.compile(r"(-unsloth)?-bnb-4bit/?$")
NF4_STATE = ".quant_state.bitsandbytes__nf4"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Types that weights are stored in, by safetensors' names: PyTorch's names."""
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
PLAIN_LORA = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": INITS}
"""PEFT settings under which a weight is simply base + B·A·scaling; others that are not in HARMLESS must be empty."""
HARMLESS = frozenset(
    """task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules exclude_modules
    lora_alpha lora_dropout use_rslora rank_pattern alpha_pattern layers_to_transform layers_pattern megatron_core
    qalora_group_size runtime_config eva_config ensure_weight_tying""".split()
)
LARGEST_SCALE = 2.0
"""Twice its trained strength; beyond that an adapter was never seen to be of use."""


def full_config(config: ModelConfig) -> "PreTrainedConfig":
    """A config.json with transformers' defaults, old and new spellings alike."""
    from transformers import AutoConfig

    # transformers moves rope_theta into the dict it is given: without a copy config.json would be rewritten
    return AutoConfig.for_model(**copy.deepcopy(config))


# --- base models -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """The weights an adapter is merged onto."""

    name: str
    revision: str | None
    folder: Path
    four_bit: bool
    """Use the NF4 weights the adapter was trained on, dequantized, instead of the 16-bit ones."""

    @property
    def local(self) -> bool:
        return self.name == "pocket" or find(self.name) is not None

    @property
    def label(self) -> str:
        """The name without where it lies on this machine: what certificates and model cards say."""
        return Path(self.name).name if self.local else self.name


def find_base(model: Mapping[str, Any], onto: str, *, local_only: bool = False) -> Base:
    """The base of `manifest.json["model"]`: `onto` "4bit" is what was loaded, "16bit" its 16-bit counterpart.

    Raises ToolkitError when the base cannot be had."""
    if onto not in ("16bit", "4bit"):
        raise ToolkitError(f"onto: expected 16bit or 4bit, got {onto!r}")
    name = model["name"]
    revision = model.get("revision")
    folder = POCKET if name == "pocket" else find(name)
    # unsloth/Qwen3-4B-unsloth-bnb-4bit was made from unsloth/Qwen3-4B
    if onto == "16bit" and FOUR_BIT_NAME.search(name) and (folder is None or quantization(folder)):
        name = FOUR_BIT_NAME.sub("", name)
        revision = None  # the one recorded is of the 4-bit repository
        folder = find(name)
    folder = folder or download(name, revision, local_only=local_only)
    check_quantization(folder, onto)
    if (folder / "adapter_config.json").is_file():
        raise ToolkitError(
            f"{folder}: holds an adapter_config.json beside config.json, and transformers would add that adapter to the "
            "model: move the adapter's two files into a folder of their own"
        )
    # the Hub's cache names a folder by its commit, whatever branch was asked for
    commit = folder.name if folder.parent.name == "snapshots" else revision
    return Base(name, commit, folder, onto == "4bit")


def quantization(folder: Path) -> str | None:
    """How the weights of a folder are quantized, by config.json: "nf4", another method's name, or None."""
    settings = read_json(folder / "config.json").get("quantization_config")
    if not settings:
        return None
    if settings.get("quant_method") == "bitsandbytes" and settings.get("load_in_4bit"):
        # fp4 is what bitsandbytes itself defaults to
        return settings.get("bnb_4bit_quant_type", "fp4")
    return settings.get("quant_method", "unknown")


def check_quantization(folder: Path, onto: str) -> None:
    """Raises ToolkitError for quantized weights that cannot be merged onto."""
    kind = quantization(folder)
    if kind is None or (kind == "nf4" and onto == "4bit"):
        return
    if kind == "nf4":
        raise ToolkitError(
            f"{folder}: holds 4-bit weights. Put the 16-bit model beside it (the name without its "
            "-bnb-4bit ending), or merge onto these with --onto 4bit"
        )
    raise ToolkitError(
        f"{folder}/config.json: its weights are quantized by {kind}, onto which nothing can be merged: expected 16-bit "
        "weights, or bitsandbytes' NF4. Train on the 16-bit model and export that run"
    )


def weight_files(folder: Path, config: ModelConfig) -> list[Path]:
    """The safetensors files that transformers loads from a folder, in its order; tensors of later ones replace earlier ones.

    A model.safetensors goes before an index, whatever shards lie beside it; of an index all files count, with all that is in
    them (transformers 5: modeling_utils._get_resolved_checkpoint_files, _load_pretrained_model). Raises ToolkitError."""
    named = config.get("transformers_weights")
    if (folder / (named or WEIGHTS)).is_file() and not (named or "").endswith(".json"):
        return [folder / (named or WEIGHTS)]
    index = folder / (named or INDEX)
    if not index.is_file():
        raise ToolkitError(_no_weights(folder, named))
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ToolkitError(f"{index}: expected a weight_map that names the file of each tensor: restore the file")
    files = sorted(folder / name for name in set(names.values()))
    if missing := [file.name for file in files if not file.is_file()]:
        raise ToolkitError(
            f"{index}: names {len(files)} files of weights, of which {len(missing)} are not there ({missing[0]}): "
            "the download or copy was not finished; fetch the model again"
        )
    return files


def _no_weights(folder: Path, named: str | None) -> str:
    """The message for a folder without safetensors."""
    if pickles := sorted(p.name for p in folder.glob("*.bin")):
        return (
            f"{folder}: its weights are a pickle ({pickles[0]}), which is not read here: load the model with "
            "transformers and save it again with save_pretrained, which writes safetensors"
        )
    return (
        f"{folder}: expected {named or f'{WEIGHTS} or {INDEX}'}, found neither weights nor an index: restore the files"
    )


class Stored(NamedTuple):
    """Where a tensor is, and what it is before it is read."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """PyTorch's name of the type it has when it is read; safetensors' name where there is no such type here."""


class Checkpoint:
    """A folder of safetensors as transformers loads it, memory-mapped: a tensor costs memory only while it is used."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config: ModelConfig = read_json(folder / "config.json")
        self.entries: dict[str, Stored] = {}
        """Everything in the files, statistics of 4-bit weights included."""
        for file in weight_files(folder, self.config):
            with open_weights(file) as weights:
                for name in weights.keys():  # noqa: SIM118 - safe_open is no dict and cannot be iterated
                    view = weights.get_slice(name)
                    stored_type = view.get_dtype()
                    self.entries[name] = Stored(file, tuple(view.get_shape()), TYPES.get(stored_type, stored_type))
        self.packed = {name.removesuffix(NF4_STATE) for name in self.entries if name.endswith(NF4_STATE)}
        """Names of the weights that are stored in NF4."""
        weights = {name: entry for name, entry in self.entries.items() if not self._is_statistic(name)}
        for name in self.packed:  # packed as a column of bytes; the real shape is in this entry
            state = json.loads(bytes(self._read(name + NF4_STATE)))
            weights[name] = Stored(self.entries[name].file, tuple(state["shape"]), state["dtype"])
        self.alias: dict[str, str] = {}
        """{weight: the entry it is read from}, where the names differ."""
        self.tied = self._tie(weights)
        """Whether the embedding is the head too."""
        self.weights = weights

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{weight: shape}, without the statistics of 4-bit ones."""
        return {name: stored.shape for name, stored in self.weights.items()}

    def index_differences(self) -> list[str]:
        """Tensors that the index does not name, or not in the file where they are; none where one file holds all."""
        stored = {name: entry.file.name for name, entry in self.entries.items()}
        if len(set(stored.values())) == 1:
            return []
        named = read_json(self.folder / (self.config.get("transformers_weights") or INDEX))["weight_map"]
        return sorted(name for name in stored.keys() | named.keys() if stored.get(name) != named.get(name))

    def is_plain(self) -> bool:
        """Whether every tensor has its own name and is where the index says."""
        return not self.alias and not self.index_differences()

    def _is_statistic(self, name: str) -> bool:
        """Part of a 4-bit weight, or a buffer that transformers computes anew."""
        return ".weight." in name or name.endswith("rotary_emb.inv_freq")

    def _tie(self, weights: dict[str, Stored]) -> bool:
        """Remove the head from `weights` where it is the embedding, by the rules of transformers' `tie_weights`:
        a head of its own, with other values, stays even where the configuration says that it is tied."""
        if not full_config(self.config).get_text_config().tie_word_embeddings:
            if HEAD not in weights and EMBEDDING in weights:
                raise ToolkitError(
                    f"{self.folder}: has no {HEAD} although config.json does not tie it to the embedding "
                    "(tie_word_embeddings): transformers would begin with a random one. Restore the file or the setting"
                )
            return False
        if HEAD not in weights:
            return True
        if EMBEDDING not in weights:  # saved under the head's name: transformers ties in both directions
            weights[EMBEDDING] = weights.pop(HEAD)
            self.alias[EMBEDDING] = HEAD
            return True
        if not self._same_values(HEAD, EMBEDDING):
            return False
        del weights[HEAD]
        return True

    def _same_values(self, one: str, other: str) -> bool:
        import torch

        first = Checkpoint.tensor(self, one)  # as stored, also where a subclass adds to it
        second = Checkpoint.tensor(self, other)
        return first.shape == second.shape and torch.equal(first.float(), second.float())

    def _read(self, name: str) -> "torch.Tensor":
        with open_weights(self.entries[name].file) as weights:
            return weights.get_tensor(name)

    def is_quantized(self, name: str) -> bool:
        """Whether a weight is stored in NF4."""
        return name in self.packed

    def tensor(self, name: str) -> "torch.Tensor":
        """The stored tensor; a stored 4-bit one is dequantized to the type it was trained in."""
        name = self.alias.get(name, name)
        if not self.is_quantized(name):
            return self._read(name)
        from bitsandbytes.functional import QuantState, dequantize_4bit

        parts = {n.removeprefix(f"{name}."): self._read(n) for n in self.entries if n.startswith(f"{name}.")}
        return dequantize_4bit(self._read(name), QuantState.from_dict(parts, device="cpu"))


def open_weights(file: Path) -> Any:
    """safetensors' view of a file. Raises ToolkitError for one that is missing, cut short or something else."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "pt")
    except (OSError, SafetensorError) as error:
        raise ToolkitError(
            f"{file}: expected whole safetensors weights ({error}). Restore the file, or run the step that writes it again"
        ) from error


# --- adapters --------------------------------------------------------------------------------------------------------


def unmergeable(config: Mapping[str, Any]) -> str | None:
    """The first setting of an adapter_config.json (or of a recipe's `lora`) by which a weight is more than base + B·A·scaling."""
    if "embed_tokens" in (config.get("target_modules") or ()):
        return "target_modules with embed_tokens"
    for key, value in config.items():
        if value and key not in HARMLESS and value not in PLAIN_LORA.get(key, ()):
            return f"{key} = {value!r}"
    return None


def check_scale(scale: float) -> None:
    """Raises ToolkitError for a scale that is no number between 0 and 2."""
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not is_number or not 0 <= scale <= LARGEST_SCALE:  # NaN too
        raise ToolkitError(
            f"scale: expected a number from 0 (the base) to {LARGEST_SCALE:g}, where 1 is the adapter as it was trained, "
            f"got {scale!r}"
        )


class Factors(NamedTuple):
    """What a LoRA adds to one weight: B·A·scaling."""

    a: "torch.Tensor"
    """(rank, inputs), fp32."""
    b: "torch.Tensor"
    """(outputs, rank), fp32."""
    scaling: float


class Adapter:
    """A LoRA as PEFT saves it, in fp32, at `scale` times the strength it was trained with."""

    def __init__(self, folder: Path, scale: float = 1.0):
        check_scale(scale)
        self.config = read_json(folder / "adapter_config.json")
        self.scale = scale
        if setting := unmergeable(self.config):
            raise ToolkitError(
                f"{folder / 'adapter_config.json'}: {setting} cannot be merged here; merge it with PEFT's merge_and_unload"
            )
        halves: dict[str, dict[str, torch.Tensor]] = {}
        with open_weights(folder / "adapter_model.safetensors") as weights:
            for stored in weights.keys():  # noqa: SIM118 - safe_open is no dict and cannot be iterated
                weight, _, half = stored.removeprefix("base_model.model.").partition(".lora_")
                if not half and not weight.endswith(".base_layer.weight"):
                    raise ToolkitError(
                        f"{folder}: holds {weight} as a whole, as PEFT saves embeddings that were resized or trained: merge it "
                        "with PEFT's merge_and_unload"
                    )
                if half:  # else an unchanged copy, where the head is a target
                    halves.setdefault(weight, {})[half] = weights.get_tensor(stored).float()
        self.factors = {f"{module}.weight": self._factors(folder, module, half) for module, half in halves.items()}
        """{weight: what is added to it}."""

    def _factors(self, folder: Path, module: str, halves: "dict[str, torch.Tensor]") -> Factors:
        if halves.keys() != {"A.weight", "B.weight"}:
            raise ToolkitError(
                f"{folder / 'adapter_model.safetensors'}: {module} has {', '.join(sorted(halves))}, expected A.weight and "
                "B.weight: restore the file, or train the run again"
            )
        factors = Factors(halves["A.weight"], halves["B.weight"], self.scaling(module))
        if not (factors.a.isfinite().all() and factors.b.isfinite().all()):
            raise ToolkitError(
                f"{folder / 'adapter_model.safetensors'}: {module} holds values that are no numbers: the training went "
                "wrong; take an earlier checkpoint, or train again at a lower learning rate"
            )
        return factors

    def scaling(self, module: str) -> float:
        """PEFT's lora_alpha / r (or √r) of a module, by its own patterns, times the scale."""
        from peft.utils.other import get_pattern_key

        ranks = self.config.get("rank_pattern") or {}
        alphas = self.config.get("alpha_pattern") or {}
        rank = ranks.get(get_pattern_key(ranks.keys(), module), self.config["r"])
        alpha = alphas.get(get_pattern_key(alphas.keys(), module), self.config["lora_alpha"])
        trained = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        return trained * self.scale
