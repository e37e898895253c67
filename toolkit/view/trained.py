"""What the steps of a run print: its mix, the fixed prompts before and after training, its scores and what comes next.

report(Path("outputs/pocket"), Console())
"""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from toolkit.files import outputs, read_json, read_jsonl
from toolkit.records import Evaluation, JsonObject, MixReport
from toolkit.view import tables


def report(folder: Path, console: Console) -> None:
    """Print the fixed prompts before and after a training, its speed and memory."""
    from toolkit.training.record import speed

    manifest = read_json(folder / "manifest.json")
    # a recipe may ask no prompts
    if samples := read_jsonl(folder / "samples.jsonl"):
        console.print(before_after(samples))
    seconds, skipped = manifest["train_seconds"], manifest["skipped_steps"]
    console.print(f"{manifest['steps']} steps in {seconds:.0f} s: {speed(manifest)}")
    if skipped:
        console.print(f"{skipped} of the steps were skipped: their fp16 gradients overflowed")


def before_after(samples: list[JsonObject]) -> Table:
    """A table of the fixed prompts' replies before and after training, in each mode of the model."""
    return tables.side_by_side(paired(samples))


def paired(samples: list[JsonObject]) -> list[JsonObject]:
    """The same as rows {prompt, mode, before: ShownReply, after: ShownReply}."""
    rows: dict[tuple[str, str], JsonObject] = {}
    for sample in samples:
        prompt, mode = sample["prompt"], sample["mode"]
        row = rows.setdefault((prompt, mode), {"prompt": prompt, "mode": mode})
        row[sample["when"]] = tables.ShownReply(sample["reasoning"], sample["answer"])
    return list(rows.values())


def print_mix(report: MixReport, console: Console, next_command: str = "") -> None:
    """A verdict, shares planned and achieved, drops by reason, warnings."""
    console.print(tables.verdict(report), style="bold", markup=False)
    if next_command:
        console.print(f"next: {next_command}", markup=False)
    console.print(tables.mix_table(report))
    for note in tables.notes(report):
        console.print(f"· {note}", style="yellow" if note.startswith("warning") else None, markup=False)


def print_result(result: Evaluation, folder: Path, console: Console, *, details: bool) -> None:
    """The verdict of an evaluation and the next command; with `details` the table of all metrics first."""
    from toolkit.evaluation import words

    if details:
        console.print(tables.score_table(result))
    for line in [*words.own_rows_text(result), *result["verdict"]]:
        console.print(line, markup=False)
    console.print(f"the run: {folder} (to read it: report.html)")
    if console.is_jupyter:  # the notebook's next cell is what comes next, and no command line
        return
    name = folder.name if folder.parent == outputs() else folder
    following = f"chat {name}   or   python -m toolkit export {name}"
    # a run that lost something is looked at before it is exported
    if result["verdict"][-1].startswith(("result: WORSE", "result: BROKEN")):
        following = f"evaluate {name} {'--level full' if details else '--details'}"
    console.print(f"next:    python -m toolkit {following}")
