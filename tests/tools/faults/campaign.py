"""The faults, one function each: what is done to a run, and what must be true afterwards.

for fault in FAULTS: outcome = try_fault(fault, number, scratch, references)
"""

import contextlib
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

from tests.tools.faults.workplace import (
    EXPORT,
    TRAIN,
    Workplace,
    die_with_parent,
    differences,
    files,
    jitter,
    lines,
    partials,
    preload,
)

SWEEP = ["sweep", "data_recipes/pocket.yaml", "--reasoning", "0.5", "1", *TRAIN[2:]]
MIX = ["mix", *TRAIN[1:]]
MIXES = ".mixes"


class Lost(AssertionError):
    """The run did not survive: what differs, or which message was missing."""


class Skipped(Exception):
    """This machine cannot make the fault, and why."""


@dataclass(frozen=True)
class Fault:
    """One kind of fault at one phase."""

    name: str
    phase: str
    act: Callable[[Workplace, int], None]
    """`act(place, try)` does it and brings the run to its end again; it raises Lost."""
    tries: int = 1
    ends_in: str = "trained"
    """Which undisturbed run the files must equal: trained, exported, swept, mixed (trained on the mix); or nothing."""
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
            place.adopt(trained(place), "r")
        for _ in range(3):
            if place.kill(argv, moment, jitter(turn, most)):
                break
            if argv != MIX:
                raise Lost("the command ended before the kill")
            shutil.rmtree(place.outputs / MIXES)
        else:
            raise Skipped("a mix is written here faster than it can be killed")
        must(place, argv)

    return act


def anywhere(*patterns: str) -> Callable[[Path], bool]:
    """A moment: a pattern below the outputs folder matches; without one, at once."""
    return lambda outputs: not patterns or any(any(outputs.glob(pattern)) for pattern in patterns)


@fault("control: damage left in a run", "comparison", quick=1)
def control(place: Workplace, turn: int) -> None:
    """The comparison itself: every file of a run that is changed or removed is noticed."""
    place.adopt(trained(place), "r")
    expected = place.result()
    for name in expected:
        path = place.outputs / "r" / name
        kept = path.read_bytes()
        path.unlink()
        if len(found := differences(expected, place.result())) != 1 or not found[0].startswith(name):
            raise Lost(f"nobody notices that {name} is missing")
        path.write_bytes(kept)
    changes = {"metrics.jsonl": (b'"loss": 0.', b'"loss": 1.'), "manifest.json": (b'"steps": 8', b'"steps": 9')}
    for name in (*changes, ADAPTER):
        path = place.outputs / "r" / name
        kept = path.read_bytes()
        path.write_bytes(kept.replace(*changes[name], 1)) if name in changes else flip(path)
        if len(found := differences(expected, place.result())) != 1 or not found[0].startswith(name):
            raise Lost(f"nobody notices that {name} has changed")
        path.write_bytes(kept)


# --- kills -----------------------------------------------------------------------------------------------------------

AFTER_LAST = files("checkpoints/checkpoint-8/trainer_state.json")
KILLS = [
    ("mix", MIX, anywhere(), 3.0, 6, "mixed", 0),
    ("mix, writing", MIX, anywhere(f"{MIXES}/*/mix*"), 0.01, 6, "mixed", 1),
    ("loading", TRAIN, files("recipe.yaml"), 1.0, 4, "trained", 0),
    ("early training", TRAIN, lines("metrics.jsonl", 1), 0.3, 6, "trained", 0),
    ("writing a checkpoint", TRAIN, files("checkpoints/checkpoint-2*"), 0.03, 6, "trained", 1),
    ("writing a later checkpoint", TRAIN, files("checkpoints/checkpoint-6*"), 0.03, 6, "trained", 0),
    ("late training", TRAIN, lines("metrics.jsonl", 9), 0.3, 6, "trained", 0),
    ("between last checkpoint and end", TRAIN, AFTER_LAST, 0.25, 12, "trained", 1),
    ("evaluation", TRAIN, files("adapter/adapter_model.safetensors"), 2.0, 6, "trained", 0),
    ("export, merging", EXPORT, files("merged/*"), 0.2, 4, "exported", 0),
    ("export, GGUF", EXPORT, files("gguf/*"), 0.2, 4, "exported", 0),
    ("export, certificate", EXPORT, files("gguf/r.q8_0.gguf"), 1.5, 4, "exported", 0),
    ("sweep", SWEEP, anywhere("*/metrics.jsonl"), 2.0, 4, "swept", 0),
]
for _phase, _argv, _moment, _most, _tries, _ends, _quick in KILLS:
    fault("kill -9", _phase, tries=_tries, ends_in=_ends, quick=_quick)(killed(_argv, _moment, _most))


def signalled(number: int, argv: list[str], moment: Callable) -> Callable[[Workplace, int], None]:
    """A polite signal: the command must stop without a traceback, and the same command must end the work."""

    def act(place: Workplace, turn: int) -> None:
        if argv[0] == "export":
            place.adopt(trained(place), "r")
        if not place.kill(argv, moment, jitter(turn, 0.3), number):
            raise Lost("the command ended before the signal")
        if "Traceback (most recent call last)" in place.log():
            raise Lost("a traceback on the screen")
        must(place, argv)

    return act


for _name in ("SIGINT", "SIGTERM", "SIGHUP"):
    _number = getattr(signal, _name)
    fault(_name, "training", tries=2)(signalled(_number, TRAIN, lines("metrics.jsonl", 3)))
    fault(_name, "end of training", tries=2)(signalled(_number, TRAIN, AFTER_LAST))
    fault(_name, "export", ends_in="exported")(signalled(_number, EXPORT, files("merged/*")))


