"""A sum of runs is exact, is a run to every verb, and says where it came from."""

import contextlib
import io
import json
import math
import shutil

import pytest
import torch
from rich.console import Console

from tests.comparison.test_dial import FEW
from tests.support.export_fixtures import base_model, run_folder
from tests.support.pocket_run import trained
from toolkit import recipe as recipes
from toolkit.comparison.blend import blend, weighted
from toolkit.files import ROOT, ToolkitError, read_json

SILENT = Console(quiet=True)
SHARES = {"examples": {"a": 1.0}, "tokens": {"a": 1.0}, "supervised_tokens": {"a": 1.0}}
IDS = torch.tensor([[1, 5, 9, 3, 7, 11, 2]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_model(tmp_path_factory.mktemp("base") / "model", dtype="float32")


def toy(folder, base, seed, **lora):
    """A finished run on a toy base whose adapter is random, with the records that a sum reads."""
    from safetensors.torch import load_file, save_file

    run_folder(folder, base, **lora)
    file = folder / "adapter" / "adapter_model.safetensors"
    torch.manual_seed(seed)
    save_file({name: 0.1 * torch.randn(weight.shape) for name, weight in load_file(file).items()}, file)
    changes = [f"name={folder.name}", f"model.model_name={base}", f"data.seed={seed}"]
    recipe = recipes.load(ROOT / "data_recipes" / "pocket.yaml", changes)
    (folder / "recipe.yaml").write_text(recipes.to_yaml(recipe), encoding="utf-8")
    checksums = {
        f.name: recipes.hashlib.sha256(f.read_bytes()).hexdigest()
        for f in (folder / "adapter").iterdir()
        if f.suffix != ".md"
    }
    model = {"name": str(base), "revision": None, "load_in_4bit": False}
    made = {"model": model, "recipe_sha256": recipes.sha256(recipe), "adapter": checksums, "steps": 4}
    (folder / "manifest.json").write_text(json.dumps(made))
    report = {"unit": "examples", "planned": {"a": 1.0}, "achieved": SHARES, "achieved_modes": SHARES, "lengths": {},
              "total": {"examples": 1, "tokens": 1, "supervised_tokens": 1}, "sources": {}}  # fmt: skip
    (folder / "mix.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def two(base, tmp_path, monkeypatch):
    """Two toy runs of one base in an outputs folder of their own."""
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(tmp_path))
    return toy(tmp_path / "one", base, 1), toy(tmp_path / "two", base, 2, r=4, lora_alpha=6)


def merged(base, run):
    """{weight: its value} of a run merged by PEFT, in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if run:
        model = PeftModel.from_pretrained(model, str(run / "adapter")).merge_and_unload()
    return dict(model.named_parameters())


def loaded(base, run):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(run / "adapter")
    ).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


# --- the sum is exact


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True, "r": 4}, {"alpha_pattern": {"q_proj": 3}}],
)
def test_the_sum_is_the_base_and_each_runs_change_as_peft_merges_it_times_its_weight(
    base, tmp_path, monkeypatch, options
):
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(tmp_path))
    runs = [toy(tmp_path / "one", base, 1), toy(tmp_path / "two", base, 2, **options), toy(tmp_path / "three", base, 3)]
    weights = [0.25, 0.75, 1.5]
    start = merged(base, None)
    expected = {name: weight.clone() for name, weight in start.items()}
    for run, weight in zip(runs, weights, strict=True):
        for name, tuned in merged(base, run).items():
            expected[name] = expected[name] + weight * (tuned - start[name])
    found = merged(base, blend(runs, weights, name="sum", console=SILENT))
    assert any(not torch.equal(found[name], start[name]) for name in start)
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, atol=1e-5), name


def test_the_sum_is_what_peft_concatenates(base, two):
    model = loaded(base, two[0])
    model.load_adapter(str(two[1] / "adapter"), adapter_name="other")
    model.add_weighted_adapter(["default", "other"], [0.4, 0.6], "cat", combination_type="cat")
    model.set_adapter("cat")
    assert torch.allclose(logits(loaded(base, blend(two, [0.4, 0.6], console=SILENT))), logits(model), atol=1e-4)


def test_weights_1_and_0_are_the_first_run(base, two):
    run = logits(loaded(base, two[0]))
    assert torch.allclose(logits(loaded(base, blend(two, [1, 0], name="first", console=SILENT))), run, atol=1e-5)
    assert not torch.allclose(logits(loaded(base, blend(two, [0, 1], name="second", console=SILENT))), run, atol=1e-2)


def test_a_loaded_sum_switches_to_any_weights_and_back(base, two):
    both = loaded(base, blend(two, [1, 1], name="both", console=SILENT))
    before = logits(both)
    ranks = [read_json(run / "adapter" / "adapter_config.json")["r"] for run in two]
    assert ranks[0] != ranks[1]
    with weighted(both, [0.3, 0.7], ranks):
        switched = logits(both)
    assert torch.equal(logits(both), before)
    assert torch.equal(switched, logits(loaded(base, blend(two, [0.3, 0.7], name="some", console=SILENT))))


def test_a_sum_of_a_sum_is_the_sum_of_the_runs(base, two):
    half = blend(two, [0.5, 0.5], name="half", console=SILENT)
    again = blend([half, two[0]], [2, 0.25], name="again", console=SILENT)
    direct = blend(two, [1.25, 1], name="direct", console=SILENT)
    assert torch.allclose(logits(loaded(base, again)), logits(loaded(base, direct)), atol=1e-4)


# --- what cannot be added


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ([1.0], r"two runs or more with a weight each, not all 0, found 2 and \[1.0\]"),
        ([0.5, 0.5, 0.5], "two runs or more with a weight each"),
        ([0.5, -0.1], "expected a number from 0 .* to 2"),
        ([2.5, 0], "expected a number from 0 .* to 2"),
        ([math.nan, 1], "expected a number from 0 .* to 2"),
        ([0, 0], "not all 0"),
    ],
)
def test_weights_that_mean_nothing_are_refused(two, weights, reason):
    with pytest.raises(ToolkitError, match=reason):
        blend(two, weights, console=SILENT)


def test_one_run_alone_is_no_sum(two):
    with pytest.raises(ToolkitError, match="two runs or more"):
        blend(two[:1], [0.5], console=SILENT)


def change(file, **values):
    file.write_text(json.dumps(read_json(file) | values))


def test_runs_of_another_base_template_or_revision_are_refused(two):
    one, two = two
    change(two / "manifest.json", model={"name": "x", "revision": "other", "load_in_4bit": False})
    with pytest.raises(ToolkitError, match=r"^one and two: .* of one base can be added: base\.revision differ"):
        blend([one, two], [1, 1], console=SILENT)
    model = read_json(one / "manifest.json")["model"]
    change(two / "manifest.json", model=model | {"files": {"model.safetensors": "f00"}})
    with pytest.raises(ToolkitError, match=r"base\.files"):
        blend([one, two], [1, 1], console=SILENT)
    (two / "adapter" / "chat_template.jinja").write_text("{{ messages }}")
    checksums = read_json(two / "manifest.json")["adapter"] | {
        "chat_template.jinja": recipes.hashlib.sha256(b"{{ messages }}").hexdigest()
    }
    change(two / "manifest.json", model=model, adapter=checksums)
    with pytest.raises(ToolkitError, match=r"^one and two: .* of one tokenizer .*: chat_template\.jinja differ"):
        blend([one, two], [1, 1], console=SILENT)


def test_runs_that_adapt_other_layers_are_refused_with_the_first_of_them(base, two, tmp_path):
    less = toy(tmp_path / "less", base, 3, target_modules=["q_proj"])
    with pytest.raises(
        ToolkitError, match=r"^one and less: .* the same layers .*: model\.layers\.0\.mlp.* is in one only"
    ):
        blend([two[0], less], [1, 1], console=SILENT)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_an_adapter_that_is_more_than_a_lora_or_of_another_shape_is_refused(base, two, tmp_path, options, reason):
    with pytest.raises(ToolkitError, match=reason):
        blend([two[0], toy(tmp_path / "more", base, 3, **options)], [1, 1], console=SILENT)


def test_a_damaged_parent_and_a_folder_without_a_recipe_are_refused(two, tmp_path):
    shutil.copytree(two[1], tmp_path / "bare")
    (tmp_path / "bare" / "recipe.yaml").unlink()
    with pytest.raises(ToolkitError, match="has no recipe"):
        blend([two[0], tmp_path / "bare"], [1, 1], console=SILENT)
    (two[1] / "adapter" / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(ToolkitError, match="missing or damaged"):
        blend(two, [1, 1], console=SILENT)


def test_a_name_that_is_taken_is_refused_and_the_same_sum_is_left_or_written_again(two):
    first = blend(two, [0.25, 0.75], name="sum", console=SILENT)
    file = first / "adapter" / "adapter_model.safetensors"
    whole = file.read_bytes()
    blend(two, [0.25, 0.75], name="sum", console=SILENT)
    assert file.read_bytes() == whole
    for name in ("sum", "one"):
        with pytest.raises(ToolkitError, match="never overwritten: choose another --name"):
            blend(two, [0.5, 0.5], name=name, console=SILENT)
    with pytest.raises(ToolkitError, match="becomes a folder"):
        blend(two, [0.5, 0.5], name="a/b", console=SILENT)
    file.write_bytes(whole[:1000])
    with pytest.raises(ToolkitError, match=r"of a sum: `blend`"):
        blend([first, two[0]], [1, 1], name="more", console=SILENT)
    blend(two, [0.25, 0.75], name="sum", console=SILENT)
    assert file.read_bytes() == whole


def test_an_exported_sum_is_certified_and_a_parent_in_its_place_is_not(two):
    from toolkit.export import export
    from toolkit.export.certificate import verify

    summed = blend(two, [0.25, 0.75], name="sum", console=SILENT)
    assert export(summed, (), console=SILENT)["passed"]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(two[1] / "adapter" / name, summed / "adapter")
    assert not verify(summed, console=SILENT)["passed"]


# --- every verb


@pytest.fixture(scope="module")
def pocket(tmp_path_factory):
    """Two short trainings at 10% and 90% reasoning, and their sum."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOLKIT_OUTPUTS", str(tmp_path_factory.mktemp("out")))
        few = [*FEW, "train.learning_rate=1.0e-2"]
        low, high = (trained(f"r{share}", f"data.reasoning={share}", *few)[0] for share in (0.1, 0.9))
        yield low, high, blend(["r0.1", high], [0.25, 0.75], name="sum", console=SILENT)


@pytest.fixture
def summed(pocket, monkeypatch):
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(pocket[0].parent))
    return pocket[2]


