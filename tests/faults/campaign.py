"""The faults, one function each: what is done to a run, and what must be true afterwards.

for fault in FAULTS: outcome = try_fault(fault, number, scratch, references)
"""

import contextlib
import ctypes
import functools
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults.workplace import EXPORT, TRAIN, Workplace, differences, files, jitter, lines, partials

SWEEP = ["sweep", "data_recipes/pocket.yaml", "--reasoning", "0.5", "1", *TRAIN[2:]]
MIX = ["mix", *TRAIN[1:]]
MIXES = ".mixes"


class Lost(AssertionError):
    """The run did not survive: what differs, or which message was missing."""


@dataclass(frozen=True)
class Fault:
    """One kind of fault at one phase."""

    name: str
    phase: str
    act: Callable[[Workplace, int], None]
    """`act(place, try)` does it and brings the run to its end again; it raises Lost."""
    tries: int = 1
    ends_in: str = "trained"
    """Which undisturbed run the files must equal: trained, exported, mixed, swept; or nothing."""
    quick: int = 0
    """How many of the tries belong to the subset of `make test`."""


FAULTS: list[Fault] = []


def fault(name: str, phase: str, **options):
    """Register a function as a fault."""

    def register(act):
        FAULTS.append(Fault(name, phase, act, **options))
        return act

    return register


def must(place: Workplace, argv: list[str], code: int = 0, says: str = "") -> None:
    """Run a command, which must end with `code`, print `says` and no traceback."""
    found = place.run(argv)
    text = place.log()
    if found != code:
        raise Lost(f"{argv[0]} ended with {found}, expected {code}: {text[-400:]}")
    if "Traceback (most recent call last)" in text:
        raise Lost(f"{argv[0]} printed a traceback")
    if says.lower() not in text.lower():
        raise Lost(f"{argv[0]} does not say {says!r}: {text[-400:]}")


def killed(argv: list[str], moment: Callable, most: float) -> Callable[[Workplace, int], None]:
    """kill -9 up to `most` seconds after a moment, then the same command again."""

    def act(place: Workplace, turn: int) -> None:
        if argv[0] == "export":
            must(place, TRAIN)
        if not place.kill(argv, moment, jitter(turn, most)):
            raise Lost("the command ended before the kill")
        must(place, argv)

    return act


def anywhere(*patterns: str) -> Callable[[Path], bool]:
    """A moment: a pattern below the outputs folder matches."""
    return lambda outputs: any(any(outputs.glob(pattern)) for pattern in patterns)


# --- kills -----------------------------------------------------------------------------------------------------------

AFTER_LAST = files("checkpoints/checkpoint-8/trainer_state.json")
KILLS = [
    ("mix", MIX, anywhere(".log-1"), 1.2, 6, "mixed", 0),
    ("mix, writing", MIX, anywhere(f"{MIXES}/*/*", f"{MIXES}/.locks/*"), 0.05, 6, "mixed", 1),
    ("loading", TRAIN, files("recipe.yaml"), 1.0, 4, "trained", 0),
    ("early training", TRAIN, lines("metrics.jsonl", 1), 0.3, 6, "trained", 1),
    ("writing a checkpoint", TRAIN, files("checkpoints/checkpoint-2*"), 0.03, 6, "trained", 1),
    ("writing a later checkpoint", TRAIN, files("checkpoints/checkpoint-6*"), 0.03, 6, "trained", 0),
    ("late training", TRAIN, lines("metrics.jsonl", 9), 0.3, 6, "trained", 0),
    ("between last checkpoint and end", TRAIN, AFTER_LAST, 0.25, 12, "trained", 2),
    ("evaluation", TRAIN, files("adapter/adapter_model.safetensors"), 2.0, 6, "trained", 0),
    ("export, merging", EXPORT, files("merged/*"), 0.2, 4, "exported", 0),
    ("export, GGUF", EXPORT, files("gguf/*"), 0.2, 4, "exported", 1),
    ("export, certificate", EXPORT, files("gguf/r.q8_0.gguf"), 1.5, 4, "exported", 0),
    ("sweep", SWEEP, anywhere("*/metrics.jsonl"), 2.0, 4, "swept", 0),
]
for _phase, _argv, _moment, _most, _tries, _ends, _quick in KILLS:
    fault("kill -9", _phase, tries=_tries, ends_in=_ends, quick=_quick)(killed(_argv, _moment, _most))


