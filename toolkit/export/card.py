"""Model cards from what a run folder knows: mix, scores, certificate, licence and data sets; and how to share an export.

text = model_card(Path("outputs/hybrid")); adapter = adapter_card(Path("outputs/hybrid"))
"""

import re
from pathlib import Path
from typing import Any, cast

from toolkit.evaluation.words import score_rows
from toolkit.export.certificate import Certificate
from toolkit.export.checkpoint import find_base
from toolkit.export.templates import filled
from toolkit.family import UNKNOWN, Family, family_of
from toolkit.files import ToolkitError, describe, read_json
from toolkit.recipe import load
from toolkit.records import Evaluation

NOTICES = {
    "OpenMathReasoning": "NVIDIA's OpenMathReasoning, CC BY 4.0 (https://huggingface.co/datasets/nvidia/OpenMathReasoning)",
    "FineTome": "Maxime Labonne's FineTome-100k, a selection of arcee-ai/The-Tome "
    "(https://huggingface.co/datasets/mlabonne/FineTome-100k)",
}
"""Attributions that data sets ask for; any other Hub source is named with its page."""


def model_card(run: Path, repo: str = "") -> str:
    """README.md of an exported and certified run as the Hub shows it, front matter included; without `repo` its name there is
    left to be filled in."""
    certificate = read_json(run / "certificate.json")
    config = read_json(run / "merged" / "config.json")
    inputs = certificate["inputs"]
    repo = repo or f"USER/{run.resolve().name}"
    return _render(run, repo, inputs["base"], inputs["revision"], family_of(config["model_type"]), certificate)


def adapter_card(run: Path) -> str:
    """README.md of a run's adapter/, instead of PEFT's empty template. Names no path of this machine."""
    model = read_json(run / "manifest.json")["model"]
    name = run.resolve().name
    try:
        base = find_base(model, "4bit", local_only=True)
    except ToolkitError:  # the base has been removed from this machine since
        return _render(run, name, Path(model["name"]).name, None, UNKNOWN, None)
    family = family_of(read_json(base.folder / "config.json")["model_type"])
    return _render(run, name, base.label, base.revision, family, None)


def _render(
    run: Path, repo: str, base: str, revision: str | None, family: Family, certificate: Certificate | None
) -> str:
    scores = cast("Evaluation | None", _optional(run / "eval.json"))
    recipe = run / "recipe.yaml"
    sources = load(recipe).data.sources if recipe.is_file() else ()
    values = {
        "repo": repo,
        "name": repo.split("/")[-1],
        "base": base,
        "revision": revision,
        "licence": family.licence,
        "mix": _optional(run / "mix.json"),
        "scores": score_rows(scores) if scores else None,
        "certificate": certificate,
        "scale": (certificate or {}).get("inputs", {}).get("scale", 1.0),
        "notices": [_notice(path) for path in dict.fromkeys(source.path for source in sources)],
    }
    return filled("model_card.md", values)


def _optional(file: Path) -> dict[str, Any] | None:
    return read_json(file) if file.is_file() else None


def _notice(path: str) -> str:
    """The attribution of one data source."""
    for word, text in NOTICES.items():
        if word in path:
            return text
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists():
        return f"{path} (https://huggingface.co/datasets/{path}; its licence applies)"
    return f"{Path(path).name}, a local file"


def upload_commands(run: Path) -> list[str]:
    """The commands that put an export on the Hub, with its card written into merged/.

    Raises ToolkitError where no certificate has passed, or a file is not as it was certified."""
    certificate = _optional(run / "certificate.json")
    if certificate is None or not certificate["passed"]:
        raise ToolkitError(f"{run}: no certificate has passed: python -m toolkit export {run}")
    for name, certified in certificate["files"].items():
        if not (run / name).is_file() or describe(run / name) != certified:
            raise ToolkitError(
                f"{run / name}: missing or changed since its certificate: python -m toolkit export {run} writes it again"
            )
    repo = f"USER/{run.resolve().name}"
    (run / "merged" / "README.md").write_text(model_card(run), encoding="utf-8")
    commands = [f"hf upload {repo} {run / 'merged'} ."]
    if any(name.startswith("gguf/") for name in certificate["files"]):
        commands.append(f"hf upload {repo} {run / 'gguf'} gguf")
    return commands
