"""The notebooks: built alike, true to the toolkit they call, with outputs that are theirs; and they run."""

import ast
import contextlib
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from tests.support import venvs
from tests.tools import run_notebooks
from toolkit import notebook
from toolkit.files import ROOT, ToolkitError
from toolkit.view import tables
from toolkit.view.trained import before_after

NAMES = "00_quickstart 01_mix 02_train 03_evaluate 04_ratio_sweep 05_export 06_your_own_data 07_in_your_own_notebook".split()
SETUP = 1
"""Where the set-up cell stands, right below the title."""
NUMERALS = {
    "Qwen3": "a name",
    "T4": "a card's name",
    "75/25": "the question that a notebook answers, in quotation marks",
    "4-bit": "a technique's name; how many bits it has is its definition",
    "16-bit": "a technique's name, as above",
}
"""Digits that prose may hold; every other number is printed by code."""
NOT_PROSE = (
    r"```.*?```",
    r"`[^`]*`",
    r"\$\$.*?\$\$",
    r"\$[^$\n]*\$",
    r"!\[[^\]]*\]\([^)]*\)",
    r"\[[^\]]*\]\([^)]*\)",
    r"<[^>]*>",
)
"""Code, formulas, links, HTML."""
ASKED = "evaluate.max_new_tokens=64 evaluate.questions.0.max_rows=4"
FEW = f"train.max_steps=4 data.budget=4000 data.validation_size=8 evaluate.questions.1.max_rows=4 {ASKED}"
TINY = f"train.max_steps=2 {ASKED}"
SMALL = {
    "00_quickstart": {"PROMPTS": ["What is 17 + 25?"], "CHANGES": FEW},
    "01_mix": {"CHANGES": "data.budget=4000 data.validation_size=8"},
    "02_train": {"CARD": 6.0, "CHANGES": FEW},
    "03_evaluate": {"CHANGES": FEW},
    "04_ratio_sweep": {"RATIOS": [0.0, 0.5], "SEEDS": 1, "CHANGES": FEW},
    "05_export": {"QUANTS": ["f16", "q8_0"], "PROMPTS": ["What is 17 + 25?"], "CHANGES": FEW},
    "06_your_own_data": {"PROMPTS": ["Who are you?"], "CHANGES": TINY},
    "07_in_your_own_notebook": {"STEPS": 2, "QUANTS": ["f16"]},
}
"""Parameters under which every notebook runs in seconds: the same path, too short to learn anything."""


def read(name: str) -> dict:
    return json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))


def text(cell: dict) -> str:
    return "".join(cell["source"])


def code(page: dict) -> list[str]:
    return [text(cell) for cell in page["cells"] if cell["cell_type"] == "code"]


def tagged(page: dict) -> list[dict]:
    return [cell for cell in page["cells"] if "parameters" in cell["metadata"].get("tags", [])]


every = pytest.mark.parametrize("name", NAMES)


# --- structure -------------------------------------------------------------------------------------------------------


def test_the_folder_holds_these_notebooks_and_no_other():
    assert [path.stem for path in run_notebooks.notebooks()] == NAMES


def test_the_set_up_cell_and_the_badge_are_those_that_make_notebooks_writes():
    for name in NAMES:
        page = read(name)
        stamped = json.loads(json.dumps(page))
        run_notebooks.stamp(stamped, name, run_notebooks.address())
        assert [text(cell) for cell in stamped["cells"]] == [text(cell) for cell in page["cells"]], "run --stamp"


