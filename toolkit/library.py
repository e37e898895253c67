"""Three calls for your own Unsloth or TRL notebook: the compiled mix, the evaluation against the base, the verified export.

mixed = compile_mix("data_recipes/pocket.yaml"); mixed.train_dataset[0]["labels"]

They take and return what those libraries use: a tokenizer, datasets, a PeftModel, a folder. `import toolkit` gives them too.
"""

from collections.abc import Sequence
from pathlib import Path

from toolkit import recipe as recipes
from toolkit.files import ToolkitError, write_json
from toolkit.records import Evaluation

SAME_16_BIT, SAME_4_BIT = 0.002, 0.01
"""Relative difference that rounding to another 16-bit type, or quantizing on another device, makes in a weight."""


def compile_mix(recipe: str | Path | dict | recipes.Recipe, tokenizer=None, overrides: Sequence[str] = ()):
    """A recipe's mix for a loaded tokenizer: `.train_dataset` and `.validation_dataset` hold input_ids and labels.

    `recipe` is a file, a dict with its keys, or a Recipe; of its model only `max_seq_length` counts when a tokenizer is
    given. Pass both data sets to SFTTrainer with SFTConfig(dataset_kwargs={"skip_prepare_dataset": True}, max_length=None):
    without these two, TRL cuts every row at 1,024 tokens.
    Raises ToolkitError on a recipe or row that cannot be used, and when the achieved shares are off their plan.
    """
    from toolkit import run
    from toolkit.data import mix

    if isinstance(recipe, dict):
        recipe = recipes.from_dict(recipe, overrides=overrides)
    elif not isinstance(recipe, recipes.Recipe):
        recipe = recipes.load(recipe, overrides)
    elif overrides:
        recipe = recipes.from_dict(recipes.to_dict(recipe), overrides=overrides)
    if tokenizer is None:
        recipe = run.resolve(recipe, run.default_console())
    return mix.compile_mix(recipe, tokenizer)


def evaluate_model(model, tokenizer, mixed=None, **options) -> Evaluation:
    """Score a PeftModel against its own base (adapter on and off) in every mode its template has, with intervals.

    Reasoning questions are the mix's held-out rows with an expected answer, otherwise those that ship; chat questions are
    those that ship. `questions=` and `chat_questions=` are your own; further `options` as in `toolkit.evaluation.measure.evaluate`.
    Prints the verdict; returns what a run keeps as eval.json.
    """
    from toolkit.evaluation import measure as evaluation

    asked = evaluation.from_mix(mixed) if mixed else {}
    result = evaluation.evaluate(model, tokenizer, **(asked | options))
    print("\n".join(evaluation.verdict(result)))
    return result


def export_model(model, tokenizer, folder: str | Path, gguf: Sequence[str] = ("q8_0",), **options) -> dict:
    """Save the adapter into `folder`, merge it, write GGUF files and verify them; returns the certificate.

    `gguf` names quantizations (none: merged weights only). The base is found again by the name the model was loaded from, and
    compared with the one in memory.
    Further `options` are those of `toolkit.export.export`. Raises ToolkitError when a check fails.
    """
    from toolkit import export as exporting
    from toolkit.training.model import adapter_checksums

    if not hasattr(model, "peft_config"):
        raise ToolkitError(
            "export_model takes a PeftModel: merged and GGUF files are made from its adapter and its base"
        )
    folder, adapter, name = Path(folder), Path(folder) / "adapter", model.active_adapter
    base = model.get_base_model()
    loaded = {
        "name": model.peft_config[name].base_model_name_or_path or "",
        "revision": vars(base.config).get("_commit_hash"),
        "load_in_4bit": bool(getattr(base, "is_loaded_in_4bit", False)),  # transformers sets it on 4-bit models only
    }
    # before anything is written
    check_base(base, loaded)
    model.save_pretrained(str(adapter), selected_adapters=[name])
    if name != "default":  # PEFT puts it into a folder of that name
        for file in (adapter / name).iterdir():
            file.replace(adapter / file.name)
        (adapter / name).rmdir()
    tokenizer.save_pretrained(str(adapter))
    write_json(folder / "manifest.json", {"model": loaded, "adapter": adapter_checksums(adapter)})
    return exporting.export(folder, (gguf,) if isinstance(gguf, str) else tuple(gguf), **options)


def check_base(base, loaded: dict) -> None:
    """Raises ToolkitError where a model in memory, its adapter aside, is not what lies under its name: it was merged or trained
    before, and an export onto that name would be another model."""
    from toolkit.export.merge import Checkpoint, find_base

    if not loaded["name"]:
        raise ToolkitError("the model has no name: save it with save_pretrained and load it from that folder")
    stored = Checkpoint(find_base(loaded, "4bit" if loaded["load_in_4bit"] else "16bit").folder)
    # PEFT wraps a trained layer and keeps the old one inside it as base_layer
    for path, module in base.named_modules():
        name = path.replace(".base_layer", "") + ".weight"
        if name in stored.shapes and getattr(module, "weight", None) is not None and not hasattr(module, "base_layer"):
            _check_weight(name, module.weight, stored, loaded["name"])


def _check_weight(name: str, weight, stored, model: str) -> None:
    """Compare a weight in memory with the stored one, both dequantized."""
    from bitsandbytes.functional import dequantize_4bit

    from toolkit.export.merge import four_bit_round_trip

    expected, limit = stored.tensor(name), SAME_16_BIT
    if state := getattr(weight, "quant_state", None):
        weight, limit = dequantize_4bit(weight, state), SAME_4_BIT
        if not stored.is_quantized(name):  # quantized when it was loaded
            expected = four_bit_round_trip(expected.to(weight.dtype), state.blocksize, state.nested, state.quant_type)
    elif not weight.is_floating_point():
        return  # 8-bit: what is merged onto is the 16-bit base
    expected, weight = expected.float(), weight.detach().float().cpu()
    if weight.shape != expected.shape:
        raise ToolkitError(f"{name}: resized in memory: save the model and load it before an adapter is trained on it")
    if not (weight - expected).norm() <= limit * expected.norm():  # NaN too
        raise ToolkitError(
            f"{name}: the model in memory is not {model} any more: it was merged or trained before this adapter. "
            "Save it with save_pretrained, load it from that folder, and train the adapter on that"
        )
