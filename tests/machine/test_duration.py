"""Hours: the formulas against a published run and against figures worked out by hand, and the choice that follows from them."""

import io
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console

from toolkit import recipe
from toolkit.evaluation import plan
from toolkit.files import ROOT, ToolkitError
from toolkit.machine import choose, duration, fit, speed
from toolkit.machine.duration import Work, words_of

HYBRID = recipe.load("hybrid")


def work(tokens: float, length: float, micro_batches: float = 0) -> Work:
    return Work(tokens, micro_batches, validation_tokens=0, mean_length=length)


def test_a_published_run_takes_what_it_took():
    """Unsloth's Qwen3-14B notebook on a T4: 240 rows of about 1,530 tokens, batches of two padded to the longer, 2,476 s."""
    seconds = duration.training_seconds(fit.shape("14B"), work(1.2 * 240 * 1530, 1530), speed.of_card("Tesla T4"))
    assert seconds == pytest.approx(2476, rel=0.25)


def test_operations_are_those_of_a_model_counted_by_torch():
    """torch's own counter, on a small Qwen3: forward, and the gradients that LoRA needs."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, head_dim=32,
                         num_key_value_heads=2, vocab_size=500, attn_implementation="eager")  # fmt: skip
    model = Qwen3ForCausalLM(config).requires_grad_(False)
    inputs = torch.randn(1, 64, 128, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        loss = model(inputs_embeds=inputs).logits.sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    shape = fit.shape_of(config, "small")
    # an eager layer computes attention to later tokens too, and both gradients of its two products
    attention = 4 * 3 * 128 * 64 * 64
    expected = 64 * speed.operations(shape, 64, trains=False)
    assert forward.get_total_flops() - attention / 2 == pytest.approx(expected, rel=0.02)
    both = 64 * speed.operations(shape, 64, recomputes=False)
    assert forward.get_total_flops() + backward.get_total_flops() - 2 * attention == pytest.approx(both, rel=0.02)


def test_short_rows_take_at_least_the_launches_of_their_micro_batches():
    rows = work(1000, 50, micro_batches=100)
    assert duration.training_seconds(fit.shape("4B"), rows, speed.of_card("RTX 4090")) == 100 * 36 * duration.LAUNCH


@pytest.mark.parametrize(
    ("card", "model", "hours"),
    [("T4", "14B", 3.3), ("RTX 3060", "8B", 2.3), ("RTX 4090", "14B", 0.6), ("RTX 4090", "32B", 1.5)],
)
def test_the_hours_of_the_default_recipe_are_those_worked_out_by_hand(card, model, hours):
    """From the same formulas with each card's own measured rates, before this table was made."""
    planned = duration.forecast(HYBRID, fit.shape(model), duration.planned_work(HYBRID), speed.of_card(card))
    assert planned.training / 3600 == pytest.approx(hours, rel=0.15)
    assert planned.evaluation == pytest.approx((planned.training + planned.validation) / 3)
    assert planned.validation < 0.1 * planned.training


def test_the_evaluation_is_planned_for_three_minutes_at_least():
    assert duration.evaluation_seconds(HYBRID, 60) == 180
    assert duration.evaluation_seconds(HYBRID, 3600) == 1200
    assert duration.evaluation_seconds(recipe.load("hybrid", ["evaluate.minutes=7"]), 3600) == 420
    assert duration.evaluation_seconds(HYBRID, 1) == 60 * plan.LEAST_MINUTES
    full = recipe.load("hybrid", ["evaluate.level=full"])
    assert duration.evaluation_seconds(full, 3600) == 60 * plan.FULL_MINUTES


