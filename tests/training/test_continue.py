"""A run that continues another (`model.adapter`): it begins with that adapter, and every later step knows of both."""

import io
import json
import shutil

import pytest
from rich.console import Console

from tests.support.pocket_run import SMALL, trained
from toolkit import recipe
from toolkit.export.preflight import check_plain
from toolkit.files import ROOT, ToolkitError, read_json, sha256
from toolkit.training.parent import checked

POCKET_RECIPE = ROOT / "data_recipes" / "pocket.yaml"


def child(name="second", *changes):
    return recipe.load(POCKET_RECIPE, [f"name={name}", "model.adapter=first", *SMALL, *changes])


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An outputs folder with `first`, a training from the base, and `second`, which continued it and was scored."""
    folder = tmp_path_factory.mktemp("continued")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOLKIT_OUTPUTS", str(folder))
        patch.setattr("toolkit.training.record.load_weights", seen(folder))
        trained("first", "lora.r=8", "lora.lora_alpha=8", "data.seed=1")
        _, said = trained("second", "model.adapter=first", "data.seed=2", score=True, screen=None)
        (folder / "said.txt").write_text(said)
    return folder


def seen(folder):
    """The real function, and a copy of the weights with which the trainer then begins."""
    import peft
    from safetensors.torch import save_file

    from toolkit.training.parent import load_weights

    def load_and_copy(model, adapter):
        load_weights(model, adapter)
        save_file(
            {n: w.contiguous() for n, w in peft.get_peft_model_state_dict(model).items()}, folder / "begun.safetensors"
        )

    return load_and_copy


@pytest.fixture
def here(runs, monkeypatch):
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(runs))
    return runs


@pytest.fixture
def copied(runs, tmp_path, monkeypatch):
    """A copy of that folder to be damaged."""
    shutil.copytree(runs, tmp_path / "copy")
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(tmp_path / "copy"))
    return tmp_path / "copy"


def test_training_begins_with_the_weights_of_the_earlier_adapter_bit_for_bit_and_changes_them(here):
    import torch
    from safetensors.torch import load_file

    first, begun, second = (
        weights(here / "first/adapter"),
        load_file(here / "begun.safetensors"),
        weights(here / "second/adapter"),
    )
    assert first.keys() == begun.keys() == second.keys()
    assert all(torch.equal(first[name], begun[name]) and first[name].dtype == begun[name].dtype for name in first)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert any(name.endswith("lora_B.weight") and first[name].any() for name in first)  # a fresh one's are zero


def test_the_settings_of_the_adapter_are_those_of_the_run_before(here):
    lora = recipe.read_values(here / "second" / "recipe.yaml")["lora"]
    assert (lora["r"], lora["lora_alpha"]) == (8, 8)
    config = read_json(here / "second/adapter/adapter_config.json")
    assert (config["r"], config["lora_alpha"]) == (8, 8)


@pytest.mark.usefixtures("here")
def test_without_the_adapter_the_model_is_the_base():
    import torch

    from toolkit.training.model import load_base, load_run

    ids = torch.arange(20, 50)[None]
    model, base = load_run("second")[0], load_base(recipe.Model("pocket"))[0]
    with torch.no_grad():
        tuned = model(input_ids=ids, use_cache=False).logits
        with model.disable_adapter():
            without = model(input_ids=ids, use_cache=False).logits
        bare = base(input_ids=ids, use_cache=False).logits
    assert torch.equal(without, bare)
    assert not torch.equal(tuned, bare)


def test_the_manifest_names_the_run_its_checksum_and_what_it_was_trained_on(here):
    parent = read_json(here / "second/manifest.json")["adapter_of"]
    assert parent == {
        "run": "first",
        "sha256": sha256(here / "first/adapter/adapter_model.safetensors"),
        "data": read_json(here / "first/manifest.json")["data"],
    }
    assert "adapter_of" not in read_json(here / "first/manifest.json")


def test_it_is_scored_beside_the_base_and_beside_the_run_before(here):
    result = read_json(here / "second/eval.json")
    earlier = result["earlier"]
    assert earlier["run"] == "first"
    forgetting = earlier["earlier"]["forgetting"]
    assert forgetting["kl"]["value"] > 0
    change = result["tuned"]["forgetting"]["kl"]["value"] - forgetting["kl"]["value"]
    assert earlier["difference"]["forgetting"]["kl"]["value"] == pytest.approx(change, abs=1e-4)
    assert [line for line in result["verdict"] if line.startswith("beside first: ")]
    assert result["verdict"][-1].startswith("result:")
    assert "beside first" in (here / "said.txt").read_text()


def test_the_numbers_of_the_run_before_are_those_of_its_own_evaluation(here):
    """`first` evaluated by itself, on the rows and probes of `second`."""
    from toolkit.data import mix
    from toolkit.evaluation import measure
    from toolkit.evaluation.questions import from_mix
    from toolkit.training.model import load_run, unsloth

    unsloth()
    manifest = read_json(here / "second/manifest.json")
    held_out = from_mix(mix.of_run(recipe.of_run(here / "second"), manifest))
    console = Console(file=io.StringIO())
    alone = measure.evaluate(
        *load_run("first"), validation=held_out["validation"], level="fast", steps=manifest["steps"], console=console
    )
    earlier = read_json(here / "second/eval.json")["earlier"]["earlier"]["forgetting"]
    for metric, value in alone["tuned"]["forgetting"].items():
        assert earlier[metric]["value"] == pytest.approx(value["value"], rel=1e-3, abs=1e-5), metric


def test_an_export_names_the_run_before_and_holds_what_it_learned(here):
    from toolkit.export import export

    parent = read_json(here / "second/manifest.json")["adapter_of"]
    certificate = export(here / "second", quants=(), console=Console(quiet=True))
    assert certificate["passed"]
    assert certificate["inputs"]["adapter_of"] == parent
    text = (here / "second/certificate.md").read_text()
    assert f"continued that of first (SHA-256 {parent['sha256']})" in text


def test_scale_0_is_the_base(here):
    import torch

    from toolkit.export.checkpoint import Checkpoint
    from toolkit.export.merge import open_merged
    from toolkit.files import POCKET

    merged, base = open_merged(here / "second", "16bit", scale=0.0), Checkpoint(POCKET)
    assert all(torch.equal(merged.tensor(name), base.tensor(name)) for name in merged.adapter.factors)


# --- what stops it before a row is read ------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
def test_a_run_that_is_not_there_is_named_with_the_nearest():
    with pytest.raises(ToolkitError, match=r"frist: no such run in .*Did you mean 'first'"):
        checked(child("second", "model.adapter=frist"))


def test_a_run_without_an_adapter_is_to_be_finished(copied):
    shutil.rmtree(copied / "first" / "adapter")
    with pytest.raises(ToolkitError, match="no adapter yet: finish it"):
        checked(child())


@pytest.mark.usefixtures("here")
def test_a_run_does_not_continue_itself():
    with pytest.raises(ToolkitError, match="continue itself"):
        checked(child("first"))


def test_a_damaged_adapter_is_named(copied):
    file = copied / "first/adapter/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ToolkitError, match=r"adapter_model.safetensors: missing or damaged"):
        checked(child())


@pytest.mark.usefixtures("here")
def test_another_base_is_named(family):
    other = str(family("qwen3"))
    with pytest.raises(ToolkitError, match=r"first was trained on pocket: set model.model_name to pocket"):
        checked(child("second", f"model.model_name={other}"))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "change", ["lora.r=16", "lora.lora_alpha=64", "lora.target_modules=[q_proj]", "lora.use_rslora=true"]
)
def test_another_setting_in_the_recipe_is_named_with_both_values(change):
    key = change.partition("=")[0]
    with pytest.raises(ToolkitError, match=rf"{key}: first has .*leave {key} out"):
        checked(child("second", change))


@pytest.mark.parametrize(
    "setting", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"alpha_pattern": {"q_proj": 4}}, {"bias": "all"}]
)
def test_more_than_a_plain_lora_is_not_continued(copied, setting):
    file = copied / "first/adapter/adapter_config.json"
    file.write_text(json.dumps(read_json(file) | setting))
    with pytest.raises(
        ToolkitError, match=rf"model.adapter: first: {next(iter(setting))}.*only a plain LoRA is continued"
    ):
        check_plain(child().model)


def test_the_folder_of_an_adapter_alone_is_continued_too(here, tmp_path):
    shutil.copytree(here / "first" / "adapter", tmp_path / "mine")
    parent = checked(child("second", f"model.adapter={tmp_path / 'mine'}"))
    assert parent["sha256"] == sha256(here / "first/adapter/adapter_model.safetensors")
    assert parent["data"] == {}


@pytest.mark.usefixtures("here")
def test_all_is_checked_before_the_mix_is_made():
    from toolkit import run

    with pytest.raises(ToolkitError, match="no such run"):
        run.train(
            recipe.load(POCKET_RECIPE, ["name=x", "model.adapter=nobody", "data.sources.0.path=not_there.jsonl"]),
            Console(file=io.StringIO()),
        )


def test_a_changed_parent_is_noticed_at_resume(copied):
    from toolkit import run

    change_parent(copied)
    (copied / "second/adapter/adapter_model.safetensors").unlink()  # so that the run is not finished
    with pytest.raises(ToolkitError, match=r"first: its adapter is not the one that this run began with"):
        run.train(child("second", "data.seed=2"), Console(file=io.StringIO()), score=False)


def test_a_run_that_continues_another_resumes_bit_for_bit(copied, runs):
    import torch

    from toolkit import run

    for name in ("checkpoints/checkpoint-3", "checkpoints/checkpoint-4", "adapter"):
        shutil.rmtree(copied / "second" / name)
    screen = io.StringIO()
    run.train(child("second", "data.seed=2"), Console(file=screen, width=200), score=False)
    assert "resuming from checkpoints/checkpoint-2" in screen.getvalue()
    ours, theirs = weights(copied / "second/adapter"), weights(runs / "second/adapter")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert read_json(copied / "second/manifest.json")["adapter_of"]["run"] == "first"


def change_parent(folder):
    from safetensors.torch import save_file

    adapter = folder / "first/adapter"
    other = {name: weight + 1 for name, weight in weights(adapter).items()}
    save_file(other, adapter / "adapter_model.safetensors", {"format": "pt"})
    manifest = read_json(folder / "first/manifest.json")
    manifest["adapter"]["adapter_model.safetensors"] = sha256(adapter / "adapter_model.safetensors")
    (folder / "first/manifest.json").write_text(json.dumps(manifest))


def test_a_parent_that_is_gone_does_not_hinder_what_comes_after_the_training(copied):
    shutil.rmtree(copied / "first")
    assert recipe.of_run(copied / "second").model.adapter == "first"
    screen = io.StringIO()
    from toolkit.evaluation.earlier import add_earlier

    result = {"verdict": ["result: fine"]}
    add_earlier(result, (None, None), copied / "second", [], Console(file=screen, width=200))
    assert "first, which this run continued, is gone or changed" in screen.getvalue()
    assert "earlier" not in result


def test_recipes_without_the_key_keep_their_checksum():
    assert "adapter" not in recipe.to_dict(recipe.load(POCKET_RECIPE))["model"]
