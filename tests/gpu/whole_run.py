"""Train, evaluate and export a random Qwen3-0.6B on the card here; a Qwen3 of the pocket model's shape on a CPU.

python -m tests.gpu.whole_run outputs/whole_run_gpu.json
"""

import shutil
import sys
import time
from pathlib import Path

from tests.tools.bench import weights
from tests.tools.bench.start import processor
from toolkit import recipe, run
from toolkit.export import export
from toolkit.files import outputs, read_json, write_json
from toolkit.machine import gpu_check
from toolkit.training import model as models
from toolkit.training.folder import commit

NAME = "whole-run"


def main(file: Path) -> None:
    """Write seconds of each part, the memory forecast beside the peak, and whether the certificate passed."""
    models.unsloth()  # before transformers, which it patches
    import torch

    base, card = outputs() / "whole-run-base", torch.cuda.is_available()
    for folder in (base, outputs() / NAME):
        shutil.rmtree(folder, ignore_errors=True)
    shape = {k: v for k, v in weights.CONFIGS["0.6B"].items() if k in weights.SIZES} | {"layer_types": None}
    gpu_check.random_model(base, shape if card else {})
    changes = [f"name={NAME}", f"model.model_name={base}", f"train.max_steps={20 if card else 2}", "train.report_to=none",
               "evaluate.max_new_tokens=64", "data.budget=20000"]  # fmt: skip
    began, seconds = time.monotonic(), {}
    folder = run.train(recipe.load("pocket", changes), score=False)
    seconds["train"] = time.monotonic() - began
    result = run.evaluate(folder)
    seconds["evaluate"] = time.monotonic() - began - seconds["train"]
    certificate = export(folder, quants=("q8_0", "q4_k_m"))
    seconds["export"] = time.monotonic() - began - sum(seconds.values())
    made = read_json(folder / "manifest.json")
    kept = {k: made.get(k) for k in ("gpu", "versions", "steps", "train_loss", "train_seconds", "tokens", "batch",
                                     "padding_free", "peak_memory_bytes", "skipped_steps", "fit")}  # fmt: skip
    hardware = torch.cuda.get_device_name(0) if card else processor()
    write_json(file, kept | {"hardware": hardware, "seconds": {k: round(v, 1) for k, v in seconds.items()},
                             "verdict": result["verdict"], "certificate": certificate["passed"],
                             "date": time.strftime("%Y-%m-%d"), "commit": commit()})  # fmt: skip
    if not certificate["passed"]:
        sys.exit("the certificate did not pass")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