def test_the_work_of_a_mix_is_its_tokens_epochs_and_validations():
    settings = ["train.num_train_epochs=2", "train.eval_steps=0.25", "train.per_device_train_batch_size=2",
                "train.gradient_accumulation_steps=2"]  # fmt: skip
    wanted = recipe.load("hybrid", settings)
    found = duration.work_of(wanted, [10, 30, 20, 40, 50, 50, 5, 5], [7, 9], on_card=True)
    assert (found.tokens, found.micro_batches, found.validation_tokens) == (420, 8, 4 * 16)
    padded = duration.work_of(wanted, [10, 30, 20, 40, 50, 50, 5, 5], [7, 9], on_card=False)
    assert padded.tokens == 2 * 2 * (30 + 40 + 50 + 5)
    assert not padded.recomputes
    by_steps = duration.work_of(recipe.load("hybrid", [*settings, "train.max_steps=1"]), [10] * 8, [], on_card=True)
    assert by_steps.tokens == 40


@pytest.mark.parametrize(
    ("strategy", "every", "count"), [("no", 0.25, 0), ("epoch", 0.25, 3), ("steps", 0.25, 4), ("steps", 30, 3), ("steps", 0.5, 2)]
)  # fmt: skip
def test_validations_are_counted_as_transformers_does(strategy, every, count):
    wanted = recipe.load(
        "hybrid", [f"train.eval_strategy={strategy}", f"train.eval_steps={every}", "train.save_steps=30"]
    )
    assert duration.validations(wanted, steps=100, epochs=3) == count


def test_what_only_the_data_decide_is_not_made_up():
    assert duration.planned_work(recipe.load("hybrid", ["data.budget=null"])) is None


def test_a_usual_length_is_the_mean_of_a_log_normal_that_is_cut():
    import numpy as np

    lengths = np.random.default_rng(0).lognormal(np.log(2500), 0.73, 400_000)
    for longest in (2048, 4096, 10**6):
        kept = lengths[lengths <= longest - duration.PROMPT]
        assert duration.usual_length("thinking", longest) == pytest.approx(kept.mean() + duration.PROMPT, rel=0.01)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 s"), (89, "89 s"), (91, "2 min"), (3599, "1 h 0 min"), (7500, "2 h 5 min")]
)
def test_seconds_are_said_as_people_say_them(seconds, words):
    assert words_of(seconds) == words


# --- cards


@pytest.mark.parametrize(
    ("name", "known"),
    [("NVIDIA GeForce RTX 3060", "RTX 3060"), ("RTX 3060 Ti", "RTX 3060 Ti"), ("rtx4090", "RTX 4090"), ("Tesla T4", "T4"),
     ("NVIDIA A100-SXM4-40GB", "A100"), ("nvidia h100 80gb hbm3", "H100")],
)  # fmt: skip
def test_a_card_is_known_by_every_driver_s_spelling(name, known):
    assert speed.of_card(name).name == known


@pytest.mark.parametrize("name", ["4090", "RTX 9999", "A1000", "T400", ""])
def test_a_card_that_the_table_lacks_is_refused_with_those_it_has(name):
    with pytest.raises(ToolkitError, match=f"--card {name}: not in the table. (Did you mean|Known: )"):
        speed.of_card(name)


def test_a_larger_card_of_the_table_is_never_slower_than_a_smaller_one_of_its_series():
    for series in ("RTX 30", "RTX 40", "RTX 50"):
        cards = sorted((name, card) for name, card in speed.CARDS.items() if name.startswith(series))
        rates = [card.teraflops for _, card in cards]
        assert rates == sorted(rates), series


# --- auto


@pytest.mark.parametrize(
    ("card", "chosen"), [("T4", "8B"), ("RTX 3060", "8B"), ("RTX 4060", "4B"), ("RTX 4090", "14B"), ("RTX 5090", "32B")]
)
def test_auto_takes_the_largest_model_whose_memory_and_time_fit(card, chosen):
    """Qwen3-14B on a T4 and 32B on 24 GB fit to a few percent and take hours: both are traps."""
    known = speed.of_card(card)
    name, why = choose.largest_model(HYBRID, fit.usable_vram(known.gigabytes), known)
    assert name == f"unsloth/Qwen3-{chosen}-unsloth-bnb-4bit"
    assert "a tenth to spare" in why
    assert f"4 hours or less on {card}" in why


