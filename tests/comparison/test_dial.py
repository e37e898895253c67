"""A dial moves one adapter between its base and a little beyond: exactly, reversibly, and with a recommendation by the rule."""

import contextlib
import io
import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.comparison.test_compare import evaluation, make_run, sums
from tests.support.pocket_run import trained
from toolkit import recipe as recipes
from toolkit.comparison import dial as dials
from toolkit.comparison.decide import KL
from toolkit.comparison.dial import at_scale, compare_scales, dial, scaled
from toolkit.files import ToolkitError

FEW = [
    "train.learning_rate=2.0e-2",
    "evaluate.max_new_tokens=24",
    "evaluate.questions_per_mode=4",
    "evaluate.questions.0.max_rows=4",
    "evaluate.questions.1.max_rows=4",
]


def tiny(**options):
    """A small Qwen3 with a LoRA whose weights are not zero."""
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], **options)
    model = get_peft_model(Qwen3ForCausalLM(config), lora).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return model


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[1, 5, 9, 3, 7]])).logits


# --- scaling


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}]
)
def test_scale_0_is_the_base_scale_1_the_run_and_half_is_half_of_the_weight_change(options):
    model = tiny(**options)
    run = logits(model)
    with model.disable_adapter():
        base = logits(model)
    with scaled(model, 1.0):
        assert torch.equal(logits(model), run)
    with scaled(model, 0.0):
        assert torch.equal(logits(model), base)
    # by hand, without a scale: half of each layer's change added to its weight
    layers = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
    changes = [0.5 * layer.get_delta_weight("default") for layer in layers]
    with scaled(model, 0.5):
        half = logits(model)
    assert torch.equal(logits(model), run)
    with torch.no_grad():
        for layer, change in zip(layers, changes, strict=True):
            layer.base_layer.weight += change
    with model.disable_adapter():
        assert torch.allclose(logits(model), half, atol=1e-5)
    assert not torch.allclose(half, run, atol=1e-3)


def test_the_scale_is_taken_back_when_something_fails():
    model = tiny()
    run = logits(model)
    with pytest.raises(RuntimeError), scaled(model, 0.3):
        raise RuntimeError
    assert torch.equal(logits(model), run)


@pytest.mark.parametrize("scale", [-0.1, 2.5, math.nan, math.inf])
def test_a_scale_that_means_nothing_is_refused(scale):
    with pytest.raises(ToolkitError, match=r"expected a number from 0 \(the base\) to 2"), scaled(tiny(), scale):
        pass


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, r"trained more than its LoRA \(lm_head\)"),
        ({"bias": "lora_only"}, "bias=lora_only"),
        ({"bias": "lora_only", "modules_to_save": ["lm_head"]}, r"\(lm_head, bias=lora_only\)"),
    ],
)
def test_an_adapter_that_a_scale_does_not_reach_is_refused(options, reason):
    with pytest.raises(ToolkitError, match=reason), scaled(tiny(**options), 0.5):
        pass


def test_a_merged_adapter_is_refused():
    model = tiny()
    model.merge_adapter()
    with pytest.raises(ToolkitError, match="merged into the base already"), scaled(model, 0.5):
        pass


# --- the decision


def member(tmp_path, name, by_scale):
    """A run of which scales were measured: {scale: (thinking accuracy, chat accuracy, KL)}."""
    folder = make_run(tmp_path, 0.5, name=name, scored=False)
    runs = {}
    for scale, (accuracy, chat, kl) in by_scale.items():
        rates = {"thinking": (0.3, 0.9, 1.0), "non_thinking": (0.2, 0.9, 1.0)}, {
            "thinking": (accuracy, 0.9, 1.0), "non_thinking": (0.2, chat, 1.0)}  # fmt: skip
        runs[scale] = at_scale(folder, scale, {("quick", scale): evaluation(sums(*rates, kl))})
    return runs


CURVE = {
    0.25: (0.3, 0.9, 0.05),
    0.5: (0.7, 0.9, 0.1),
    0.75: (0.85, 0.88, 0.3),
    1.0: (0.95, 0.4, 0.9),
}


def test_the_highest_gain_among_scales_that_break_no_guard_is_recommended_with_its_export(tmp_path):
    found = compare_scales([member(tmp_path, "run", CURVE)], list(CURVE))
    assert found.recommended.label == "scale 0.75"
    assert found.verdict[0].startswith("Recommended: scale 0.75: reasoning questions with thinking 30% → 85%")
    assert found.verdict[-1] == "next: python -m toolkit export run --scale 0.75"
    assert any(note.startswith("scale 1 is left out of the choice: chat questions without") for note in found.notes)
    assert not any("One seed" in line for line in found.verdict)


