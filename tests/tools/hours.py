"""What a run was forecast to take on this CPU, and what it took: the pocket model and SmolLM2, three tries each.

OMP_NUM_THREADS=1 python -m tests.tools.hours      # → data_recipes/measured/time_forecast.json (outputs/smollm2 is there)

Both are counted in CPU seconds of one thread: those of a quiet machine, whatever else runs on this one.
"""

import io
import json
import os
import tempfile
import time
from pathlib import Path

import pytest
from rich.console import Console

RECORD = Path(__file__).resolve().parents[2] / "data_recipes" / "measured" / "time_forecast.json"
RUNS = {
    "pocket": "data.budget=20000 train.max_steps=24".split(),
    "smollm2": "train.max_steps=20 evaluate.level=fast".split(),
}
PLAIN = "train.report_to=none train.eval_steps=0.5 train.save_steps=0.5 evaluate.forgetting_probes=0".split()
TRIES = 3


def count_cpu_time() -> None:
    """From here on every clock of the toolkit and of the trainer goes with this process's CPU time."""
    began = time.time() - time.process_time()
    time.perf_counter = time.monotonic = time.process_time
    time.time = lambda: began + time.process_time()


def timed(name: str, changes: list[str], folder: Path) -> dict:
    """Train once: seconds of training and validation, forecast before it and as the manifest has them after it."""
    from toolkit import recipe, run
    from toolkit.files import ROOT, read_json
    from toolkit.machine import choose, speed

    os.environ["TOOLKIT_OUTPUTS"] = str(folder)
    speed.here.cache_clear()
    plan = recipe.load(ROOT / "data_recipes" / f"{name}.yaml", [*PLAIN, *changes])
    planned = []
    with pytest.MonkeyPatch.context() as patch:
        say = choose.say_hours
        patch.setattr(choose, "say_hours", lambda *given: planned.append(say(*given)) or planned[0])
        made = run.train(plan, Console(file=io.StringIO()), score=False)
    manifest, [forecast] = read_json(made / "manifest.json"), planned
    took = {"training": manifest["train_seconds"], "validation": manifest["evaluation_seconds"]}
    began = time.process_time()
    run.evaluate(made, Console(file=io.StringIO()), level="fast")
    return {
        "forecast": {part: round(getattr(forecast, part), 2) for part in took},
        "measured": {part: round(seconds, 2) for part, seconds in took.items()},
        "speed": manifest["time"]["speed"],
        "error": round(manifest["time"]["error"], 4),
        "load_and_score_fast": round(time.process_time() - began, 1),
        "load_average": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    """Measure and write the record."""
    count_cpu_time()
    from tests.tools.bench.start import processor
    from toolkit.training.folder import commit

    record = {
        "what": "Forecast of training and validation, and what they took, in CPU seconds of one thread; error: forecast / measured - 1",
        "command": "OMP_NUM_THREADS=1 python -m tests.tools.hours",
        "hardware": f"one of {os.cpu_count()} shared CPU cores, {processor()}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "runs": {},
    }
    for name, changes in RUNS.items():
        tries: list[dict] = []
        record["runs"][name] = {"changes": [*PLAIN, *changes], "tries": tries}
        for _ in range(TRIES):
            with tempfile.TemporaryDirectory() as folder:
                tries.append(timed(name, changes, Path(folder)))
            print(name, tries[-1], flush=True)
            RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
