"""A certificate passes for a sound export and fails for each way in which one goes wrong."""

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.support.export_fixtures import base_model, gguf_tensor, header_value, run_folder, tokenizer
from toolkit.export import export, gguf_path
from toolkit.export.certificate import merge_limit, upload_commands, verify
from toolkit.export.checkpoint import Adapter, Checkpoint, find_base
from toolkit.export.gguf import write_gguf
from toolkit.export.merge import Merged
from toolkit.export.parity import divergence, log_probs
from toolkit.export.record import FAILED
from toolkit.files import ToolkitError, read_json
from toolkit.serving.engine import exported_gguf

SILENT = {"console": Console(quiet=True)}


@pytest.fixture
def copy(sound, tmp_path):
    """The same run with its F16 file only, to be damaged."""
    run = Path(shutil.copytree(sound[0], tmp_path / "toy"))
    gguf_path(run, "q4_k_m").unlink()
    record = read_json(run / "export.json")
    del record["files"]["gguf/toy.q4_k_m.gguf"]
    (run / "export.json").write_text(json.dumps(record))
    return run


def failed(run: Path) -> str:
    """What a verification finds wrong; it must say so everywhere."""
    certificate = verify(run, **SILENT)
    assert not certificate["passed"]
    assert read_json(run / "certificate.json")["passed"] is False
    names = "\n".join(c["name"] for c in certificate["checks"] if not c["passed"])
    assert names.splitlines()[-1] in (run / FAILED).read_text()
    with pytest.raises(ToolkitError, match="no certificate has passed"):
        upload_commands(run)
    return names


def rewrite(run: Path) -> None:
    """A GGUF made anew from whatever merged/ now holds."""
    write_gguf(Checkpoint(run / "merged"), gguf_path(run, "f16"), "f16", "toy")


def test_a_sound_export_passes_and_says_so_in_the_agreed_keys(sound):
    run, certificate = sound
    stored = read_json(run / "certificate.json")
    assert stored == certificate
    assert stored["passed"] is True
    assert all(c.keys() >= {"name", "passed", "value", "limit"} for c in stored["checks"])
    assert stored["files"].keys() >= {"merged/model.safetensors", "gguf/toy.f16.gguf", "gguf/toy.q4_k_m.gguf"}
    assert all(f.keys() == {"sha256", "bytes"} for f in stored["files"].values())
    assert not (run / FAILED).exists()
    assert "passed" in (run / "certificate.md").read_text().splitlines()[0]


def test_the_control_the_quantized_file_and_qloras_gap_have_lines_of_their_own(sound):
    checks = {c["name"]: c for c in sound[1]["checks"]}
    control = checks["control: the base without the adapter fails that gate (mean KL)"]
    merged = checks["merged against base + adapter (mean KL)"]
    assert control["value"] > merged["limit"]
    assert checks["toy.q4_k_m.gguf: against merged (mean KL)"]["limit"] == 0.5
    [gap] = sound[1]["reports"]
    assert gap["name"] == "QLoRA gap"
    assert gap["value"] > 10 * merged["value"]


def test_the_base_without_the_adapter_fails(copy):
    base = Path(read_json(copy / "manifest.json")["model"]["name"])
    shutil.copyfile(base / "model.safetensors", copy / "merged" / "model.safetensors")
    rewrite(copy)
    found = failed(copy)
    assert "merged against base + adapter" in found
    assert "files changed" in found


def test_an_adapter_that_was_emptied_after_the_export_fails(copy):
    from safetensors.torch import load_file, save_file

    file = copy / "adapter" / "adapter_model.safetensors"
    save_file({n: t * 0 if "lora_B" in n else t for n, t in load_file(file).items()}, file)
    assert "merged against base + adapter" in failed(copy)


def test_a_wrong_template_fails(copy):
    template = copy / "merged" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<think>\\n\\n</think>\\n\\n", "<think>\\n</think>\\n"))
    rewrite(copy)
    found = failed(copy)
    assert "merged: facts of the tokenizer that differ from the run's: chat template" in found
    assert "toy.f16.gguf: templates rendered differently" in found
    assert "header values that differ: tokenizer.chat_template" in found


