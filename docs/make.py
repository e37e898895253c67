"""Write the reference pages from the code: every verb, every recipe key, every key of a run's files.

python -m docs.make     (`make docs`; a test says when the pages are not current)
"""

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.tools import time_and_memory
from toolkit import __main__ as command_line
from toolkit.files import PACKAGE, write_text

FOLDER = Path(__file__).resolve().parent
MADE = "<!-- made by `make docs` from {source}: change it there -->\n\n"
SECTIONS = {  # dataclass in recipe.py: (key in a recipe, whose names the keys are)
    "Recipe": ("", ""),
    "Data": ("data", ""),
    "Source": ("data.sources", ""),
    "Model": ("model", "an argument of Unsloth's `FastLanguageModel.from_pretrained`"),
    "Lora": ("lora", "an argument of PEFT's `LoraConfig`"),
    "Train": ("train", "a field of TRL's `SFTConfig`"),
    "Evaluate": ("evaluate", ""),
    "Export": ("export", ""),
}
RECORDS = {
    "mix.json": "MixReport", "eval.json": "Evaluation", "manifest.json": "Manifest", "certificate.json": "Certificate",
    "export.json": "ExportRecord", "metrics.jsonl": "MetricLine", "samples.jsonl": "SampleLine",
    "quarantine.jsonl": "DroppedRow",
}  # fmt: skip


def pages() -> dict[Path, str]:
    """{file: its text} of the whole reference."""
    made = {FOLDER / "recipe.md": recipe_page(), FOLDER / "run_folder.md": records_page()}
    for name, verb in verbs().items():
        made[FOLDER / "verbs" / f"{name}.md"] = verb_page(name, verb)
    made[FOLDER / "time_and_memory.md"] = time_and_memory.page()
    made[FOLDER / "README.md"] = index_page()
    return made


def index_page() -> str:
    """Where to find what."""
    lines = ["# Reference", "", "| page | what it lists |", "|---|---|"]
    lines += ["| [glossary](glossary.md) | what the words in tables and messages mean, in English and Chinese |"]
    lines += ["| [recipe](recipe.md) | every key of a recipe, with its default |"]
    lines += ["| [run folder](run_folder.md) | every key of the files that a run leaves |"]
    lines += ["| [time and memory](time_and_memory.md) | hours and memory by card and model, calculated |"]
    lines += [f"| [{name}](verbs/{name}.md) | {cell(first_line(verb))} |" for name, verb in verbs().items()]
    return MADE.format(source="the code") + "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


# --- verbs -----------------------------------------------------------------------------------------------------------


def verbs() -> dict[str, argparse.ArgumentParser]:
    """{verb: its parser}, in the order of `--help`."""
    actions = command_line.parser()._subparsers._group_actions
    return dict(actions[0].choices)


def first_line(verb: argparse.ArgumentParser) -> str:
    return (verb.description or "").strip().splitlines()[0]


def verb_page(name: str, verb: argparse.ArgumentParser) -> str:
    """What a verb does, and a row for each of its arguments."""
    arguments = [action for action in verb._actions if not isinstance(action, argparse._HelpAction)]
    usage = " ".join(["python -m toolkit", name, *(usage_of(action) for action in arguments)])
    text = f"# {name}\n\n{verb.description.strip()}\n\n```\n{usage}\n```\n"
    if arguments:
        rows = [f"| `{cell(spelling(action))}` | {cell(meaning(action))} |" for action in arguments]
        text += "\n" + "\n".join(["| argument | meaning |", "|---|---|", *rows]) + "\n"
    return MADE.format(source="toolkit/__main__.py") + text


def placeholder(action: argparse.Action) -> str:
    """What stands for an argument's value: `{quick,full}`, `N`, RUN."""
    if action.choices:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return str(action.metavar or action.dest.upper())  # a tuple is spelled below


def spelling(action: argparse.Action) -> str:
    """An argument as it is typed."""
    value = "" if action.nargs == 0 else placeholder(action)
    if isinstance(action.metavar, tuple):  # of an argument with several values of different kinds
        value = " ".join(action.metavar)
    if action.nargs in ("+", "*"):
        value += " …"
    return f"{', '.join(action.option_strings)} {value}".strip()


def usage_of(action: argparse.Action) -> str:
    """The same in the line of use: in brackets where it may be left out."""
    value = spelling(action).removeprefix(", ".join(action.option_strings)).strip()
    word = f"{action.option_strings[0]} {value}".strip() if action.option_strings else value
    return word if action.required and action.nargs not in ("?", "*") else f"[{word}]"


