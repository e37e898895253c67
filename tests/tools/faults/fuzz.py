"""Generated rows, files, recipes and overrides by the thousand: success or a clear error, and no wrong success.

python -m tests.tools.faults.fuzz 20000          (cases of each of the four kinds; the smallest failing case is printed)
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, given, settings

from tests.support import recipe_strategies, row_strategies
from tests.tools.faults.__main__ import RECORD

KINDS = {
    "sound rows": (row_strategies.sound_rows(), row_strategies.assert_sound),
    "broken rows": (row_strategies.broken_rows(), row_strategies.assert_broken),
    "files": (row_strategies.files(), row_strategies.assert_file),
    "recipes with overrides": (recipe_strategies.cases(), recipe_strategies.assert_recipe),
}


def fuzz(kind: str, n: int) -> int:
    """Check n generated cases of a kind; returns how many ran. Raises AssertionError with the smallest failing case."""
    strategy, check = KINDS[kind]
    done = 0
    with tempfile.TemporaryDirectory() as folder:

        def one(case) -> None:
            nonlocal done
            check(case, Path(folder)) if kind == "files" else check(case)
            done += 1

        options = settings(max_examples=n, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        options(given(strategy)(one))()
    return done


def main() -> None:
    """Fuzz every kind and record how many cases of each there were."""
    options = argparse.ArgumentParser(prog="python -m tests.tools.faults.fuzz")
    options.add_argument("cases", type=int, nargs="?", default=20_000, help="of each kind; default 20000")
    options.add_argument("--record", action="store_true", help=f"write the counts into {RECORD.name}")
    args = options.parse_args()
    counts = {}
    for kind in KINDS:
        started = time.monotonic()
        counts[kind] = fuzz(kind, args.cases)
        print(f"{counts[kind]:,} {kind}: nothing found, {time.monotonic() - started:.0f} s", flush=True)
    if args.record:
        from toolkit.training.folder import commit

        record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
        RECORD.write_text(json.dumps(record | {"fuzz": {"commit": commit(), **counts}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
