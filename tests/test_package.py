"""Guards for the whole: imports point left, nothing heavy at import, every module says what it is and how to use it."""

import ast
import subprocess
import sys
import time

import pytest

from toolkit.recipe import ROOT

# The pipeline, left to right: a module uses only modules before it.
ORDER = """recipe install files rows tables conversation formats sources render overlap lint mix show shapes memory gauge fit model generate callbacks train
stats score questions subject evaluate folders compare report files merge parity gguf_file certificate model_card export splitter engine batcher request api llama serve chat batch doctor run notebook sweep replay
bench __main__""".split()
MODULES = sorted((ROOT / "toolkit").glob("*.py"))


def imported(path) -> set[str]:
    """Toolkit modules a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "toolkit":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names}
    return found - {"__version__", "pocket"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.name)
def test_imports_point_left(path):
    if path.stem == "__init__":
        assert not imported(path)
        return
    before = ORDER[: ORDER.index(path.stem)]
    assert imported(path) <= set(before)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.name)
def test_every_module_says_what_it_is_and_shows_one_line_of_use(path):
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert text
    assert text.splitlines()[0].rstrip(":").rstrip()
    assert "(" in text or "`" in text or "import" in text


def test_importing_the_package_loads_neither_torch_nor_unsloth():
    code = (
        "import toolkit, toolkit.recipe, sys; print({'torch', 'unsloth', 'transformers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


def test_help_answers_within_half_a_second():
    command = [sys.executable, "-m", "toolkit", "--help"]
    times = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        times.append(time.perf_counter() - started)
    assert "train" in done.stdout
    assert min(times) < 0.5


def test_the_order_above_names_every_module_that_exists():
    assert {p.stem for p in MODULES} - {"__init__"} <= set(ORDER)
