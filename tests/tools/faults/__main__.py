"""The fault campaign as one command: a table (fault, phase, tries, survived), recorded in data_recipes/measured/faults.json.

python -m tests.tools.faults            (all; about an hour on two cores)    python -m tests.tools.faults --quick --only "kill -9"
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT="0", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1",
                  CUDA_VISIBLE_DEVICES="", WANDB_MODE="offline")  # fmt: skip

RECORD = Path(__file__).resolve().parents[3] / "data_recipes" / "measured" / "faults.json"


def campaign(tries: list[tuple[int, int]], workers: int, scratch: Path, outcomes: dict) -> None:
    """Try everything; `outcomes` gets {fault index: [None (survived) or what was lost, …]} as it comes."""
    from tests.tools.faults.campaign import FAULTS, worker

    context = multiprocessing.get_context("spawn")
    todo, done = context.Queue(), context.Queue()
    processes = [context.Process(target=worker, args=(todo, done, scratch / str(i))) for i in range(workers)]
    for item in [*tries, *[None] * workers]:
        todo.put(item)
    for process in processes:
        process.start()
    for number in range(1, len(tries) + 1):
        index, turn, lost, took = done.get()
        outcomes.setdefault(index, []).append(lost)
        print(
            f"{time.strftime('%H:%M:%S')} {number}/{len(tries)}  {FAULTS[index].name}, {FAULTS[index].phase} #{turn}: {lost or 'survived'}  {took}",
            flush=True,
        )
    for process in processes:
        process.join()


def rows_of(outcomes: dict) -> list[dict]:
    """The table: one row per fault and phase."""
    from tests.tools.faults.campaign import FAULTS

    rows = []
    for index, found in sorted(outcomes.items()):
        skipped = [f for f in found if f and f.startswith("skipped")]
        lost = [f for f in found if f and not f.startswith("skipped")]
        row = {"fault": FAULTS[index].name, "phase": FAULTS[index].phase, "tries": len(found),
               "survived": found.count(None), "skipped": len(skipped)}  # fmt: skip
        rows.append(row | ({"lost": lost} if lost else {}))
    return rows


def main() -> int:
    """Run the campaign; exit 1 when anything was lost."""
    options = argparse.ArgumentParser(prog="python -m tests.tools.faults")
    options.add_argument("--quick", action="store_true", help="the subset that `make test` runs")
    options.add_argument("--only", help="faults whose name and phase match this expression")
    options.add_argument("--tries", type=int, default=100, metavar="N", help="at most N of each fault")
    options.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    options.add_argument("--workers", type=int, default=2)
    args = options.parse_args()
    from rich.console import Console
    from rich.table import Table

    from tests.tools.faults.campaign import FAULTS

    chosen = [
        (i, turn)
        for i, one in enumerate(FAULTS)
        if not args.only or re.search(args.only, f"{one.name} {one.phase}")
        for turn in range(min(args.tries, int(one.quick) if args.quick else one.tries))
    ]
    # every fault once before any twice, the telling and the quick ones first: what is interrupted has seen the most
    order = ("trained", "mixed", "", "exported", "swept")
    chosen.sort(key=lambda item: (item[1], not FAULTS[item[0]].quick, order.index(FAULTS[item[0]].ends_in)))
    started, outcomes = time.monotonic(), {}
    with contextlib.suppress(KeyboardInterrupt), tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        campaign(chosen, args.workers, Path(scratch), outcomes)
    rows, minutes = rows_of(outcomes), (time.monotonic() - started) / 60
    table = Table(title=f"{sum(map(len, outcomes.values()))} of {len(chosen)} faults in {minutes:.1f} minutes")
    for heading in ("fault", "phase", "tries", "survived"):
        table.add_column(heading)
    for row in rows:
        table.add_row(row["fault"], row["phase"], str(row["tries"] - row["skipped"]), str(row["survived"]))
    Console().print(table)
    lost = [row for row in rows if "lost" in row]
    for row in lost:
        print(f"LOST: {row['fault']}, {row['phase']}: {row['lost'][0]}")
    if args.record:
        from tests.tools.bench.start import processor
        from toolkit.training.folder import commit

        fuzz = json.loads(RECORD.read_text())["fuzz"] if RECORD.is_file() else {}  # of another day: stays
        RECORD.write_text(json.dumps({"machine": f"{processor()}, {os.cpu_count()} cores", "date": time.strftime("%Y-%m-%d"), "commit": commit(),
                                      "minutes": round(minutes, 1), "planned": len(chosen),
                                      "tried": sum(row["tries"] for row in rows), "rows": rows, "fuzz": fuzz}, indent=1) + "\n")  # fmt: skip
    return 1 if lost or not outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
