"""The fit planner: sums, monotony, real parameter counts, published measurements, changes that really fit."""

import dataclasses
import io
import json
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from toolkit import recipe
from toolkit.files import POCKET, ROOT, ToolkitError
from toolkit.machine import fit
from toolkit.machine.fit import GIB, Settings, shipped

POINTS = json.loads((ROOT / "data_recipes/measured/published.json").read_text(encoding="utf-8"))["points"]
QWEN35 = json.loads((ROOT / "tests/support/files/qwen35_configs.json").read_text(encoding="utf-8"))
CONFIGS = json.loads((ROOT / "tests/support/files/qwen3_configs.json").read_text(encoding="utf-8"))["configs"]
TARGETS = Settings().target_modules
RUNS = st.builds(
    Settings,
    longest=st.integers(1, 40000),
    per_device_train_batch_size=st.integers(1, 32),
    per_device_eval_batch_size=st.integers(1, 32),
    longest_validation=st.integers(1, 40000),
    max_new_tokens=st.integers(1, 16000),
    r=st.integers(1, 256),
    target_modules=st.sets(st.sampled_from(TARGETS), min_size=1).map(tuple),
    optim=st.sampled_from(["adamw_8bit", "adamw_torch"]),
    load_in_4bit=st.booleans(),
    use_gradient_checkpointing=st.sampled_from(["unsloth", True, False]),
)
MODELS = st.sampled_from([shipped(size) for size in fit.SHIPPED])
CARDS = st.integers(1 * GIB, 80 * GIB)
claim = settings(max_examples=60, deadline=None)  # a busy machine is no failure


OF_OLD_VERSIONS = ("converted_at_load", "bytes_per_logit")
"""What published runs did that today's libraries do not: see `converted` and `reserved`."""


def point(published: dict, **changes) -> fit.Forecast:
    known = {key: value for key, value in published["settings"].items() if key not in OF_OLD_VERSIONS}
    return fit.forecast(Settings(**known | changes), published["model"])


def converted(published: dict) -> int:
    """transformers 4 converted a bf16 checkpoint on a card without bf16: once the largest 16-bit tensor, which stays behind."""
    model = shipped(published["model"])
    return 2 * model.vocab_size * model.hidden_size * published["settings"].get("converted_at_load", False)


def reserved(published: dict, monkeypatch, **changes) -> float:
    """Bytes at the peak of a run in which all logits existed, as Unsloth's loss of that time kept them."""

    def loss_of_then(model: fit.Shape, tokens: int) -> float:
        return tokens * model.vocab_size * published["settings"]["bytes_per_logit"] + 2 * tokens * model.hidden_size

    monkeypatch.setattr(fit, "loss_bytes", loss_of_then)
    return point(published, **changes).reserved() + converted(published)


# --- sums and monotony


@claim
@given(RUNS, MODELS)
def test_parts_sum_to_the_peak_and_every_part_has_a_column(run, model):
    found = fit.forecast(run, model)
    assert found.peak == max(sum(parts.values()) for parts in found.phases.values())
    assert all(size >= 0 for parts in found.phases.values() for size in parts.values())
    assert all(tuple(parts) == fit.PARTS for parts in found.phases.values())


@claim
@given(RUNS, MODELS, st.data())
def test_more_of_anything_never_needs_less(run, model, data):
    numbers = [f.name for f in dataclasses.fields(Settings) if isinstance(getattr(Settings(), f.name), int)]
    knob = data.draw(st.sampled_from(sorted(set(numbers) - {"load_in_4bit"})))
    more = dataclasses.replace(run, **{knob: getattr(run, knob) + data.draw(st.integers(1, 5000))})
    low, high = fit.forecast(run, model), fit.forecast(more, model)
    for phase in low.phases:
        assert high.total(phase) >= low.total(phase), (knob, phase)


