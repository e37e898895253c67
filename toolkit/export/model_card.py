"""Model cards from what a run folder knows: mix, scores, certificate, licence and data sets.

text = model_card(Path("outputs/hybrid"), "me/hybrid"); adapter = adapter_card(Path("outputs/hybrid"))
"""

import re
from pathlib import Path

from toolkit.evaluation.words import score_rows
from toolkit.export.merge import filled, find_base
from toolkit.family import UNKNOWN, family_of
from toolkit.files import ToolkitError, read_json
from toolkit.recipe import load

NOTICES = {
    "OpenMathReasoning": "NVIDIA's OpenMathReasoning, CC BY 4.0 (https://huggingface.co/datasets/nvidia/OpenMathReasoning)",
    "FineTome": "Maxime Labonne's FineTome-100k, a selection of arcee-ai/The-Tome "
    "(https://huggingface.co/datasets/mlabonne/FineTome-100k)",
}
"""Attributions that data sets ask for; any other Hub source is named with its page."""


def model_card(run: Path, repo: str) -> str:
    """README.md of the Hub repository `repo` with an exported and certified run, front matter included."""
    certificate = read_json(run / "certificate.json")
    inputs, config = certificate["inputs"], read_json(run / "merged" / "config.json")
    family = family_of(config["model_type"])
    return _render(run, repo, inputs["base"], inputs["revision"], family, certificate)


def adapter_card(run: Path) -> str:
    """README.md of a run's adapter/, instead of PEFT's empty template. Names no path of this machine."""
    model = read_json(run / "manifest.json")["model"]
    try:
        base = find_base(model, "4bit", local_only=True)
        family = family_of(read_json(base.folder / "config.json")["model_type"])
        return _render(run, run.resolve().name, base.label, base.revision, family, None)
    except ToolkitError:  # the base has been removed from this machine since
        return _render(run, run.resolve().name, Path(model["name"]).name, None, UNKNOWN, None)


def _render(run: Path, repo: str, base: str, revision: str | None, family, certificate: dict | None) -> str:
    told = {n: read_json(run / f"{n}.json") if (run / f"{n}.json").is_file() else None for n in ("mix", "eval")}
    sources = load(run / "recipe.yaml").data.sources if (run / "recipe.yaml").is_file() else ()
    notices = [_notice(path) for path in dict.fromkeys(source.path for source in sources)]
    facts = {"repo": repo, "name": repo.split("/")[-1], "base": base, "revision": revision, "licence": family.licence}
    told["scores"] = score_rows(told["eval"]) if told["eval"] else None
    return filled("model_card.md", facts | told | {"certificate": certificate, "notices": notices})


def _notice(path: str) -> str:
    known = next((text for word, text in NOTICES.items() if word in path), None)
    if known is None and re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists():
        return f"{path} (https://huggingface.co/datasets/{path}; its licence applies)"
    return known or f"{Path(path).name}, a local file"
