"""The two READMEs say the same: headings, commands, links and figures; and what they say of the project is so."""

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests import measures
from toolkit import __main__ as command_line
from toolkit.files import PACKAGE, ROOT

PAIRS = ("README", "data_recipes/README")
HEADING = re.compile(r"(?m)^(#+) .*$")
BLOCK = re.compile(r"```.*?```", re.DOTALL)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    """The lines of its code blocks without their comments, and without what is said beside the names of a folder tree."""
    lines = [line for block in BLOCK.findall(text) for line in block.splitlines()]
    return [re.split(r"  +|：|: |#", line.strip())[0].rstrip() for line in lines if not line.startswith("# ")]


def spans(text: str) -> set[str]:
    """What stands in `code`."""
    return set(re.findall(r"`([^`\n]+)`", BLOCK.sub("", text)))


def figures(text: str) -> Counter[str]:
    """Every number outside of code, with how often it stands there."""
    plain = re.sub(r"\]\([^)]*\)|`[^`\n]*`", " ", BLOCK.sub("", text))
    return Counter(number.rstrip(".,") for number in re.findall(r"\d[\d.,]*", plain))


def links(text: str) -> set[str]:
    """Where its links lead, to the other language or to a heading left out."""
    found = re.findall(r"\]\(([^)#]+)\)", BLOCK.sub("", text))
    return {target.replace(".zh.md", ".md") for target in found} - {"README.md"}


@pytest.mark.parametrize("name", PAIRS)
def test_both_languages_have_the_same_headings_commands_and_links(name):
    english, chinese = read(f"{name}.md"), read(f"{name}.zh.md")
    assert HEADING.findall(BLOCK.sub("", chinese)) == HEADING.findall(BLOCK.sub("", english))
    assert commands(chinese) == commands(english)
    assert spans(chinese) == spans(english)
    assert links(chinese) == links(english)


def sections(text: str) -> list[str]:
    return HEADING.split(BLOCK.sub("", text))[2::2]


@pytest.mark.parametrize("name", PAIRS)
def test_every_section_has_the_same_figures_and_tables_in_both_languages(name):
    english, chinese = sections(read(f"{name}.md")), sections(read(f"{name}.zh.md"))
    assert len(chinese) == len(english)
    for ours, theirs in zip(english, chinese, strict=True):
        assert figures(theirs) == figures(ours)
        assert theirs.count("\n|") == ours.count("\n|")


def test_a_figure_that_differs_is_noticed():
    assert figures("70% [59, 81] in 2,332 rows of `r=16` [2](a3.md)") == Counter(["70", "59", "81", "2,332", "2"])
    assert figures("71%") != figures("70%")


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_folder_tree_is_what_ls_shows(name):
    tree = next(block for block in BLOCK.findall(read(name)) if "toolkit/\n" in block)
    listed = re.findall(r"(?m)^  (\S+)", tree)
    hidden = {"__init__.py", "py.typed"}
    assert {entry.rstrip("/") for entry in listed} == set(measures.entries()) - hidden
    for entry in listed:
        assert (PACKAGE / entry).is_dir() == entry.endswith("/")


@pytest.mark.parametrize(
    "name", ["README.md", "README.zh.md", "AGENTS.md", "CONTRIBUTING.md", "data_recipes/README.md", "docs/README.md"]
)
def test_links_lead_to_files_and_commands_are_verbs(name):
    text = read(name)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("http") or ((ROOT / name).parent / target).exists(), target
    for verb in re.findall(r"python -m toolkit ([a-z]+)\b", text):
        assert verb in command_line.VERBS, verb
    code = "\n".join([*BLOCK.findall(text), *spans(text)])
    for target in re.findall(r"(?m)^make ([a-z-]+)", code):
        assert re.search(rf"(?m)^{target}:", read("Makefile")), target


def test_the_tables_of_verbs_name_them_all():
    """What a reader can do is in the README, or in the reference page that it links."""
    reference = read("docs/README.md")
    assert [verb for verb in command_line.VERBS if f"verbs/{verb}.md" not in reference] == []


def test_make_help_fits_80_columns_and_every_verb_is_a_target():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line for line in listed if len(line) > 80] == []
    targets = {line.split()[1] for line in listed}
    assert set(command_line.VERBS) <= targets


def test_the_language_links_are_there():
    assert "[中文](README.zh.md)" in read("README.md")
    assert Path(ROOT / "README.zh.md").read_text(encoding="utf-8").count("[English](README.md)") == 1