@claim
@given(RUNS, MODELS)
def test_dearer_choices_never_need_less(run, model):
    def peak(**changes) -> int:
        return fit.forecast(dataclasses.replace(run, **changes), model).total("training")

    assert peak(use_gradient_checkpointing="unsloth") <= peak(use_gradient_checkpointing=True)
    assert peak(use_gradient_checkpointing=True) <= peak(use_gradient_checkpointing=False)
    assert peak(load_in_4bit=True) <= peak(load_in_4bit=False)
    assert peak(target_modules=run.target_modules) <= peak(target_modules=TARGETS)


@claim
@given(RUNS, st.sampled_from(["hidden_size", "num_hidden_layers", "num_attention_heads", "q_dim", "kv_dim", "intermediate_size",
                              "vocab_size", "parameters"]), MODELS, st.integers(1, 4000))  # fmt: skip
def test_a_larger_model_never_needs_less(run, key, model, extra):
    larger = dataclasses.replace(model, **{key: getattr(model, key) + extra})
    low, high = fit.forecast(run, model), fit.forecast(run, larger)
    assert all(high.total(phase) >= low.total(phase) for phase in low.phases)


def test_an_8_bit_adam_never_needs_more_than_a_32_bit_one_at_real_ranks():
    for size in fit.SHIPPED:
        for r in (4, 8, 16, 64):
            eight, full = (
                fit.forecast(Settings(r=r, optim=o), size).total("training") for o in ("adamw_8bit", "adamw_torch")
            )
            assert eight <= full


# --- counts


def test_parameter_counts_are_those_of_the_real_models():
    published = {"0.6B": 596049920, "1.7B": 1720574976, "4B": 4022468096, "8B": 8190735360, "14B": 14768307200,
                 "32B": 32762123264}  # fmt: skip
    assert {size: shipped(size).parameters for size in fit.SHIPPED} == published


@pytest.mark.parametrize("size", CONFIGS)
def test_shipped_shapes_are_those_of_transformers_own_models(size):
    from transformers import Qwen3Config

    values = {key: value for key, value in CONFIGS[size].items() if key != "kept_mlps"}
    found = fit.shape_of(Qwen3Config(**values), size)
    assert dataclasses.replace(found, kept=shipped(size).kept) == shipped(size)
    assert shipped(size).kept == CONFIGS[size]["kept_mlps"] * 3 * values["hidden_size"] * values["intermediate_size"]


@pytest.mark.parametrize("size", QWEN35["configs"])
def test_qwen35s_shapes_are_those_of_transformers_text_models(size):
    from transformers import Qwen3_5TextConfig

    found = fit.shape_of(Qwen3_5TextConfig(**QWEN35["configs"][size]), f"unsloth/Qwen3.5-{size}")
    assert found == shipped(f"unsloth/Qwen3.5-{size}")
    assert found.delta_layers == 3 * found.num_hidden_layers // 4


@pytest.mark.parametrize("size", QWEN35["trainable_parameters"])
def test_qwen35s_lora_counts_are_those_that_others_printed(size):
    known = shipped(f"Qwen/Qwen3.5-{size}")
    targets = {matrix.name for matrix in known.matrices} - ({"in_proj_a", "in_proj_b"} if size == "2B" else set())
    assert sum(fit.lora_tensors(known, 16, targets)) == QWEN35["trainable_parameters"][size]


@pytest.mark.parametrize("size", ["0.8B", "2B", "4B", "9B"])
def test_qwen35_needs_less_than_unsloth_says_of_its_16_bit_lora_and_more_than_its_weights(size):
    """3, 5, 10 and 22 GB (unsloth.ai/docs/models/qwen3.5/fine-tune), of which vision, not loaded here, is a part."""
    says = {"0.8B": 3, "2B": 5, "4B": 10, "9B": 22}[size]
    plan = Settings(load_in_4bit=False, per_device_train_batch_size=1, longest=2048, longest_validation=2048)
    needed = fit.forecast(plan, f"unsloth/Qwen3.5-{size}").total("training")
    assert 2 * shipped(f"unsloth/Qwen3.5-{size}").parameters < needed < 1.1e9 * says


