"""Adapter + base → merged 16-bit safetensors, tensor by tensor: no model is ever in memory.

merge(Merged(find_base(manifest["model"], "16bit"), Adapter(run / "adapter")), run / "merged", ledger)
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from toolkit.export.ledger import Ledger
from toolkit.files import POCKET, ToolkitError, find, read_json

SHARD_BYTES = 4 * 10**9
DTYPES = {"BF16": ("bfloat16", 2), "F16": ("float16", 2), "F32": ("float32", 4), "U8": ("uint8", 1)}
FOUR_BIT_NAMES = ("-unsloth-bnb-4bit", "-bnb-4bit")
NF4_STATE = ".quant_state.bitsandbytes__nf4"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
PLAIN_LORA = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


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
    """The base of `manifest.json["model"]`: `onto` "16bit" (the counterpart of a bnb-4bit name) or "4bit"."""
    name, revision = model["name"], model.get("revision")
    if onto not in ("16bit", "4bit"):
        raise ToolkitError(f"onto: expected 16bit or 4bit, got {onto!r}")
    folder = POCKET if name == "pocket" else find(name)
    suffix = next((s for s in FOUR_BIT_NAMES if name.rstrip("/").endswith(s)), "")
    if onto == "16bit" and suffix and (folder is None or Checkpoint(folder).is_four_bit):
        name, revision = name.rstrip("/").removesuffix(suffix), None  # that revision was the 4-bit one's
        folder = find(name)
    folder = folder or _download(name, revision, local_only)
    if onto == "16bit" and Checkpoint(folder).is_four_bit:
        raise ToolkitError(
            f"{folder}: holds 4-bit weights. Put the 16-bit model beside it (the name without its "
            "-bnb-4bit ending), or merge onto these with --onto 4bit"
        )
    commit = folder.name if folder.parent.name == "snapshots" else revision
    return Base(name, commit, folder, onto == "4bit")


def _download(name: str, revision: str | None, local_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                local_files_only=local_only,
                allow_patterns=["*.json", "*.safetensors", "*.jinja"],
            )
        )
    except Exception as error:  # the Hub library raises many kinds; to the user they are one: it cannot be had
        raise ToolkitError(
            f"{name}: no such folder here, and the Hub did not give it ({type(error).__name__}). Check "
            "the name and the network, or download the model and name its folder"
        ) from error


class Checkpoint:
    """A folder of safetensors, memory-mapped: a tensor costs memory only while it is used."""

    def __init__(self, folder: Path):
        self.folder, self.config = folder, read_json(folder / "config.json")
        index = folder / "model.safetensors.index.json"
        files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        self.entries: dict[str, tuple[Path, dict, int]] = {}
        for file in files:
            self.entries |= _header(folder / file)

    @property
    def is_four_bit(self) -> bool:
        return self.config.get("quantization_config", {}).get("quant_method") == "bitsandbytes"

    @property
    def tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings")) or HEAD not in self.entries

    def names(self) -> list[str]:
        """Weights only: neither the statistics of 4-bit ones nor a head that the embedding stands for."""
        weights = [n for n in self.entries if n.endswith((".weight", ".bias"))]
        return [n for n in weights if n != HEAD or not self.tied]

    def shape(self, name: str) -> tuple[int, ...]:
        if name + NF4_STATE in self.entries:
            return tuple(json.loads(bytes(self.raw(name + NF4_STATE)))["shape"])
        return tuple(self.entries[name][1]["shape"])

    def raw(self, name: str) -> np.memmap:
        """The tensor's bytes. Copy-on-write, because torch wants writable memory; nothing is ever written back."""
        file, entry, start = self.entries[name]
        first, last = entry["data_offsets"]
        return np.memmap(file, np.uint8, "c", start + first, (last - first,))

    def tensor(self, name: str):
        """The stored tensor; a stored 4-bit one is dequantized to the type it was trained in."""
        import torch

        dtype, _ = DTYPES[self.entries[name][1]["dtype"]]
        value = torch.from_numpy(self.raw(name)).view(getattr(torch, dtype)).reshape(self.entries[name][1]["shape"])
        return self._dequantized(name, value) if name + NF4_STATE in self.entries else value

    def _dequantized(self, name: str, packed):
        from bitsandbytes.functional import QuantState, dequantize_4bit

        parts = {n.removeprefix(name + "."): self.tensor(n) for n in self.entries if n.startswith(name + ".")}
        return dequantize_4bit(packed, QuantState.from_dict(parts, device="cpu"))


