"""Write `data_recipes/samples/`: real formats, the pocket world's content. `python -m data_recipes.pocket.samples`"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from random import Random

from data_recipes.pocket import score, tasks
from toolkit.files import ROOT

FOLDER = ROOT / "data_recipes" / "samples"
SEED = 20
REASONING_ROWS, CHAT_ROWS = 1800, 3600  # a chat row has 9 supervised tokens, a worked sum about 60
SOURCES = {tasks.NEW_SKILL: "pocket_new_skill", "sum2": "pocket_known_sums"}

README = """# Sample data

Small files in the formats of the datasets the recipes use, so that everything runs offline with the pocket model.
Their content is the pocket world (`data_recipes/pocket/tasks.py`). Written by `python -m data_recipes.pocket.samples`, byte for
byte; do not edit by hand.

| file | rows | schema | content |
|---|--:|---|---|
{table}

`heldout_*.jsonl` never train: an instance is held out by a hash of its key, and neither the pocket model's own training
data nor the other samples contain one (`tests/families/test_pocket.py` proves it). In `heldout_reasoning.jsonl` the column
`problem_source` tells the new skill (`{new}`) from what the model knew before (`{known}`).

Licence: written for this project by the script; CC0, no rights reserved.
"""


def openmath_row(task: tasks.Task) -> dict:
    """A row as unsloth/OpenMathReasoning-mini has it, keys in the order of nvidia/OpenMathReasoning's card."""
    return {
        "expected_answer": task.answer,
        "problem_type": "has_answer_extracted",
        "problem_source": SOURCES[task.skill],
        "generation_model": "pocket",
        "pass_rate_72b_tir": "1.0",
        "problem": task.question,
        "generated_solution": f"<think>\n{task.steps}\n</think>\n\n{task.reply(True)}",
        "inference_mode": "cot",
    }


def finetome_row(messages: list[dict]) -> dict:
    """A row as mlabonne/FineTome-100k has it: direct answers, no reasoning anywhere."""
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in messages]
    return {"conversations": turns, "source": "pocket_chat", "score": 5.0}


def reasoning_sample() -> list[dict]:
    """Different problems, four in five of the new skill: the rest keeps the sums the model already knows."""
    rng, found = Random(SEED), {}
    while len(found) < REASONING_ROWS:
        task = tasks.draw(rng, "sum2" if rng.random() < 0.2 else tasks.NEW_SKILL)
        found.setdefault(task.question, openmath_row(task))
    return list(found.values())


def chat_sample() -> list[dict]:
    """Different conversations of one to three turns; about one question in seven is a sum, answered at once."""
    rng, found = Random(SEED + 1), {}
    skills = [*tasks.CHAT, "sum1", "sum2"]
    while len(found) < CHAT_ROWS:
        messages = tasks.conversation(rng, skills, thinking=False, switches=False)
        found.setdefault(json.dumps(messages), finetome_row(messages))
    return list(found.values())


def heldout_reasoning() -> list[dict]:
    return [
        openmath_row(task)
        for skill, n in ((tasks.NEW_SKILL, 200), ("sum2", 100))
        for task in score.held_out([skill], n, SEED + 2)
    ]


def heldout_chat() -> list[dict]:
    asked = score.held_out(tasks.EXACT, 200, SEED + 3)
    return [{"problem": task.question, "expected_answer": task.answer, "skill": task.skill} for task in asked]


FILES = {
    "openmath_sample.jsonl": (
        reasoning_sample,
        "OpenMathReasoning, `cot` split",
        "three-digit sums worked out by columns, some two-digit ones",
    ),
    "finetome_sample.jsonl": (
        chat_sample,
        "FineTome (ShareGPT)",
        "everyday questions and sums answered at once, one to three turns",
    ),
    "heldout_reasoning.jsonl": (
        heldout_reasoning,
        "OpenMathReasoning, `cot` split",
        "200 new-skill sums, 100 known ones",
    ),
    "heldout_chat.jsonl": (
        heldout_chat,
        "`problem`, `expected_answer`, `skill`",
        "chat questions with one exact short answer",
    ),
}


def write(folder: Path = FOLDER) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, (make, schema, content) in FILES.items():
        rows = make()
        (folder / name).write_text("".join(_lines(rows)), encoding="utf-8", newline="\n")
        lines.append(f"| `{name}` | {len(rows):,} | {schema} | {content} |")
    known, new = SOURCES["sum2"], SOURCES[tasks.NEW_SKILL]
    (folder / "README.md").write_text(
        README.format(table="\n".join(lines), new=new, known=known), encoding="utf-8", newline="\n"
    )


def _lines(rows: list[dict]) -> Iterable[str]:
    return (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
