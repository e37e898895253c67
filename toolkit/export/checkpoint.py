"""Readers of a base model's folder and of an adapter: names, shapes and types at once, tensors when they are asked for.

base = find_base({"name": "pocket"}, "16bit"); Checkpoint(base.folder).tensor("model.norm.weight")
"""

import copy
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit.files import ToolkitError, download, read_if_there, read_json
from toolkit.recipe import INITS
from toolkit.records import JsonObject
from toolkit.training.base import ADAPTER_WEIGHTS, base_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

ModelConfig = JsonObject
"""The content of a config.json."""
FOUR_BIT_NAME = re.compile(r"(-unsloth)?-bnb-4bit/?$")
NF4_STATE = ".quant_state.bitsandbytes__nf4"
HEAD = "lm_head.weight"
INSIDE = re.compile(r"^model\.language_model\.")
"""Where a checkpoint that also sees keeps its text model (Qwen3.5)."""
EMBEDDING = "model.embed_tokens.weight"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Types that weights are stored in, by safetensors' names, which are GGML's too: PyTorch's names."""
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
PLAIN_LORA = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": INITS}
"""PEFT settings under which a weight is simply base + B·A·scaling; others that are not in HARMLESS must be empty."""
HARMLESS = frozenset(
    """task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules exclude_modules
    lora_alpha lora_dropout use_rslora rank_pattern alpha_pattern layers_to_transform layers_pattern megatron_core
    qalora_group_size runtime_config eva_config ensure_weight_tying""".split()
)
ELSEWHERE = "cannot be merged here: merge it with PEFT's merge_and_unload"
LARGEST_SCALE = 2.0
"""Twice its trained strength; beyond that an adapter was never seen to be of use."""


def seen_as(name: str) -> str:
    """The name that a stored weight, or an adapter's, has in the text model alone: the one by which it is known here."""
    return INSIDE.sub("model.", name)


def text_settings(config: ModelConfig) -> ModelConfig:
    """The part of a config.json that describes the text model: a part of its own where the model sees too."""
    return config.get("text_config", config)


def full_config(config: ModelConfig) -> "PreTrainedConfig":
    """A config.json with transformers' defaults, old and new spellings alike."""
    from transformers import AutoConfig

    # transformers moves rope_theta into the dict it is given: without a copy config.json would be rewritten
    return AutoConfig.for_model(**copy.deepcopy(config))


def empty_model(config: ModelConfig) -> "PreTrainedModel":
    """The architecture of a config.json, its weights without values."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        return AutoModelForCausalLM.from_config(full_config(config), dtype=torch.float32).eval()


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
    def label(self) -> str:
        """The name without where it lies on this machine: what certificates and model cards say."""
        return self.name if base_folder(self.name) is None else Path(self.name).name


def find_base(model: JsonObject, onto: str, *, local_only: bool = False) -> Base:
    """The base of `manifest.json["model"]`: `onto` "4bit" is what was loaded, "16bit" its 16-bit counterpart.

    Raises ToolkitError when the base cannot be had, or cannot be merged onto."""
    if onto not in ("16bit", "4bit"):
        raise ToolkitError(f"onto: expected 16bit or 4bit, got {onto!r}")
    name = model["name"]
    revision = model.get("revision")
    folder = base_folder(name)
    # unsloth/Qwen3-4B-unsloth-bnb-4bit was made from unsloth/Qwen3-4B
    if onto == "16bit" and FOUR_BIT_NAME.search(name) and (folder is None or quantization(folder)):
        name = FOUR_BIT_NAME.sub("", name)
        revision = None  # the one recorded is of the 4-bit repository
        folder = base_folder(name)
    folder = folder or download(name, revision, local_only=local_only)
    check_folder(folder, onto)
    # the Hub's cache names a folder by its commit, whatever branch was asked for
    commit = folder.name if folder.parent.name == "snapshots" else revision
    return Base(name, commit, folder, onto == "4bit")


def quantization(folder: Path) -> str | None:
    """How the weights of a folder are quantized, by config.json: "nf4", another method's name, or None."""
    settings = read_json(folder / "config.json").get("quantization_config")
    if not settings:
        return None
    if settings.get("load_in_4bit") and settings.get("bnb_4bit_quant_type") == "nf4":
        return "nf4"
    return settings.get("quant_method", "unknown")


