"""Two processes train what one does, at the same effective batch: torchrun, which `accelerate launch` starts too, on gloo."""

import json
import os
import subprocess
import sys

import pytest

from toolkit.files import ROOT

OVERRIDES = ["data.budget=3000", "data.validation_size=8", "train.max_steps=4", "train.eval_steps=0.5", "train.save_steps=0.5",
             "train.per_device_train_batch_size=4", "evaluate.max_new_tokens=16", "train.report_to=none"]  # fmt: skip


def trained(folder, *launcher, name, accumulation):
    """Train without evaluation; the losses by step and the adapter's tensors."""
    code = "import sys; from toolkit import recipe, run; run.train(recipe.load('data_recipes/pocket.yaml', sys.argv[1:]), score=False)"
    script = folder / "go.py"
    script.write_text(code)
    overrides = [*OVERRIDES, f"name={name}", f"train.gradient_accumulation_steps={accumulation}"]
    env = os.environ | {
        "TOOLKIT_OUTPUTS": str(folder),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    done = subprocess.run(
        [sys.executable, *launcher, str(script), *overrides],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    from safetensors.numpy import load_file

    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    losses = {m["step"]: m["loss"] for m in lines if "loss" in m}
    return (
        losses,
        load_file(folder / name / "adapter" / "adapter_model.safetensors"),
        json.loads((folder / name / "manifest.json").read_text()),
    )


@pytest.mark.slow
def test_two_processes_end_where_one_does_at_the_same_effective_batch(tmp_path):
    launch = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29611")
    alone, one, _ = trained(tmp_path, name="one", accumulation=2)
    together, two, manifest = trained(tmp_path, *launch, name="two", accumulation=1)
    assert manifest["processes"] == 2
    assert alone.keys() == together.keys()
    assert max(abs(alone[s] - together[s]) for s in alone) < 2e-3  # sums in another order round differently
    for name, weights in one.items():
        assert abs(weights - two[name]).max() < 5e-3 * max(1.0, abs(weights).max()), name
