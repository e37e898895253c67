"""A data file becomes a recipe: what is guessed is right or said to be unknown, and what is no data is named and left."""

import json
import random

import pytest

from tests.support.pocket_run import Screen
from toolkit import __main__ as cli
from toolkit import recipe
from toolkit.data import guess
from toolkit.data.guess import understand
from toolkit.files import ToolkitError
from toolkit.recipe import Source

ROWS = 30
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}]
SMALL = ["model.model_name=pocket", "model.max_seq_length=512", "train.max_steps=1", "train.eval_strategy=no",
         "train.load_best_model_at_end=false", "train.report_to=none", "evaluate.max_new_tokens=4",
         "lora.target_modules=[q_proj]"]  # fmt: skip


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def sums(number: int) -> tuple[str, str]:
    dice = random.Random(number)
    a, b = dice.randrange(100, 1000), dice.randrange(100, 1000)
    return f"Please add {a} and {b} for the bakery's order {number}.", f"That makes {a + b} loaves."


def csv_with_odd_names(folder):
    lines = ["Kunde; Frage (Text) ;Antwort vom Team"]
    lines += [";".join([str(n), *sums(n)]) for n in range(ROWS)]
    (folder / "faq.csv").write_text("\n".join(lines), encoding="utf-8")
    return ["faq.csv"]


def alpaca_with_system(folder):
    rows = [
        {"instruction": sums(n)[0], "input": "", "output": sums(n)[1], "system": "You count loaves."}
        for n in range(ROWS)
    ]
    (folder / "alpaca.json").write_text(json.dumps(rows), encoding="utf-8")
    return ["alpaca.json"]


def sharegpt_with_tools(folder):
    rows = [
        {
            "conversations": [
                {"from": "human", "value": f"What time is it in shop {n}?"},
                {"from": "function_call", "value": json.dumps({"name": "clock", "arguments": {"shop": str(n)}})},
                {"from": "observation", "value": json.dumps({"time": f"{n % 24}:00"})},
                {"from": "gpt", "value": f"In shop {n} it is {n % 24} o'clock."},
            ],
            "tools": json.dumps(TOOLS),
        }
        for n in range(ROWS)
    ]
    write_lines(folder / "calls.jsonl", rows)
    return ["calls.jsonl"]


def openai_jsonl(folder):
    rows = [
        {"messages": [{"role": "user", "content": sums(n)[0]}, {"role": "assistant", "content": sums(n)[1]}]}
        for n in range(ROWS)
    ]
    write_lines(folder / "chat.jsonl", rows)
    return ["chat.jsonl"]


def parquet_folder(folder):
    import pyarrow
    import pyarrow.parquet

    (folder / "medical").mkdir()
    for part in (0, 1):
        numbers = range(part * ROWS, part * ROWS + ROWS)
        columns = {
            "Question": [sums(n)[0] for n in numbers],
            "Complex_CoT": [f"I add the two numbers of order {n}." for n in numbers],
            "Response": [sums(n)[1] for n in numbers],
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "medical" / f"train-{part:05}-of-00002.parquet")
    return ["medical"]


def two_files_with_counts(folder):
    rows = [{"问题": f"{sums(n)[0]} 多少？", "回答": f"一共 {sums(n)[1]}"} for n in range(ROWS)]
    write_lines(folder / "zh.jsonl", rows)
    return ["zh.jsonl#20", *[f"{openai_jsonl(folder)[0]}#12"]]


FILES = {
    csv_with_odd_names: ({"user": "Frage (Text)", "assistant": "Antwort vom Team"}, "non_thinking"),
    alpaca_with_system: ({}, "non_thinking"),
    sharegpt_with_tools: ({}, "non_thinking"),
    openai_jsonl: ({}, "non_thinking"),
    parquet_folder: ({"user": "Question", "assistant": "Response", "reasoning": "Complex_CoT"}, "thinking"),
    two_files_with_counts: ({"user": "问题", "assistant": "回答"}, "non_thinking"),
}
CASES = pytest.mark.parametrize("make", FILES, ids=lambda make: make.__name__)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path


