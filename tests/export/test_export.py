"""Exports are exact, whole or absent, resumable, and told in numbers before they begin."""

import contextlib
import io
import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.support import families
from tests.support.export_fixtures import base_model, dynamic_4bit, killed_export, run_folder
from toolkit.export import export, gguf_path, modelfile
from toolkit.export.certificate import upload_commands
from toolkit.export.checkpoint import Adapter, Base, Checkpoint, find_base
from toolkit.export.merge import Merged, merge, open_merged
from toolkit.export.parity import log_probs
from toolkit.export.record import Record
from toolkit.export.tokenizer import load_tokenizer
from toolkit.files import ROOT, ToolkitError, read_json, sha256
from toolkit.serving.engine import start

SILENT = {"console": Console(quiet=True)}
QUANTS = ("f16", "q4_k_m")


@pytest.fixture
def exported(sound):
    return sound[0]


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "toy"))


def merged_here(run: Path, onto: str = "16bit") -> Checkpoint:
    merge(open_merged(run, onto), run, Record(run, {}), Console(quiet=True))
    return Checkpoint(run / "merged")


def digests(run: Path) -> dict[str, str]:
    return {name: sha256(run / name) for name in read_json(run / "export.json")["files"]}


# Merging


@pytest.mark.parametrize(
    ("tied", "lora"),
    [
        (True, {}),
        (True, {"use_rslora": True}),
        (True, {"target_modules": ["q_proj", "down_proj"]}),
        (False, {"target_modules": ["v_proj", "lm_head"]}),
    ],
    ids=str,
)
def test_the_merge_is_bit_equal_to_pefts(tied, lora, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import Qwen3ForCausalLM

    base = base_model(tmp_path / "base", tied=tied)
    run = run_folder(tmp_path / "run", base, **lora)
    ours = merged_here(run)
    model = Qwen3ForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    theirs = PeftModel.from_pretrained(model, run / "adapter").merge_and_unload().state_dict()
    assert ours.shapes
    assert [n for n in ours.shapes if not torch.equal(ours.tensor(n), theirs[n].to(torch.bfloat16))] == []
    assert ours.tied == tied


def test_transformers_loads_the_merged_folder_and_gives_pefts_logits(base, run):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    merged_here(run)
    ids = torch.arange(30)[None]
    ours = AutoModelForCausalLM.from_pretrained(run / "merged", dtype="auto")
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    theirs = PeftModel.from_pretrained(theirs, run / "adapter").merge_and_unload()
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_several_shards_hold_the_same_tensors_as_one(run, monkeypatch):
    import torch

    whole = merged_here(run)
    one = {n: whole.tensor(n).clone() for n in whole.shapes}
    shutil.rmtree(run / "merged")
    (run / "export.json").unlink()
    monkeypatch.setattr(sys.modules["toolkit.export.merge"], "SHARD_BYTES", 10**6)
    many = merged_here(run)
    files = list((run / "merged").glob("model-*-of-*.safetensors"))
    assert len(files) > 3
    assert all(torch.equal(many.tensor(n), one[n]) for n in one)


def test_onto_4bit_merges_onto_bitsandbytes_own_rounding_of_the_linear_layers(base, run):
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    loaded = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, dtype=torch.bfloat16)
    loaded.save_pretrained(run.parent / "model-bnb-4bit")
    on_load, stored = open_merged(run, "4bit"), Checkpoint(run.parent / "model-bnb-4bit")
    on_disk = Merged(Base("model-bnb-4bit", None, stored.folder, True), Adapter(run / "adapter"))
    for name in ("model.layers.0.self_attn.v_proj.weight", "model.layers.3.mlp.down_proj.weight"):
        weight = loaded.get_submodule(name.removesuffix(".weight")).weight
        theirs = dequantize_4bit(weight.data, weight.quant_state).to(torch.bfloat16)
        assert torch.equal(on_load.base_tensor(name), theirs)
        assert torch.equal(on_disk.base_tensor(name), theirs)
        assert on_disk.shapes[name] == tuple(theirs.shape)
    assert on_disk.shapes == on_load.shapes
    embedding = "model.embed_tokens.weight"
    assert torch.equal(on_load.base_tensor(embedding), Checkpoint(base).tensor(embedding))


