"""Execute the notebooks and write their outputs, all at once, by machine: `python -m tests.tools.run_notebooks`.

execute(notebooks())  # each in a fresh kernel, top to bottom; committed outputs come from nowhere else
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from toolkit import __version__
from toolkit.files import ROOT, ToolkitError, outputs

FOLDER = ROOT / "notebooks"
SETUP = """\
# @title Set-up: installs the toolkit where it is missing: a few minutes the first time
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

if Path("../toolkit/recipe.py").is_file():  # a notebook of a checkout works in its root, as commands do
    os.chdir("..")
sys.path.insert(0, os.getcwd())
if find_spec("toolkit") is None:
    source = next(map(str, Path().glob("*.zip")), "{source}")
    assert source, "The toolkit is not here: upload the project as a zip beside this notebook"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)
from toolkit.machine import install

install.prepare_notebook()"""
"""The first code cell of every notebook, byte for byte; `{source}` is what pip fetches the project from, empty while it has
no address."""
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{slug}/blob/main/notebooks/{name}.ipynb) "
)
BADGES = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\) ?|(?=\[(?:← |\d\d_\w+ →))")
"""A badge, or the place before the links to other notebooks where one belongs."""
MEASURED = re.compile(r"(?<=<!--measured-->).*?(?=<!--/measured-->)", re.DOTALL)
"""What a title cell says about time and machine: written by `execute`, so no part of a notebook's own text."""
WIDGETS = {"application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json"}
SECONDS = 1800
"""After so long a cell hangs."""
KEPT = {"tags", "jupyter", "cellView"}
"""Cell metadata that is part of a notebook: the parameters' tag, and how JupyterLab and Colab fold the set-up cell."""
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def notebooks(names: Sequence[str] = ()) -> list[Path]:
    """The notebooks in reading order, or those whose names begin as asked for. Raises ToolkitError for an unknown one."""
    every = sorted(FOLDER.glob("*.ipynb"))
    for name in names:
        if not any(path.name.startswith(Path(name).name) for path in every):
            raise ToolkitError(f"{name}: no such notebook. There are {', '.join(path.stem for path in every)}")
    return [path for path in every if not names or any(path.name.startswith(Path(name).name) for name in names)]


def address() -> str:
    """The project's public address from `git remote`: https://github.com/OWNER/NAME, or "" while there is none.

    Only GitHub's, since Colab opens notebooks from nowhere else."""
    asked = subprocess.run(["git", "remote", "get-url", "origin"], cwd=ROOT, capture_output=True, text=True)
    slug = re.fullmatch(
        r"(?:https://(?:[^/@]+@)?github\.com/|git@github\.com:)([\w.-]+/[\w.-]+?)(?:\.git)?/?", asked.stdout.strip()
    )
    return f"https://github.com/{slug[1]}" if slug else ""


def stamp(notebook: dict, name: str, address: str) -> None:
    """Write the set-up cell and the badge for an address; without one the badge is left out."""
    title, setup = notebook["cells"][:2]
    badge = BADGE.format(slug=address.removeprefix("https://github.com/"), name=name) if address else ""
    title["source"] = BADGES.sub(badge, "".join(title["source"]), count=1).splitlines(keepends=True)
    setup["source"] = setup_cell(address and f"git+{address}").splitlines(keepends=True)


def setup_cell(source: str) -> str:
    """The set-up cell for what pip can install the project from: an address, or "" for an uploaded zip alone."""
    return SETUP.replace("{source}", source)


def execute(paths: Sequence[Path], say=print) -> None:
    """Run each notebook as it is and write it back with its outputs. Raises ToolkitError at the first cell that fails,
    and leaves that notebook's file as it was.

    Their runs lie apart from yours, in outputs/.notebooks: all of them together start from nothing, so that what is
    committed shows whole trainings; one alone takes up what the others left there."""
    with runs_apart(fresh=list(paths) == notebooks()):
        for path in paths:
            began = time.monotonic()
            notebook = run(path)
            minutes = (time.monotonic() - began) / 60
            clean(notebook, minutes)
            stamp(notebook, path.stem, address())
            write(path, notebook)
            say(f"{path.name}: {minutes:.1f} minutes, {path.stat().st_size / 1e3:.0f} kB")


def write(path: Path, notebook: dict) -> None:
    """Write a notebook as JupyterLab does."""
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def runs_apart(*, fresh: bool) -> Iterator[None]:
    """$TOOLKIT_OUTPUTS for the kernels: a folder of their own, emptied first if `fresh`."""
    before, apart = os.environ.get("TOOLKIT_OUTPUTS"), outputs() / ".notebooks"
    if fresh:
        shutil.rmtree(apart, ignore_errors=True)
    os.environ["TOOLKIT_OUTPUTS"] = str(apart)
    try:
        yield
    finally:
        os.environ.pop("TOOLKIT_OUTPUTS")
        os.environ |= {"TOOLKIT_OUTPUTS": before} if before else {}