@pytest.mark.parametrize(
    ("remote", "expected"),
    [
        ("https://github.com/me/tuner.git", "https://github.com/me/tuner"),
        ("https://token@github.com/me/tuner", "https://github.com/me/tuner"),
        ("git@github.com:me/my.tuner.git", "https://github.com/me/my.tuner"),
        ("ssh://example.org/me/tuner", ""),
        (None, ""),
    ],
)
def test_the_address_is_that_of_git_remote_and_the_badge_is_left_out_without_one(
    tmp_path, monkeypatch, remote, expected
):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    if remote:
        subprocess.run(["git", "-C", tmp_path, "remote", "add", "origin", remote], check=True)
    monkeypatch.setattr(run_notebooks, "ROOT", tmp_path)
    assert run_notebooks.address() == expected
    page = read(NAMES[1])
    for _ in range(2):
        run_notebooks.stamp(page, NAMES[1], run_notebooks.address())
        title, setup = (text(cell) for cell in page["cells"][:2])
        slug = expected.removeprefix("https://github.com/")
        badge = f"https://colab.research.google.com/github/{slug}/blob/main/notebooks/{NAMES[1]}.ipynb"
        assert (title.count(badge), title.count("Open in Colab")) == ((1, 1) if expected else (0, 0))
        assert title.count("[← 00_quickstart]") == 1
        assert f'glob("*.zip")), "{expected and f"git+{expected}"}")' in setup


def test_the_set_up_cell_finds_the_project_from_the_notebooks_folder_and_installs_nothing_here():
    cell = text(read(NAMES[0])["cells"][SETUP])
    quiet = "import subprocess; subprocess.run = lambda *a, **k: exit(f'would run {a}')\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{quiet}{cell}\n{cell}\nimport toolkit; print(os.getcwd(), toolkit.__file__)"],
        cwd=ROOT / "notebooks", capture_output=True, text=True,
    )  # fmt: skip
    place = f"{ROOT} {ROOT / 'toolkit' / '__init__.py'}"
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, place, "")


def test_the_set_up_cell_is_a_few_lines():
    assert len([line for line in run_notebooks.setup_cell("").splitlines() if line.strip()]) <= 15


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The project as a zip, as GitHub offers it: everything below one folder."""
    archive = tmp_path_factory.mktemp("archive") / "project-main.zip"
    command = ["git", "archive", "--prefix=project-main/", "-o", archive, "HEAD"]
    subprocess.run(command, cwd=ROOT, check=True)
    return archive


@pytest.mark.parametrize("given", [pytest.param("address", marks=pytest.mark.slow), "zip", "nothing"])
def test_in_a_fresh_kernel_in_an_empty_folder_the_set_up_cell_installs_the_toolkit(tmp_path, archive, given):
    """From the repository's address or from an uploaded zip; without any it says what to upload."""
    folder = tmp_path / "empty"
    folder.mkdir()
    if given == "zip":
        shutil.copy(archive, folder)
    cell = run_notebooks.setup_cell(f"git+file://{ROOT}" if given == "address" else "")
    with kernel(folder, venvs.make(tmp_path / "venv"), folder) as (_, client):
        first = ask(client, cell)
        if given == "nothing":
            assert "upload the project as a zip" in first["evalue"]
            return
        assert first["status"] == "ok", first
        assert ask(client, cell)["status"] == "ok"  # run again, it installs nothing
        lines = f"import toolkit.recipe as r; assert r.__file__.startswith({str(tmp_path)!r}); r.load('pocket')"
        assert ask(client, lines)["status"] == "ok"


@every
def test_the_title_says_what_you_will_have_and_links_to_its_neighbours(name):
    first = text(read(name)["cells"][0])
    assert first.startswith("# ")
    assert "**At the end you have**" in first
    place = NAMES.index(name)
    for neighbour in NAMES[max(0, place - 1) : place] + NAMES[place + 1 : place + 2]:
        assert f"({neighbour}.ipynb)" in first


@every
def test_links_between_notebooks_lead_to_files(name):
    whole = "\n".join(text(cell) for cell in read(name)["cells"])
    for target in re.findall(r"\]\(([\w.]+\.ipynb)\)", whole):
        assert (ROOT / "notebooks" / target).is_file()


@every
def test_one_cell_holds_the_parameters_in_capitals(name):
    cells = tagged(read(name))
    assert len(cells) == 1
    for node in ast.parse(text(cells[0])).body:
        assert isinstance(node, ast.Assign)
        assert node.targets[0].id.isupper()
    assert all("# @param" in line for line in text(cells[0]).splitlines())


