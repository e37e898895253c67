"""What a budget for forgetting keeps: SmolLM2 without general data, stopped by `evaluate.forgetting_limit`.

python -m data_recipes.smollm2.make && python -m data_recipes.smollm2.forgetting_limit

Writes data_recipes/measured/forgetting_limit.json: two limits, three seeds, to be held against the full runs and their dial in
dial_smollm2.json, which are the same recipe and seeds. The same command resumes it.
"""

from pathlib import Path
from typing import Any

from data_recipes.smollm2.dial import SEEDS, conditions, mean, measure, train
from toolkit.files import ROOT, read_json, read_jsonl, write_json
from toolkit.training.checkpoints import KL

OUT = ROOT / "data_recipes" / "measured" / "forgetting_limit.json"
LIMITS = (0.3, 0.6)
EVERY = "train.eval_steps=0.05"
"""The recipe's own two evaluations would look at the limit halfway and at the end."""


def kept(folder: Path) -> dict[str, Any]:
    """Which step a run kept, of how many, and how far from the base it was there by what training itself measured."""
    manifest = read_json(folder / "manifest.json")
    distances = {line["step"]: line[KL] for line in read_jsonl(folder / "metrics.jsonl") if KL in line}
    return {
        "kept_step": manifest["adapter_step"],
        "stopped_at": manifest["steps"],
        "kl_when_kept": distances[manifest["adapter_step"]],
        "kl_by_step": distances,
    }


def head() -> dict[str, Any]:
    """What is measured, where and when."""
    return {
        "what": "SmolLM2-135M-Instruct taught its name and a style without general data, as the runs of that share in "
        f"dial_smollm2.json, with evaluate.forgetting_limit and {EVERY}. Figures and intervals as there.",
        "command": "python -m data_recipes.smollm2.forgetting_limit",
        **conditions(),
    }


def main() -> None:
    """Train and measure what is missing; the record is written after each limit."""
    described, rows = head(), []
    for limit in LIMITS:
        settings = [EVERY, f"evaluate.forgetting_limit={limit:g}"]
        folders = [train(f"limit{limit:g}", 0.0, seed, *settings) for seed in SEEDS]
        figures = mean([measure(folder, (1.0,))["1"] for folder in folders])
        runs = [{"seed": seed} | kept(folder) for seed, folder in zip(SEEDS, folders, strict=True)]
        rows.append({"limit": limit} | figures | {"runs": runs})
        write_json(OUT, described | {"limits": rows})


if __name__ == "__main__":
    main()
