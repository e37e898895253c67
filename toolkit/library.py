"""Three calls for your own Unsloth or TRL notebook: the compiled mix, the evaluation against the base, the verified export.

mixed = compile_mix("data_recipes/pocket.yaml"); mixed.train_dataset[0]["labels"]

They take and return what those libraries use: a tokenizer, datasets, a PeftModel, a folder. `import toolkit` gives them too.
"""

from collections.abc import Sequence
from pathlib import Path

from toolkit import recipe as recipes
from toolkit.files import write_json


def compile_mix(recipe: str | Path | dict | recipes.Recipe, tokenizer=None, overrides: Sequence[str] = ()):
    """A recipe's mix for a loaded tokenizer: `.train_dataset` and `.validation_dataset` hold input_ids and labels.

    `recipe` is a file, a dict with its keys, or a Recipe; of its model only `max_seq_length` counts when a tokenizer is
    given. Pass both data sets to SFTTrainer with SFTConfig(dataset_kwargs={"skip_prepare_dataset": True}, max_length=None).
    Raises ToolkitError on a recipe or row that cannot be used, and when the achieved shares are off their plan.
    """
    from toolkit import mix

    if isinstance(recipe, dict):
        recipe = recipes.from_dict(recipe, overrides=overrides)
    elif not isinstance(recipe, recipes.Recipe):
        recipe = recipes.load(recipe, overrides)
    return mix.compile_mix(recipe, tokenizer)


def evaluate_model(model, tokenizer, mixed=None, **options) -> dict:
    """Score a PeftModel against its own base (adapter on and off) in every mode its template has, with intervals.

    Questions are the mix's held-out rows with an expected answer, otherwise the ones that ship. Further `options` are
    those of `toolkit.evaluate.evaluate`. Prints the verdict; returns what a run keeps as eval.json.
    """
    from toolkit import evaluate as evaluation

    result = evaluation.evaluate(model, tokenizer, **(evaluation.from_mix(mixed) if mixed else {}), **options)
    print("\n".join(evaluation.verdict(result)))
    return result


def export_model(model, tokenizer, folder: str | Path, gguf: Sequence[str] = ("q8_0",), **options) -> dict:
    """Save the adapter into `folder`, merge it, write GGUF files and verify them; returns the certificate.

    `gguf` names quantizations (none: merged weights only). The base is found again by the name the model was loaded from.
    Further `options` are those of `toolkit.export.export`. Raises ToolkitError when a check fails.
    """
    from toolkit import export as exporting
    from toolkit.model import adapter_checksums

    folder, adapter = Path(folder), Path(folder) / "adapter"
    model.save_pretrained(str(adapter))
    tokenizer.save_pretrained(str(adapter))
    name = model.peft_config[model.active_adapter].base_model_name_or_path
    revision = vars(model.get_base_model().config).get("_commit_hash")
    four_bit = bool(
        getattr(model.get_base_model(), "is_loaded_in_4bit", False)
    )  # transformers sets it on 4-bit models only
    write_json(
        folder / "manifest.json",
        {
            "model": {"name": name, "revision": revision, "load_in_4bit": four_bit},
            "adapter": adapter_checksums(adapter),
        },
    )
    return exporting.export(folder, tuple(gguf), **options)