def verb(*words):
    """(exit code, stdout) of a command."""
    from toolkit.__main__ import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main([str(word) for word in words])
    return code, out.getvalue()


def test_a_sum_names_its_parents_and_has_their_weighted_shares(pocket, summed):
    manifest, mix = read_json(summed / "manifest.json"), read_json(summed / "mix.json")
    assert [parent["name"] for parent in manifest["parents"]] == ["r0.1", "r0.9"]
    assert manifest["weights"] == [0.25, 0.75]
    assert mix["planned"] == pytest.approx({"openmath_sample": 0.7, "finetome_sample": 0.3})
    shares = [read_json(run / "mix.json")["achieved_modes"]["tokens"]["thinking"] for run in pocket[:2]]
    assert mix["achieved_modes"]["tokens"]["thinking"] == pytest.approx(0.25 * shares[0] + 0.75 * shares[1])


def test_what_a_sum_is_asked_none_of_its_parents_trained_on(pocket):
    from toolkit.data import mix

    mixes = [mix.of_run(recipes.of_run(run), read_json(run / "manifest.json")) for run in pocket]
    first, second, both = mixes
    trained_on = {row.prompt.tobytes() for row in first.train + second.train}
    held = {row.ids.tobytes() for row in both.validation}
    assert held
    assert not {row.prompt.tobytes() for row in both.validation} & trained_on
    assert held <= {row.ids.tobytes() for row in first.validation + second.validation}