def signalled(number: int, argv: list[str], moment: Callable) -> Callable[[Workplace, int], None]:
    """A polite signal: the command must stop without a traceback, and the same command must end the work."""

    def act(place: Workplace, turn: int) -> None:
        if argv[0] == "export":
            must(place, TRAIN)
        if not place.kill(argv, moment, jitter(turn, 0.3), number):
            raise Lost("the command ended before the signal")
        if "Traceback (most recent call last)" in place.log():
            raise Lost("a traceback on the screen")
        must(place, argv)

    return act


for _name in ("SIGINT", "SIGTERM", "SIGHUP"):
    _number = getattr(signal, _name)
    fault(_name, "training", tries=2, quick=_name == "SIGTERM")(signalled(_number, TRAIN, lines("metrics.jsonl", 3)))
    fault(_name, "end of training", tries=2)(signalled(_number, TRAIN, AFTER_LAST))
    fault(_name, "export", ends_in="exported")(signalled(_number, EXPORT, files("merged/*")))


# --- full disk, folders that cannot be written -------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(place: Workplace, megabytes: float) -> Iterator[Callable[[], None]]:
    """The outputs folder on a small tmpfs; yields what makes it large. Raises OSError where mounting is not allowed."""
    size = int(megabytes * 2**20)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place.outputs)]
    kept = {p: p.read_bytes() for p in place.outputs.rglob("*") if p.is_file()}
    if subprocess.run(command, capture_output=True).returncode:
        raise OSError("no tmpfs can be mounted here")
    try:
        for path, content in kept.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        yield lambda: subprocess.run(["mount", "-o", "remount,size=2g", str(place.outputs)], check=True)
    finally:
        grown = Path(f"{place.outputs}.kept")
        shutil.copytree(place.outputs, grown, dirs_exist_ok=True)
        subprocess.run(["umount", "-l", str(place.outputs)], check=True)
        shutil.rmtree(place.outputs)
        grown.rename(place.outputs)


def full_disk(argv: list[str], megabytes: float, first: list[list[str]]) -> Callable[[Workplace, int], None]:
    """The disk fills while a command writes: a clear message, then, with more room, the same command ends the work."""

    def act(place: Workplace, turn: int) -> None:
        for command in first:
            must(place, command)
        with small_disk(place, megabytes + turn * 0.4) as enlarge:
            code = place.run(argv)
            text = place.log()
            if code not in (1, 2) or "Traceback (most recent call last)" in text or "free" not in text:
                raise Lost(f"a full disk ended with {code}: {text[-300:]}")
            enlarge()
            must(place, argv)

    return act


fault("disk full", "mix", ends_in="mixed")(full_disk(MIX, 0.05, []))
fault("disk full", "training", tries=3, quick=1)(full_disk(TRAIN, 1.2, []))
fault("disk full", "export", tries=2, ends_in="exported")(full_disk(EXPORT, 12.0, [TRAIN]))


@fault("file size limit", "checkpoint", quick=0)
def file_size_limit(place: Workplace, turn: int) -> None:
    """A quota: no file may grow beyond 100 kB, so the first checkpoint fails."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    code = place.run(TRAIN, limit)
    if code not in (1, 2) or "Traceback (most recent call last)" in place.log():
        raise Lost(f"ended with {code}: {place.log()[-300:]}")
    must(place, TRAIN)


@fault("output below a file", "start", ends_in="")
def below_a_file(place: Workplace, turn: int) -> None:
    (place.outputs / "r").write_text("not a folder")
    must(place, TRAIN, code=2, says="is a file")


# --- damage --------------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """Turn one bit in the second half of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


HALF_WAY = files("checkpoints/checkpoint-6/trainer_state.json")
DAMAGE = [
    ("metrics.jsonl", cut), ("metrics.jsonl", Path.unlink), ("samples.jsonl", cut), ("samples.jsonl", Path.unlink),
    ("manifest.json", empty), ("manifest.json", Path.unlink), ("manifest.json", cut),
    ("checkpoints/*/rng_state.pth", cut), ("checkpoints/*/optimizer.pt", flip),
    ("checkpoints/*/adapter_model.safetensors", cut), ("checkpoints/*/adapter_model.safetensors", flip),
    ("checkpoints/*/trainer_state.json", cut), ("mix.json", empty),
]  # fmt: skip


