"""Does one forward pass of the base say which source will move it furthest? A measurement, outside the package.

python -m data_recipes.smollm2.make && python -m data_recipes.conflicts    # → data_recipes/measured/conflicts.json

For each source of SmolLM2's recipe and of the pocket's: the base's mean loss on the rows, and the share of confident conflicts
(arXiv 2601.02151: tokens of which the base is sure, and the label is another). Beside them the KL of runs trained on each source
alone, at one budget. Where the order is the same, the pass would be a forecast; where not, it is none.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_recipes.smollm2.dial import SEEDS, conditions
from toolkit import recipe, run
from toolkit.data import mix
from toolkit.data.rows import Row
from toolkit.files import ROOT, read_json, read_jsonl, write_json
from toolkit.recipe import Recipe
from toolkit.training.checkpoints import KL
from toolkit.training.model import load_base

MEASURED = ROOT / "data_recipes" / "measured"
ROWS = 48
"""Of each source, for the forward pass."""
BUDGET = 1500
"""Supervised tokens of a run on one source of SmolLM2's recipe: what its 60 rows of each kind give in four passes or fewer."""
SURE, UNLIKELY = 1.0, 0.1
"""Entropy in nats below which the base is sure, and probability below which the label is another."""
LOWEST = 0.15
"""The paper's rule instead: both among the lowest 15% of all tokens, here of all sources together."""
ALONE = {"openmath_sample": 1.0, "finetome_sample": 0.0}
"""Share of reasoning in the sweep of the pocket model at which a source is alone."""


class Tokens(NamedTuple):
    """What the base thinks of supervised tokens: the label's probability, and the entropy of what it expects there."""

    probability: np.ndarray
    entropy: np.ndarray


def tokens_of(model: Any, rows: list[Row]) -> Tokens:
    """One pass over each row."""
    import torch

    found = []
    for row in rows:
        ids = torch.tensor(row.ids.tolist())
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, row.prompt_length - 1 : -1].float()
        expected = logits.log_softmax(-1)
        label = expected.gather(-1, ids[row.prompt_length :, None])[:, 0]
        found.append((label.exp().numpy(), -(expected.exp() * expected).sum(-1).numpy()))
    return Tokens(*(np.concatenate(column) for column in zip(*found, strict=True)))


def conflicts(tokens: Tokens, sure: float, unlikely: float) -> float:
    """Share of the tokens that are confident conflicts."""
    return float(np.mean((tokens.entropy < sure) & (tokens.probability < unlikely)))


def signals(loaded: Recipe) -> dict[str, dict[str, float]]:
    """{source: what one pass of the base over a sample of its rows shows}."""
    model, tokenizer = load_base(loaded.model)
    rows: dict[str, list[Row]] = {}
    for row in mix.compile_mix(loaded, tokenizer).train:
        rows.setdefault(row.source, []).append(row)
    seen = {source: tokens_of(model, of_source[:ROWS]) for source, of_source in rows.items()}
    low = [np.quantile(np.concatenate(column), LOWEST) for column in zip(*seen.values(), strict=True)]
    found = {}
    for source, tokens in seen.items():
        found[source] = {
            "tokens": len(tokens.probability),
            "mean_loss": float(-np.log(tokens.probability).mean()),
            "conflicts": conflicts(tokens, SURE, UNLIKELY),
            "conflicts_lowest_15%": conflicts(tokens, low[1], low[0]),
        }
    return found


def alone(source: int, seed: int) -> Path:
    """A run of SmolLM2's recipe on one of its sources."""
    loaded = recipe.load("smollm2")
    name = loaded.data.sources[source].name
    shares = [f"data.sources.{at}.fraction={float(at == source):g}" for at in range(len(loaded.data.sources))]
    changes = [f"name=smollm2_{name}_s{seed}", f"data.seed={seed}", f"data.budget={BUDGET}", "train.report_to=none"]
    return run.train(recipe.load("smollm2", [*shares, *changes]), run.default_console(), score=False)


def last_distance(folder: Path) -> float:
    """KL from the base in nats per token at the end of a training, as the training itself measured it."""
    return [line[KL] for line in read_jsonl(folder / "metrics.jsonl") if KL in line][-1]


def ordered(found: dict[str, dict[str, Any]], signal: str) -> bool:
    """Whether a signal puts the sources in the order of their runs' mean KL."""
    by_distance = sorted(found.values(), key=lambda source: np.mean(source["kl_alone"]))
    return all(one[signal] < other[signal] for one, other in pairwise(by_distance))


def main() -> None:
    """Both recipes; the pocket's runs on one source are those of its recorded sweep."""
    head = {"what": __doc__, "command": "python -m data_recipes.conflicts", **conditions()}
    pocket = signals(recipe.load("sweep_pocket"))
    trainings = read_json(MEASURED / "sweep_pocket.json")["trainings"]
    for source, share in ALONE.items():
        pocket[source]["kl_alone"] = [t["kl"] for t in trainings if t["reasoning_share"] == share]
    smollm2 = signals(recipe.load("smollm2", ["data.budget=6000"]))
    for place, source in enumerate(recipe.load("smollm2").data.sources):
        smollm2[source.name]["kl_alone"] = [last_distance(alone(place, seed)) for seed in SEEDS]
    models = {}
    for name, found in {"smollm2": smollm2, "pocket": pocket}.items():
        orders = {key: ordered(found, key) for key in ("mean_loss", "conflicts", "conflicts_lowest_15%")}
        models[name] = {"sources": found, "orders_by_kl": orders}
    write_json(MEASURED / "conflicts.json", head | models)


if __name__ == "__main__":
    main()
