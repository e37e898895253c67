"""What a training did, for the screen: its speed and memory, and the fixed prompts' replies before and after.

report(Path("outputs/pocket"), Console())
"""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from toolkit.files import read_json, read_jsonl
from toolkit.view import tables


def report(folder: Path, console: Console) -> None:
    """Print the fixed prompts before and after a training, its speed and memory."""
    from toolkit.training.record import speed

    manifest = read_json(folder / "manifest.json")
    console.print(before_after(read_jsonl(folder / "samples.jsonl")))
    console.print(f"{manifest['steps']} steps in {manifest['train_seconds']:.0f} s: {speed(manifest)}")
    if manifest["skipped_steps"]:
        console.print(f"{manifest['skipped_steps']} of the steps were skipped: their fp16 gradients overflowed")


def before_after(rows: list[dict[str, str]]) -> Table:
    """A table of the fixed prompts' replies before and after training, in each mode of the model."""
    replies: dict[tuple[str, str], dict[str, tables.ShownReply]] = {}
    for row in rows:
        if row["when"] not in ("before", "after"):
            continue
        key = (row["prompt"], row["mode"])
        replies[key] = replies.get(key, {}) | {row["when"]: tables.ShownReply(row["reasoning"], row["answer"])}
    return tables.side_by_side([{"prompt": prompt, "mode": mode, **pair} for (prompt, mode), pair in replies.items()])
