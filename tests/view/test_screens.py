"""What every verb prints on a terminal of 80 and of 120 columns: nothing cut, nothing wider, and what to do next."""

import fcntl
import os
import re
import struct
import sys
import termios
from concurrent.futures import ThreadPoolExecutor

import pytest
from rich.cells import cell_len

from tests.support.pocket_run import SMALL
from tests.support.terminal import shown

FEW = [
    *SMALL,
    "evaluate.questions.0.max_rows=4",
    "evaluate.questions.1.max_rows=4",
    "evaluate.max_new_tokens=48",
    "lora.target_modules=[q_proj,v_proj]",
]
WIDTHS = (80, 120)


def screen(columns: int, *words: str) -> tuple[int, str]:
    """(exit code, text) of a verb on a terminal so wide; a line that was drawn over is there as it ended."""
    from toolkit.__main__ import main

    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    before, sys.stdout = sys.stdout, os.fdopen(writer, "w", encoding="utf-8", buffering=1)
    with ThreadPoolExecutor(1) as pool:
        seen = pool.submit(shown, reader)  # read while it is written: a terminal holds a few kB
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("TERM", "xterm")
                patch.setenv("COLUMNS", str(columns))
                code = main(list(words))
        finally:
            sys.stdout.close()
            sys.stdout = before
        text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.result().replace("\r\n", "\n"))
    return code, "\n".join(line.rpartition("\r")[2].rstrip() for line in text.split("\n"))


def fits(columns: int, text: str) -> None:
    wide = [line for line in text.split("\n") if cell_len(line) > columns]
    assert not wide, wide
    # what rich cuts ends in a mark without a space; a reply shown by its beginning has one
    assert not re.search(r"\S…", text), [line for line in text.split("\n") if "…" in line]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["doctor"], "make train"),
        (["mix", "pocket", "data.budget=4000", "data.validation_size=4"], "next:"),
        (["mix", "pocket", "--dry-run"], "source"),
        (["fit", "hybrid", "--model", "unsloth/Qwen3-4B-unsloth-bnb-4bit", "--vram", "8"], "evaluation"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_what_needs_no_run_fits_the_terminal(columns, words, expected):
    code, text = screen(columns, *words)
    assert code == 0
    assert expected in text
    fits(columns, text)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("columns", WIDTHS)
def test_an_error_fits_in_its_own_words_and_names_the_way_out(columns, capsys):
    assert screen(columns, "train", "pocket", "train.learning_rte=1")[0] == 2
    assert "learning_rate" in capsys.readouterr().err


@pytest.mark.slow
def test_every_verb_of_a_run_fits_the_terminal_and_says_what_comes_next(here):
    (here / "prompts.txt").write_text("What is 3 + 4?\n你好\n", encoding="utf-8")
    verbs = [
        (["train", "pocket", "name=a", *FEW], "next: "),
        (["train", "pocket", "name=b", "data.reasoning=0.25", *FEW], "next: "),
        (["train", "pocket", "name=a", *FEW], "finished already"),
        (["evaluate", "a"], "result: "),
        (["evaluate", "a", "--details"], "difference"),
        (["compare", "a", "b"], "next: "),
        (["export", "a", "--quant", "q8_0"], "next: "),
        (["export", "a", "--quant", "q8_0"], "hf upload"),
        (["verify", "a"], "verified: "),
        (["generate", "a", str(here / "prompts.txt"), str(here / "replies.jsonl"), "--max-new-tokens", "8"], "4 replies"),
        (["replay", "pocket", "--count", "2", *FEW], "rows"),
        (["sweep", "pocket", "--reasoning", "0", "0.5", "--seeds", "1", *FEW], "next: "),
    ]  # fmt: skip
    shown = [verb for verb in verbs if verb[0][0] in ("evaluate", "compare", "verify")]
    for columns, chosen in zip(WIDTHS, (verbs, shown), strict=True):
        for words, expected in chosen:
            code, text = screen(columns, *words)
            print(f"=== {columns}: {' '.join(words[:3])}\n{text}")
            assert code == 0, text
            assert expected in " ".join(text.split())
            # a command that is pasted is not wrapped, and the folder of a test is longer than anybody's
            fits(columns, text.replace(str(here), "outputs"))
