"""Adapter + base → merged 16-bit safetensors, a shard at a time: the whole model is never in memory.

merged = open_merged(Path("outputs/hybrid"), "16bit"); merged.tensor("model.norm.weight")
"""

import functools
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from toolkit.evaluation.generate import closing_token
from toolkit.files import POCKET, ToolkitError, complete, describe, download, find, read_json, write_json, write_text
from toolkit.recipe import INITS

FAILED = "EXPORT_FAILED.txt"
SHARD_BYTES = 2 * 10**9
FOUR_BIT_NAME = re.compile(r"(-unsloth)?-bnb-4bit/?$")
NF4_STATE = ".quant_state.bitsandbytes__nf4"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
PLAIN_LORA = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": INITS}
"""PEFT settings under which a weight is simply base + B·A·scaling; others that are not in HARMLESS must be empty."""
HARMLESS = frozenset(
    """task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules exclude_modules
    lora_alpha lora_dropout use_rslora layers_to_transform layers_pattern megatron_core qalora_group_size runtime_config
    eva_config ensure_weight_tying""".split()
)
TOKENIZER_FILES = """tokenizer.json tokenizer_config.json chat_template.jinja special_tokens_map.json added_tokens.json
vocab.json merges.txt tokenizer.model""".split()
RUN_FILES = """manifest.json adapter/adapter_config.json adapter/adapter_model.safetensors adapter/tokenizer.json
adapter/tokenizer_config.json""".split()
PROGRESS_SECONDS = 5


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


def find_base(model: dict, onto: str, *, local_only: bool = False) -> Base:
    """The base of `manifest.json["model"]`: `onto` "4bit" is what was loaded, "16bit" its 16-bit counterpart.

    Raises ToolkitError when the base cannot be had."""
    if onto not in ("16bit", "4bit"):
        raise ToolkitError(f"onto: expected 16bit or 4bit, got {onto!r}")
    name, revision = model["name"], model.get("revision")
    folder = POCKET if name == "pocket" else find(name)
    # unsloth/Qwen3-4B-unsloth-bnb-4bit was made from unsloth/Qwen3-4B
    if onto == "16bit" and FOUR_BIT_NAME.search(name) and (folder is None or _is_four_bit(folder)):
        name, revision = FOUR_BIT_NAME.sub("", name), None  # a revision of the 4-bit repository
        folder = find(name)
    folder = folder or download(name, revision, local_only=local_only)
    if onto == "16bit" and _is_four_bit(folder):
        raise ToolkitError(
            f"{folder}: holds 4-bit weights. Put the 16-bit model beside it (the name without its "
            "-bnb-4bit ending), or merge onto these with --onto 4bit"
        )
    # the Hub's cache names a folder by its commit, whatever branch was asked for
    commit = folder.name if folder.parent.name == "snapshots" else revision
    return Base(name, commit, folder, onto == "4bit")


def _is_four_bit(folder: Path) -> bool:
    return read_json(folder / "config.json").get("quantization_config", {}).get("quant_method") == "bitsandbytes"


class Checkpoint:
    """A folder of safetensors, memory-mapped: a tensor costs memory only while it is used."""

    def __init__(self, folder: Path):
        self.folder, self.config = folder, read_json(folder / "config.json")
        index = folder / "model.safetensors.index.json"
        files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        self.files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            with open_weights(folder / file) as weights:
                for name in weights.keys():  # noqa: SIM118 - safe_open is no dict and cannot be iterated
                    self.files[name], shapes[name] = folder / file, tuple(weights.get_slice(name).get_shape())
        # packed 4-bit weights are stored as a column of bytes; their real shape is in this entry
        for name in [name for name in self.files if name.endswith(NF4_STATE)]:
            shapes[name.removesuffix(NF4_STATE)] = tuple(json.loads(bytes(self._stored(name)))["shape"])
        self.tied = bool(self.config.get("tie_word_embeddings")) or HEAD not in self.files
        """Whether the embedding is the head too."""
        skipped = HEAD if self.tied else None
        self.shapes = {n: s for n, s in shapes.items() if n.endswith((".weight", ".bias")) and n != skipped}
        """{weight: shape}, without the statistics of 4-bit ones."""

    def _stored(self, name: str):
        with open_weights(self.files[name]) as weights:
            return weights.get_tensor(name)

    def is_quantized(self, name: str) -> bool:
        return name + NF4_STATE in self.files

    def tensor(self, name: str):
        """The stored tensor; a stored 4-bit one is dequantized to the type it was trained in."""
        if not self.is_quantized(name):
            return self._stored(name)
        from bitsandbytes.functional import QuantState, dequantize_4bit

        parts = {n.removeprefix(name + "."): self._stored(n) for n in self.files if n.startswith(name + ".")}
        return dequantize_4bit(self._stored(name), QuantState.from_dict(parts, device="cpu"))