def check_folder(folder: Path, onto: str) -> None:
    """Raises ToolkitError for a model's folder that cannot be merged onto."""
    kind = quantization(folder)
    if kind == "nf4" and onto == "16bit":
        raise ToolkitError(
            f"{folder}: holds 4-bit weights: put the 16-bit model beside it (its name without -bnb-4bit), or merge onto "
            "these with --onto 4bit"
        )
    if kind not in (None, "nf4"):
        raise ToolkitError(
            f"{folder}/config.json: weights quantized by {kind}, expected 16-bit ones or bitsandbytes' NF4: train on the "
            "16-bit model and export that run"
        )
    if (folder / "adapter_config.json").is_file():
        raise ToolkitError(
            f"{folder}: holds an adapter_config.json beside config.json, and transformers would add that adapter to the "
            "model: move the adapter's two files into a folder of their own"
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads from a folder, in its order; tensors of later ones replace earlier ones.

    A model.safetensors goes before an index, whatever shards lie beside it; of an index all files count, with all that is in
    them (transformers 5: modeling_utils._get_resolved_checkpoint_files, _load_pretrained_model). Raises ToolkitError."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        raise ToolkitError(
            f"{folder}: neither weights nor an index ({WEIGHTS}, {INDEX}): restore them. A pickle (.bin) is not read here: "
            "load it with transformers and save it again with save_pretrained"
        )
    files = sorted({folder / name for name in read_json(index).get("weight_map", {}).values()})
    if not files:
        raise ToolkitError(f"{index}: expected a weight_map that names the file of each tensor: fetch the model again")
    return files


class Stored(NamedTuple):
    """Where a tensor is, and what it is before it is read."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """PyTorch's name of the type it has when it is read; safetensors' name where there is no such type here."""
    name: str
    """In the file."""


class Checkpoint:
    """A folder of safetensors as transformers loads it, memory-mapped: a tensor costs memory only while it is used."""

    def __init__(self, folder: Path):
        """Raises ToolkitError for weights that are missing, damaged or not of this config.json."""
        self.folder = folder
        self.config: ModelConfig = read_json(folder / "config.json")
        self.entries: dict[str, Stored] = {}
        """Everything in the files, by the names of the text model, statistics of 4-bit weights included."""
        # names, shapes and types stand in each file's header: nothing is read yet
        for file in weight_files(folder):
            with open_weights(file) as weights:
                for name in weights.keys():  # noqa: SIM118 - safe_open is no dict and cannot be iterated
                    view = weights.get_slice(name)
                    dtype = view.get_dtype()
                    entry = Stored(file, tuple(view.get_shape()), TYPES.get(dtype, dtype), name)
                    self.entries[seen_as(name)] = entry
        # a statistic is part of a 4-bit weight, or a buffer that transformers computes anew
        self.weights = {
            name: entry
            for name, entry in self.entries.items()
            if ".weight." not in name and not name.endswith("rotary_emb.inv_freq")
        }
        """The entries that are weights."""
        self.packed = {name.removesuffix(NF4_STATE) for name in self.entries if name.endswith(NF4_STATE)}
        """Names of the weights that are stored in NF4."""
        for name in self.packed:  # packed as a column of bytes; the real shape is in this entry
            state = json.loads(bytes(self._read(name + NF4_STATE)))
            self.weights[name] = self.entries[name]._replace(shape=tuple(state["shape"]), dtype=state["dtype"])
        self.tied = self._tie()
        """Whether the embedding is the head too."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{weight: shape}, without the statistics of 4-bit ones."""
        return {name: stored.shape for name, stored in self.weights.items()}

    def _tie(self) -> bool:
        """Remove the head from `weights` where it is the embedding, by the rules of transformers' `tie_weights`:
        a head of its own, with other values, stays even where the configuration says that it is tied."""
        import torch

        states_tie = full_config(self.config).get_text_config().tie_word_embeddings
        if HEAD not in self.weights:
            if states_tie:
                return True
            raise ToolkitError(
                f"{self.folder}: has no {HEAD} although config.json does not tie it to the embedding (tie_word_embeddings): "
                "transformers would begin with a random one. Restore the file or the setting"
            )
        if not states_tie or EMBEDDING not in self.weights:
            return False
        # as stored, also where a subclass adds to it
        head, embedding = (Checkpoint.tensor(self, name).float() for name in (HEAD, EMBEDDING))
        if is_tied := torch.equal(head, embedding):
            del self.weights[HEAD]
        return is_tied

    def _read(self, name: str) -> "torch.Tensor":
        stored = self.entries[name]
        with open_weights(stored.file) as weights:
            return weights.get_tensor(stored.name)

    def tensor(self, name: str) -> "torch.Tensor":
        """The stored tensor; a stored 4-bit one is dequantized to the type it was trained in."""
        if name not in self.packed:
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