def test_a_run_on_a_dynamic_4bit_folder_exports_onto_both_bases(tmp_path):
    """Laid out like unsloth/Qwen3-0.6B-unsloth-bnb-4bit: NF4 tensors, and some modules left in 16 bits."""
    base, kept = families.build("qwen3", tmp_path / "toy"), "model.layers.1.mlp.down_proj"
    four = dynamic_4bit(base, kept)
    run = run_folder(tmp_path / "run", base)
    (run / "manifest.json").write_text(json.dumps({"model": {"name": str(four), "load_in_4bit": True}}))
    stored = Checkpoint(four)
    assert f"{kept}.weight.absmax" not in stored.entries
    assert "model.layers.0.mlp.down_proj.weight.absmax" in stored.entries
    for onto, label in (("16bit", "toy"), ("4bit", "toy-unsloth-bnb-4bit")):
        certificate = export(run, quants=("q8_0",), onto=onto, **SILENT)
        assert (certificate["passed"], certificate["inputs"]["base"]) == (True, label)


@pytest.mark.parametrize(
    "name", ["llama3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "qwen2.5", "gemma3"))]
)
def test_a_model_as_the_hub_has_it_passes_its_certificate(name, tmp_path):
    run = run_folder(tmp_path / "run", families.build(name, tmp_path / "base"))
    certificate = export(run, quants=("f16", "q8_0"), **SILENT)
    assert certificate["passed"]
    assert {"gguf/run.f16.gguf", "gguf/run.q8_0.gguf"} <= certificate["files"].keys()


def test_the_reference_pass_is_the_same_where_unsloth_has_patched_transformers(run, monkeypatch, one_reference_process):
    merged, texts = open_merged(run, "16bit"), [[1, 2, 3, 4], [5, 6, 7]]
    here = log_probs([(merged, "adapter")], texts)
    monkeypatch.setitem(sys.modules, "unsloth", sys)  # as if imported: the pass then runs in a process of its own
    monkeypatch.setattr(sys.modules["toolkit.export.parity"], "_in_own_process", one_reference_process)
    assert (here[0] == log_probs([(merged, "adapter")], texts)[0]).all()


def test_a_4bit_folder_gives_way_to_the_16bit_one_beside_it(base, tmp_path):
    shutil.copytree(base, tmp_path / "model")
    four = Path(shutil.copytree(base, tmp_path / "model-unsloth-bnb-4bit"))
    config = read_json(four / "config.json") | {
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
        }
    }
    (four / "config.json").write_text(json.dumps(config))
    assert find_base({"name": str(four)}, "16bit").folder == tmp_path / "model"
    assert find_base({"name": str(four)}, "4bit").folder == four
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(ToolkitError, match="model: no such folder here, and the Hub"):
        find_base({"name": str(four)}, "16bit", local_only=True)


def test_a_hub_name_is_found_in_the_local_cache_and_its_commit_recorded(base, tmp_path, monkeypatch):
    cached = tmp_path / "models--unsloth--Qwen3-toy"
    shutil.copytree(base, cached / "snapshots" / "abc123")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = find_base({"name": "unsloth/Qwen3-toy-unsloth-bnb-4bit", "revision": "of the 4-bit one"}, "16bit")
    assert (found.name, found.revision, found.label) == ("unsloth/Qwen3-toy", "abc123", "unsloth/Qwen3-toy")


def test_an_adapter_of_another_kind_or_model_is_refused_by_name(run):
    config = run / "adapter" / "adapter_config.json"
    plain = config.read_text()
    for odd, told in (({"use_dora": True}, "use_dora = True"), ({"modules_to_save": ["lm_head"]}, "modules_to_save")):
        config.write_text(json.dumps(json.loads(plain) | odd))
        with pytest.raises(ToolkitError, match=told):
            open_merged(run, "16bit")
    config.write_text(plain)
    adapter = Adapter(run / "adapter")
    adapter.factors["model.layers.9.mlp.up_proj.weight"] = None, None
    with pytest.raises(ToolkitError, match=r"layers\.9.*another model"):
        Merged(find_base(read_json(run / "manifest.json")["model"], "16bit"), adapter)


# Whole or absent


@pytest.mark.parametrize(
    "at", ["gguf/*.q4_k_m.gguf.*.partial", pytest.param("merged/*.safetensors.*.partial", marks=pytest.mark.slow)]
)
def test_killed_in_the_middle_and_run_again_gives_identical_files(at, run, exported):
    assert killed_export(run, at) == -9
    assert not (run / "certificate.json").exists()
    assert (run / "EXPORT_FAILED.txt").exists()
    assert not gguf_path(run, "q4_k_m").exists()
    export(run, quants=QUANTS, **SILENT)
    assert digests(run) == digests(exported)
    assert list(run.rglob("*.partial")) == []


