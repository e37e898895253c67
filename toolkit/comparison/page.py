"""A comparison's own page: report.html beside its picture, the runs side by side, each with a link to its page.

from toolkit.comparison import decide, page; page.write(decide.compare(Path("outputs").glob("sweep*")), Path("comparison"))
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.comparison.decide import Comparison
from toolkit.comparison.runs import Run
from toolkit.files import read_json
from toolkit.records import Evaluation, Manifest, MixReport
from toolkit.view import figures
from toolkit.view import page as pages


class RunRow(NamedTuple):
    """A run as the page lists it."""

    name: str
    page: str
    """The way to its own page from the folder of this one; empty where it has none."""
    seed: int
    manifest: Manifest
    mix: MixReport
    result: Evaluation


def write(comparison: Comparison, folder: Path) -> Path:
    """Write the page into a folder that holds the comparison's files, and return its file."""
    # each run once: the scales of a dial are one run
    runs = {run.folder: run for point in comparison.points for run in point.runs}
    rows = [row_of(run, folder.resolve()) for run in runs.values()]
    sources = dict.fromkeys(source for row in rows for source in row.mix["planned"])
    values = {
        "name": folder.resolve().name,
        "found": pages.compared(folder),
        "runs": rows,
        "colours": figures.source_colours(sources),
    }
    return pages.render("comparison.html", values, folder)


def row_of(run: Run, folder: Path) -> RunRow:
    """A row for a run, read from its folder."""
    manifest: Any = read_json(run.folder / "manifest.json")
    mix: Any = read_json(run.folder / "mix.json")
    # a dial needs no evaluation
    result: Any = pages.optional(run.folder / "eval.json") or {}
    page = run.folder / pages.PAGE
    link = Path(os.path.relpath(page, folder)).as_posix() if page.is_file() else ""
    return RunRow(run.name, link, run.recipe["data"]["seed"], manifest, mix, result)
