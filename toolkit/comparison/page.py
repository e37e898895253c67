"""A comparison's own page: report.html beside its picture, the runs side by side, each with a link to its page.

from toolkit.comparison import decide, page; page.write(decide.compare(Path("outputs").glob("sweep*")), Path("comparison"))
"""

import os
from pathlib import Path
from typing import Any

from toolkit.comparison.decide import Comparison
from toolkit.comparison.runs import Run
from toolkit.files import read_json
from toolkit.view import figures
from toolkit.view import page as pages


def write(comparison: Comparison, folder: Path) -> Path:
    """Write the page into a folder that holds the comparison's files, and return its file."""
    # each run once: the scales of a dial are one run
    runs = {run.folder: run for point in comparison.points for run in point.runs}
    rows = [row_of(run, folder.resolve()) for run in runs.values()]
    sources = dict.fromkeys(source for row in rows for source in row["mix"]["planned"])
    values = {
        "name": folder.resolve().name,
        "found": pages.compared(folder),
        "runs": rows,
        "colours": figures.source_colours(sources),
    }
    return pages.render("comparison.html", values, folder)


def row_of(run: Run, folder: Path) -> dict[str, Any]:
    """What the page shows of a run, read from its folder."""
    page = run.folder / pages.PAGE
    return {
        "name": run.name,
        # the way to its own page from this one
        "page": Path(os.path.relpath(page, folder)).as_posix() if page.is_file() else "",
        "seed": run.recipe["data"]["seed"],
        "manifest": read_json(run.folder / "manifest.json"),
        "mix": read_json(run.folder / "mix.json"),
        # a dial needs no evaluation
        "result": pages.optional(run.folder / "eval.json") or {},
    }
