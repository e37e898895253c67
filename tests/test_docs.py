"""The reference pages in docs/ are those of the code, and leave nothing undescribed."""

import re

import pytest

from docs import make
from toolkit import __main__ as command_line


@pytest.fixture(scope="module")
def pages():
    return make.pages()


def test_the_reference_pages_are_current(pages):
    stale = [
        page.name for page, text in pages.items() if not page.is_file() or page.read_text(encoding="utf-8") != text
    ]
    assert stale == [], "run `make docs`"
    assert make.made_before() <= pages.keys(), "run `make docs`"


def test_there_is_a_page_for_every_verb_and_it_names_every_option(pages):
    for name in command_line.VERBS:
        text = pages[make.FOLDER / "verbs" / f"{name}.md"]
        options = [flag for action in make.verbs()[name]._actions for flag in action.option_strings]
        assert [flag for flag in options if flag not in text and flag not in ("-h", "--help")] == []


def test_every_recipe_key_has_a_meaning(pages):
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", pages[make.FOLDER / "recipe.md"], re.MULTILINE)
    assert len(rows) > 40
    assert [key for key, meaning in rows if not meaning.strip()] == []
