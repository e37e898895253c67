"""Guards for the whole: imports point left, nothing heavy at import, every module says what it is and how to use it."""

import ast
import subprocess
import sys
import time

import pytest

from toolkit.files import ROOT

# The pipeline, left to right: a module uses only modules before it.
ORDER = """files family progress install recipe
sources.readers sources.conversation sources.formats sources render dedup lint mix show
fit model generate tracking callbacks train
evaluate.stats evaluate.questions evaluate.score evaluate.base_replies evaluate.subject evaluate.text evaluate folders compare report
export.ledger export.merge export.gguf_file export.parity export.certificate export.model_card export
serve.request serve.splitter serve.batcher serve.llama serve.engine serve.api serve serve.chat serve.batch
run doctor sweep.workers sweep replay labels pictures notebook __main__""".split()
PACKAGE = ROOT / "toolkit"
MODULES = [p for p in sorted(PACKAGE.rglob("*.py")) if "pocket" not in p.parts and p != PACKAGE / "__init__.py"]


def name_of(path) -> str:
    """`sources/readers.py` is sources.readers, `sources/__init__.py` is sources."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imported(path) -> set[str]:
    """Toolkit modules a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "toolkit":
            package = node.module.removeprefix("toolkit").lstrip(".")
            inside = {f"{package}.{a.name}".lstrip(".") for a in node.names}
            found |= {name if name in ORDER else package for name in inside}
    return {name for name in found if name and not name.startswith("pocket")}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_left(path):
    before = ORDER[: ORDER.index(name_of(path))]
    assert imported(path) <= set(before)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_is_and_shows_one_line_of_use(path):
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert text
    assert "(" in text or "`" in text or "import" in text


def test_importing_the_package_loads_neither_torch_nor_unsloth():
    code = (
        "import toolkit, toolkit.recipe, sys; print({'torch', 'unsloth', 'transformers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


def test_help_answers_within_0_3_seconds():
    command = [sys.executable, "-m", "toolkit", "--help"]
    times = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        times.append(time.perf_counter() - started)
    assert "train" in done.stdout
    assert min(times) < 0.3


def test_the_order_above_names_every_module_that_exists_and_no_other():
    assert {name_of(p) for p in MODULES} == set(ORDER)