@every
def test_every_parameter_the_tests_set_exists(name):
    """papermill only warns about one that does not."""
    known = {node.targets[0].id for node in ast.parse(text(tagged(read(name))[0])).body}
    assert SMALL[name].keys() <= known


@every
def test_cells_are_short_and_hold_no_function_no_dead_branch_and_no_code_that_is_commented_out(name):
    for cell in code(read(name))[1:]:
        tree = ast.parse(cell)
        # a call spread over lines is one thing to read: Unsloth's and TRL's calls have an argument a line
        statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
        assert sum(not isinstance(node, ast.Import | ast.ImportFrom) for node in statements) <= 8, cell
        assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.walk(tree)), cell
        assert not any(isinstance(n, ast.If) and isinstance(n.test, ast.Constant) for n in ast.walk(tree)), cell
        assert not [line for line in cell.splitlines() if line.strip().startswith("#")], cell


def prose(markdown: str) -> str:
    """Markdown without what `execute` wrote and what is not prose."""
    markdown = run_notebooks.MEASURED.sub(" ", markdown)
    for pattern in NOT_PROSE:
        markdown = re.sub(pattern, " ", markdown, flags=re.DOTALL)
    return markdown


def typed_numbers(markdown: str) -> list[str]:
    """Numbers that were typed where code could print them."""
    rest = prose(markdown)
    for name in NUMERALS:
        rest = re.sub(rf"(?<![\w.]){re.escape(name)}(?![\d/]|\.\d)", " ", rest)
    return re.findall(r"\S*\d\S*", rest)


@every
def test_no_number_is_typed_in_prose(name):
    for cell in read(name)["cells"]:
        if cell["cell_type"] == "markdown":
            assert typed_numbers(text(cell)) == [], text(cell)


CHINESE = re.compile("[\u3400-\u9fff]")


@every
def test_chinese_stands_beside_every_step(name):
    """In each cell of text, and as much as the English says: about one character for four or five letters."""
    for cell in read(name)["cells"]:
        if cell["cell_type"] == "markdown":
            english = prose(re.sub(r"(?m)^>.*$", "", text(cell)))
            assert len(CHINESE.findall(text(cell))) > len(english) / 7, text(cell)


def test_a_typed_number_would_be_found():
    assert typed_numbers("Qwen3 on a T4 with 4-bit weights: `r=16`, $x^2$, [02_train](02_train.ipynb)") == []
    assert typed_numbers("It trains for 60 steps of Qwen3.5 at 14-bit") == ["60", "Qwen3.5", "14-bit"]


@every
def test_outputs_are_those_of_these_cells_and_this_version(name):
    assert run_notebooks.stale(read(name)) == "", "run `make notebooks`"


def test_outputs_of_changed_cells_are_called_stale():
    cell = {"cell_type": "code", "source": ["print(1)"], "outputs": [{"text": ["1"]}], "metadata": {}}
    page = {"cells": [{**cell, "source": ["set up"], "outputs": []}, cell]}
    page["metadata"] = {
        "toolkit": {"version": run_notebooks.__version__, "sources": run_notebooks.sources_sha256(page)}
    }
    assert run_notebooks.stale(page) == ""
    cell["source"] = ["print(2)"]
    assert "changed" in run_notebooks.stale(page)


@every
def test_outputs_hold_no_widget_no_error_no_warning_and_no_path_of_the_machine_that_made_them(name):
    for cell in read(name)["cells"]:
        for output in cell.get("outputs", ()):
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr", output["text"]
            assert not run_notebooks.WIDGETS & output.get("data", {}).keys()
            assert not re.search(r"/(home|root|work|tmp|content)/\w", json.dumps({**output, "data": _texts(output)}))


def _texts(output: dict) -> dict:
    return {kind: value for kind, value in output.get("data", {}).items() if kind != "image/png"}


# --- drift -----------------------------------------------------------------------------------------------------------


