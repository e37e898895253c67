"""The page about wider benchmarks is true: its task is held out, its commands are sound, and the tools run them.

`LM_EVAL=…/bin/lm_eval EVALSCOPE=…/bin/evalscope python -m pytest -m slow tests/evaluation/test_wider_benchmarks.py`
"""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from data_recipes.pocket import tasks
from tests.support.pocket_run import make_run
from toolkit.__main__ import parser
from toolkit.family import QWEN3_SAMPLING as SAMPLING
from toolkit.files import POCKET, ROOT

FOLDER = ROOT / "data_recipes" / "benchmarks"
SAMPLES = ROOT / "data_recipes" / "samples"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines() if line]
COMMANDS = [line for line in LINES if line.startswith(("lm_eval", "evalscope"))]
EXECUTABLES = {"lm_eval": "LM_EVAL", "evalscope": "EVALSCOPE"}


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def addends(question: str) -> tuple[int, ...]:
    """The two numbers of a sum, the smaller first; nothing for another question."""
    found = re.search(r"(\d+) \+ (\d+)|Add (\d+) and (\d+)\.", question)
    return tuple(sorted(int(number) for number in found.groups() if number)) if found else ()


def mode(command: str) -> str:
    return "thinking" if re.search(r"enable_thinking'?[=:]True", command) else "non_thinking"


def name(command: str) -> str:
    place = "merged" if "outputs/pocket/merged" in command else "server"
    return f"{command.split()[0]}-{place}-{mode(command)}"


def test_the_questions_are_right_and_held_out_of_everything_that_ships():
    asked = rows(FOLDER / "pocket_sums" / "test.jsonl")
    sums = [addends(row["question"]) for row in asked]
    assert len(set(sums)) == len(asked) == 64
    assert all(sum(pair) == int(row["answer"]) for pair, row in zip(sums, asked, strict=True))
    assert all(tasks.Task("", "", "", "", "", f"sum {a} {b}").held_out for a, b in sums)
    shipped = [row["problem"] for path in ("openmath_sample", "heldout_reasoning", "heldout_chat")
               for row in rows(SAMPLES / f"{path}.jsonl")]  # fmt: skip
    shipped += [turn["value"] for row in rows(SAMPLES / "finetome_sample.jsonl") for turn in row["conversations"]]
    assert not set(sums) & {addends(question) for question in shipped}


def test_the_task_reads_the_questions_and_finds_the_answer_of_both_modes():
    task = yaml.safe_load((FOLDER / "pocket_sums.yaml").read_text(encoding="utf-8"))
    folder = ROOT / task["dataset_path"]
    row = rows(folder / f"{task['test_split']}.jsonl")[0]
    assert re.findall(r"{{(\w+)}}", task["doc_to_text"] + task["doc_to_target"]) == ["question", "answer"]
    assert set(row) >= {"question", "answer"}
    pattern = task["filter_list"][0]["filter"][0]
    for reply in ("The answer is \\boxed{57}.", "The answer is 57."):
        assert re.findall(pattern["regex_pattern"], reply)[pattern["group_select"]] == "57"


def test_the_page_shows_both_tools_in_both_modes_on_the_server_and_the_merged_folder():
    shown = {name(command) for command in COMMANDS}
    assert len(COMMANDS) == len(shown) == 8


@pytest.mark.parametrize("command", [line for line in LINES if line.startswith("python -m toolkit")])
def test_the_page_s_own_verbs_and_options_exist(command):
    assert parser().parse_args(shlex.split(command)[3:]).verb in command


@pytest.mark.parametrize("command", COMMANDS, ids=name)
def test_a_command_names_files_that_exist_and_its_mode_s_own_sampling(command):
    for path in re.findall(r"data_recipes/[\w/.]+", command):
        assert (ROOT / path).exists(), path
    for value in SAMPLING[mode(command)].items():
        assert "{}={:g}".format(*value) in command or value[0] == "min_p"
    words = shlex.split(command)
    if "--dataset-args" in words:
        (given,) = json.loads(words[words.index("--dataset-args") + 1]).values()
        assert given["local_path"] == "data_recipes/benchmarks/pocket_sums"
    for switch in re.findall(r"\{'[^ \"]*\}", command):
        assert "enable_thinking" in str(ast.literal_eval(switch))


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """The pocket model, served as the run the page names: it adds two digits when it thinks, and nothing when not."""
    from toolkit.serving import public

    return public([make_run(tmp_path_factory.mktemp("outputs") / "pocket")], "127.0.0.1", 0, None, print, {})


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=name)
def test_the_tool_runs_the_command_and_its_score_is_the_mode_s(command, engine, tmp_path):
    words = shlex.split(command)
    tool = shutil.which(os.environ.get(EXECUTABLES[words[0]], words[0]))
    if tool is None:
        pytest.skip(f"no {words[0]} here: install it as the page says and name it in {EXECUTABLES[words[0]]}")
    python = Path(tool).parent / "python"
    if "merged" in command and subprocess.run([python, "-c", "import torch"], capture_output=True).returncode:
        pytest.skip(f"no torch beside {tool}, which the merged folder needs")
    moved = {
        "http://127.0.0.1:8000": engine.url,
        "outputs/pocket/merged": str(POCKET),
        "outputs/pocket/": f"{tmp_path}/",
    }
    for old, new in moved.items():
        words = [word.replace(old, new) for word in words]
    done = subprocess.run(
        [tool, *words[1:]], cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    right = score(tmp_path)
    assert right > 0.4 if mode(command) == "thinking" else right < 0.2


def score(folder: Path) -> float:
    """The share of right answers, from whichever report the tool wrote."""
    (report,) = [*folder.rglob("results_*.json"), *folder.rglob("gsm8k.json")]
    written = json.loads(report.read_text(encoding="utf-8"))
    if "results" in written:
        return written["results"]["pocket_sums"]["exact_match,last_number"]
    return written["metrics"][0]["score"]