@CASES
def test_format_columns_and_modes_are_guessed(make, here):
    columns, mode = FILES[make]
    found = understand(Source(make(here)[0]))
    assert {role: column.strip() for role, column in found.source.columns.items()} == columns
    assert [name for name, count in found.modes.items() if count] == [mode]
    assert found.rejected == []
    text = "\n".join(found.lines())
    assert text.count("of which the last turn is trained on") == 3
    assert all(len(line) <= 80 for line in text.splitlines()[1:])


@CASES
def test_one_command_writes_a_recipe_that_loads_and_names_the_next_command(make, here, capsys):
    data = make(here)
    assert cli.main(["init", *data, "--model", "pocket", "--name", "mine"]) == 0
    assert "next:    python -m toolkit train mine.yaml" in capsys.readouterr().out
    built = recipe.load("mine.yaml")
    assert [source.path for source in built.data.sources] == data
    assert built.model.model_name == "pocket"
    # the person's own questions are answered before and after, not ours
    assert "Who are you?" not in built.evaluate.prompts or make is sharegpt_with_tools


@CASES
def test_the_recipe_that_init_writes_trains(make, here):
    from rich.console import Console

    from toolkit.training.model import unsloth

    unsloth()  # before transformers, which it patches
    from toolkit import run

    file = guess.start(make(here), "pocket", "mine", [], lambda _: None)
    screen = Screen()
    folder = run.train(recipe.load(file, SMALL), Console(file=screen, width=120), score=False)
    assert json.loads((folder / "manifest.json").read_text())["state"] == "finished"


def test_train_takes_a_data_file_and_goes_on_with_the_recipe_it_made(here, capsys, monkeypatch):
    from toolkit import run

    trained = []
    monkeypatch.setattr(run, "train", lambda loaded, *_, **__: trained.append(loaded))
    [data] = csv_with_odd_names(here)
    for _ in range(2):  # the same command resumes: its recipe is not written again
        assert cli.main(["train", data, "model.model_name=pocket"]) == 0
    assert "faq.yaml is here already and is left as it is" in capsys.readouterr().out
    assert [loaded.name for loaded in trained] == ["faq", "faq"]
    assert trained[0] == trained[1]


def test_a_recipe_of_something_else_is_not_overwritten(here, capsys):
    (here / "faq.yaml").write_text("name: faq\n")
    assert cli.main(["init", *csv_with_odd_names(here)]) == 2
    assert "faq.yaml: is here already, for something else: choose another name (--name)" in capsys.readouterr().err
    assert (here / "faq.yaml").read_text() == "name: faq\n"


@pytest.mark.parametrize(("rows", "expected"), [(30, 10), (90, 20), (1_000, 100), (20_000, 200), (9, 3)])
def test_a_tenth_is_held_out_within_bounds(rows, expected):
    assert guess.held_out(rows) == expected


def test_what_cannot_be_known_is_asked_by_the_one_key_to_set(here, capsys):
    write_lines(here / "odd.jsonl", [{"alpha": sums(n)[0], "beta": sums(n)[1]} for n in range(ROWS)])
    assert cli.main(["init", "odd.jsonl"]) == 2
    err = capsys.readouterr().err
    assert "has the columns alpha, beta: which of them holds what the user says?" in err
    assert "Add data.sources.0.columns.user=alpha to this command" in err
    words = ["data.sources.0.columns.user=alpha", "data.sources.0.columns.assistant=beta"]
    assert cli.main(["init", "odd.jsonl", words[0]]) == 2
    assert "What user is in 'alpha'. Add data.sources.0.columns.assistant=beta" in capsys.readouterr().err
    assert cli.main(["init", "odd.jsonl", *words]) == 0
    assert recipe.load("odd.yaml").data.sources[0].columns == {"user": "alpha", "assistant": "beta"}


# --- what is no data -------------------------------------------------------------------------------------------------


def empty_file(folder):
    (folder / "x.jsonl").touch()
    return "x.jsonl"


def one_row(folder):
    write_lines(folder / "x.jsonl", [{"query": "Hi", "response": "Hello"}])
    return "x.jsonl"


def two_formats(folder):
    rows = [{"query": sums(n)[0], "response": sums(n)[1]} for n in range(ROWS)]
    rows += [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": str(n)}]} for n in range(ROWS)
    ]
    write_lines(folder / "x.jsonl", rows)
    return "x.jsonl"