def drift(name: str) -> list[str]:
    """Where a notebook calls the toolkit otherwise than it is: a name that is not there, arguments that do not bind."""
    known, wrong = {}, []
    for cell in code(read(name)):
        tree = ast.parse(cell)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "toolkit":
                for alias in node.names:
                    owner = importlib.import_module(node.module)
                    try:
                        known[alias.asname or alias.name] = importlib.import_module(f"{node.module}.{alias.name}")
                    except ModuleNotFoundError as error:
                        if not hasattr(owner, alias.name):  # a function, or nothing at all
                            wrong.append(f"{name}: {error}")
        wrong += [f"{name}: {fault}" for fault in _faults(tree, known)]
    return wrong


def _faults(tree: ast.AST, known: dict):
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            if node.attr not in vars(known[node.value.id]):
                yield f"{ast.unparse(node)}: no such name"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield from _binding_fault(node, known)


def _binding_fault(node: ast.Call, known: dict):
    owner = node.func.value
    function = vars(known[owner.id]).get(node.func.attr) if isinstance(owner, ast.Name) and owner.id in known else None
    if function is None or any(isinstance(arg, ast.Starred) for arg in node.args):
        return
    try:
        inspect.signature(function).bind(*node.args, **{k.arg: k.value for k in node.keywords})
    except TypeError as error:
        yield f"{ast.unparse(node)}: {error}"


@every
def test_every_call_fits_the_toolkit(name):
    assert drift(name) == []


@pytest.mark.parametrize(
    ("module", "before", "after", "named"),
    [
        ("run.py", "fresh: bool = False, score: bool = True", "fresh: bool = False, judge: bool = True", "score"),
        ("view/figures.py", "def mix_figure(", "def drawing(", "figures.mix_figure"),
        ("notebook.py", "def ask(folder: Path,", "def ask(folder: Path, mode,", "prompts|mode"),
    ],
)
def test_a_changed_signature_is_noticed(tmp_path, module, before, after, named):
    shutil.copytree(
        ROOT / "toolkit", tmp_path / "toolkit", ignore=shutil.ignore_patterns("*.safetensors", "__pycache__")
    )
    for folder in ("tests", "notebooks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "data"))
    changed = tmp_path / "toolkit" / module
    assert before in changed.read_text(encoding="utf-8")
    changed.write_text(changed.read_text(encoding="utf-8").replace(before, after), encoding="utf-8")
    program = (
        "from tests.tools.test_notebooks import NAMES, drift; print([fault for name in NAMES for fault in drift(name)])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert re.search(named, done.stdout)


# --- what notebooks call ------------------------------------------------------------------------------------------------


def test_a_run_is_named_after_what_it_does():
    words = ("data_recipes/quickstart.yaml", "data_recipes/pocket.yaml")
    plain, again, changed = (notebook.pick(*words, text) for text in ("", "", "train.max_steps=3"))
    assert plain == again
    assert plain[-1] != changed[-1]
    assert changed[1] == "train.max_steps=3"


def test_words_in_quotation_marks_stay_together():
    words = "data_recipes/self_cognition.yaml data.placeholders.AUTHOR='the Bakery'"
    found = notebook.choose(words, words)
    assert found.data.placeholders["AUTHOR"] == "the Bakery"


def test_replies_are_shown_as_text_and_never_as_markup():
    rows = [{"prompt": "<b>?", "mode": "thinking", "base": tables.ShownReply("[bold]<script>", "a < b")}]
    page = tables.side_by_side(rows)._repr_mimebundle_([], [])["text/html"]
    assert "<script>" not in page
    assert "[bold]&lt;script&gt;" in page
    assert "a &lt; b" in page


def test_reasoning_is_grey_before_and_after_training_and_the_answer_is_not():
    row = {"prompt": "2 + 2?", "mode": "thinking", "when": "after", "reasoning": "two and two", "answer": "Four."}
    cells = list(before_after([row | {"when": "before"}, row]).columns[-1].cells)
    grey = [cells[0].plain[span.start : span.end] for span in cells[0].spans if span.style == "bright_black"]
    assert (grey, str(cells[0].style), cells[0].plain) == (["two and two\n"], "", "two and two\nFour.")


# --- execution -------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # trainings, a sweep, a dial and exports: five minutes and more
def test_all_notebooks_run_on_a_cpu(tmp_path):
    """One kernel for all, emptied between them: Unsloth's import takes longer than these notebooks do."""
    whole = _joined()
    done = _executed(whole, tmp_path)
    assert len([cell for cell in done.cells if cell.cell_type == "code"]) > 4 * len(NAMES)


def _joined(names=NAMES):
    import nbformat
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    whole = nbformat.v4.new_notebook()
    for name in names:
        page = load_notebook_node(str(ROOT / "notebooks" / f"{name}.ipynb"))
        page = parameterize_notebook(page, SMALL[name], kernel_name="python3", language="python")
        whole.cells += [nbformat.v4.new_code_cell(cell.source) for cell in page.cells if cell.cell_type == "code"]
        whole.cells.append(nbformat.v4.new_code_cell("get_ipython().run_line_magic('reset', '-f')"))
    return whole


def _executed(page, tmp_path):
    from nbclient import NotebookClient

    client = NotebookClient(
        page, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "notebooks")}}
    )
    client.execute(env=quiet_environment(tmp_path))
    return page