def test_a_qwen35_that_is_known_needs_no_hub_and_an_unknown_size_is_none_of_these():
    assert shipped("unsloth/Qwen3.5-4B").hidden_size == 2560
    assert shipped("Qwen/Qwen3.5-35B-A3B") is shipped("Qwen/Qwen3.6-27B") is None
    assert shipped("Qwen/Qwen3-4B").vocab_size == 151936


def test_of_qwen35_the_text_model_alone_is_counted_and_its_state_is_what_transformers_keeps(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from tests.support import families
    from toolkit.evaluation.decode import rows_that_fit

    folder = families.build("qwen3.5", tmp_path / "qwen3.5")
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = fit.shape(str(folder))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    linear = [m for path, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in path]
    assert found.linear_parameters == sum(m.weight.numel() for m in linear)
    layers = {}
    for tokens in (64, 128):
        with torch.no_grad():
            cache = model(torch.arange(tokens)[None], use_cache=True).past_key_values
        layers[tokens] = [bytes_of(vars(layer)) for layer in cache.layers]
    delta, full = zip(*layers.values(), strict=True)
    assert delta[0] == delta[1] == found.state_bytes
    assert full[1] - full[0] == 64 * 4 * found.kv_dim
    row = sum(layers[128])
    assert rows_that_fit(model.config, 128, 10.5 * row / 0.7, batch_size=32) == 10


def bytes_of(values) -> int:
    """Of all tensors in a structure."""
    import torch

    if isinstance(values, torch.Tensor):
        return values.numel() * values.element_size()
    if isinstance(values, dict):
        return sum(map(bytes_of, values.values()))
    return sum(map(bytes_of, values)) if isinstance(values, list | tuple) else 0


def test_the_shape_of_the_pocket_model_that_ships_is_that_of_its_config():
    from transformers import AutoConfig

    assert fit.shape_of(AutoConfig.from_pretrained(POCKET), "pocket") == fit.shape("pocket")


@pytest.mark.parametrize("name", ["qwen2.5", "llama3", "gemma3", "smollm2", "qwen3"])
def test_any_familys_shape_comes_from_its_config(name, tmp_path):
    from transformers import AutoModelForCausalLM

    from tests.support import families

    folder = families.build(name, tmp_path / name)
    found = fit.shape(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    linear = [m.weight.numel() for path, m in model.named_modules() if path.endswith("_proj")]
    assert found.linear_parameters == sum(linear)
    assert fit.forecast(Settings(), model.config).phases == fit.forecast(Settings(), str(folder)).phases


def test_lora_counts_are_pefts():
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, Qwen3ForCausalLM

    pocket = fit.shape("pocket")
    base = Qwen3ForCausalLM(AutoConfig.from_pretrained(POCKET))
    assert pocket.parameters == sum(p.numel() for p in base.parameters())
    targets = ["q_proj", "v_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=7, target_modules=targets))
    real = [p.numel() for p in model.parameters() if p.requires_grad]
    assert sorted(fit.lora_tensors(pocket, 7, targets)) == sorted(real)


def test_lora_counts_are_those_the_notebooks_printed():
    for published in POINTS:
        tensors = fit.lora_tensors(shipped(published["model"]), published["settings"]["r"], TARGETS)
        assert sum(tensors) == published["trainable_parameters"]


def test_nf4_bytes_are_those_bitsandbytes_stores():
    import torch
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(512, 256)
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    inner = state.state2
    tensors = (packed, state.absmax, state.code, state.offset, inner.absmax, inner.code)
    stored = sum(t.numel() * t.element_size() for t in tensors)
    one = dataclasses.replace(shipped("4B"), kept=0, matrices=(fit.Matrix("x_proj", 256, 512, 3),))
    assert fit.nf4_bytes(one) - 3 * 1092 == pytest.approx(3 * (stored - 1092), rel=1e-3)


def test_optimizer_bytes_are_those_bitsandbytes_holds():
    import torch
    from bitsandbytes.optim import AdamW8bit

    sizes = [100, 4095, 40000, 16 * 5120]
    weights = [torch.nn.Parameter(torch.zeros(n)) for n in sizes]
    adam = AdamW8bit(weights)
    for i, weight in enumerate(weights):
        adam.init_state(adam.param_groups[0], weight, 0, i)
    shared = ("qmap1", "qmap2")  # one pair of tables for all tensors
    held = sum(
        t.numel() * t.element_size()
        for state in adam.state.values()
        for key, t in state.items()
        if torch.is_tensor(t) and key not in shared
    )
    assert fit.optimizer_bytes(sizes, "adamw_8bit") == pytest.approx(held, rel=1e-3)


ROWS = """
import json, sys, unsloth
from unsloth_zoo.fused_losses.fused_linear import fused_linear_rows
shapes = json.load(sys.stdin)
print(json.dumps([fused_linear_rows(n, h, v, 4) * v * 4 for n, h, v in shapes]))
"""


@pytest.mark.slow
def test_the_loss_buffer_covers_unsloths_own_chunk_rule():
    cases = [(n, m.hidden_size, m.vocab_size) for m in map(shipped, fit.SHIPPED) for n in (1, 100, 600, 5000, 40000)]
    done = subprocess.run(
        [sys.executable, "-c", ROWS], input=json.dumps(cases), capture_output=True, text=True, check=True
    )
    theirs = json.loads(done.stdout.splitlines()[-1])
    for (n, _, _), model, chunk in zip(
        cases, [m for m in map(shipped, fit.SHIPPED) for _ in range(5)], theirs, strict=True
    ):
        assert fit.loss_bytes(model, n) - 2 * n * model.hidden_size >= chunk


# --- measurements


@pytest.mark.parametrize("published", POINTS, ids=lambda p: p["notebook"][3:])
def test_checkpoints_weigh_what_the_hub_serves(published):
    load = point(published, longest=1).phases["load"]
    assert load["weights"] / 1e9 == pytest.approx(sum(published["shards_gb"]), abs=0.02)


@pytest.mark.parametrize("published", POINTS, ids=lambda p: p["notebook"][3:])
def test_published_memory_before_training_is_reproduced(published):
    found = point(published, longest=1)
    # the block that conversion left is used by LoRA
    left = max(0, converted(published) - found.phases["load"]["LoRA"])
    expected = published["reserved_before_training_gib"]
    assert (found.reserved("load") + left) / GIB == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("published", [p for p in POINTS if p["settings"]["longest"]], ids=lambda p: p["notebook"][3:])
def test_published_peaks_are_reproduced(published, monkeypatch):
    error = reserved(published, monkeypatch) / (published["peak_reserved_gib"] * GIB) - 1
    assert -0.02 <= error <= 0.05


def test_a_peak_of_unknown_length_lies_between_the_shortest_and_the_longest_row(monkeypatch):
    [published] = [p for p in POINTS if not p["settings"]["longest"]]
    short, long = (reserved(published, monkeypatch, longest=n) / GIB for n in (1, 2048))
    assert short < published["peak_reserved_gib"] < long


def test_compare_is_positive_where_the_forecast_was_too_high():
    found = fit.forecast(Settings(), "4B")
    assert fit.compare(found, found.reserved())["error"] == 0
    assert fit.compare(found, found.reserved() // 2)["error"] == pytest.approx(1)
    assert found.reserved() == found.total("training") - fit.CONTEXT


# --- facts


@pytest.mark.parametrize("name", ["Qwen/Qwen3-4B", "unsloth/Qwen3-4B-unsloth-bnb-4bit", "unsloth/Qwen3-4B-Instruct-2507",
                                  "unsloth/qwen3-4b-unsloth-bnb-4bit", "4B"])  # fmt: skip
def test_every_spelling_of_a_size_is_known(name):
    assert dataclasses.replace(shipped(name), name="") == dataclasses.replace(shipped("4B"), name="")


@pytest.mark.parametrize(
    "name", ["meta/Llama-3-8B", "unsloth/Qwen3-Embedding-4B", "Qwen/Qwen3-VL-8B-Instruct", "Qwen3-4Bx"]
)
def test_an_unknown_model_is_an_error_that_lists_the_known_ones(name):
    with pytest.raises(ToolkitError, match=r"Qwen3-0\.6B.*config\.json"):
        fit.forecast(Settings(), name)


def test_a_plain_4_bit_checkpoint_keeps_no_layer_in_16_bit():
    assert shipped("unsloth/Qwen3-14B-bnb-4bit").kept == 0
    assert shipped("unsloth/Qwen3-14B-unsloth-bnb-4bit").kept == 3 * 3 * 5120 * 17408


def test_a_local_config_tells_which_layers_stay_in_16_bit(tmp_path):
    config = json.loads((POCKET / "config.json").read_text(encoding="utf-8"))
    skips = ["lm_head", "model.layers.0.mlp", "model.layers.1.self_attn.q_proj"]
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes", "llm_int8_skip_modules": skips}})
    )
    found = fit.shape(str(tmp_path))
    assert found.kept == 3 * found.hidden_size * config["intermediate_size"] + found.hidden_size * found.q_dim


@pytest.mark.parametrize("text", ['{"model_type": "no-such-model"}', "{", '{"hidden_size": 8}'])
def test_a_config_that_transformers_does_not_know_is_refused_by_path(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ToolkitError, match=str(tmp_path)):
        fit.shape(str(tmp_path))


def test_a_mixture_of_experts_is_a_reason_and_no_wrong_forecast():
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(hidden_size=64, num_hidden_layers=2, num_experts=4, num_attention_heads=4, vocab_size=99)
    with pytest.raises(ToolkitError, match="a mixture of experts"):
        fit.forecast(Settings(), config)


# --- decisions


@claim
@given(RUNS, st.sampled_from(fit.QWEN3), CARDS)
def test_suggestions_really_fit_and_keep_the_effective_batch(run, name, vram):
    found = fit.forecast(run, name)
    offers = fit.suggestions(found, vram)
    assert not (offers and found.fits(vram))
    for overrides, offer in offers:
        after = offer.settings
        assert fit.forecast(after, offer.shape).peak <= vram
        effective = after.per_device_train_batch_size * after.gradient_accumulation_steps
        assert effective == run.per_device_train_batch_size * run.gradient_accumulation_steps
        assert overrides


def test_what_train_solves_by_itself_is_no_advice_but_shown():
    planned = fit.forecast(Settings(longest=16384, per_device_eval_batch_size=1), "8B")
    assert not planned.fits(fit.usable_vram(12))
    trained = planned.as_trained(fit.usable_vram(12))
    assert trained.fits(fit.usable_vram(12))
    assert (trained.settings.per_device_train_batch_size, trained.settings.gradient_accumulation_steps) == (1, 8)
    assert fit.suggestions(planned, fit.usable_vram(12)) == []
    text = screen(fit.show, planned, fit.usable_vram(12))
    assert "train lowers the batch from 2 to 1 rows by itself" in text
    assert " no " not in text


def test_twice_the_suggested_limit_would_not_fit():
    found, vram = fit.forecast(Settings(longest=32768), "14B"), fit.usable_vram(16)
    [offer] = [after for overrides, after in fit.suggestions(found, vram) if "max_seq_length" in overrides[-1]]
    longer = offer.changed(longest=2 * offer.settings.longest)
    assert not longer.as_trained(vram).fits(vram)


def test_overrides_of_a_suggestion_are_overrides_of_a_recipe():
    values = {"name": "x", "data": {"sources": [{"path": "x.jsonl"}]}, "model": {"model_name": "8B", "max_seq_length": 8192},
              "lora": {"r": 256}, "train": {"optim": "adamw_torch"}}  # fmt: skip
    vram = fit.usable_vram(8)
    offers = fit.suggestions(fit.forecast(recipe.from_dict(values)), vram)
    assert offers
    for overrides, offer in offers:
        changed = fit.forecast(recipe.from_dict(values, overrides=overrides))
        assert changed.as_trained(vram).settings == offer.settings


def test_the_command_line_the_notebook_and_train_forecast_the_same():
    loaded, vram = recipe.load("hybrid", ["train.max_steps=2"]), fit.usable_vram(16)
    from toolkit import notebook

    by_name = fit.forecast(loaded, fit.choose_model(vram, loaded)).as_trained(vram)
    assert fit.forecast(loaded, vram=vram).as_trained(vram) == by_name == notebook.forecast(loaded, vram)


@claim
@given(RUNS, CARDS, CARDS)
def test_more_memory_never_chooses_a_smaller_model(run, one, other):
    def rank(vram: int) -> int:
        try:
            return [n.split("-")[1] for n in fit.QWEN3].index(fit.choose_model(vram, run).split("-")[1])
        except ToolkitError:
            return -1

    assert rank(min(one, other)) <= rank(max(one, other))


def test_auto_takes_the_largest_that_fits_and_says_what_helps_where_none_does():
    names = [fit.choose_model(fit.usable_vram(gb)) for gb in (6, 8, 12, 16, 24)]
    assert names == [f"unsloth/Qwen3-{size}-unsloth-bnb-4bit" for size in ("4B", "4B", "8B", "14B", "14B")]
    assert fit.choose_model(int(14.74 * GIB)).startswith("unsloth/Qwen3-8B"), "a T4 shows less, and 14B takes 94% of it"
    for name, room in (("14B", int(14.74 * GIB)), ("32B", fit.usable_vram(24))):
        assert fit.forecast(Settings(), name).fits(room), "it fits, but without room to spare"
    with pytest.raises(ToolkitError, match="model_name: auto"):
        fit.choose_model(GIB // 2)


def test_a_forecast_without_a_model_is_refused():
    with pytest.raises(ToolkitError, match="needs a model"):
        fit.forecast(Settings())


# --- pictures, cost


def screen(show, *args, width=80) -> str:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    show(*args, console=console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_show_says_the_verdict_first_and_cuts_nothing(width):
    text = screen(fit.show, fit.forecast(Settings(), "14B"), fit.usable_vram(12), width=width)
    assert text.startswith("14B does not fit: ")
    for word in (
        "phase",
        "KV",
        "cache",
        "total",
        "load",
        "training",
        "validation",
        "evaluation",
    ):
        assert word in text
    assert "model.model_name=unsloth/Qwen3-8B-unsloth-bnb-4bit" in text.replace("\n", "")
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_a_forecast_takes_milliseconds_and_imports_nothing_heavy():
    code = "import toolkit.machine.fit, sys; print({'torch', 'numpy', 'rich', 'matplotlib', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"
    started = time.perf_counter()
    for _ in range(100):
        fit.forecast(Settings(), "14B")
    assert (time.perf_counter() - started) / 100 < 0.005


@pytest.mark.parametrize(
    ("limit", "asked", "planned"), [(512, "unsloth", "unsloth"), (511, "unsloth", True), (511, "false", False)]
)
def test_rows_too_short_for_offloading_are_planned_as_unsloth_checkpoints_them(limit, asked, planned):
    changes = [f"model.max_seq_length={limit}", f"lora.use_gradient_checkpointing={asked}"]
    assert fit.settings(recipe.load("pocket", changes)).use_gradient_checkpointing == planned


@pytest.mark.parametrize("size", [float("nan"), float("inf"), -8, 1e300])
def test_a_card_has_a_size(size):
    with pytest.raises(ToolkitError, match="expected the size of a card in GB"):
        fit.usable_vram(size)


@pytest.mark.parametrize("key", ["lora.modules_to_save=[lm_head]", "lora.target_modules=[q_proj, lm_head]"])
def test_modules_that_train_as_a_whole_are_not_forecast(key):
    """Unsloth trains embedding and head as a whole even where they are an adapter's targets."""
    with pytest.raises(ToolkitError, match="lm_head: the memory of modules that are trained as a whole"):
        fit.forecast(recipe.load("pocket", [key]))


def test_of_a_model_that_sees_the_rest_is_counted_too():
    import torch
    from transformers import AutoModelForImageTextToText, Gemma3Config

    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512}  # fmt: skip
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(config)
    assert fit.shape_of(config, "sees").parameters == sum(p.numel() for p in whole.parameters())
