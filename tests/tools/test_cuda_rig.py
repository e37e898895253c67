"""Unsloth's real CUDA trainer, generated and built on a machine without a card: what the toolkit does on it, and relies on.

Each group of facts is gathered in a process of its own (tests/tools/cuda_rig): there torch.cuda is answered for, tensors stay on the CPU
and Triton interprets. Precision, speed, memory and bitsandbytes' kernels are beyond it: tests/test_gpu.py.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.cuda_rig import LAYERS, NEW_TOKENS, PROMPT
from tests.tools.decoding import plain_replies
from toolkit.files import ROOT


@functools.cache
def facts(group: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "tests.tools.cuda_rig", group], cwd=ROOT, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def supervised(labels: list[list[int]]) -> list[int]:
    return [token for row in labels for token in row if token != -100]


# --- what we rely on without its being promised ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("unsloth/models/llama.py", ["def for_training", "def for_inference", "_flag_for_generation",
                                     "_unsloth_allow_packed_overlength"]),
        ("unsloth/models/rl.py", ["_unsloth_truncated_to"]),
        ("unsloth/utils/packing.py", ["def mark_allow_overlength", "_unsloth_allow_packed_overlength"]),
        ("unsloth/models/_decode_graphs.py", ["def release_for_training"]),
        ("unsloth/models/loader_utils.py", ["def get_model_name"]),
        ("unsloth/models/loader.py", ["use_exact_model_name"]),
        ("unsloth/models/_utils.py", ["UNSLOTH_DISABLE_STATISTICS"]),
        ("unsloth_zoo/device_type.py", ["UNSLOTH_FORCE_CPU", "/proc/driver/nvidia/version", "/usr/lib/wsl/lib/nvidia-smi"]),
        ("unsloth_zoo/llama_cpp.py", ["UNSLOTH_AUTO_INSTALL"]),
        ("unsloth_zoo/compiler.py", ["UNSLOTH_COMPILE_LOCATION"]),
        ("unsloth_zoo/gradient_checkpointing.py", ["class UnslothCheckpointFunction"]),
    ],
)  # fmt: skip
def test_private_names_of_unsloth_that_the_toolkit_uses_exist(file, words):
    package, _, path = file.partition("/")
    [folder] = importlib.util.find_spec(package).submodule_search_locations
    text = (Path(folder) / path).read_text(encoding="utf-8")
    assert [word for word in words if word not in text] == []


# --- the trainer as it is by default ---------------------------------------------------------------------------------


def test_the_longest_batch_is_tried_with_every_layer_checkpointed():
    found = facts("probe")
    assert found["after_build"]["checkpointing"] == [False]  # so does Unsloth leave its trainer
    assert found["probe"]["layers"] == LAYERS
    assert found["probe"]["checkpointing"] == ["unsloth"]
    assert found["probe"]["training"] == [True]


def test_trying_it_leaves_neither_gradients_nor_its_peak_behind():
    found = facts("probe")
    assert not found["gradients"]
    assert found["resets"] == 1


def test_rows_are_joined_without_padding_and_positions_restart_with_each():
    found = facts("probe")
    assert found["arguments"] == {"packing": False, "padding_free": True}
    assert found["position_ids"] == [[*range(9), *range(7), *range(5)]]
    assert "attention_mask" not in found["columns"]


def test_prompts_teach_nothing_and_every_other_token_does():
    found = facts("probe")
    [ids], [labels] = found["input_ids"], found["labels"]
    starts = [0, 9, 16]
    prompt = {start + i for start in starts for i in range(PROMPT)}
    assert labels == [-100 if i in prompt else token for i, token in enumerate(ids)]


def test_a_prompt_longer_than_max_seq_length_is_read_whole():
    found = facts("probe")
    assert found["seen_by_itself"] < found["prompt"]  # what Unsloth does without a word
    assert found["seen_in_inference"] == found["prompt"]


def test_a_hub_name_is_resolved_to_what_unsloth_loads_before_the_mix_is_rendered():
    found = facts("probe")
    assert found["resolved"] == found["again"] == "unsloth/Qwen3-4B-unsloth-bnb-4bit"
    assert found["exact"] == "Qwen/Qwen3-4B"
    assert found["refused"].startswith(
        "model.revision: Unsloth loads unsloth/Qwen3-4B-unsloth-bnb-4bit for Qwen/Qwen3-4B"
    )


# --- packed and padded -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_padding_free_packed_and_padded_give_one_loss_and_one_set_of_labels():
    found = facts("ways") | {"padding_free": facts("probe")}
    assert found["packed"]["arguments"]["packing"]
    assert not found["padded"]["arguments"]["padding_free"]
    assert found["padded"]["columns"] == ["attention_mask", "input_ids", "labels"]
    taught = {way: sorted(supervised(f["labels"])) for way, f in found.items()}
    assert taught["packed"] == taught["padded"] == taught["padding_free"]
    for way in ("packed", "padded"):
        assert found[way]["loss"] == pytest.approx(found["padding_free"]["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["packed", "padded"])
def test_the_longest_batch_is_tried_with_packs_and_with_padding_too(way):
    found = facts("ways")[way]
    assert found["probe"]["layers"] == LAYERS
    assert not found["gradients"]


@pytest.mark.slow
def test_a_pack_keeps_every_row_whole_and_its_positions():
    found = facts("ways")["packed"]
    assert found["rows"] == 1
    [positions] = found["position_ids"]
    assert sorted(p for p in positions if p == 0) == [0, 0, 0]
    assert sorted(positions) == sorted([*range(9), *range(7), *range(5)])


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_micro_batch_knows_the_supervised_tokens_of_its_step():
    found = facts("training")
    steps = [event for event in found["events"] if event["event"] == "step"]
    assert len(steps) == 4  # two steps of two
    assert sum(step["items"] for step in steps) == 2 * sum(found["supervised"])
    assert found["totals"]["supervised_tokens"] == sum(found["supervised"])


@pytest.mark.slow
def test_after_replies_and_validation_training_goes_on_checkpointed_and_with_gradients():
    events = facts("training")["events"]
    names = [event["event"] for event in events]
    assert names[:2] == ["sample", "step"]
    assert len(names) - 1 - names[::-1].index("step") > names.index("evaluate")  # a step follows a validation
    for event in events:
        if event["event"] == "step":
            assert event["layers"] == LAYERS  # by Unsloth's own function, whether the mark says True or "unsloth"
            assert event["after"] == {
                "checkpointing": [True], "training": [True], "for_generation": False, "buffers": False,
            }  # fmt: skip


@pytest.mark.slow
def test_out_of_memory_inside_a_step_frees_activations_and_optimizer_and_keeps_the_effective_batch():
    attempts = facts("memory")["attempts"]
    sizes = [tuple(a[k] for k in ("per_device_train_batch_size", "gradient_accumulation_steps")) for a in attempts]
    assert sizes == [(4, 3), (2, 6), (1, 12)]
    assert [attempt["left"] for attempt in attempts] == [[], [], []]


# --- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_greedy_replies_on_the_cuda_path_are_those_of_plain_transformers_token_for_token(tmp_path):
    import contextlib

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    command = [sys.executable, "-m", "tests.tools.cuda_rig", "decoding", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    replies = json.loads(done.stdout.splitlines()[-1])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    for name, reply in replies.items():
        with contextlib.nullcontext() if name.endswith("tuned") else model.disable_adapter():
            alone = plain_replies(model, reply["prompts"], reply["ends"], reply["ends"][0], NEW_TOKENS)
        assert reply["new"] == alone, name
        assert max(map(len, reply["new"])) > 1, "some reply is longer than its first token"
    modes = {name.partition("/")[0] for name in replies}
    assert any(replies[f"{mode}/base"] != replies[f"{mode}/tuned"] for mode in modes), "the adapter changes the replies"


ALLOCATOR = """
import os, sys, torch
def note(name, value):
    def call(*args, **kwargs):
        print(name, "unsloth" in sys.modules, os.environ.get("PYTORCH_ALLOC_CONF"))
        return value
    return call
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = note("get_device_name", "a card")
torch.cuda.mem_get_info = note("mem_get_info", (15 * 2**30, 16 * 2**30))
torch.cuda.memory_reserved = lambda *_: 0
torch.cuda.device_count = lambda: 1
torch.cuda.is_bf16_supported = lambda **_: True
from toolkit.machine import doctor, fit
doctor.has_driver = lambda: True
print(doctor.default_recipe(answers=True))
print(fit.usable_vram())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the driver there has no expandable segments")
@pytest.mark.parametrize("own", [None, "max_split_size_mb:64"])
def test_the_allocator_is_set_before_anything_starts_cuda(own):
    environment = {k: v for k, v in os.environ.items() if not k.endswith("ALLOC_CONF")}
    environment |= {"PYTORCH_ALLOC_CONF": own} if own else {}
    code = f"import toolkit{ALLOCATOR}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    starts = [line.split() for line in done.stdout.splitlines() if line.startswith(("get_device", "mem_get"))]
    assert {line[0] for line in starts} == {"get_device_name", "mem_get_info"}, done.stderr
    assert {line[2] for line in starts} == {own or "expandable_segments:True"}
    assert {line[1] for line in starts} == {"False"}  # or Unsloth would have set it, too late