def test_scales_that_tie_go_to_the_lowest_kl(tmp_path):
    curve = {scale: (0.9, 0.9, scale) for scale in (0.5, 0.75, 1.0)}
    assert compare_scales([member(tmp_path, "run", curve)], list(curve)).recommended.label == "scale 0.5"


def test_only_scales_that_keep_half_of_the_gain_get_replies():
    def fast(gain):
        return {"difference": {"forgetting": {"loss/a/thinking": {"value": -gain}, "kl": {"value": 9.0}}}}

    gains = {0.25: 0.1, 0.5: 0.49, 0.75: 0.6, 1.0: 0.9, 1.25: 1.0, 1.5: 0.95}
    results = {scale: fast(gain) for scale, gain in gains.items()}
    assert dials.scales_for_replies(results) == [0.75, 1.0, 1.25]
    # the run itself always, and never more than four; not the lowest alone, where a skill may not have come yet
    results[1.0] = fast(0.0)
    results |= {scale: fast(0.7) for scale in (0.3, 0.4, 0.6)}
    assert dials.scales_for_replies(results) == [0.3, 0.6, 0.75, 1.0]


def test_a_scale_is_added_in_the_middle_of_the_interval_where_loss_and_kl_change_most():
    def fast(gain, kl):
        return {
            "difference": {"forgetting": {"loss/a/thinking": {"value": -gain}}},
            "tuned": {"forgetting": {"kl": {"value": kl}}},
        }

    # shares of all change up to scale 1, by hand: 0.1 + 0.1, 0.7 + 0.1, 0.1 + 0.2, 0.1 + 0.6; beyond it nothing counts
    curve = {0.25: (0.1, 0.1), 0.5: (0.8, 0.2), 0.75: (0.9, 0.4), 1.0: (1.0, 1.0), 1.25: (1.0, 9.0)}
    results = {scale: fast(*curve[scale]) for scale in (1.0, 0.25, 0.5, 0.75, 1.25)}
    assert dials.bend(results) == 0.375
    results[0.375] = fast(0.3, 0.15)
    assert dials.bend(results) == 0.875
    # without held-out rows there is no gain: then KL alone decides
    results = {scale: fast(0.0, kl) for scale, (_, kl) in curve.items()}
    assert dials.bend(results) == 0.875


def test_several_seeds_are_averaged_and_their_spread_is_in_the_interval(tmp_path):
    other = {scale: (accuracy - 0.3, chat, kl) for scale, (accuracy, chat, kl) in CURVE.items()}
    first, second = member(tmp_path, "s1", CURVE), member(tmp_path, "s2", other)
    both = compare_scales([first, second], [0.5, 0.75, 1.0]).points[0].values["thinking", "accuracy"]
    alone = compare_scales([first], [0.5, 0.75, 1.0]).points[0].values["thinking", "accuracy"]
    assert both.value == pytest.approx(0.55, abs=0.02)
    assert both.high - both.low > alone.high - alone.low


def test_the_record_names_level_and_scale_in_words_and_is_read_back_for_the_same_adapter_alone(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"adapter": {"weights": "a1"}}))
    measured = {("fast", 1.0): {"n": 1}, ("quick", 1.0): {"n": 2}, ("fast", 0.1): {"n": 3}, ("fast", 1 / 3): {"n": 4}}
    run = dials.Evidence(tmp_path, Console(quiet=True))
    run.results |= measured
    run.write()
    kept = json.loads((tmp_path / "dial.json").read_text())
    assert list(kept["scales"]) == ["fast 1", "quick 1", "fast 0.1", "fast 0.3333333333333333"]
    assert dials.Evidence(tmp_path, Console(quiet=True)).results == measured
    (tmp_path / "manifest.json").write_text(json.dumps({"adapter": {"weights": "b2"}}))
    assert dials.Evidence(tmp_path, Console(quiet=True)).results == {}


def test_a_run_that_is_measured_leaves_memory_before_the_next_seed_is_loaded(tmp_path):
    run = dials.Evidence(make_run(tmp_path, 0.5), Console(quiet=True))
    result = json.loads((run.folder / "eval.json").read_text())
    run.results = {("fast", 1.0): result, ("quick", 1.0): result}
    vars(run)["loaded"] = "model, tokenizer, questions"
    dials.measure(run, dials.Plan([1.0], [1.0]))
    assert "loaded" not in vars(run)