def damaged(pattern: str, how: Callable[[Path], None], newest: bool) -> Callable[[Workplace, int], None]:
    """Damage a file of a run that was killed half way, then train on."""

    def act(place: Workplace, turn: int) -> None:
        if not place.kill(TRAIN, HALF_WAY, 0.3):
            raise Lost("the command ended before the kill")
        found = sorted((place.outputs / "r").glob(pattern), key=lambda p: p.stat().st_mtime)
        if not found:
            raise Lost(f"nothing matches {pattern}")
        how(found[-1] if newest else found[0])
        must(place, TRAIN)

    return act


for _pattern, _how in DAMAGE:
    _verb = {"cut": "cut", "flip": "bit flipped", "empty": "emptied", "unlink": "deleted"}[_how.__name__]
    fault(f"{_verb}: {_pattern}", "resume", quick=_how is flip and "optimizer" in _pattern)(
        damaged(_pattern, _how, True)
    )
fault("cut: older checkpoint", "resume")(damaged("checkpoints/*/adapter_model.safetensors", cut, False))


def damaged_after(name: str, how: Callable, argv: list[str], says: str = "") -> Callable[[Workplace, int], None]:
    """Damage a file of a finished run; the command must recover (says empty) or name the file."""

    def act(place: Workplace, turn: int) -> None:
        must(place, TRAIN)
        how(place.outputs / name if name.startswith(".") else place.outputs / "r" / name)
        must(place, argv, code=2 if says else 0, says=says)

    return act


ADAPTER = "adapter/adapter_model.safetensors"
fault("cut: eval.json", "finished run")(damaged_after("eval.json", cut, TRAIN))
fault("cut: adapter", "evaluate", ends_in="")(damaged_after(ADAPTER, cut, ["evaluate", "r"], "adapter_model"))
fault("bit flipped: adapter", "evaluate", ends_in="")(damaged_after(ADAPTER, flip, ["evaluate", "r"], "adapter_model"))
fault("cut: adapter", "export", ends_in="")(damaged_after(ADAPTER, cut, EXPORT, "adapter_model"))
fault("bit flipped: adapter", "export", ends_in="", quick=1)(damaged_after(ADAPTER, flip, EXPORT, "adapter_model"))


def damaged_mix(how: Callable) -> Callable[[Workplace, int], None]:
    """Damage every file of the compiled mix in turn; the next command must compile it again."""

    def act(place: Workplace, turn: int) -> None:
        must(place, MIX)
        made = sorted(p for p in (place.outputs / MIXES).rglob("*") if p.is_file() and p.suffix in (".npz", ".json"))
        made = [p for p in made if ".locks" not in p.parts]
        how(made[turn % len(made)])
        must(place, MIX)

    return act


for _how in (cut, flip, empty, Path.unlink):
    fault(f"{_how.__name__}: compiled mix", "cache", tries=3, ends_in="mixed", quick=_how is flip)(damaged_mix(_how))


# --- two of everything ----------------------------------------------------------------------------------------------------


def together(commands: list[list[str]], expected: list[set[int]], after: list[str] | None, first=()) -> Callable:
    """Start commands at once; each exit code must be among the expected ones, and then `after` ends the work."""

    def act(place: Workplace, turn: int) -> None:
        for command in first:
            must(place, command)
        pids = []
        for command in commands:
            pids.append(place.start(command))
            time.sleep(jitter(turn, 0.5))
        codes = sorted(place.wait(pid) for pid in pids)
        if not any(codes == sorted(one) for one in ([*e] if isinstance(e, list) else [e] for e in expected)):
            logs = " | ".join(place.log(i)[-200:] for i in range(len(commands)))
            raise Lost(f"ended with {codes}: {logs}")
        if any("Traceback" in place.log(i) for i in range(len(commands))):
            raise Lost("a traceback on the screen")
        if after:
            must(place, after)

    return act


fault("two at once", "train", tries=2, quick=1)(together([TRAIN, TRAIN], [[0, 2], [0, 0]], TRAIN))
fault("two at once", "export", tries=2, ends_in="exported")(
    together([EXPORT, EXPORT], [[0, 2], [0, 0]], EXPORT, first=[TRAIN])
)
fault("three at once", "mix", tries=2, ends_in="mixed", quick=1)(together([MIX, MIX, MIX], [[0, 0, 0]], None))
fault("two at once", "sweep", ends_in="swept")(together([SWEEP, SWEEP], [[0, 0], [0, 2]], SWEEP))


