"""Runs done one by one in processes of their own, by any number of workers that share a folder.

    failed = work(["hybrid-r0-s3407", "hybrid-r1-s3407"], folder, lambda recipe_file: [...], console)

A worker claims a run by creating a numbered file, which only one can. A claim holds as long as the worker or the run's own
process lives; kill either or both and whoever comes next takes over, from the run's last checkpoint.
"""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from toolkit.files import outputs

TRIES, TAIL, PATIENCE = 2, 15, 2.0
"""Attempts at a run, lines of a crashed run's log that are shown, seconds between looks at runs that others hold."""


def finished(run: str) -> bool:
    """Trained and scored."""
    folder = outputs() / run
    manifest = folder / "manifest.json"
    return (folder / "eval.json").is_file() and manifest.is_file() and "finished" in json.loads(manifest.read_text())


def work(runs: Sequence[str], folder: Path, command: Callable[[Path], list[str]], console) -> list[str]:
    """Do every run (a name under outputs/, its recipe in `folder`/recipes) that nobody else does, then wait for the others';
    returns those that failed here. `command` gives the words that train and score a recipe file."""
    for run in runs:
        if finished(run):
            console.print(f"{run}: finished before, left as it is")
    failed: list[str] = []
    waiting = None
    while open_ := [run for run in runs if not finished(run) and run not in failed]:
        run, held = _take(open_, folder / "claims")
        if run is None:
            waiting = _wait(folder / "claims" / open_[0], waiting, console)
            continue
        try:
            if not _attempts(run, held, folder, command, console):
                failed.append(run)
        finally:
            held.unlink()
    return failed


def _take(open_: list[str], claims: Path) -> tuple[str, Path] | tuple[None, None]:
    """The first run that can be claimed and is still to be done."""
    for run in open_:
        if held := claim(claims / run):
            if not finished(run):
                return run, held
            held.unlink()  # whoever had it finished it between our look and our claim
    return None, None


def _wait(claims: Path, before: Path | None, console) -> Path | None:
    newest = _newest(claims)
    if newest and newest != before:
        console.print(
            f"waiting for {claims.name}, which another process does (if it is gone for good, delete {newest})"
        )
    time.sleep(PATIENCE)
    return newest


def _attempts(run: str, claimed: Path, folder: Path, command: Callable, console) -> bool:
    """One run in its own process, twice if it crashes; the end of its log is shown when it does."""
    log = folder / "logs" / f"{run}.log"
    for attempt in range(1, TRIES + 1):
        console.print(f"{run}: {'training' if attempt == 1 else 'trying again'} (log: {log})")
        began, code = time.time(), _process(command(folder / "recipes" / f"{run}.yaml"), log, claimed, folder.name)
        if code == 0 and finished(run):
            console.print(f"{run}: done in {time.time() - began:.0f} s")
            return True
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
        console.print(
            f"{run}: crashed after {time.time() - began:.0f} s with exit code {code}; its log ends:", style="red"
        )
        console.print("\n".join(f"    {line}" for line in tail), markup=False)
    return False


def _process(command: list[str], log: Path, claimed: Path, group: str) -> int:
    """Exit code of the run's process. Its number joins the claim: should only this process be killed, the claim holds on."""
    environment = os.environ | {"TOOLKIT_SWEEP": group, "PYTHONUNBUFFERED": "1"}
    with open(log, "a", encoding="utf-8") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        )
        try:
            claimed.write_text(json.dumps(_signature(os.getpid(), process.pid)), encoding="utf-8")
            return process.wait()
        except BaseException:  # an interrupt too must not leave an orphan training
            process.terminate()
            process.wait()
            raise


def claim(folder: Path) -> Path | None:
    """The file that makes a run ours, or None while a living process holds it. A claim whose processes are gone is void;
    then whoever first creates the next number has it, so that two can never take the same."""
    newest = _newest(folder)
    if newest and _alive(newest):
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / str(int(newest.name) + 1 if newest else 1)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(json.dumps(_signature(os.getpid())))
    except FileExistsError:
        return None
    return path


def _newest(folder: Path) -> Path | None:
    return max(folder.glob("*"), key=lambda path: int(path.name), default=None)


def _signature(*pids: int) -> dict:
    import psutil

    return {"host": platform.node(), "processes": {str(pid): psutil.Process(pid).create_time() for pid in pids}}


def _alive(claimed: Path) -> bool:
    """Whether one of a claim's processes runs; another machine's are believed to."""
    import psutil

    try:
        held = json.loads(claimed.read_text(encoding="utf-8"))
    except FileNotFoundError:  # given back just now
        return False
    except ValueError:  # between creation and its first line, or killed there
        return time.time() - claimed.stat().st_mtime < 5 * PATIENCE
    if held["host"] != platform.node():
        return True
    for pid, began in held["processes"].items():
        try:
            process = psutil.Process(int(pid))
            if abs(process.create_time() - began) < 1 and process.status() != psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            continue
    return False
