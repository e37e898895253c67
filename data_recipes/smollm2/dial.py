"""What SmolLM2 keeps and gives back at several scales of its adapter, by the share of general data it was trained with.

python -m data_recipes.smollm2.make && python -m data_recipes.smollm2.dial    # → data_recipes/measured/dial_smollm2.json

Three shares of general data, three seeds each, without training again at any scale: may one run with a dial replace a second
training, and do dial and mix together reach further than either? What was measured is kept in each run's folder, so that the
same command resumes it.
"""

import os
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from data_recipes.smollm2.measure import ASKED, EMOJI, REPLY, WHY, changes, named
from toolkit import recipe, run
from toolkit.comparison.dial import scaled
from toolkit.comparison.points import average
from toolkit.comparison.runs import Score
from toolkit.evaluation.measure import score
from toolkit.evaluation.plan import LEVELS, Plan
from toolkit.evaluation.questions import PROBES, read_questions, select
from toolkit.evaluation.stats import Sample, interval
from toolkit.evaluation.subject import LoadedRun
from toolkit.files import ROOT, outputs, read_if_whole, read_jsonl, write_json
from toolkit.training.folder import commit
from toolkit.training.model import load_run
from toolkit.view.progress import Progress

OUT = ROOT / "data_recipes" / "measured" / "dial_smollm2.json"
SHARES = (0.0, 0.5, 0.8)
"""Of general data."""
SEEDS = (3407, 3408, 3409)
SCALES = (1.0, 0.6, 0.8, 0.5, 0.7, 0.4, 0.25)
"""The ones that decide most first, for whoever reads the record before all are measured."""
WHO = [text for texts in ASKED.values() for text in texts]
FIGURES = ("name", "style", "general", "kl")


def train(name: str, share: float, seed: int, *more: str) -> Path:
    """The run of a share and a seed, which is not trained again where it is finished."""
    settings = [*changes(share), f"name=smollm2_{name}_s{seed}", f"data.seed={seed}", *more]
    return run.train(recipe.load("smollm2", settings), run.default_console(), score=False)


def measure(folder: Path, scales: tuple[float, ...] = SCALES) -> dict[str, Any]:
    """{scale: the figures of a finished run there}; what is missing is measured, and written scale by scale."""
    kept = folder / "scales.json"
    found = read_if_whole(kept)
    missing = [scale for scale in scales if f"{scale:g}" not in found]
    if missing:
        model, tokenizer = load_run(folder)
        for scale in missing:
            with scaled(model, scale):
                found[f"{scale:g}"] = figures(model, tokenizer)
            write_json(kept, found)
    return found


def figures(model: Any, tokenizer: Any) -> dict[str, Any]:
    """A model with its adapter, as it is scaled: shares of replies with the name and with the style, general questions
    against the base, KL on the base's own answers; each an interval over the questions."""
    began = time.process_time()
    quiet = Console(quiet=True)
    conversations: Any = [[{"role": "user", "content": question}] for question in (*WHO, *WHY)]
    subject = LoadedRun(model, tokenizer, outputs() / ".base_replies")
    with Progress(quiet, "replies", len(conversations)) as progress:
        replies = subject.reply(conversations, "non_thinking", True, progress, max_new_tokens=32, greedy=True)
    answers = [reply.answer for reply in replies]
    loaded = recipe.load("smollm2")
    general = read_questions(loaded.evaluate.questions[0], loaded.data.seed, {})
    probes = read_jsonl(PROBES)[:8]
    plan = Plan(LEVELS["quick"], {"non_thinking": REPLY})
    # no look at how replies begin: the model has one mode
    asked = replace(select("quick", None, [], general, probes, plan=plan), starts=[])
    result = score(subject, asked, quiet)
    return {
        "name": share_of([named(answer) for answer in answers[: len(WHO)]]),
        "style": share_of([bool(EMOJI.search(answer)) for answer in answers[len(WHO) :]]),
        "general": result["difference"]["non_thinking"]["accuracy/chat"],
        "kl": result["tuned"]["forgetting"]["kl"],
        "cut": result["tuned"]["non_thinking"]["cut"],
        "cpu_seconds": round(time.process_time() - began),
    }


def share_of(hits: list[bool]) -> dict[str, Any]:
    """The share of true ones with its interval."""
    return dict(interval(Sample.of([float(hit) for hit in hits], [1.0] * len(hits)), seed=1, rate=True))


def mean(members: list[dict[str, Any]]) -> dict[str, Any]:
    """Every figure averaged over the seeds: the interval covers the questions and the spread between the trainings."""
    averaged = {}
    for name in FIGURES:
        # a difference may lie below 0, a share may not
        metric = "accuracy" if name in ("name", "style") else name
        found = average(metric, [Score(**member[name]) for member in members])
        averaged[name] = {key: getattr(found, key) for key in ("value", "low", "high", "n", "each")}
    return averaged


def record(found: dict[tuple[float, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each share and scale that was measured of every seed."""
    rows = []
    for share in SHARES:
        for scale in sorted(SCALES):
            members = [found.get((share, seed), {}).get(f"{scale:g}") for seed in SEEDS]
            known = [member for member in members if member]
            if len(known) == len(SEEDS):
                rows.append({"share_of_general_data": share, "scale": scale} | mean(known))
    return rows


def main() -> None:
    """Train what is missing, measure every run at every scale; the record is written after each run."""
    head = described()
    found: dict[tuple[float, int], dict[str, Any]] = {}
    for share in SHARES:
        for seed in SEEDS:
            found[share, seed] = measure(train(f"general{share:g}", share, seed))
            write_json(OUT, head | {"points": record(found)})


def described() -> dict[str, Any]:
    """What is measured, where and when."""
    return {
        "what": "SmolLM2-135M-Instruct as in smollm2.json, three seeds: runs of data_recipes/smollm2.yaml by share of general "
        "data, at scales of their adapters. name, style: share of 16 unseen questions each whose greedy reply holds the name, or an "
        f"emoji. general: 64 easy questions against the base, of those that both finish in {REPLY} tokens. kl: nats per "
        "token on the base's own answers to 8 probes. Means over the seeds (each); intervals of 95% cover questions and seeds.",
        "command": "python -m data_recipes.smollm2.dial",
        **conditions(),
    }


def conditions() -> dict[str, Any]:
    """Where and when; asked before the file that is written is itself a change to its commit."""
    return {
        "hardware": f"{os.cpu_count()} CPU cores, shared, one used; {platform.machine()}, no GPU",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
    }


if __name__ == "__main__":
    main()