def formats_in_turn(folder):
    rows = []
    for n in range(ROWS):
        rows.append({"instruction": sums(n)[0], "output": sums(n)[1]})
        rows.append({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": str(n)}]})
    write_lines(folder / "x.jsonl", rows)
    return "x.jsonl"


def very_wide(folder):
    names = ",".join(f"gene{n}" for n in range(100_000))
    (folder / "x.csv").write_text(f"{names}\n" + f"{','.join('1' * 100_000)}\n" * 10)
    return "x.csv"


def pictures(folder):
    (folder / "photos").mkdir()
    for n in range(12):
        (folder / "photos" / f"{n}.png").write_bytes(b"\x89PNG")
    return "photos"


def empty_folder(folder):
    (folder / "nothing").mkdir()
    return "nothing"


def pipe_in_a_folder(folder):
    import os

    (folder / "pipes").mkdir()
    os.mkfifo(folder / "pipes" / "rows.jsonl")
    return "pipes"


def plain_text_column(folder):
    write_lines(folder / "x.jsonl", [{"text": sums(n)[0]} for n in range(ROWS)])
    return "x.jsonl"


def rows_without_replies(folder):
    write_lines(folder / "x.jsonl", [{"messages": [{"role": "user", "content": sums(n)[0]}]} for n in range(ROWS)])
    return "x.jsonl"


BAD = {
    empty_file: "x.jsonl.*empty",
    one_row: "x.jsonl: rows found: 1. Some are held out: expected 8 or more",
    two_formats: "x.jsonl: holds rows of several formats: query_response and sharegpt. Split it",
    formats_in_turn: "x.jsonl: holds rows of several formats: alpaca and messages. Split it",
    very_wide: "x.csv.*has 100,000 columns",
    pictures: r"photos: expected .*\.jsonl.*found 0.png, 1.png",
    empty_folder: r"nothing: expected .*\.jsonl.*found no files",
    pipe_in_a_folder: "rows.jsonl: is a pipe",
    plain_text_column: "x.jsonl.*Plain text has no question and answer to tell apart",
    rows_without_replies: "x.jsonl: 30 of 30 rows cannot be trained on",
}


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_what_is_no_data_is_said_and_nothing_is_written(make, here):
    with pytest.raises(ToolkitError, match=BAD[make]):
        guess.start([make(here)], "pocket", "mine", [], lambda _: None)
    assert not (here / "mine.yaml").exists()


@pytest.mark.parametrize(
    ("file", "name"),
    [("con.csv", "con-run"), ("base.jsonl", "base-run"), ("pocket.csv", "pocket-run"), ("my data (1).v2.csv", "my-data-1"),
     ("问答.jsonl#50", "问答"), (".", "mine"), ("x" * 200 + ".csv", "x" * 50)],
)  # fmt: skip
def test_a_run_is_called_like_its_file_where_that_is_a_name(file, name):
    assert guess.run_name(file) == name


def test_a_name_that_no_run_may_have_leaves_no_file(here):
    with pytest.raises(ToolkitError, match="name: 'a/b' becomes a folder|could not be written"):
        guess.start(openai_jsonl(here), "pocket", "a/b", [], lambda _: None)
    with pytest.raises(ToolkitError, match="name: 'nul' becomes a folder"):
        guess.start(openai_jsonl(here), "pocket", "nul", [], lambda _: None)
    assert [*here.rglob("*.yaml")] == []


@pytest.mark.parametrize("words", [["train", "nowhere.jsonl"], ["init", "nowhere.jsonl"], ["init", "nowhere.jsonl#5"]])
def test_a_data_file_that_is_not_there_is_no_missing_recipe(words, here, capsys):
    openai_jsonl(here)
    assert cli.main(words) == 2
    assert "nowhere.jsonl: no such file or folder here" in capsys.readouterr().err


def test_a_pipe_is_named_without_waiting_for_it(here, capsys):
    import os

    os.mkfifo(here / "rows.jsonl")
    assert cli.main(["train", "rows.jsonl"]) == 2
    assert "rows.jsonl: is a pipe" in capsys.readouterr().err


def test_a_folder_named_like_a_recipe_does_not_hide_it(here):
    (here / "pocket").mkdir()
    write_lines(here / "pocket" / "rows.jsonl", [])
    assert not guess.is_data("pocket")
    assert guess.is_data("./pocket/rows.jsonl")
