"""Where a fault is tried: commands in forked processes, kills at a moment, and what a run must look like afterwards.

place = Workplace(tmp_path); place.kill(["train", *RECIPE], when=files("checkpoints/checkpoint-4")); place.run(["train", *RECIPE])

Each command is `toolkit.__main__.main(argv)` in a fork of a process that has imported unsloth already: a try then costs
seconds and not the quarter of a minute that the import takes. The fork is made before any parallel work, as OpenMP demands.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.support.collector import pass_over_imports

SETTINGS = [
    "name=r", "data.budget=2500", "data.validation_size=6", "train.max_steps=8", "train.per_device_train_batch_size=4",
    "train.eval_steps=2", "train.save_steps=2", "train.report_to=none", "evaluate.max_new_tokens=8",
    "evaluate.questions.0.max_rows=2", "evaluate.questions.1.max_rows=2", 'evaluate.prompts=["Hi"]',
]  # fmt: skip
TRAIN = ["train", "data_recipes/pocket.yaml", *SETTINGS]
EXPORT = ["export", "r", "--quant", "q8_0"]
TIMES = {"seconds", "resumed_at", "started", "finished", "train_seconds", "tokens_per_second", "runtime",
         "supervised_tokens_per_second", "peak_memory_bytes", "evaluation_seconds", "commit", "peak_memory_gib"}  # fmt: skip
"""Keys that tell when, how fast and with how much memory, which no two runs share."""
EXCEPT = ("run.log", "export.json", "certificate.md", "report.html")
"""Files of a run that hold such times as text; the numbers of the last two are in JSON files, which are compared."""


def preload() -> None:
    """Import what every command needs, so that forks start in a moment."""
    import datasets  # noqa: F401
    import trl  # noqa: F401

    from toolkit.training import model

    model.unsloth()
    pass_over_imports()  # nor search them in each fork, which would also copy their memory


def die_with_parent() -> None:
    """Ask Linux to end this process when its parent ends, so that nothing outlives a campaign that is interrupted."""
    with contextlib.suppress(OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Workplace:
    """One outputs folder, with commands run in it one after the other or side by side."""

    def __init__(self, folder: Path):
        self.outputs, self.count = folder.resolve(), 0
        self.logs = Path(f"{self.outputs}.logs")
        """Beside the outputs, as a disk that is full must not take the screen away."""
        for made in (self.outputs, self.logs):
            made.mkdir(parents=True, exist_ok=True)
        self.codes: dict[int, int] = {}
        """Exit codes of commands that have ended, by process number."""
        self.limit = 300.0
        """Seconds after which a command is taken to hang."""

    def start(self, argv: list[str], before: Callable[[], None] | None = None) -> int:
        """Start a command; returns its process number. `before` runs in the child (limits, environment)."""
        self.count += 1
        log = self.logs / str(self.count)
        pid = os.fork()
        if pid:
            return pid
        code = 99
        try:
            die_with_parent()
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            target = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
            os.dup2(target, 1)
            os.dup2(target, 2)
            os.environ["TOOLKIT_OUTPUTS"] = str(self.outputs)
            if before:
                before()
            from toolkit.__main__ import main

            code = main(argv)
        except BaseException:  # the child must never return into the campaign
            traceback.print_exc()
        finally:
            os._exit(code)

    def wait(self, pid: int) -> int:
        """The exit code of a command; 124 when it had to be stopped for taking too long, minus a signal's number."""
        until = time.monotonic() + self.limit
        while time.monotonic() < until:
            if self._ended(pid):
                return self.codes[pid]
            time.sleep(0.02)
        self.stop(pid, signal.SIGKILL)
        return 124

    def _ended(self, pid: int) -> bool:
        """Whether a command has ended; its exit code is then in `codes`."""
        if pid not in self.codes:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        return pid in self.codes

    def stop(self, pid: int, number: int) -> None:
        """Send a signal to a command and to whatever it started, and reap it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, number)
        if number == signal.SIGKILL and pid not in self.codes:
            self.codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def run(self, argv: list[str], before: Callable[[], None] | None = None) -> int:
        """Run a command to its end; returns its exit code."""
        return self.wait(self.start(argv, before))

    def log(self, back: int = 0) -> str:
        """What a command printed: the last one, or the one `back` before it."""
        return (self.logs / str(self.count - back)).read_text(errors="replace")

    def kill(
        self, argv: list[str], when: Callable[[Path], bool], delay: float = 0.0, number: int = signal.SIGKILL
    ) -> bool:
        """Start a command and signal it `delay` seconds after `when(outputs)` is true; False if it came to its end."""
        pid = self.start(argv)
        if not self.await_moment(pid, when):
            return False
        time.sleep(delay)
        self.stop(pid, number)
        if number != signal.SIGKILL:
            self.wait(pid)
        return self.codes[pid] != 0

    def await_moment(self, pid: int, when: Callable[[Path], bool]) -> bool:
        """Wait until `when(outputs)` is true; False if the command ended before."""
        until = time.monotonic() + self.limit
        while time.monotonic() < until and not when(self.outputs):
            if self._ended(pid):
                return False
            time.sleep(0.005)
        return True

    def adopt(self, other: Path, *names: str) -> None:
        """Begin with files of an undisturbed run: its caches, or the run itself."""
        for name in names:
            shutil.copytree(other / name, self.outputs / name, dirs_exist_ok=True)

    def remove(self) -> None:
        for made in (self.outputs, self.logs):
            shutil.rmtree(made, ignore_errors=True)

    def result(self) -> dict:
        """What must be equal after a fault and without one: every file of the run, times and speeds aside."""
        run = self.outputs / "r"
        found = {}
        for path in sorted(p for p in run.rglob("*") if p.is_file()):
            name = str(path.relative_to(run))
            if name.startswith(("checkpoints/", "wandb/")) or name in EXCEPT:
                continue
            found[name] = _content(path)
        return found


def _content(path: Path):
    if path.suffix == ".jsonl":
        return [_timeless(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text(encoding="utf-8")))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _timeless(value):
    if isinstance(value, dict):
        return {
            k: _timeless(v) for k, v in value.items() if k not in TIMES and not k.endswith(("_runtime", "per_second"))
        }
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def partials(outputs: Path) -> list[str]:
    """Half-written files left under any name."""
    return [str(p.relative_to(outputs)) for p in outputs.rglob("*.partial")]


def files(*patterns: str) -> Callable[[Path], bool]:
    """A moment: any of these patterns (below the run's folder) matches something."""
    return lambda outputs: any(any((outputs / "r").glob(pattern)) for pattern in patterns)


def lines(name: str, count: int) -> Callable[[Path], bool]:
    """A moment: a file of the run has so many lines."""

    def reached(outputs: Path) -> bool:
        file = outputs / "r" / name
        return file.is_file() and file.read_bytes().count(b"\n") >= count

    return reached


def jitter(seed: int, most: float) -> float:
    """A delay below `most` seconds, the same for the same seed."""
    return random.Random(seed).uniform(0, most)


def differences(expected: dict, found: dict) -> list[str]:
    """Files that differ, are missing or are there in addition; of a JSON file what differs first in it."""
    names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return [f"{name}{_first(expected.get(name), found.get(name))}" for name in names]


def _first(old, new) -> str:
    """Where two JSON values differ first, and both values there."""
    if type(old) is not type(new) or not isinstance(old, dict | list):
        return f": {str(old)[:60]} → {str(new)[:60]}"
    if isinstance(old, list):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    key = next(k for k in [*old, *new] if k not in old or k not in new or old[k] != new[k])
    return f".{key}{_first(old.get(key), new.get(key))}"