def test_a_swapped_tokenizer_fails(copy):
    other = tokenizer(vocabulary=400)
    other.save_pretrained(copy / "merged")
    rewrite(copy)
    found = failed(copy)
    assert "vocabulary and rules" in found
    assert "toy.f16.gguf: texts tokenized differently" in found


def test_one_flipped_tensor_of_the_gguf_fails(copy):
    path = gguf_path(copy, "f16")
    tensor = gguf_tensor(path, "blk.2.attn_v.weight")
    with open(path, "rb+") as file:
        file.seek(tensor.data_offset)
        file.write((-tensor.data.view(np.float16)).tobytes())
    found = failed(copy)
    assert "toy.f16.gguf: worst tensor" in found
    assert "toy.f16.gguf: against merged (mean KL)" in found


def test_one_flipped_tensor_of_the_merged_folder_fails(copy):
    from safetensors.torch import load_file, save_file

    file, name = copy / "merged" / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    weights = load_file(file)
    save_file(weights | {name: -weights[name]}, file)
    assert "merged against base + adapter" in failed(copy)


def test_a_wrong_end_of_turn_token_fails(copy):
    settings = read_json(copy / "merged" / "tokenizer_config.json") | {"eos_token": "<|endoftext|>"}
    (copy / "merged" / "tokenizer_config.json").write_text(json.dumps(settings))
    rewrite(copy)
    assert "header values that differ: tokenizer.ggml.eos_token_id" in failed(copy)


def test_a_truncated_gguf_fails_and_the_verification_goes_on(copy):
    path = gguf_path(copy, "f16")
    path.write_bytes(path.read_bytes()[:100_000])
    assert "toy.f16.gguf: could not be read" in failed(copy)


def test_an_interrupted_verification_leaves_the_mark_of_failure(copy):
    (copy / "merged" / "config.json").unlink()
    with pytest.raises(ToolkitError, match=r"config\.json"):
        verify(copy, **SILENT)
    assert not (copy / "certificate.json").exists()
    assert "Not verified" in (copy / FAILED).read_text()