def run(path: Path, parameters: dict | None = None) -> dict:
    """The executed notebook as plain values; papermill opens a kernel of its own for it."""
    import papermill

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / path.name
        try:
            papermill.execute_notebook(
                str(path), str(target), parameters=parameters, cwd=str(path.parent), kernel_name="python3",
                execution_timeout=SECONDS, iopub_timeout=120,  # of a busy machine's last output
                progress_bar=False, log_output=False,
            )  # fmt: skip
        except papermill.PapermillExecutionError as error:
            raise ToolkitError(
                f"{path.name}: cell {error.cell_index} failed with {error.ename}: {error.evalue}\n{error.source}\n"
                + "\n".join(error.traceback[-3:])
            ) from error
        return json.loads(target.read_text(encoding="utf-8"))


def clean(notebook: dict, minutes: float) -> None:
    """Take out what says nothing to a reader (widgets, kernel and papermill metadata, paths of this machine) and write in
    what does: machine, minutes, date, and the hash by which a stale output is found."""
    for cell in notebook["cells"]:
        cell["metadata"] = {key: value for key, value in cell["metadata"].items() if value and key in KEPT}
        if cell["cell_type"] == "code":
            cell["outputs"] = [_output(out) for out in cell["outputs"] if not _is_empty(out)]
    line = f"{minutes:.0f} minutes on {machine()}, {time.strftime('%Y-%m-%d')}" if minutes >= 1.5 else (
        f"{60 * minutes:.0f} seconds on {machine()}, {time.strftime('%Y-%m-%d')}"
    )  # fmt: skip
    first = notebook["cells"][0]
    first["source"] = MEASURED.sub(line, "".join(first["source"])).splitlines(keepends=True)
    notebook["metadata"] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "toolkit": {"version": __version__, "sources": sources_sha256(notebook)},
    }


def machine() -> str:
    """What ran a notebook, in a few words."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"a CPU with {os.cpu_count()} cores"


def sources_sha256(notebook: dict) -> str:
    """Identity of what outputs depend on: the text of every code cell but the set-up, which is the first and only finds
    the toolkit (so a new address makes nothing stale)."""
    texts = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(texts[1:], ensure_ascii=False).encode()).hexdigest()


def stale(notebook: dict) -> str:
    """Why a notebook's outputs are not those of its cells; empty when they are, or when it has none."""
    if not any(cell.get("outputs") for cell in notebook["cells"]):
        return ""
    written = notebook["metadata"].get("toolkit", {})
    if written.get("version") != __version__:
        return f"made by version {written.get('version', 'unknown')}, this is {__version__}"
    return "" if written.get("sources") == sources_sha256(notebook) else "its cells were changed afterwards"


def _is_empty(output: dict) -> bool:
    """Widgets, which nothing can show without their kernel, and what a finished progress bar leaves behind."""
    data = output.get("data", {"text/plain": "not data"})
    return bool(WIDGETS & data.keys()) or not (
        data.keys() - {"text/html", "text/plain"} or "".join(data["text/plain"]).strip()
    )


def _output(output: dict) -> dict:
    """One output without display ids and paths; images are left as they are."""
    output = {k: v for k, v in output.items() if k != "transient"} | ({"metadata": {}} if "metadata" in output else {})
    if "text" in output:
        output["text"] = _lines(output["text"])
    if "data" in output:
        output["data"] = {kind: v if kind == "image/png" else _lines(v) for kind, v in output["data"].items()}
    return output


def _lines(text) -> list[str]:
    """Text as a list of lines, without terminal colours, with this machine's folders named by what they are."""
    whole = ANSI.sub("", text if isinstance(text, str) else "".join(text))
    for path, name in ((str(outputs()), "outputs"), (str(ROOT) + "/", ""), (str(ROOT), ".")):
        whole = whole.replace(path, name)
    return whole.splitlines(keepends=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.tools.run_notebooks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="e.g. 00 03; without one, all")
    parser.add_argument("--stamp", action="store_true", help="only write the repository's address into them")
    args = parser.parse_args()
    try:
        paths = notebooks(args.names)
        for path in paths if args.stamp else ():
            notebook = json.loads(path.read_text(encoding="utf-8"))
            stamp(notebook, path.stem, address())
            write(path, notebook)
        if not args.stamp:
            execute(paths)
    except ToolkitError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
