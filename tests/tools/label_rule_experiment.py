"""What the label rule is worth: one mix, trained with and without the empty think block in the labels.

python -m tests.tools.label_rule_experiment [RECIPE] [key=value …]     # about 6 minutes on 2 quiet cores; writes data_recipes/measured/label_rule.json

TRL (`assistant_only_loss`) and Unsloth (`train_on_responses_only`) supervise `<think>\\n\\n</think>\\n\\n` on every reply without
reasoning; here it belongs to the prompt, because inference puts it there. Rows, order, seed, steps and everything else are the same.
"""

import dataclasses
import json
import os
import platform
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np

from toolkit import recipe, run
from toolkit.data import mix
from toolkit.data.render import load_chat
from toolkit.training.folder import commit, open_run

EMPTY = "<think>\n\n</think>\n\n"
OUT = recipe.ROOT / "data_recipes" / "measured" / "label_rule.json"
METRICS = {
    "thinking": ("adherence", "accuracy", "accuracy/chat", "switch/think", "switch/no_think"),
    "non_thinking": ("adherence", "accuracy", "accuracy/chat"),
    "forgetting": ("kl",),
}


def supervised(rows: list[mix.Row], block: list[int]) -> list[mix.Row]:
    """The same token ids, with the empty block at the end of a prompt moved into the labels."""
    moved = []
    for row in rows:
        ends = row.prompt_length >= len(block) and np.array_equal(
            row.ids[row.prompt_length - len(block) : row.prompt_length], block
        )
        moved.append(dataclasses.replace(row, prompt_length=row.prompt_length - len(block) * ends))
    return moved


def trained(loaded: recipe.Recipe, mixed: mix.Mix, console) -> dict:
    """eval.json of a run on these rows, and how many tokens of them were labels."""
    folder, state = open_run(loaded)
    if state != "finished":
        run.evaluate(folder, console, loaded=run.train_adapter(loaded, mixed, console))
    elif not (folder / "eval.json").is_file():
        run.evaluate(folder, console)
    if json.loads((folder / "mix.json").read_text(encoding="utf-8")) != mixed.report:
        raise recipe.ToolkitError(f"{folder} was trained on another mix: move it away and run again")
    return json.loads((folder / "eval.json").read_text(encoding="utf-8"))


def processor() -> str:
    """The CPU's own name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def chosen(result: dict) -> dict:
    """The metrics that the comparison is about, of base and tuned."""
    return {
        name: {s: {m: result[name][s][m] for m in metrics if m in result[name][s]} for s, metrics in METRICS.items()}
        for name in ("base", "tuned")
    }


def main(words: list[str]) -> None:
    began, console = time.time(), run.default_console()
    path = words.pop(0) if words and "=" not in words[0] else "data_recipes/pocket.yaml"
    given = recipe.load(path, words)
    ours = recipe.load(path, [*words, f"name={given.name}-labels-ours"])
    theirs = recipe.load(path, [*words, f"name={given.name}-labels-empty-block"])
    mixed = run.compile_mix(ours, console)
    block = load_chat(ours.model.model_name, ours.model.revision).encode([EMPTY])[0]
    moved = dataclasses.replace(mixed, train=supervised(mixed.train, block))
    changed = sum(a.prompt_length != b.prompt_length for a, b in zip(mixed.train, moved.train, strict=True))
    console.print(
        f"{changed} of {len(mixed.train)} rows gain the {len(block)} tokens of an empty think block as labels"
    )
    results = {"ours": trained(ours, mixed, console), "empty_block_supervised": trained(theirs, moved, console)}
    found = {
        "what": __doc__.splitlines()[0],
        "recipe": {"path": str(path), "overrides": words, "achieved": mixed.report["achieved_modes"]},
        "rows": len(mixed.train),
        "rows_changed": changed,
        "block_tokens": len(block),
        "supervised_tokens": {
            "ours": sum(row.size("supervised_tokens") for row in mixed.train),
            "empty_block_supervised": sum(row.size("supervised_tokens") for row in moved.train),
        },
        "results": {name: chosen(result) for name, result in results.items()},
        "hardware": {"cpu": processor(), "cores": os.cpu_count()},
        "date": date.today().isoformat(),
        "commit": commit(),
        "seconds": round(time.time() - began),
    }
    known = json.loads(OUT.read_text(encoding="utf-8")) if OUT.is_file() else {}
    label = f"reasoning share {mixed.report['achieved_modes']['supervised_tokens'].get('thinking', 0):.2f}"
    OUT.write_text(json.dumps(known | {label: found}, indent=1) + "\n", encoding="utf-8")
    for name, result in found["results"].items():
        for section, metric in (
            ("thinking", "adherence"),
            ("non_thinking", "adherence"),
            ("thinking", "accuracy"),
        ):
            value = result["tuned"][section][metric]
            console.print(
                f"{name:<24} {section} {metric}: {value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