@pytest.mark.parametrize("tied", [True, False])
def test_the_layerwise_forward_pass_equals_peft_in_fp32(tied, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import Qwen3ForCausalLM

    base = base_model(tmp_path / "base", tied=tied)
    run = run_folder(tmp_path / "run", base, target_modules=["q_proj"] if tied else ["q_proj", "lm_head"])
    merged = Merged(find_base({"name": str(base)}, "16bit"), Adapter(run / "adapter"))
    texts = [list(range(40)), [7 * i % 490 for i in range(50)]]
    model = Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    peft = PeftModel.from_pretrained(model, run / "adapter").eval()

    def logits(model) -> np.ndarray:
        return torch.cat([model(torch.tensor([t])).logits[0].log_softmax(-1) for t in texts]).numpy()

    with torch.inference_mode():
        tuned, plain = log_probs([(merged, "adapter"), (merged, "base")], texts)
        assert divergence(logits(peft), tuned).max() < 1e-6
        with peft.disable_adapter():
            assert divergence(logits(peft), plain).max() < 1e-6


def test_the_page_for_people_lists_every_check_and_every_file(sound):
    page = (sound[0] / "certificate.md").read_text()
    assert all(c["name"] in page for c in sound[1]["checks"])
    assert all(re.search(rf"{re.escape(n)} .*{f['sha256']}", page) for n, f in sound[1]["files"].items())


def test_the_limit_of_a_merge_grows_with_what_the_adapter_does_and_stays_below_it():
    exact = [(0.0888, 1.27e-4), (0.185, 5.7e-5), (7.5e-4, 1.7e-4), (2.5e-3, 4.1e-4), (2.4e-3, 4.2e-4)]
    assert all(merge_limit(effect) > rounding for effect, rounding in exact)  # every tensor was bit-equal: bf16 alone
    assert merge_limit(1e-6) == 5e-7  # an adapter that does little: the bare base must still fail
    assert merge_limit(3e-4) == 1e-4
    assert merge_limit(50.0) == 1e-3
    assert all(merge_limit(effect) < effect for effect in (1e-6, 1e-4, 1e-2, 1.0))


def test_an_export_stays_valid_when_its_folder_is_renamed(sound, tmp_path):
    renamed = Path(shutil.copytree(sound[0], tmp_path / "another name"))
    assert verify(renamed, **SILENT)["passed"]


def test_a_file_that_export_did_not_write_is_noted_and_decides_nothing(sound, tmp_path):
    copy = Path(shutil.copytree(sound[0], tmp_path / "toy"))
    shutil.copy(gguf_path(copy, "f16"), copy / "gguf" / "toy.q3_k_m.gguf")
    (copy / "gguf" / "aaa.q4_k_m.gguf").write_bytes(b"a fragment, smaller than any")
    certificate = verify(copy, **SILENT)
    assert certificate["passed"]
    names = [note["name"] for note in certificate["reports"] if "not checked" in note["name"]]
    assert names == ["aaa.q4_k_m.gguf: not checked", "toy.q3_k_m.gguf: not checked"]
    assert exported_gguf(copy, "q4_k_m").name == "toy.q4_k_m.gguf"


def test_a_gguf_that_was_given_another_name_is_missing(copy):
    gguf_path(copy, "f16").rename(copy / "gguf" / "mine.gguf")
    assert "changed or missing" in failed(copy)


# How much of the adapter


@pytest.fixture(scope="module")
def scaled(sound, tmp_path_factory):
    """The same run, exported at 0.8 of its adapter."""
    run = Path(shutil.copytree(sound[0], tmp_path_factory.mktemp("scaled") / "toy"))
    return run, export(run, quants=("f16",), scale=0.8, **SILENT)


def test_an_export_at_a_scale_passes_against_the_scaled_adapter_and_says_it_everywhere(scaled, sound):
    run, certificate = scaled
    assert certificate["passed"]
    assert certificate["inputs"]["scale"] == read_json(run / "export.json")["inputs"]["scale"] == 0.8
    assert "0.8 of its trained strength" in (run / "certificate.md").read_text()
    assert "0.8 of its trained strength" in header_value(gguf_path(run, "f16"), "general.description")
    assert read_json(run / "merged" / "config.json")["adapter_scale"] == 0.8
    assert sound[1]["inputs"]["scale"] == 1.0
    assert "strength" not in (sound[0] / "certificate.md").read_text()


def test_an_export_at_a_scale_fails_against_the_unscaled_adapter(scaled, tmp_path):
    run = Path(shutil.copytree(scaled[0], tmp_path / "toy"))
    record = read_json(run / "export.json")
    record["inputs"]["scale"] = 1.0
    (run / "export.json").write_text(json.dumps(record))
    names = failed(run)
    assert "merged against base + adapter" in names
    assert "merged: worst tensor" in names


def test_an_export_at_another_scale_replaces_the_files(scaled, tmp_path):
    run = Path(shutil.copytree(scaled[0], tmp_path / "toy"))
    certificate = export(run, quants=("f16",), scale=0.5, **SILENT)
    assert certificate["passed"]
    assert certificate["files"] != scaled[1]["files"]


@pytest.mark.parametrize("scale", [0, 1])
def test_a_run_that_changed_nothing_exports_and_is_said_to_be_its_base(scale, sound, tmp_path):
    from safetensors.torch import load_file, save_file

    run = Path(shutil.copytree(sound[0], tmp_path / "toy"))
    if scale:  # as after a training of warm-up steps only
        file = run / "adapter" / "adapter_model.safetensors"
        save_file({n: t * 0 if "lora_B" in n else t for n, t in load_file(file).items()}, file)
    screen = io.StringIO()
    certificate = export(run, quants=("f16",), scale=scale, console=Console(file=screen))
    assert certificate["passed"]
    assert "the adapter changes nothing" in [note["name"] for note in certificate["reports"]]
    assert "the adapter changes nothing: these files are the run, and the run is its base" in screen.getvalue()
    assert "do not use" not in (run / "certificate.md").read_text()
    assert not (run / FAILED).exists()