# --- full disk, folders that cannot be written -------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(place: Workplace) -> Iterator[None]:
    """The outputs folder on a disk of its own, of 80 MB. Raises Skipped where mounting is not allowed."""
    inside = place.outputs / "disk"
    inside.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(inside)]
    if subprocess.run(command, capture_output=True).returncode:
        raise Skipped("no tmpfs can be mounted here")
    outside = place.outputs
    try:
        shutil.copytree(outside, inside, ignore=lambda *_: ["disk"], dirs_exist_ok=True)
        place.outputs = inside
        yield
        shutil.copytree(inside, outside, dirs_exist_ok=True)
    finally:
        place.outputs = outside
        subprocess.run(["umount", "-l", str(inside)], check=True)
        inside.rmdir()


def full_disk(argv: list[str], moment: Callable, room: int) -> Callable[[Workplace, int], None]:
    """At a moment all but `room` bytes of the disk are taken: a clear message, then, with space, the same command ends
    the work."""

    def act(place: Workplace, turn: int) -> None:
        if argv[0] == "export":
            place.adopt(trained(place), "r")
        with small_disk(place):
            ballast = place.outputs / "ballast"
            pid = place.start(argv)
            place.await_moment(pid, moment)
            fill(ballast, room + turn * 100_000)
            code, text = place.wait(pid), place.log()
            if code != 2 or "Traceback (most recent call last)" in text or "free some space" not in text:
                raise Lost(f"a full disk ended with {code}: {text[-300:]}")
            ballast.unlink()
            must(place, argv)

    return act


def fill(ballast: Path, room: int) -> None:
    """Take all of a disk but `room` bytes."""
    free = os.statvfs(ballast.parent).f_bavail * os.statvfs(ballast.parent).f_frsize
    with contextlib.suppress(OSError):  # the run wrote meanwhile: the disk is full before the ballast is
        ballast.write_bytes(bytes(max(0, free - room)))


fault("disk full", "mix", ends_in="mixed")(full_disk(MIX, anywhere(), 20_000))
fault("disk full", "training", tries=3)(full_disk(TRAIN, lines("metrics.jsonl", 3), 100_000))
# not at the last checkpoint: after it older ones are deleted, which makes room
fault("disk full", "end of training")(full_disk(TRAIN, files("adapter/adapter_model.safetensors"), 0))
fault("disk full", "export", tries=2, ends_in="exported")(full_disk(EXPORT, files("merged/*"), 200_000))


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
    ("metrics.jsonl", cut), ("metrics.jsonl", Path.unlink), 
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
        place.adopt(trained(place), "r")
        how(place.outputs / "r" / name)
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
    fault(f"{_how.__name__}: compiled mix", "cache", tries=3, ends_in="mixed")(damaged_mix(_how))


# --- two of everything ----------------------------------------------------------------------------------------------------


def together(commands: list[list[str]], expected: list[set[int]], after: list[str] | None) -> Callable:
    """Start commands at once; each exit code must be among the expected ones, and then `after` ends the work."""

    def act(place: Workplace, turn: int) -> None:
        if commands[0] == EXPORT:
            place.adopt(trained(place), "r")
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
fault("two at once", "export", tries=2, ends_in="exported")(together([EXPORT, EXPORT], [[0, 2], [0, 0]], EXPORT))
fault("three at once", "mix", tries=2, ends_in="mixed")(together([MIX, MIX, MIX], [[0, 0, 0]], None))
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


def trained(place: Workplace) -> Path:
    """The outputs of the undisturbed training run, made before any try."""
    return place.outputs.parent / "reference-trained"


@functools.cache  # an undisturbed run that fails is not remembered, and fails every fault that needs it
def reference(kind: str, scratch: Path) -> dict:
    """The files of an undisturbed run of a kind."""
    place = Workplace(scratch / f"reference-{kind}")
    if kind == "exported":
        place.adopt(trained(place), "r")
    must(place, {"trained": TRAIN, "exported": EXPORT, "swept": SWEEP}[kind])
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
        expected = reference("trained", scratch)
        if one.ends_in in ("exported", "swept"):
            expected = reference(one.ends_in, scratch)
        # what is not disturbed need not be computed again
        place.adopt(trained(place), ".base_replies", *([] if one.ends_in == "mixed" else [MIXES]))
        one.act(place, turn)
        if one.ends_in == "mixed":
            must(place, TRAIN)  # the mix is right if what is trained on it is
        if one.ends_in:
            found = swept(place) if one.ends_in == "swept" else place.result()
            if wrong := differences(expected, found):
                raise Lost(f"differ: {', '.join(wrong[:5])}")
        if left := partials(place.outputs):
            raise Lost(f"half-written files left: {left[:3]}")
    except Lost as lost:
        return str(lost)
    except Skipped as reason:
        return f"skipped: {reason}"
    else:
        return None
    finally:
        place.remove()


def worker(todo, done, scratch: Path) -> None:
    """Take (fault index, try) from a queue until it is empty; a process of its own, since forks of it are killed."""
    die_with_parent()
    preload()
    while (item := todo.get()) is not None:
        started, used = time.monotonic(), os.times()
        try:
            lost = try_fault(FAULTS[item[0]], item[1], scratch)
        except Exception as error:  # a fault of the campaign counts as a loss, and must not end the worker
            lost = f"the campaign itself failed: {error!r}"
        cpu = sum(os.times()[:4]) - sum(used[:4])
        done.put((*item, lost, f"{time.monotonic() - started:.0f} s, {cpu:.0f} s of CPU"))
