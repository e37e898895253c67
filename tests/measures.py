"""What a reader of `toolkit/` meets, in numbers: sizes, density, untyped parameters, comments. `python -m tests.measures`

Sizes are counts of expressions and statements of the syntax tree, which line breaks and comments do not change.
"""

import ast
from dataclasses import dataclass
from pathlib import Path

from toolkit.files import PACKAGE

CORE = ("recipe.py", "run.py", "files.py", "family.py", "records.py", "data", "training", "evaluation", "export")
FIRST = ("run.py", "data/mix.py", "data/render.py")
BARE = {"dict", "list", "tuple"}


@dataclass(frozen=True)
class Size:
    """Counts over some files."""

    files: int = 0
    lines: int = 0
    code_lines: int = 0
    nodes: int = 0
    comments: int = 0
    parameters: int = 0
    untyped: int = 0

    @property
    def density(self) -> float:
        """Expressions and statements per line of code."""
        return self.nodes / max(1, self.code_lines)


def docstring_lines(tree: ast.Module) -> set[int]:
    """Numbers of the lines that docstrings take."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for statement in body:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                lines |= set(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    return lines


def is_untyped(argument: ast.arg) -> bool:
    """Whether a parameter has no annotation, or one that is a bare dict, list or tuple."""
    if argument.arg in ("self", "cls"):
        return False
    annotation = argument.annotation
    return annotation is None or (isinstance(annotation, ast.Name) and annotation.id in BARE)


def parameters(tree: ast.Module) -> list[ast.arg]:
    """Every parameter of every function, lambdas left out."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            found += [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            found += [a for a in (arguments.vararg, arguments.kwarg) if a]
    return [a for a in found if a.arg not in ("self", "cls")]


def measure(paths: list[Path]) -> Size:
    """The counts of some Python files together."""
    lines = code = nodes = comments = total = untyped = 0
    for path in paths:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        strings = docstring_lines(tree)
        for number, line in enumerate(text.splitlines(), start=1):
            lines += 1
            if line.strip().startswith("#"):
                comments += 1
            elif line.strip() and number not in strings:
                code += 1
        nodes += sum(isinstance(node, ast.expr | ast.stmt) for node in ast.walk(tree))
        arguments = parameters(tree)
        total += len(arguments)
        untyped += sum(map(is_untyped, arguments))
    return Size(len(paths), lines, code, nodes, comments, total, untyped)


def python_files(*names: str) -> list[Path]:
    """The Python files of the named files and folders of the package; all of them without a name."""
    found: list[Path] = []
    for path in [PACKAGE / name for name in names] or [PACKAGE]:
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path] * path.exists()
    return found


def entries() -> list[str]:
    """What `ls toolkit` shows, caches left out."""
    return sorted(p.name for p in PACKAGE.iterdir() if p.name != "__pycache__" and not p.name.startswith("."))


def table() -> str:
    """A line for each folder and file of the package, then the core, the files to open first, and all."""
    header = f"{'':24}{'files':>6}{'lines':>8}{'nodes':>8}{'density':>9}{'comments':>10}{'untyped':>14}"
    rows = [header]
    groups = [(name, [name]) for name in entries() if python_files(name)]
    for title, names in [*groups, ("CORE", list(CORE)), ("FIRST THREE", list(FIRST)), ("ALL", [])]:
        size = measure(python_files(*names))
        share = 100 * size.comments / max(1, size.lines)
        rows.append(
            f"{title:24}{size.files:>6}{size.lines:>8,}{size.nodes:>8,}{size.density:>9.2f}{share:>9.1f}%"
            f"{size.untyped:>7} of {size.parameters:>4}"
        )
    return "\n".join([*rows, f"entries in toolkit/: {len(entries())}"])


if __name__ == "__main__":
    print(table())