def test_a_budget_that_is_too_large_for_an_evening_takes_a_smaller_model():
    small, large = (recipe.load("hybrid", [f"data.budget={n}"]) for n in (2_000_000, 8_000_000))
    known = speed.of_card("RTX 3060")
    vram = fit.usable_vram(known.gigabytes)
    assert "8B" in choose.largest_model(small, vram, known)[0]
    assert "1.7B" in choose.largest_model(large, vram, known)[0]
    assert "0.6B" in choose.largest_model(recipe.load("hybrid", ["data.budget=90000000"]), vram, known)[0]


def test_without_a_speed_or_a_budget_memory_alone_decides():
    vram = fit.usable_vram(12)
    assert choose.largest_model(HYBRID, vram, None)[0] == fit.choose_model(vram, HYBRID)
    unknown = recipe.load("hybrid", ["data.budget=null"])
    assert choose.largest_model(unknown, vram, speed.of_card("RTX 3060"))[0] == fit.choose_model(vram, unknown)


# --- screens, cost


def shown(width: int, *overrides: str, card: str | None = "RTX 3060", gigabytes: float = 0) -> str:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    choose.show(recipe.load("hybrid", overrides), gigabytes, card, console)
    return console.file.getvalue()


def test_fit_says_hours_and_minutes_for_a_named_card():
    text = shown(80)
    assert "training 2 h" in text
    assert "evaluation 4" in text
    assert "(calculated for RTX 3060)" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80
    assert 'name a card for its hours, e.g. --card "RTX 3060"' in shown(80, card=None, gigabytes=8)
    assert "not known before the mix is compiled" in shown(80, "data.budget=null")


def test_a_forecast_of_the_pocket_model_imports_nothing_heavy():
    code = (
        "import sys; from toolkit.__main__ import main; main(['fit', 'pocket', '--card', 'T4']);"
        "print({'torch', 'transformers', 'matplotlib', 'IPython', 'wandb'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "set()"
    assert "(calculated for T4)" in done.stdout


def test_a_short_run_is_not_measured_first():
    wanted = recipe.load("pocket", ["train.max_steps=4"])
    assert choose.hours_of_mix(wanted, [100] * 64, [100] * 8) is None


def test_a_model_of_unknown_shape_is_a_reason_and_stops_nothing():
    wanted = recipe.load("pocket", ["model.model_name=somebody/unknown"])
    said: list[str] = []
    mixed = type("Mixed", (), {"train": [], "validation": []})
    assert choose.say_hours(wanted, mixed, said.append) is None
    assert said[0].startswith("no forecast of hours: ")


def test_what_a_run_took_stands_beside_its_forecast(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"train_seconds": 90.0, "evaluation_seconds": 10.0}))
    planned = duration.Duration(100, 20, 180, speed.of_card("T4"))
    choose.record_hours(tmp_path, planned)
    kept = json.loads((tmp_path / "manifest.json").read_text())["time"]
    assert kept == {"forecast": 120, "measured": 100, "speed": "T4", "error": pytest.approx(0.2)}


TIMED = """
import json, sys
from pathlib import Path
from tests.tools import hours
hours.count_cpu_time()
print(json.dumps(hours.timed("pocket", hours.RUNS["pocket"], Path(sys.argv[1]))))
"""


@pytest.mark.slow
def test_a_run_on_this_cpu_takes_what_its_manifest_says_was_forecast_to_a_quarter(tmp_path):
    """Both counted in CPU seconds of one thread: by the clock, whatever else a machine does would slow the forecast or the run
    down, and not both alike."""
    words = [sys.executable, "-c", TIMED, str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT, env=env)
    kept = json.loads(done.stdout.splitlines()[-1])
    assert kept["speed"] == "this CPU"
    assert abs(kept["error"]) <= 0.25, kept


def test_the_page_of_hours_and_memory_is_current_and_says_that_it_is_calculated():
    from tests.tools import time_and_memory

    assert (ROOT / "docs" / "time_and_memory.md").read_text(encoding="utf-8") == time_and_memory.page(), "make docs"
    assert "nothing was measured on a card" in time_and_memory.page()