def open_weights(file: Path):
    """safetensors' view of a file. Raises ToolkitError for one that is missing, cut short or something else."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "pt")
    except (OSError, SafetensorError) as error:
        raise ToolkitError(
            f"{file}: expected whole safetensors weights ({error}). Restore the file, or run the step that writes it again"
        ) from error


def unmergeable(config: dict) -> str | None:
    """The first setting of an adapter_config.json (or of a recipe's `lora`) by which a weight is more than base + B·A·scaling."""
    if "embed_tokens" in (config.get("target_modules") or ()):
        return "target_modules with embed_tokens"
    settings = ((key, value) for key, value in config.items() if key not in HARMLESS and value)
    return next((f"{key} = {value!r}" for key, value in settings if value not in PLAIN_LORA.get(key, ())), None)


class Adapter:
    """A LoRA as PEFT saves it, in fp32."""

    def __init__(self, folder: Path):
        self.config = read_json(folder / "adapter_config.json")
        if setting := unmergeable(self.config):
            raise ToolkitError(
                f"{folder / 'adapter_config.json'}: {setting} cannot be merged here; merge it with PEFT's merge_and_unload"
            )
        rank = self.config["r"]
        self.scaling = self.config["lora_alpha"] / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        halves: dict[str, dict] = {}
        with open_weights(folder / "adapter_model.safetensors") as weights:
            for stored in weights.keys():  # noqa: SIM118 - safe_open is no dict and cannot be iterated
                weight, _, half = stored.removeprefix("base_model.model.").partition(".lora_")
                if not half and not weight.endswith(".base_layer.weight"):
                    raise ToolkitError(
                        f"{folder}: holds {weight} as a whole, as PEFT saves embeddings that were resized or trained: merge it "
                        "with PEFT's merge_and_unload"
                    )
                if half:  # else an unchanged copy, where the head is a target
                    halves.setdefault(f"{weight}.weight", {})[half] = weights.get_tensor(stored).float()
        self.factors = {name: (half.get("A.weight"), half.get("B.weight")) for name, half in halves.items()}
        """{weight: (A, B)}."""


class Merged(Checkpoint):
    """Base and adapter seen as one 16-bit checkpoint, each tensor computed when asked for."""

    def __init__(self, base: Base, adapter: Adapter):
        super().__init__(base.folder)
        self.base, self.adapter = base, adapter
        # left out without a word, a factor would make an export that differs from its run
        if stray := sorted(adapter.factors.keys() - self.shapes):
            raise ToolkitError(
                f"the adapter holds {stray[0]} ({len(stray)} such), which belongs to no weight of the base: it was "
                "trained on another model, or on the head of one that shares it with the embedding"
            )
        self.quantized = self.config.pop("quantization_config", None) is not None
        # the name of `dtype` before transformers 5
        self.config.pop("torch_dtype", None)
        self.config |= {"dtype": "bfloat16", "tie_word_embeddings": self.tied}

    def base_tensor(self, name: str):
        """The base's weight, before the adapter: 16-bit, or through NF4 as bitsandbytes does when it loads a model."""
        import torch

        weight = super().tensor(name).to(torch.bfloat16)
        # what bitsandbytes quantizes: the linear layers of the decoder, not embedding and head
        on_load = self.base.four_bit and not self.quantized and name.endswith("_proj.weight")
        return four_bit_round_trip(weight) if on_load else weight

    def tensor(self, name: str):
        """The merged weight: delta in fp32 as PEFT computes it, added in fp32, then rounded to bf16 once."""
        import torch

        weight = self.base_tensor(name)
        if name in self.adapter.factors:
            a, b = self.adapter.factors[name]
            weight = (weight.float() + (b @ a) * self.adapter.scaling).to(torch.bfloat16)
        return weight


def four_bit_round_trip(weight, blocksize=64, compress_statistics=True, quant_type="nf4"):
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


def open_merged(run: Path, onto: str, *, local_only: bool = False) -> Merged:
    """A run's base and adapter, seen as one checkpoint. `onto` "4bit" is the base exactly as it was trained on."""
    model = read_json(run / "manifest.json")["model"]
    if onto == "4bit" and not model.get("load_in_4bit"):
        raise ToolkitError(f"{run}: trained on 16-bit weights: there is no 4-bit base to merge onto, use --onto 16bit")
    return Merged(find_base(model, onto, local_only=local_only), Adapter(run / "adapter"))


class Record:
    """export.json: what an export has written, by checksum, for one set of inputs.

    A file whose recorded checksum and inputs still match is kept, so a repeated export writes only what is missing."""

    def __init__(self, run: Path, inputs: dict):
        self.run, self.inputs = run, inputs
        old = read_json(run / "export.json") if (run / "export.json").is_file() else {"inputs": inputs, "files": {}}
        self.files: dict[str, dict] = old["files"]
        if old["inputs"] != inputs:  # another adapter or base: every old file is stale
            uncertify(run)
            for name in self.files:
                (run / name).unlink(missing_ok=True)
            self.files = {}

    def make(self, path: Path, content: str | Callable[[Path], object]) -> bool:
        """Write a text, or let `content(partial)` write, unless the file is there already; True if it was written."""
        name = path.relative_to(self.run).as_posix()
        kept = path.is_file() and self.files.get(name) == describe(path)
        if kept and (callable(content) or path.read_text(encoding="utf-8") == content):
            return False
        uncertify(self.run)
        with complete(path) as partial:
            content(partial) if callable(content) else partial.write_text(content, encoding="utf-8")
        self.files[name] = describe(path)
        write_json(self.run / "export.json", {"inputs": self.inputs, "files": self.files})
        return True


def uncertify(run: Path) -> None:
    """Withdraw a certificate: the files are about to change, or to be looked at again."""
    for name in ("certificate.json", "certificate.md"):
        (run / name).unlink(missing_ok=True)
    write_text(run / FAILED, "Not verified yet: the export or its verification was interrupted.\n")


def merge(merged: Merged, run: Path, record: Record, say: Callable[[str], None] = print) -> None:
    """Write run/merged in the Hugging Face layout; `config.json` comes last, so a folder that loads is whole."""
    from huggingface_hub import split_state_dict_into_shards_factory

    out = run / "merged"
    shards = split_state_dict_into_shards_factory(
        merged.shapes,
        get_storage_size=lambda shape: 2 * math.prod(shape),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    for file, names in shards.filename_to_tensors.items():
        one_by_one = progress(names, lambda name: size_of(merged, name), f"merging {file}", say)
        if record.make(out / file, functools.partial(_write_shard, merged, one_by_one)):
            say(f"merged: {file}, {(out / file).stat().st_size / 1e9:.2f} GB")
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        record.make(out / "model.safetensors.index.json", _json(index))
    for file, text in small_files(merged, run / "adapter").items():
        record.make(out / file, text)


def _write_shard(merged: Merged, names: Iterator[str], partial: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: merged.tensor(name).contiguous() for name in names}, partial, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, told as every other failed write
        raise OSError(str(error)) from error


def size_of(merged: Merged, name: str) -> int:
    """Bytes of a merged tensor."""
    return 2 * math.prod(merged.shapes[name])


def small_files(merged: Merged, tokenizer: Path) -> dict[str, str]:
    """{file: text} of a merged folder besides its weights: the run's tokenizer, the base's settings.

    `model_max_length` is the base's: training may set it to the recipe's `max_seq_length`, which vLLM and transformers
    would take for the model's limit."""
    files = {f: (tokenizer / f).read_text(encoding="utf-8") for f in TOKENIZER_FILES if (tokenizer / f).is_file()}
    base = merged.base.folder / "tokenizer_config.json"
    longest = (read_json(base) if base.is_file() else {}).get("model_max_length")
    settings = json.loads(files["tokenizer_config.json"])
    settings["model_max_length"] = longest or merged.config["max_position_embeddings"]
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # its name in transformers 4, which older vLLM has
    files["tokenizer_config.json"] = _json(settings)
    if generation := generation_config(merged, load_tokenizer(tokenizer)):
        files["generation_config.json"] = _json(generation)
    return files | {"config.json": _json(merged.config)}


def _json(value: dict) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def generation_config(merged: Merged, tokenizer) -> dict:
    """The base's generation_config.json, with the end of a turn among its stop tokens (a base model's lacks it)."""
    file = merged.base.folder / "generation_config.json"
    generation = read_json(file) if file.is_file() else {}
    stops, end = stop_tokens(generation, merged.config), closing_token(tokenizer)
    return generation if end in stops else generation | {"eos_token_id": [*stops, end]}


def stop_tokens(generation: dict, config: dict) -> list[int]:
    """Ids that end generation in transformers."""
    stops = generation.get("eos_token_id", config.get("eos_token_id"))
    return stops if isinstance(stops, list) else [i for i in [stops] if i is not None]


def filled(name: str, values: dict) -> str:
    """A file of templates/ (the model card, the certificate's page, the Modelfile) with its values."""
    import jinja2

    folder = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    environment = jinja2.Environment(loader=folder, keep_trailing_newline=True, trim_blocks=True)
    return environment.get_template(name).render(values)


def load_tokenizer(folder: Path):
    """The tokenizer of a folder. Raises ToolkitError when its files are missing or damaged."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exceptions for a damaged tokenizer.json
        raise ToolkitError(
            f"{folder}: the tokenizer cannot be loaded ({str(error)[:200]}): restore its files"
        ) from error


def progress(items: list, size: Callable, label: str, say: Callable[[str], None]) -> Iterator:
    """The items one by one; every few seconds it says how far it is, by their sizes, and the time left."""
    total, done, began = sum(map(size, items)), 0, time.monotonic()
    last = began
    for item in items:
        yield item
        done, now = done + size(item), time.monotonic()
        if now - last > PROGRESS_SECONDS and done < total:
            say(f"{label}: {done / total:.0%}, about {(now - began) * (total / done - 1):.0f} s left")
            last = now
