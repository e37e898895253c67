"""Trained adapters in any ratio: the weighted sum of what several runs changed, as a run folder of its own.

from toolkit.comparison.blend import blend; blend(["first", "second"], [0.25, 0.75])

A LoRA adds B·A·scaling to a weight. The sum of several is one LoRA: their A below each other, their B side by side, each B
times its scaling and its weight. Nothing is approximated; the rank is the sum of the ranks.
"""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from toolkit import recipe as recipes
from toolkit.comparison.dial import finished_run, lora_layers
from toolkit.comparison.runs import changed_keys
from toolkit.data.joined import joined_report
from toolkit.export.checkpoint import Adapter, check_scale
from toolkit.files import ToolkitError, flat, lock, outputs, read_json, write_json, write_text
from toolkit.recipe import Recipe
from toolkit.records import Parent
from toolkit.run import default_console
from toolkit.training.base import ADAPTER_WEIGHTS
from toolkit.training.folder import commit, read_manifest, utc_now
from toolkit.training.model import adapter_checksums

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG = "adapter_config.json"


def blend(
    runs: Sequence[str | Path], weights: Sequence[float], *, name: str | None = None, console: Console | None = None
) -> Path:
    """Write the weighted sum of finished runs of one base as a run, which every verb takes; returns its folder.

    `weights` has a number from 0 to 2 for each run. Raises ToolkitError for runs that cannot be added, and where the name
    is taken by something else."""
    if not 2 <= len(runs) == len(weights) or not any(weights):
        raise ToolkitError(
            f"blend: expected two runs or more with a weight each, not all 0, found {len(runs)} and {weights}"
        )
    for weight in weights:
        check_scale(weight)
    folders = [finished_run(run) for run in runs]
    parts = [f"{folder.name}-{weight:g}" for folder, weight in zip(folders, weights, strict=True)]
    name = name or "-".join(parts)
    folder = write_sum(folders, weights, outputs(), name)
    words = f"{folder}\nnext:    python -m toolkit evaluate {name}   or   python -m toolkit dial {name}"
    (console or default_console()).print(words, markup=False)
    return folder


def check_addable(parents: Sequence[Parent], adapters: Sequence[Adapter]) -> None:
    """Raises ToolkitError where runs were trained on different models, talk by different templates, or adapted different
    layers: what they changed is then not the same weights."""
    first = parents[0]
    for parent, adapter in zip(parents, adapters, strict=True):
        if adapter.config.get("rank_pattern"):
            raise ToolkitError(f"{parent['name']}: a rank pattern: only runs of one rank in all layers can be added")
        both = f"{first['name']} and {parent['name']}"
        if keys := changed_keys([base_settings(first), base_settings(parent)]):
            raise ToolkitError(f"{both}: only runs of one base can be added: {', '.join(keys)} differ")
        checksums = [first["manifest"]["adapter"], parent["manifest"]["adapter"]]
        if files := set(changed_keys(checksums)) - {ADAPTER_WEIGHTS, CONFIG}:
            raise ToolkitError(f"{both}: only runs of one tokenizer can be added: {', '.join(sorted(files))} differ")
        if layers := adapters[0].factors.keys() ^ adapter.factors.keys():
            raise ToolkitError(
                f"{both}: only runs that adapt the same layers can be added: {min(layers)} is in one only"
            )


def base_settings(parent: Parent) -> dict[str, Any]:
    """What says which base a run was trained on."""
    base: Any = {**parent["manifest"]["model"], "name": ""}  # its path may differ
    return flat({"model": parent["recipe"]["model"], "base": base})


# --- the run folder --------------------------------------------------------------------------------------------------


def write_sum(folders: Sequence[Path], weights: Sequence[float], place: Path, name: str) -> Path:
    """Write a sum's run folder below `place`, or again where the same sum is there. Raises ToolkitError."""
    adapters = [Adapter(folder / "adapter") for folder in folders]
    parents = [parent_of(folder) for folder in folders]
    check_addable(parents, adapters)
    values = parents[0]["recipe"]
    rank = sum(adapter.config["r"] for adapter in adapters)
    plain = {"r": rank, "lora_alpha": rank, "use_rslora": False}
    recipe = recipes.from_dict(values | {"name": name, "lora": values["lora"] | plain}, "blend")
    target = place / name
    with lock(target, "blend"):
        before = read_manifest(target)
        if before and [before.get("weights"), before.get("parents")] != [[*weights], parents]:
            raise ToolkitError(f"{target} holds another run, and runs are never overwritten: choose another --name")
        # for the tokenizer and its template, which all parents have
        shutil.copytree(folders[0] / "adapter", target / "adapter", dirs_exist_ok=True)
        write_adapter(adapters, weights, target / "adapter", plain | {"alpha_pattern": {}})
        reports: list[Any] = [read_json(folder / "mix.json") for folder in folders]
        write_json(target / "mix.json", joined_report(reports, weights))
        write_records(target, recipe, parents, weights)
    return target


def parent_of(folder: Path) -> Parent:
    """A run as a record of its sum."""
    manifest: Any = read_json(folder / "manifest.json")
    return {"name": folder.name, "recipe": recipes.to_dict(recipes.of_run(folder)), "manifest": manifest}


def write_records(folder: Path, recipe: Recipe, parents: Sequence[Parent], weights: Sequence[float]) -> None:
    """The manifest and the recipe of a sum whose adapter is written."""
    made = {
        "recipe_sha256": recipes.sha256(recipe),
        "model": parents[0]["manifest"]["model"],
        # by them an evaluation is sized, as those of its parents were
        "steps": parents[0]["manifest"]["steps"],
        "commit": commit(),
        "started": utc_now(),
        "finished": utc_now(),
        "state": "finished",
        "adapter": adapter_checksums(folder / "adapter"),
        "weights": weights,
        "parents": parents,
    }
    write_json(folder / "manifest.json", made)
    # last: with it the folder is a run
    write_text(folder / "recipe.yaml", recipes.to_yaml(recipe))


def write_adapter(adapters: Sequence[Adapter], weights: Sequence[float], folder: Path, plain: dict[str, Any]) -> None:
    """The sum as PEFT saves an adapter, its scaling 1."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for module in adapters[0].factors:
        factors = [adapter.factors[module] for adapter in adapters]
        place = f"base_model.model.{module.removesuffix('.weight')}.lora_"
        columns = [part.b * part.scaling * weight for part, weight in zip(factors, weights, strict=True)]
        tensors[f"{place}A.weight"] = torch.cat([part.a for part in factors])
        tensors[f"{place}B.weight"] = torch.cat(columns, dim=1)
    save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    write_json(folder / CONFIG, adapters[0].config | plain)


# --- in memory -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def weighted(model: "PeftModel", weights: Sequence[float], ranks: Sequence[int]) -> Iterator[None]:
    """The model of a sum of runs of these ranks, each at weight 1, at other weights; afterwards as it was, to the last bit."""
    import torch

    # the B of the runs stand side by side, each as wide as its rank
    columns = torch.tensor(weights).repeat_interleave(torch.tensor(ranks))
    before = {half.weight: half.weight.data for layer in lora_layers(model) for half in layer.lora_B.values()}
    for weight, data in before.items():
        weight.data = data * columns.to(data)
    try:
        yield
    finally:
        for weight, data in before.items():
            weight.data = data
