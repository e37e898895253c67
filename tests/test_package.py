"""Guards for the whole: imports point left, nothing heavy at import, every module says what it is and how to use it."""

import ast
import builtins
import contextlib
import graphlib
import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests import measures
from toolkit import __main__ as cli
from toolkit.files import PACKAGE, ROOT

# The core, left to right: a folder or file uses only those before it.
CORE = "files records family recipe data training evaluation export run".split()
# Nothing of the core imports these; `run`, the public calls and the command line compose them.
EXTRAS = "comparison serving machine view notebook".split()
COMPOSERS = "__init__ __main__ run".split()
# Imports that break the rule of folders today; the list only gets shorter.
TO_MOVE: set[tuple[str, str]] = set()
MODULES = [p for p in sorted(PACKAGE.rglob("*.py")) if "pocket" not in p.parts and p.name != "__init__.py"]
MODULES += [p for p in sorted(PACKAGE.rglob("__init__.py")) if "\nfrom " in p.read_text(encoding="utf-8")]


def name_of(path) -> str:
    """`data/readers.py` is data.readers, `serving/__init__.py` is serving."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(p) for p in PACKAGE.rglob("*.py")}


def imported(path) -> set[str]:
    """Toolkit modules a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "toolkit":
            package = node.module.removeprefix("toolkit").lstrip(".")
            inside = {f"{package}.{a.name}".lstrip(".") for a in node.names}
            found |= {name if name in NAMES else package for name in inside}
    return {name for name in found if name and not name.startswith("pocket")}


def allowed(module: str) -> set[str]:
    """The folders and files that a module may import by the rule of folders."""
    place = module.split(".")[0]
    if place in CORE and place not in COMPOSERS:
        return set(CORE[: CORE.index(place) + 1])
    return {*CORE, *EXTRAS, *COMPOSERS}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_left(path):
    module = name_of(path)
    wrong = {name for name in imported(path) if name.split(".")[0] not in allowed(module)} - {"view.progress"}
    listed = {name for importer, name in TO_MOVE if importer == module}
    assert wrong == listed


def test_no_two_modules_import_each_other():
    imports = {name_of(p): imported(p) for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"}
    tuple(graphlib.TopologicalSorter(imports).static_order())  # raises CycleError, which names the circle


def usage(path) -> str:
    """The second paragraph of a module's docstring: one line of use, what stands after five spaces left out."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = textwrap.dedent(([*text.split("\n\n", 2), ""])[1])
    return re.sub(r"(?m) {5,}\S.*$", "", paragraph).strip()


def commands(text: str) -> list[list[str]]:
    """The words after `python -m toolkit` in a usage line."""
    return [shlex.split(found) for found in re.findall(r"(?m)python -m toolkit ([^`\n]+)", text)]


def called(tree: ast.AST, names: dict) -> list[tuple[object, ast.Call]]:
    """(function, call) for every call in a usage line; a method of something unknown is left out. Raises NameError."""
    found = []
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        chain, root = [], node.func
        while isinstance(root, ast.Attribute):
            chain, root = [root.attr, *chain], root.value
        if not isinstance(root, ast.Name) or (root.id not in names and chain):
            continue
        if root.id not in names:
            raise NameError(f"{root.id} is not defined")
        function = names[root.id]
        for attribute in chain:
            function = getattr(function, attribute)
        found.append((function, node))
    return found


def bind(function, call: ast.Call) -> None:
    """Raises TypeError where a call does not fit the function's signature."""
    if any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords):
        return
    with contextlib.suppress(ValueError):  # some builtins have no signature
        inspect.signature(function).bind(*call.args, **{k.arg: k.value for k in call.keywords})


# Cheap enough to run; elsewhere names are resolved and calls bound to their signatures.
EXECUTED = "recipe data.sources data.readers data.conversation data.formats evaluation.score machine.fit".split()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_usage_line_of_every_module_runs(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text, name = usage(path), name_of(path)
    assert text, "the docstring's second paragraph is one line of use"
    for words in commands(text):
        try:
            cli.parser().parse_args(cli.take_overrides(words)[0])
        except SystemExit as end:
            assert end.code == 0, words  # noqa: PT017 - argparse ends --help this way, and a mistake with another code
    if text.startswith(("python -m", "`python -m")):
        return
    module = importlib.import_module(f"toolkit.{name}")
    parent, _, last = f"toolkit.{name}".rpartition(".")
    names = vars(builtins) | {"Path": Path} | vars(importlib.import_module(parent)) | {last: module} | vars(module)
    tree = ast.parse(text)
    assigned = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)):
        exec(ast.unparse(node), names)
    if name in EXECUTED:
        exec(text, names)
    for function, call in called(tree, {key: value for key, value in names.items() if key not in assigned}):
        bind(function, call)


# What stands, and where it should go: (measure, most today, goal). A goal that is met may not be lost.
BOUNDS = [
    ("core", 52_150, 30_000), ("first three", 4_600, 4_600), ("whole", 80_200, 46_000), ("density", 6.5, 6.5),
    ("untyped", 100, 100), ("entries", 18, 18),
]  # fmt: skip


def measured() -> dict[str, float]:
    """Each measure of the table in DESIGN, by the names of BOUNDS."""
    whole = measures.measure(measures.python_files())
    return {
        "core": measures.measure(measures.python_files(*measures.CORE)).nodes,
        "first three": measures.measure(measures.python_files(*measures.FIRST)).nodes,
        "whole": whole.nodes,
        "density": whole.density,
        "untyped": whole.untyped,
        "entries": len(measures.entries()),
    }


def test_the_measures_of_the_package_hold(capsys):
    have = measured()
    with capsys.disabled():
        print("\n" + measures.table())
    assert {name: have[name] for name, most, _ in BOUNDS if have[name] > most} == {}


def test_importing_the_package_loads_neither_torch_nor_unsloth():
    code = (
        "import toolkit, toolkit.recipe, sys; print({'torch', 'unsloth', 'transformers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


def test_help_takes_less_than_0_3_seconds_of_a_processor():
    command, times = [sys.executable, "-m", "toolkit", "--help"], []
    for _ in range(3):
        before = os.times()
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert "train" in done.stdout
    assert min(times) < 0.3


def test_the_type_checker_passes():
    """Modules that it does not pass yet are listed in pyproject.toml; the list only gets shorter."""
    done = subprocess.run([sys.executable, "-m", "mypy"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_the_test_files_that_are_run_first_are_there():
    from tests.conftest import LONGEST

    assert [name for name in LONGEST if not (ROOT / "tests" / name).is_file()] == []