@contextlib.contextmanager
def files_up_to(size: int):
    """Every write beyond `size` bytes of a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100_000, 6_570_000], ids=["while merging", "while writing the GGUF"])
def test_a_write_that_fails_is_told_and_leaves_nothing_half_written(size, run):
    with files_up_to(size), pytest.raises(ToolkitError, match=r"could not be written .* GB are free"):
        export(run, quants=("f16",), **SILENT)
    left = sorted(p.name for p in [*run.glob("merged/*"), *run.glob("gguf/*")])
    assert not any(name.endswith((".partial", ".gguf")) for name in left)
    assert ("model.safetensors" in left) == (size > 6_564_152)
    assert (run / "EXPORT_FAILED.txt").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_refused_beforehand_and_survived_when_it_fills_up_meanwhile(trained, small_disk):
    run = Path(shutil.copytree(trained, small_disk / "toy"))
    with pytest.raises(ToolkitError, match=r"0\.0\d GB of disk needed, 0\.00 GB free\. Nothing was written"):
        export(run, **SILENT)
    assert not (run / "merged").exists()
    with pytest.raises(ToolkitError, match="No space left on device"):
        merged_here(run)
    assert list((run / "merged").iterdir()) == []


# Resuming


def test_a_second_export_writes_nothing_and_a_damaged_file_is_made_again(exported, tmp_path):
    run = Path(shutil.copytree(exported, tmp_path / "toy"))
    before = {name: (run / name).stat().st_mtime_ns for name in digests(run)}
    gguf_path(run, "f16").write_bytes(b"damaged")
    export(run, quants=QUANTS, **SILENT)
    after = {name: (run / name).stat().st_mtime_ns for name in digests(run)}
    assert [n for n in before if before[n] != after[n]] == ["gguf/toy.f16.gguf"]
    assert digests(run) == digests(exported)


def test_another_adapter_makes_every_old_file_stale(exported, base, tmp_path):
    run = Path(shutil.copytree(exported, tmp_path / "toy"))
    run_folder(run, base, r=4)
    export(run, quants=(), **SILENT)
    assert sha256(run / "merged" / "model.safetensors") != digests(exported)["merged/model.safetensors"]
    assert not gguf_path(run, "f16").exists()


# What is said


def test_the_disk_is_told_in_numbers_before_anything_is_written(run):
    class Watched(Console):
        def print(self, *line, **_) -> None:
            assert len(lines) > 1 or not (run / "merged").exists()
            lines.extend(line[0].split("\n"))

    lines = []
    export(run, quants=(), console=Watched())
    assert lines[0].startswith("base: ")
    assert re.match(r"disk: \d\.\d\d GB needed \(merged .*\d GB free$", lines[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"onto": "8bit"}, "onto: expected 16bit or 4bit"),
        ({"quants": ("q9",)}, "quantization 'q9'"),
    ],
)
def test_a_wrong_argument_is_told_before_anything_is_written(arguments, message, run):
    with pytest.raises(ToolkitError, match=message):
        export(run, **arguments, **SILENT)
    assert not (run / "merged").exists()


def test_a_folder_that_is_no_run_is_told_what_it_lacks(tmp_path):
    with pytest.raises(ToolkitError, match=r"manifest\.json, adapter/adapter_config\.json.*not found"):
        export(tmp_path, **SILENT)


def test_an_adapter_that_is_not_as_it_was_trained_is_neither_exported_nor_served(run):
    weights = run / "adapter" / "adapter_model.safetensors"
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"adapter": {weights.name: sha256(weights)}}))
    (run / "recipe.yaml").write_text("name: run\n")
    damaged = bytearray(weights.read_bytes())
    damaged[len(damaged) * 3 // 4] ^= 1
    weights.write_bytes(damaged)
    for use in (lambda: export(run, quants=()), lambda: start([run])):
        with pytest.raises(ToolkitError, match=r"adapter_model\.safetensors: missing or damaged.*Run the `train`"):
            use()
    assert not (run / "merged").exists()


def test_16bit_training_has_no_4bit_base_to_merge_onto(run):
    manifest = read_json(run / "manifest.json")
    manifest["model"]["load_in_4bit"] = False
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ToolkitError, match="--onto 16bit"):
        export(run, onto="4bit", **SILENT)


def test_onto_4bit_is_certified_against_the_4bit_model_and_recorded(run):
    certificate = export(run, quants=(), onto="4bit", **SILENT)
    assert certificate["passed"]
    assert certificate["inputs"]["onto"] == "4bit"
    assert certificate["reports"] == []  # no gap: the 4-bit base is what the adapter was trained on


def test_the_modelfile_names_the_smallest_file_its_stops_and_both_modes(exported):
    text = (exported / "gguf" / "Modelfile").read_text()
    assert text.encode() == modelfile(exported, open_merged(exported, "16bit"), load_tokenizer(exported / "adapter"))
    assert "FROM ./toy.q4_k_m.gguf\n" in text
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert "\nPARAMETER temperature 0.6\n" in text
    assert "\n# PARAMETER temperature 0.7\n" in text
    assert "PARAMETER num_ctx 4096" in text
    assert "0.30.0" in text


def test_a_second_export_keeps_the_certificate_and_ends_with_the_next_command(exported):
    before, screen = (exported / "certificate.json").stat().st_mtime_ns, io.StringIO()
    export(exported, quants=QUANTS, console=Console(file=screen))
    said = screen.getvalue().splitlines()
    assert (exported / "certificate.json").stat().st_mtime_ns == before
    assert said[-5].startswith("verified: ")
    assert said[-3] == f"next:     cd {exported / 'gguf'} && ollama create toy -f Modelfile"
    assert said[-2] == f"share:    hf upload USER/toy {exported / 'merged'} ."
    assert said[-1] == f"share:    hf upload USER/toy {exported / 'gguf'} gguf"


def test_a_second_export_of_a_run_at_work_says_who_holds_it(run):
    code = f"import time; from toolkit.files import lock, Path\nwith lock(Path({str(run)!r}), 'export'): print(1, flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(ToolkitError, match=rf"in use by `export` \(process {other.pid}"):
            export(run, **SILENT)
    finally:
        other.kill()
    assert not (run / "merged").exists()


def test_leftovers_of_a_killed_export_are_removed_and_the_bases_length_limit_is_kept(run, base):
    (run / "merged").mkdir()
    (run / "merged" / "model.safetensors.123.partial").write_bytes(b"half")
    adapter, limit = (
        run / "adapter" / "tokenizer_config.json",
        read_json(base / "tokenizer_config.json")["model_max_length"],
    )
    adapter.write_text(json.dumps(read_json(adapter) | {"model_max_length": 512}))  # as a recipe's max_seq_length does
    export(run, quants=(), **SILENT)
    assert list(run.rglob("*.partial")) == []
    assert read_json(run / "merged" / "tokenizer_config.json")["model_max_length"] == limit


def test_the_merged_tokenizer_names_a_class_that_transformers_4_has_too(run):
    """transformers 5 saves TokenizersBackend, and 4 answers "Tokenizer class TokenizersBackend does not exist"."""
    assert read_json(run / "adapter" / "tokenizer_config.json")["tokenizer_class"] == "TokenizersBackend"
    merged_here(run)
    assert read_json(run / "merged" / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_revision_counts_for_the_4bit_repository_it_was_recorded_with_only(tmp_path, base, monkeypatch):
    """A run names what Unsloth loaded, unsloth/Qwen3-toy-unsloth-bnb-4bit, and the commit is that one's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, commit in (("Qwen3-toy", "a" * 40), ("Qwen3-toy-unsloth-bnb-4bit", "b" * 40)):
        folder = tmp_path / f"models--unsloth--{name}"
        shutil.copytree(base, folder / "snapshots" / commit)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
    model = {"name": "unsloth/Qwen3-toy-unsloth-bnb-4bit", "revision": "b" * 40}
    found = {onto: find_base(model, onto, local_only=True) for onto in ("16bit", "4bit")}
    assert (found["16bit"].name, found["16bit"].revision) == ("unsloth/Qwen3-toy", "a" * 40)
    assert (found["4bit"].name, found["4bit"].revision) == (model["name"], "b" * 40)


# Sharing


@pytest.mark.parametrize(
    "name", ["gguf/toy.q4_k_m.gguf", "merged/model.safetensors", "merged/config.json", "gguf/Modelfile"]
)
def test_no_upload_is_named_for_a_file_that_changed_after_its_certificate(name, exported, tmp_path):
    run = Path(shutil.copytree(exported, tmp_path / "toy"))
    data = bytearray((run / name).read_bytes())
    data[len(data) // 2] ^= 1
    (run / name).write_bytes(data)
    with pytest.raises(ToolkitError, match=f"{Path(name).name}: missing or changed since its certificate"):
        upload_commands(run)
