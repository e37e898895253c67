"""What there is: the runs in the outputs folder with their state, the recipes that ship with their purpose.

from toolkit.view.listing import recipes, runs; runs(); recipes()
"""

from pathlib import Path
from typing import TypedDict

from toolkit.files import RECIPES, ToolkitError, outputs, read_json, read_text


class ListedRun(TypedDict):
    """A run's folder."""

    name: str
    state: str
    """`finished`, `stopped`, `running`, or what is wrong with its files."""
    steps: int | None
    scored: bool
    exported: list[str]
    """What of `merged` and `gguf` is there."""


class ListedRecipe(TypedDict):
    """A recipe that ships."""

    name: str
    purpose: str


def runs() -> list[ListedRun]:
    """Every run in the outputs folder, by name; a damaged file of one is told and hides no other."""
    return [_run(file.parent) for file in sorted(outputs().glob("*/recipe.yaml"))]


def _run(folder: Path) -> ListedRun:
    manifest = {}
    state = "not begun"
    if (folder / "manifest.json").is_file():
        try:
            manifest = read_json(folder / "manifest.json")
            # a folder of another program's making may hold no state
            state = manifest.get("state", "finished" if (folder / "adapter").is_dir() else "unknown")
        except ToolkitError:
            state = "manifest.json is damaged: run its `train` command again"
    return {
        "name": folder.name,
        "state": state,
        "steps": manifest.get("steps"),
        "scored": (folder / "eval.json").is_file(),
        "exported": [name for name in ("merged", "gguf") if (folder / name).is_dir()],
    }


def recipes() -> list[ListedRecipe]:
    """Every recipe that ships, by name, with the first line of its header."""
    shipped: list[ListedRecipe] = []
    for file in sorted(RECIPES.glob("*.yaml")):
        header = read_text(file).partition("\n")[0]
        shipped.append({"name": file.stem, "purpose": header.lstrip("# ")})
    return shipped


def lines() -> list[str]:
    """The same for people: a line each, then the commands that go on from there."""
    listed = runs()
    text = [f"runs in {outputs()}:" if listed else f"no run in {outputs()} yet"]
    for run in listed:
        steps = f", {run['steps']} steps" if run["steps"] else ""
        done = [", scored"] * run["scored"] + [f", {name}" for name in run["exported"]]
        text.append(f"  {run['name']}: {run['state']}{steps}{''.join(done)}")
    text += ["", "recipes that ship:"]
    text += [f"  {recipe['name']}: {recipe['purpose']}" for recipe in recipes()]
    return [*text, "", "next: python -m toolkit train RECIPE   or   python -m toolkit evaluate RUN"]