def meaning(action: argparse.Action) -> str:
    """An argument's help, with its default where the help does not name one."""
    text = action.help or ""
    shown = action.default not in (None, False, argparse.SUPPRESS, [], ()) and "default" not in text
    default = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
    return f"{text}{'; ' if text else ''}default {default}" if shown else text


# --- recipes and records ---------------------------------------------------------------------------------------------


def fields(node: ast.ClassDef) -> Iterator[tuple[str, str, str, str]]:
    """(name, type, default, documentation) of each field; the documentation is the text right below it, or beside it."""
    for place, statement in enumerate(node.body):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        below = node.body[place + 1] if place + 1 < len(node.body) else None
        documented = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        text = str(below.value.value) if documented else ""
        yield statement.target.id, kind_of(ast.unparse(statement.annotation)), default_of(statement), text


def default_of(statement: ast.AnnAssign) -> str:
    """A field's default as a recipe would have it; a section's keys have defaults of their own."""
    if statement.value is None:
        return "required"
    if isinstance(statement.value, ast.Constant):
        words = {None: "null", True: "true", False: "false", "": "none"}
        value = statement.value.value
        return (
            words.get(value, str(value))
            if not isinstance(value, int | float) or isinstance(value, bool)
            else str(value)
        )
    if isinstance(statement.value, ast.Tuple):
        return ", ".join(map(str, ast.literal_eval(statement.value))) or "none"
    return "none"


def kind_of(annotation: str) -> str:
    """A field's type for people: the words it may be, `null` for None, lists for tuples."""
    words = re.sub(r"Literal\[([^]]*)\]", lambda found: found[1].replace("'", ""), annotation)
    return words.replace("None", "null").replace(", ...", "").replace("tuple[", "list[")


def recipe_page() -> str:
    """Every section of a recipe with its keys."""
    tree = ast.parse((PACKAGE / "recipe.py").read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    parts = ["# Every key of a recipe", "The recipes that ship, explained: [data_recipes](../data_recipes/README.md)."]
    for name, (key, owner) in SECTIONS.items():
        parts.append(f"## {f'`{key}:`' if key else 'Top level'}")
        parts.append(ast.get_docstring(classes[name]) or "")
        rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
        for field, kind, default, text in fields(classes[name]):
            if field == "extra":
                continue
            section = f"see `{field}:` below" if name == "Recipe" and kind in SECTIONS else ""
            says = cell(text) or section or owner
            rows.append(f"| `{field}` | `{cell(kind)}` | `{cell(default)}` | {says} |")
        if owner:
            rows.append(f"| any other | | | {owner}, passed on as it is |")
        parts.append("\n".join(rows))
    return MADE.format(source="toolkit/recipe.py") + "\n\n".join(parts) + "\n"


def records_page() -> str:
    """Every file of a run folder with its keys, from records.py."""
    text = (PACKAGE / "records.py").read_text(encoding="utf-8")
    classes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    lines = text.splitlines()
    of_file = {record: name for name, record in RECORDS.items()}
    parts = [
        "# Every key of the files that a run leaves",
        "They are plain JSON; the types are in `toolkit/records.py`.",
    ]
    for name in [*RECORDS.values(), *(name for name in classes if name not in of_file)]:
        node = classes[name]
        parts.append(f"## {of_file[name]} ({name})" if name in of_file else f"## {name}")
        if described := ast.get_docstring(node):
            parts.append(described)
        rows = ["| key | type | meaning |", "|---|---|---|"]
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign):
                note = lines[(statement.end_lineno or statement.lineno) - 1].partition("  # ")[2]
                key, kind = ast.unparse(statement.target), ast.unparse(statement.annotation)
                rows.append(f"| `{key}` | `{cell(kind)}` | {cell(note)} |")
        parts.append("\n".join(rows))
    return MADE.format(source="toolkit/records.py") + "\n\n".join(parts) + "\n"


def made_before() -> set[Path]:
    """The pages that lie here and were made, not written by hand."""
    return {page for page in FOLDER.rglob("*.md") if page.read_text(encoding="utf-8").startswith(MADE[:12])}


if __name__ == "__main__":
    for page, content in pages().items():
        write_text(page, content)
    for page in made_before() - pages().keys():  # of a verb that is gone
        page.unlink()
