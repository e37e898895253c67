"""What there is: the runs and sweeps in the outputs folder with their state, the recipes that ship with their purpose.

from toolkit.view.listing import contents, lines; lines(contents())
"""

import re
import textwrap
from pathlib import Path

from toolkit.files import RECIPES, ToolkitError, outputs, read_if_there, read_json, read_text
from toolkit.records import JsonObject


def contents() -> dict[str, list[JsonObject]]:
    """{"runs", "sweeps", "recipes"}: each file is read once."""
    found = runs()
    return {"runs": found, "sweeps": sweeps(found), "recipes": recipes()}


def runs() -> list[JsonObject]:
    """Every run in the outputs folder, by name; a damaged file of one hides no other."""
    return [listed(file.parent) for file in sorted(outputs().glob("*/recipe.yaml"))]


def listed(folder: Path) -> JsonObject:
    """One run's folder: `state` is finished, stopped, running or what is wrong with its files, `exported` what of merged
    and gguf is there."""
    try:
        manifest = read_if_there(folder / "manifest.json") or {"state": "not begun"}
    except ToolkitError:
        manifest = {"state": "manifest.json is damaged: run its `train` command again"}
    return {
        "name": folder.name,
        "state": manifest.get("state", "unknown"),
        "steps": manifest.get("steps"),
        "scored": (folder / "eval.json").is_file(),
        "exported": [name for name in ("merged", "gguf") if (folder / name).is_dir()],
    }


def sweeps(found: list[JsonObject]) -> list[JsonObject]:
    """Every sweep in the outputs folder, {"name", "state"} by name; `found` are the runs there."""
    finished = {run["name"] for run in found if run["state"] == "finished"}
    folders = [file.parent for file in sorted(outputs().glob("*/sweep.json"))]
    return [{"name": folder.name, "state": state_of_sweep(folder, finished)} for folder in folders]


def state_of_sweep(folder: Path, finished: set[str]) -> str:
    """`3 of 9 runs finished, compared`, by the names of the finished runs."""
    try:
        names = {run["name"] for run in read_json(folder / "sweep.json")["runs"]}
    except ToolkitError:
        return "sweep.json is damaged: give its `sweep` command again"
    state = f"{len(names & finished)} of {len(names)} runs finished"
    return f"{state}, compared" if (folder / "comparison.json").is_file() else state


def recipes() -> list[JsonObject]:
    """Every recipe that ships, {"name", "purpose"} by name: the first sentence of its header."""
    shipped = []
    for file in sorted(RECIPES.glob("*.yaml")):
        header = read_text(file).partition("\n# Run:")[0]
        # a sentence may go on in the next comment line
        text = header.replace("\n#", "").lstrip("# ")
        sentence, *_ = re.split(r"(?<=\.)\s", text)
        shipped.append({"name": file.stem, "purpose": sentence})
    return shipped


def lines(there: dict[str, list[JsonObject]]) -> list[str]:
    """The contents for people, at most 80 columns wide, then the commands that go on from there."""
    found = there["runs"]
    text = [f"runs in {outputs()}:" if found else f"no run in {outputs()} yet"]
    for run in found:
        line = f"  {run['name']}: {run['state']}"
        if run["steps"]:
            line += f", {run['steps']} steps"
        if run["scored"]:
            line += ", scored"
        text.append(", ".join([line, *run["exported"]]))
    text += [f"  {sweep['name']}: {sweep['state']}" for sweep in there["sweeps"]]
    text += ["", "recipes that ship:"]
    for recipe in there["recipes"]:
        line = f"  {recipe['name']}: {recipe['purpose']}"
        text += textwrap.wrap(line, 80, subsequent_indent="    ", break_long_words=False)
    return [*text, "", "next: python -m toolkit train RECIPE   or   python -m toolkit evaluate RUN"]