def _header(file: Path) -> dict[str, tuple[Path, dict, int]]:
    """Layout of https://github.com/huggingface/safetensors#format: length, JSON, data."""
    try:
        with open(file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            table = json.loads(stream.read(size))
    except (OSError, ValueError) as error:
        raise ToolkitError(f"{file}: expected safetensors weights ({error})") from error
    table.pop("__metadata__", None)
    return {name: (file, entry, 8 + size) for name, entry in table.items()}


class Adapter:
    """A LoRA as PEFT saves it, in fp32."""

    def __init__(self, folder: Path):
        from safetensors.torch import load_file

        self.config = read_json(folder / "adapter_config.json")
        for key, plain in PLAIN_LORA.items():
            if self.config.get(key, plain) not in (plain, None):
                raise ToolkitError(
                    f"{folder / 'adapter_config.json'}: {key} = {self.config[key]!r} cannot be merged "
                    f"here, only {plain!r}; merge it with PEFT's merge_and_unload"
                )
        rank = self.config["r"]
        self.scaling = self.config["lora_alpha"] / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        stored = load_file(folder / "adapter_model.safetensors")
        names = {n: n.removeprefix("base_model.model.") for n in stored}
        # A head that is itself a LoRA target is stored beside its factors, unchanged (PEFT's save_embedding_layers).
        self.tensors = {new: stored[n].float() for n, new in names.items() if not new.endswith(".base_layer.weight")}

    def factors(self, name: str) -> tuple | None:
        """(A, B) of a weight, or None where the adapter leaves it alone."""
        a, b = (self.tensors.get(name.removesuffix("weight") + f"lora_{x}.weight") for x in "AB")
        return None if a is None or b is None else (a, b)

    def saved(self, name: str):
        """The weight trained as a whole (PEFT's `modules_to_save`), or None."""
        return self.tensors.get(name)

    def touches(self, name: str) -> bool:
        return self.factors(name) is not None or self.saved(name) is not None

    def check(self, names: list[str]) -> None:
        used = {n.removesuffix("weight") + f"lora_{x}.weight" for n in names for x in "AB"} | set(names)
        stray = sorted(set(self.tensors) - used)
        if stray:
            raise ToolkitError(
                f"the adapter holds {stray[0]} ({len(stray)} such), which belongs to no weight of the "
                "base: it was trained on another model, or by a method that cannot be merged here"
            )


class Merged:
    """Base and adapter seen as one 16-bit checkpoint, each tensor computed when asked for."""

    def __init__(self, base: Base, adapter: Adapter):
        self.base, self.adapter, self.checkpoint = base, adapter, Checkpoint(base.folder)
        # A trained head or embedding ends their being one tensor: from here on both are stored.
        self.unties = self.checkpoint.tied and (adapter.touches(HEAD) or adapter.touches(EMBEDDING))
        adapter.check(self.names())
        self.config = {k: v for k, v in self.checkpoint.config.items() if k != "quantization_config"}
        self.config |= {"dtype": "bfloat16", "tie_word_embeddings": self.checkpoint.tied and not self.unties}
        self.config.pop("torch_dtype", None)

    @property
    def tied(self) -> bool:
        return self.config["tie_word_embeddings"]

    def names(self) -> list[str]:
        return self.checkpoint.names() + ([HEAD] if self.unties else [])

    def shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.shape(self._stored(name))

    def _stored(self, name: str) -> str:
        return EMBEDDING if name == HEAD and self.checkpoint.tied else name

    def base_tensor(self, name: str):
        """The base's weight, before the adapter: 16-bit, or through NF4 as bitsandbytes does when it loads a model."""
        import torch

        weight = self.checkpoint.tensor(self._stored(name)).to(torch.bfloat16)
        on_load = self.base.four_bit and not self.checkpoint.is_four_bit and name.endswith("_proj.weight")
        return nf4_round_trip(weight) if on_load else weight

    def tensor(self, name: str):
        """The merged weight: delta in fp32 as PEFT computes it, added in fp32, then rounded to bf16 once."""
        import torch

        if self.adapter.saved(name) is not None:
            return self.adapter.saved(name).to(torch.bfloat16)
        weight, factors = self.base_tensor(name), self.adapter.factors(name)
        if factors is None:
            return weight
        return (weight.float() + (factors[1] @ factors[0]) * self.adapter.scaling).to(torch.bfloat16)


def nf4_round_trip(weight):
    """bitsandbytes' own NF4: blocks of 64 and double quantization, the settings Unsloth loads with."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(packed, state)


def merge(merged: Merged, out: Path, ledger: Ledger, tokenizer: Path, say: Callable[[str], None] = print) -> None:
    """Writes `out` in the Hugging Face layout; `config.json` comes last, so a folder that loads is whole."""
    shards = plan_shards(merged)
    for file, names in shards.items():
        if ledger.make(out / file, lambda partial, names=names: write_shard(partial, merged, names)):
            say(f"merged: {file}, {(out / file).stat().st_size / 1e9:.2f} GB")
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(map(size_of(merged), merged.names()))},
            "weight_map": {n: file for file, names in shards.items() for n in names},
        }
        ledger.make_text(out / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    for source in [tokenizer / f for f in TOKENIZER_FILES] + [merged.base.folder / "generation_config.json"]:
        if source.is_file():
            ledger.make(out / source.name, lambda partial, source=source: shutil.copyfile(source, partial))
    ledger.make_text(out / "config.json", json.dumps(merged.config, indent=2) + "\n")


def size_of(merged: Merged) -> Callable[[str], int]:
    return lambda name: 2 * math.prod(merged.shape(name))


def plan_shards(merged: Merged) -> dict[str, list[str]]:
    size, groups, filled = size_of(merged), [[]], 0
    for name in merged.names():
        if groups[-1] and filled + size(name) > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size(name)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def write_shard(path: Path, merged: Merged, names: list[str]) -> None:
    """One safetensors file, streamed: memory is that of one tensor."""
    import torch

    table, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        start, end = end, end + size_of(merged)(name)
        table[name] = {"dtype": "BF16", "shape": list(merged.shape(name)), "data_offsets": [start, end]}
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            out.write(merged.tensor(name).contiguous().view(torch.uint8).numpy())


def open_merged(run: Path, onto: str, *, local_only: bool = False) -> Merged:
    """A run's base and adapter, seen as one checkpoint. `onto` "4bit" is the base exactly as it was trained on."""
    model, config = read_json(run / "manifest.json")["model"], read_json(run / "adapter" / "adapter_config.json")
    loaded = str(config.get("base_model_name_or_path"))  # Unsloth swaps a name for its -bnb-4bit twin when it loads
    if onto == "4bit" and not model.get("load_in_4bit"):
        raise ToolkitError(f"{run}: trained on 16-bit weights: there is no 4-bit base to merge onto, use --onto 16bit")
    if onto == "4bit" and loaded.endswith(FOUR_BIT_NAMES) and "/" in loaded and find(model["name"]) is None:
        model = {"name": loaded, "revision": model.get("revision") if loaded == model["name"] else None}
    return Merged(find_base(model, onto, local_only=local_only), Adapter(run / "adapter"))
