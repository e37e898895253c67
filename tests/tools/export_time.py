"""CPU seconds that the verification of an export takes, on SmolLM2-135M with three GGUF files.

python -m data_recipes.smollm2.make && python -m tests.tools.export_time FOLDER    # FOLDER: where the run is made
"""

import sys
import time
from pathlib import Path

from data_recipes.smollm2.make import make
from tests.support.export_fixtures import run_folder
from toolkit.export import export, verify

GOAL = 25


def main(folder: Path) -> int:
    """Export once, verify again in the same process, and say how long both took; 1 where the goal is missed."""
    run = run_folder(folder / "run", make())
    began = time.process_time()
    export(run, quants=("f16", "q8_0", "q4_k_m"))
    exported = time.process_time()
    verify(run)
    seconds = time.process_time() - exported
    print(f"export {exported - began:.1f} CPU seconds, of which a verification is {seconds:.1f} (goal {GOAL})")
    return int(seconds > GOAL)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