def unmergeable(config: JsonObject) -> str | None:
    """The first setting of an adapter_config.json (or of a recipe's `lora`) by which a weight is more than base + B·A·scaling."""
    if "embed_tokens" in (config.get("target_modules") or ()):
        return "target_modules with embed_tokens"
    for key, value in config.items():
        if value and key not in HARMLESS and value not in PLAIN_LORA.get(key, ()):
            return f"{key} = {value!r}"
    return None


def generation_of(base: Path) -> JsonObject:
    """The generation_config.json of a base's folder; empty where it has none."""
    return read_if_there(base / "generation_config.json")


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
        """Raises ToolkitError for an adapter that is damaged, or more than a LoRA."""
        check_scale(scale)
        self.config = read_json(folder / "adapter_config.json")
        self.scale = scale
        self.file = folder / ADAPTER_WEIGHTS
        if setting := unmergeable(self.config):
            raise ToolkitError(f"{folder}/adapter_config.json: {setting} {ELSEWHERE}")
        # A and B are stored side by side, in any order
        halves: dict[str, dict[str, torch.Tensor]] = {}
        with open_weights(self.file) as weights:
            for stored in weights.keys():  # noqa: SIM118 - safe_open is no dict and cannot be iterated
                module, _, half = seen_as(stored.removeprefix("base_model.model.")).partition(".lora_")
                if half:
                    halves.setdefault(module, {})[half] = weights.get_tensor(stored).float()
                elif not module.endswith(".base_layer.weight"):  # an unchanged copy, where the head is a target
                    raise ToolkitError(
                        f"{self.file}: holds the whole of {module}, resized or trained, which {ELSEWHERE}"
                    )
        self.factors = {f"{module}.weight": self._factors(module, half) for module, half in halves.items()}
        """{weight: what is added to it}."""

    def _factors(self, module: str, halves: "dict[str, torch.Tensor]") -> Factors:
        if halves.keys() != {"A.weight", "B.weight"}:
            raise ToolkitError(f"{self.file}: {module} lacks one of its two factors: restore the file")
        if not all(half.isfinite().all() for half in halves.values()):
            raise ToolkitError(
                f"{self.file}: {module} holds values that are no numbers: the training went wrong; take an earlier "
                "checkpoint, or train again at a lower learning rate"
            )
        return Factors(halves["A.weight"], halves["B.weight"], self.scaling(module))

    def scaling(self, module: str) -> float:
        """PEFT's lora_alpha / r (or √r) of a module, by its own patterns, times the scale."""
        rank = self._setting("rank_pattern", module, self.config["r"])
        alpha = self._setting("alpha_pattern", module, self.config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank) * self.scale

    def _setting(self, patterns: str, module: str, usual: float) -> float:
        """What a module has of its own, by its name, else the usual value."""
        known = self.config.get(patterns)
        if not known:
            return usual
        # imported here alone: it takes 8 CPU seconds, and few adapters have patterns
        from peft.utils.other import get_pattern_key

        return known.get(get_pattern_key(known.keys(), module), usual)
