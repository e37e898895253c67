"""Model cards from what a run folder knows: mix, scores, certificate and data sets; and how to share an export.

text = card(Path("outputs/hybrid")); upload_commands(Path("outputs/hybrid"))
"""

import re
from pathlib import Path
from typing import Any, cast

from toolkit.evaluation.words import score_rows
from toolkit.export.certificate import Certificate
from toolkit.export.templates import filled
from toolkit.files import ToolkitError, describe, read_json, write_text
from toolkit.recipe import load
from toolkit.records import Evaluation
from toolkit.training.base import base_folder

NOTICES = {
    "OpenMathReasoning": "NVIDIA's OpenMathReasoning, CC BY 4.0 (https://huggingface.co/datasets/nvidia/OpenMathReasoning)",
    "FineTome": "Maxime Labonne's FineTome-100k, a selection of arcee-ai/The-Tome "
    "(https://huggingface.co/datasets/mlabonne/FineTome-100k)",
}
"""Attributions that data sets ask for; any other Hub source is named with its page."""


def card(run: Path, certificate: Certificate | None = None) -> str:
    """README.md as the Hub shows it, front matter included: of an export by its certificate, else of a run's adapter.

    Names no path of this machine; its own name on the Hub is left to be filled in."""
    model = read_json(run / "manifest.json")["model"]
    is_folder = base_folder(model["name"]) is not None or Path(model["name"]).is_absolute()
    adapted = {"base": Path(model["name"]).name if is_folder else model["name"], "revision": model.get("revision")}
    scores = cast("Evaluation | None", _optional(run / "eval.json"))
    recipe = run / "recipe.yaml"
    sources = load(recipe).data.sources if recipe.is_file() else ()
    values = {
        "name": run.resolve().name,
        "inputs": certificate["inputs"] if certificate else adapted,
        "mix": _optional(run / "mix.json"),
        "scores": score_rows(scores) if scores else None,
        "certificate": certificate,
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
    certificate = _optional(run / "certificate.json") or {"passed": False}
    if not certificate["passed"]:
        raise ToolkitError(f"{run}: no certificate has passed: python -m toolkit export {run}")
    for name, certified in certificate["files"].items():
        if not (run / name).is_file() or describe(run / name) != certified:
            raise ToolkitError(
                f"{run / name}: missing or changed since its certificate: python -m toolkit export {run} writes it again"
            )
    write_text(run / "merged" / "README.md", card(run, certificate))
    repo = f"USER/{run.resolve().name}"
    commands = [f"hf upload {repo} {run / 'merged'} ."]
    if "gguf/Modelfile" in certificate["files"]:
        commands.append(f"hf upload {repo} {run / 'gguf'} gguf")
    return commands
