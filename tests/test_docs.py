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


GLOSSARY = (make.FOLDER / "glossary.md").read_text(encoding="utf-8")
TERMS = [
    "share", "fraction", "supervised tokens", "probes", "nats", "KL from the base", "held-out rows", "`validation_prompt`",
    "thinking kept", "cut", "scale", "certificate", "never ends", "no change shown", "chance",
]  # fmt: skip


@pytest.mark.parametrize("term", TERMS)
def test_the_glossary_says_what_a_term_means_in_both_languages(term):
    (row,) = re.findall(rf"^\| (?:[^|]*, )?{re.escape(term)}(?:, [^|]*)? \| (.*) \|$", GLOSSARY, re.MULTILINE)
    english, _, chinese = row.split(" | ")
    assert len(english) > 20
    assert re.search("[\u4e00-\u9fff]", chinese)


def test_every_reason_for_a_drop_that_is_explained_in_output_is_in_the_glossary():
    from toolkit.data.mix import NOT_MALFORMED
    from toolkit.view.tables import MEANING

    assert MEANING.keys() <= NOT_MALFORMED
    assert [reason for reason in MEANING if f"`{reason}`" not in GLOSSARY] == []


def test_both_readmes_lead_to_the_glossary():
    for name in ("README.md", "README.zh.md"):
        assert "](docs/glossary.md)" in (make.FOLDER.parent / name).read_text(encoding="utf-8")