@fault("train --fresh beside a running one", "train", tries=2)
def fresh_beside(place: Workplace, turn: int) -> None:
    pid = place.start(TRAIN)
    until = time.monotonic() + 60
    while time.monotonic() < until and not lines("metrics.jsonl", 2)(place.outputs):
        time.sleep(0.01)
    must(place, [*TRAIN, "--fresh"], code=2, says="in use")
    if place.wait(pid):
        raise Lost("the running one did not end well")


# --- the world outside ------------------------------------------------------------------------------------------------------


@fault("clock set back a day", "resume", tries=2)
def clock_back(place: Workplace, turn: int) -> None:
    if not place.kill(TRAIN, HALF_WAY, jitter(turn, 0.2)):
        raise Lost("the command ended before the kill")

    def back() -> None:
        real = time.time
        time.time = lambda: real() - 86_400

    if place.run(TRAIN, back):
        raise Lost(place.log()[-300:])


@contextlib.contextmanager
def stalling_server() -> Iterator[str]:
    """A local server that accepts, sends half an answer and stops."""
    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def serve() -> None:
        listener.settimeout(0.2)
        while not stop.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nhalf")
                stop.wait(0.3)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stop.set()
        thread.join()
        listener.close()


@fault("Hub stops half way", "mix", ends_in="")
def hub_stalls(place: Workplace, turn: int) -> None:
    with stalling_server() as address:

        def online() -> None:
            import huggingface_hub.constants as constants
            from datasets import config

            os.environ |= {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address}
            constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = False
            constants.ENDPOINT = config.HF_ENDPOINT = address

        code = place.run([*MIX, "data.sources.0.path=nobody/nothing"], online)
    text = place.log()
    if code != 2 or "Traceback" in text or "nobody/nothing" not in text:
        raise Lost(f"ended with {code}: {text[-300:]}")


@fault("wandb answers nothing", "train", quick=0)
def wandb_stalls(place: Workplace, turn: int) -> None:
    with stalling_server() as address:

        def account() -> None:
            os.environ.pop("WANDB_MODE", None)
            os.environ |= {"WANDB_API_KEY": "0123456789" * 4, "WANDB_BASE_URL": address}

        code = place.run([*TRAIN, "train.report_to=wandb"], account)
    if code or "Traceback" in place.log():
        raise Lost(f"ended with {code}: {place.log()[-300:]}")
    shutil.rmtree(place.outputs / "r")  # another recipe than the reference's; what counts is that it trained to the end
    must(place, TRAIN)


# --- running them -------------------------------------------------------------------------------------------------------------


@functools.cache  # an undisturbed run that fails is not remembered, and fails every fault that needs it
def reference(kind: str, scratch: Path) -> dict:
    """The files of an undisturbed run of a kind."""
    folder = scratch / f"reference-{kind}"
    shutil.rmtree(folder, ignore_errors=True)
    place = Workplace(folder)
    for command in {"trained": [TRAIN], "exported": [TRAIN, EXPORT], "mixed": [MIX, TRAIN], "swept": [SWEEP]}[kind]:
        must(place, command)
    return swept(place) if kind == "swept" else place.result()


def swept(place: Workplace) -> dict:
    """What all runs of a sweep hold."""
    found = {}
    for run in sorted(p.parent for p in place.outputs.glob("*/eval.json")):
        shutil.copytree(run, place.outputs / "r", dirs_exist_ok=True)
        found |= {f"{run.name}/{name}": content for name, content in place.result().items()}
        shutil.rmtree(place.outputs / "r")
    return found


def try_fault(one: Fault, turn: int, scratch: Path) -> str | None:
    """None when the run survived, otherwise what was lost; "skipped: …" where this machine cannot make the fault."""
    place = Workplace(scratch / f"{random.getrandbits(64):016x}")
    try:
        expected = reference(one.ends_in, scratch) if one.ends_in else None
        one.act(place, turn)
        if one.ends_in == "mixed":
            must(place, TRAIN)  # the mix is right if what is trained on it is
        if expected is not None:
            found = swept(place) if one.ends_in == "swept" else place.result()
            if wrong := differences(expected, found):
                raise Lost(f"differ: {', '.join(wrong[:5])}")
        if left := partials(place.outputs):
            raise Lost(f"half-written files left: {left[:3]}")
    except Lost as lost:
        return str(lost)
    except OSError as error:
        return f"skipped: {error}"
    else:
        return None
    finally:
        shutil.rmtree(place.outputs, ignore_errors=True)


def die_with_parent() -> None:
    """Ask Linux to end this process when its parent ends, so that nothing outlives a campaign that is interrupted."""
    with contextlib.suppress(OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