# --- a real run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOLKIT_OUTPUTS", str(tmp_path_factory.mktemp("out")))
        yield trained("dialled", *FEW)[0]


def test_a_dial_of_a_run_ends_with_table_picture_and_export_and_resumes_from_what_it_measured(run, monkeypatch):
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(run.parent))
    console = Console(file=io.StringIO(), width=80)
    found = dial([run, "dialled"], scales=[0.5, 1.0], console=console)  # one run by two spellings
    shown = console.file.getvalue()
    assert [point.place for point in found.points] == [0.5, 1.0]
    assert [len(point.runs) for point in found.points] == [1, 1]
    kl = [point.values[KL].value for point in found.points]
    assert 0 < kl[0] < kl[1]
    assert max(map(len, shown.splitlines())) <= 80 or str(run) in shown
    assert shown.rstrip().splitlines()[-1].startswith("next: python -m toolkit export dialled --scale ")
    assert (run / "dialled-dial" / "comparison.png").stat().st_size > 10_000
    kept = (run / "dial.json").read_bytes()

    def never(*_):
        raise AssertionError("the model is loaded again")

    monkeypatch.setattr(dials.models, "load_run", never)
    again = dial([run], scales=[0.5, 1.0], console=Console(quiet=True))
    assert again.verdict == found.verdict
    assert (run / "dial.json").read_bytes() == kept
    # a damaged record is measured again, not trusted
    (run / "dial.json").write_bytes(kept[: len(kept) // 2])
    with pytest.raises(AssertionError, match="loaded again"):
        dial([run], scales=[0.5, 1.0], console=Console(quiet=True))


def test_without_scales_two_are_added_where_the_curve_bends_and_the_same_are_taken_again(run, monkeypatch):
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(run.parent))
    monkeypatch.setattr(dials, "SCALES", (0.5, 1.0))
    found = dial([run], console=Console(quiet=True))
    places = [point.place for point in found.points]
    assert len(places) == 4
    assert {0.5, 1.0} < set(places)
    assert set(places) - {0.5, 1.0} <= {0.125, 0.25, 0.375, 0.625, 0.75, 0.875}
    again = dial([run], console=Console(quiet=True))
    assert [point.place for point in again.points] == places
    # what an earlier dial measured elsewhere is not chosen again
    few = dial([run], scales=[1.0], console=Console(quiet=True))
    assert [point.place for point in few.points] == [1.0]


def test_a_dial_goes_on_printing_where_it_began_while_the_output_of_libraries_goes_to_the_log(run, monkeypatch):
    seen = []

    def stop(*given, **named):
        seen.extend(value for value in (*given, *named.values()) if isinstance(value, Console))
        raise ToolkitError("enough")

    monkeypatch.setattr(dials, "Evidence", stop)
    with pytest.raises(ToolkitError, match="enough"):
        dial([run])
    before = seen[0].file
    with contextlib.redirect_stdout(io.StringIO()):
        assert seen[0].file is before


def test_scale_1_of_a_dial_is_what_evaluate_says_of_the_run(run, monkeypatch):
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(run.parent))
    from toolkit.run import evaluate

    dial([run], scales=[1.0], console=Console(quiet=True))
    result = json.loads((run / "dial.json").read_text())["scales"]["quick 1"]
    own = evaluate(run, Console(quiet=True))
    assert {key: own[key] for key in ("tuned", "base")} == {key: result[key] for key in ("tuned", "base")}


def test_a_run_that_changed_nothing_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(tmp_path))
    # a run of warm-up alone ends with a note, not with an error
    folder, _ = trained("idle", *FEW, "train.learning_rate=1.0e-30", "train.warmup_steps=100")
    with pytest.raises(ToolkitError, match=r"idle: the adapter changes nothing .* nothing to dial"):
        dial([folder], scales=[1.0], console=Console(quiet=True))


def test_runs_of_different_recipes_are_not_averaged():
    def changed(*overrides):
        return recipes.load("data_recipes/pocket.yaml", overrides)

    first, faster = changed("name=a"), changed("name=b", "train.learning_rate=0.1")
    with pytest.raises(ToolkitError, match=r"differ in train\.learning_rate$"):
        dials.check_same_training([first, faster])
    dials.check_same_training([first, changed("name=c", "data.seed=2", "evaluate.prompts=[a]")])
