"""How long until the first training step, phase by phase, next to the value recorded before: `python -m tests.tools.bench` without a GPU.

print(start_up("data_recipes/pocket.yaml"))  # {"mix": 2.1, "model": 13.0, "first_step": 16.4}
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from toolkit.files import ROOT, ToolkitError

RECORD = ROOT / "data_recipes" / "measured" / "cpu_start.json"
ONE_STEP = (
    "import sys; from toolkit import recipe, run; "
    "run.train(recipe.load(sys.argv[1], ['train.max_steps=1', 'train.eval_strategy=no', 'train.load_best_model_at_end=false']), score=False)"
)

WRITTEN = {"mix": ".mixes/*/mix.json", "model": "*/mix.json", "first_step": "*/checkpoints/*/adapter_model.safetensors"}
"""Phase → the first file that is written after it."""


def start_up(recipe: str) -> dict[str, float]:
    """Seconds from the start of a cold process to the end of each phase: mix compiled, model loaded, first step done."""
    with tempfile.TemporaryDirectory() as folder:
        command, began = [sys.executable, "-c", ONE_STEP, recipe], time.time()
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"TOOLKIT_OUTPUTS": folder}, capture_output=True, text=True
        )
        if done.returncode:
            raise ToolkitError(f"the run that was to be timed failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        times = {phase: next(Path(folder).glob(file)).stat().st_mtime for phase, file in WRITTEN.items()}
        return {phase: round(at - began, 2) for phase, at in times.items()}


def measure(recipe: str, repeats: int) -> dict:
    """Medians of several cold starts, with hardware, load, date and commit."""
    from toolkit.training.folder import commit

    runs = [start_up(recipe) for _ in range(repeats)]
    return {
        "recipe": recipe,
        "seconds_to": {phase: median(r[phase] for r in runs) for phase in runs[0]},
        "runs": runs,
        "cpu": processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
    }


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def recorded(file: Path = RECORD) -> dict | None:
    """The last recorded measurement, or None."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def keep(measured: dict, file: Path = RECORD) -> None:
    """Keep a measurement as the one to compare with."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(measured, indent=1), encoding="utf-8")


def table(measured: dict, before: dict | None):
    """Phases of a start, now and as recorded."""
    from rich.table import Table

    def head(m: dict) -> str:
        return f"{m['date']}, {m['cores']} cores, load {m['load']}, {m['commit']}"

    table = Table(title=f"seconds from the start of the process ({measured['recipe']})", title_justify="left")
    for column in (
        "until the end of",
        f"now ({head(measured)})",
        f"recorded ({head(before)})" if before else "recorded: none",
    ):
        table.add_column(column)
    for phase, seconds in measured["seconds_to"].items():
        old = f"{before['seconds_to'][phase]:.1f}" if before else ""
        table.add_row(phase.replace("_", " "), f"{seconds:.1f}", old)
    return table