@pytest.mark.slow  # a training in a kernel of its own, twice
def test_a_kernel_interrupt_in_mid_training_leaves_a_run_that_goes_on(tmp_path):
    cells = code(read("02_train"))
    training = next(cell for cell in cells if "notebook.live(" in cell).replace(
        "run.train(wanted)", "run.train(wanted, score=False)"
    )
    changes = (
        "CHANGES = 'train.max_steps=12 train.save_steps=2 train.eval_steps=2 data.budget=4000 data.validation_size=8'"
    )
    with kernel(tmp_path) as (manager, client):
        ask(client, f"{cells[0]}\nCARD = 0\n{changes}\n{cells[2]}")
        asked = client.execute(training)
        wait_for(lambda: list(tmp_path.glob("*/checkpoints/checkpoint-*/trainer_state.json")))
        manager.interrupt_kernel()
        assert reply(client, asked)["ename"] == "KeyboardInterrupt"
        assert ask(client, training)["status"] == "ok"
    folder = next(tmp_path.glob("proper_run-*"))
    steps = [line["step"] for line in map(json.loads, (folder / "metrics.jsonl").open()) if "loss" in line]
    assert steps == list(range(1, 13))
    assert "finished" in json.loads((folder / "manifest.json").read_text())


@contextlib.contextmanager
def kernel(outputs, python=sys.executable, place=ROOT / "notebooks"):
    """A kernel of a Python in a folder, with a network for nothing: pip takes what it is given, and builds with what is here."""
    from jupyter_client.manager import KernelManager

    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    manager = KernelManager(kernel_name="python3")
    manager.kernel_spec.argv[0] = str(python)
    manager.start_kernel(cwd=str(place), env=quiet_environment(outputs) | offline)
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=120)
    try:
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def quiet_environment(outputs) -> dict:
    return {**os.environ, "TOOLKIT_OUTPUTS": str(outputs), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def ask(client, program: str) -> dict:
    return reply(client, client.execute(program))


def reply(client, asked: str) -> dict:
    while True:
        message = client.get_shell_msg(timeout=300)
        if message["parent_header"].get("msg_id") == asked:
            return message["content"]


def wait_for(condition, seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.1)


def test_a_failing_cell_is_reported_with_its_notebook_and_leaves_the_file_alone(tmp_path):
    broken = {**read(NAMES[0]), "cells": [{"cell_type": "code", "id": "a", "metadata": {}, "execution_count": None,
              "outputs": [], "source": "raise ValueError('the oven is cold')"}]}  # fmt: skip
    path = tmp_path / "broken.ipynb"
    path.write_text(json.dumps(broken), encoding="utf-8")
    before = path.read_bytes()
    with pytest.raises(ToolkitError, match="broken.ipynb.*the oven is cold"):
        run_notebooks.execute([path])
    assert path.read_bytes() == before
