"""Every recipe runs on rows that ship, and the tutorials' recipes train on the families they were written for."""

import io
import re

import pytest
from rich.console import Console

from tests.support import families
from toolkit import recipe
from toolkit.data.mix import NOT_MALFORMED, compile_mix
from toolkit.files import ROOT, read_json

RECIPES = sorted(path.stem for path in (ROOT / "data_recipes").glob("*.yaml"))
SHIPPED = {
    "unsloth/OpenMathReasoning-mini": "data_recipes/samples/openmath_sample.jsonl",
    "mlabonne/FineTome-100k": "data_recipes/samples/finetome_sample.jsonl",
}
"""Full-size set → the sample in its format."""
TUTORIALS = {"swift_identity": "qwen2.5", "csv_project": "qwen3", "mixing": "qwen2.5", "style_emoji": "qwen2.5",
             "tool_calling": "qwen3"}  # fmt: skip


def offline(name: str) -> list[str]:
    """What a recipe for the Hub needs changed to run on the samples; nothing for one that runs on them as it is."""
    sources = recipe.load(name).data.sources
    paths = [f"data.sources.{i}.path={SHIPPED[s.path]}" for i, s in enumerate(sources) if s.path in SHIPPED]
    small = ["data.validation_size=8", *(["data.budget=8000"] if name != "unsloth_reference" else ["data.budget=80"])]
    return [*paths, "model.model_name=pocket", *small] if paths else []


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_compiles_on_rows_that_ship_and_loses_none_as_malformed(name, tmp_path):
    changes = offline(name)
    if name == "smollm2":  # its weights come from the package index; rows and template do not need them
        families.build_tokenizer("smollm2", tmp_path / "smollm2")
        changes = [
            f"model.model_name={tmp_path / 'smollm2'}",
            "data.budget=9000",
        ]  # a small vocabulary: more tokens a row
    loaded = recipe.load(name, changes)
    report = compile_mix(loaded).report
    assert list(report["sources"]) == [source.name for source in loaded.data.sources]
    for source in report["sources"].values():
        assert source["rows_kept"] > 0
        assert set(source["dropped"]) <= NOT_MALFORMED
    # what some are for, and the columns that others leave out by naming theirs
    meant = ("the model may lose that mode", ": not read: question")
    assert [warning for warning in report["warnings"] if not any(words in warning for words in meant)] == []


def test_what_the_page_calls_the_same_names_under_train_are_accepted():
    page = (ROOT / "data_recipes" / "README.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if "the same names under `train:`" in line]
    names = {name for row in rows for name in re.findall(r"`(?:--)?(\w+)`", row.split("the same names")[0])}
    assert len(rows) == 2
    assert len(names) >= 12
    recipe.load("pocket", [f"train.{name}=1" for name in names - {"report_to", "lr_scheduler_type", "bf16"}])


def test_report_to_is_a_name_or_a_list_of_names():
    for text, wanted in (("tensorboard", "tensorboard"), ("[tensorboard, wandb]", ["tensorboard", "wandb"])):
        assert recipe.load("csv_project", [f"train.report_to={text}"]).train["report_to"] == wanted


@pytest.mark.slow
@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorials_recipe_trains_on_its_family(name, family):
    from toolkit.training.model import unsloth

    unsloth()  # before transformers, which it patches
    from toolkit import run

    changes = [f"model.model_name={family(TUTORIALS[name])}", "model.max_seq_length=4096", "train.max_steps=2",
               "train.eval_steps=1", "train.save_steps=1", "train.report_to=none", "evaluate.max_new_tokens=8"]  # fmt: skip
    folder = run.train(recipe.load(name, changes), Console(file=io.StringIO()), score=False)
    manifest = read_json(folder / "manifest.json")
    assert (manifest["state"], manifest["steps"]) == ("finished", 2)
    assert manifest["train_loss"] > 0