def test_every_verb_takes_a_sum(pocket, summed):
    from toolkit.run import evaluate

    result = evaluate(summed, SILENT)
    assert result["tuned"]["forgetting"]["kl"]["value"] > 0
    code, shown = verb("dial", "sum", "--scales", 0.5, 1)
    assert (code, shown.splitlines()[-1][:38]) == (0, "next: python -m toolkit export sum --s")
    code, shown = verb("export", "sum", "--quant", "q8_0")
    assert code == 0
    assert "checks passed" in shown
    assert verb("verify", "sum")[0] == 0
    code, shown = verb("list")
    assert "sum: finished, 4 steps, scored, merged, gguf" in shown
    assert verb("report", "sum")[0] == 0
    assert "0.25 × r0.1 + 0.75 × r0.9" in (summed / "report.html").read_text()
    evaluate(pocket[0], SILENT)
    code, shown = verb("compare", "r0.1", "sum", "--json")
    assert code == 0
    assert {point["runs"] for point in json.loads(shown)["points"]} == {"", "r0.1", "sum"}
    code, shown = verb("train", summed / "recipe.yaml")
    assert code == 0
    assert "is finished already" in shown


def test_a_sum_is_served_beside_its_parents(pocket, summed):
    from toolkit.serving.engine import start

    engine = start([summed, pocket[0]], quant="f16")
    assert engine.runs == ("sum", "r0.1")
    request = {"messages": [{"role": "user", "content": "What is 17 + 25?"}], "max_tokens": 4}
    assert list(engine.stream(request | engine.lora("sum")))


def test_sums_of_other_weights_are_no_seeds_of_one_another(pocket, summed):
    from toolkit.comparison import dial
    from toolkit.comparison.decide import compare
    from toolkit.evaluation.measure import scored
    from toolkit.run import evaluate

    other = blend(pocket[:2], [0.75, 0.25], name="other", console=SILENT)
    with pytest.raises(ToolkitError, match="sums with different weights"):
        dial.dial([summed, other], console=SILENT)
    for run in (summed, other):
        if not scored(run):  # by an earlier test
            evaluate(run, SILENT)
    assert len(compare([summed, other]).points) == 2
