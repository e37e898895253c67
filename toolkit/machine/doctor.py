"""What is installed, what will run, and the fix for what will not.

from toolkit.machine.doctor import examine; print(*examine(), sep="\\n")     (`python -m toolkit doctor`)
"""

import contextlib
import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from toolkit.files import ROOT, Say, ToolkitError
from toolkit.machine import install
from toolkit.machine.install import has_driver

GIB = 2**30
# CUDA's own memory, beside what torch reserves; at most 0.23 GiB was left for it on a published T4 run.
CONTEXT = int(0.4 * GIB)
# Packages without which no verb but `setup` and `doctor` works.
NEEDED = ("torch", "rich", "transformers", "msgspec")


class Finding(NamedTuple):
    """One line of the doctor's report; `fix` is empty where nothing is wrong."""

    what: str
    state: str
    fix: str = ""


class Card(NamedTuple):
    """A card as torch sees it; memory in bytes."""

    name: str
    total: int
    free: int


@dataclass(frozen=True)
class Machine:
    """What there is to know about the GPU side of a machine: plain values, so that every case can be tested anywhere."""

    has_driver: bool = False
    driver_cuda: str = ""
    """The newest CUDA the driver supports."""
    torch_cuda: str | None = None
    """The CUDA that torch was built with; None for a build without."""
    visible: str | None = None
    """CUDA_VISIBLE_DEVICES."""
    seen: tuple[Card, ...] = ()
    """The cards that a run can use, by torch, which numbers the fastest first."""
    half: str = "bf16"


def examine() -> list[Finding]:
    """All findings, quickest first; what is not installed is named, and what needs it left out."""
    old = "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer and make the .venv again"
    python = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    findings = [Finding("python", python, old), packages(), *kernels()]
    if missing := missing_packages():
        reason = f"{', '.join(missing)} missing: nothing else can be examined, or trained"
        return [*findings, Finding("toolkit", reason, "python -m toolkit setup")]
    from toolkit.training.tracking import has_account

    answers = hub_answers()
    account = has_account()
    recipe, why = default_recipe(answers)
    free = shutil.disk_usage(ROOT).free / GIB
    return [
        *findings,
        *gpu(look()),
        Finding("hub", "answers")
        if answers
        else Finding("hub", "does not answer", "local folders and the pocket model still work"),
        Finding("wandb", "account found")
        if account
        else Finding("wandb", "no account: runs stay offline", "optional: wandb login"),
        Finding("disk", f"{free:.0f} GiB free", "" if free > 20 else "a 4B export needs about 20 GiB"),
        Finding("make train", f"{recipe}: {why}"),
    ]


def missing_packages() -> list[str]:
    """Those of NEEDED that are not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def packages() -> Finding:
    """Whether what is pinned is installed."""
    different = install.differing()
    count = len(install.pins())
    state = f"{count - len(different)} of {count} as pinned; torch {install.installed('torch') or 'missing'}"
    if not different:
        return Finding("packages", state)
    more = f" and {len(different) - 5} more" if len(different) > 5 else ""
    return Finding("packages", state, f"{', '.join(different[:5])}{more}: python -m toolkit setup")


def default_recipe(answers: bool | None = None) -> tuple[str, str]:
    """(recipe, why): `hybrid` where there is a CUDA card and the Hub answers, else `pocket`."""
    machine = look()
    if not machine.seen:
        # where there is a driver, the reason why torch cannot use it
        reason = next(gpu(machine)).state if machine.has_driver else "no CUDA card here"
        return "data_recipes/pocket.yaml", f"{reason}: the pocket Qwen3 that ships with the package, on the CPU"
    if not (hub_answers() if answers is None else answers):
        return "data_recipes/pocket.yaml", "the Hub does not answer: the pocket Qwen3 that ships with the package"
    return "data_recipes/hybrid.yaml", f"{machine.seen[0].name} and the Hub answers"


def hub_answers() -> bool:
    """Whether huggingface.co answers; never asked when HF_HUB_OFFLINE is set."""
    import requests

    if os.environ.get("HF_HUB_OFFLINE", "0") not in {"", "0"}:
        return False
    # any answer will do, an error page too: the question is whether there is a network
    with contextlib.suppress(requests.RequestException):
        requests.head(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=3)
        return True
    return False


def show(findings: list[Finding], say: Say = print) -> None:
    """Print findings, each with its fix below it. Plain text: rich may be what is missing."""
    width = max(60, shutil.get_terminal_size().columns)
    for what, state, fix in findings:
        say(textwrap.fill(f"{'!' if fix else '✓'} {what:<11} {state}", width, subsequent_indent=" " * 14))
        if fix:
            say(textwrap.fill(f"→ {fix}", width, initial_indent=" " * 14, subsequent_indent=" " * 16))


# --- the card --------------------------------------------------------------------------------------------------------


def look() -> Machine:
    """This machine; torch is imported where there is a driver."""
    if not has_driver():
        return Machine()
    import torch

    from toolkit.training.model import has_bf16

    cards = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(number)
        cards.append(Card(torch.cuda.get_device_name(number), total, free))
    return Machine(
        has_driver=True,
        driver_cuda=install.driver_cuda(),
        torch_cuda=torch.version.cuda,
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        seen=tuple(cards),
        half="bf16" if cards and has_bf16() else "fp16 (no bf16 on this card)",
    )


def gpu(machine: Machine) -> Iterator[Finding]:
    """What a run will train on, or why a card that is there cannot be used."""
    if not machine.seen:
        yield Finding("gpu", *_unreachable(machine))
        return
    first = machine.seen[0]
    total = f"{first.total / GIB:.1f} GiB"
    count = f"; the first of {len(machine.seen)} cards is used" if len(machine.seen) > 1 else ""
    yield Finding("gpu", f"{first.name}, {total}, {machine.half}; CUDA {machine.torch_cuda}{count}")
    largest = max(machine.seen, key=lambda card: card.total)
    if largest.total > first.total:
        state = f"{largest.name} is larger: {largest.total / GIB:.1f} GiB"
        yield Finding("cards", state, f"CUDA_VISIBLE_DEVICES={machine.seen.index(largest)} trains on it")
    held = first.total - first.free - CONTEXT  # CUDA's own, for this process, is no one else's
    if held > first.total / 8:
        fix = "nvidia-smi lists who: end those processes (kill PID), or plan with less: fit --vram"
        yield Finding("gpu memory", f"{held / GIB:.1f} of {total} are in use by others", fix)


def _unreachable(machine: Machine) -> tuple[str, str]:
    """(state, fix) of a machine whose torch sees no card."""
    if not machine.has_driver:
        return f"none: {os.cpu_count()} CPU cores: the pocket model trains, larger ones are slow", ""
    # major versions: a driver runs programs built for its own or an older one
    driver = int((machine.driver_cuda or "0").split(".")[0])
    needed = int((machine.torch_cuda or "0").split(".")[0])
    on_cpu = "to train on the CPU instead: UNSLOTH_FORCE_CPU=1"
    # the likeliest reason first: the variable that hides a card is set by hand
    if machine.visible is not None:
        state = f"a card is hidden: CUDA_VISIBLE_DEVICES={machine.visible!r} names none"
        return state, "unset it to train on the card; cards are numbered from 0"
    if not needed:
        state = "an NVIDIA driver is here, but this torch has no CUDA"
        return state, f"{torch_command(machine.driver_cuda)}; {on_cpu}"
    if 0 < driver < needed:
        state = f"the NVIDIA driver supports CUDA {machine.driver_cuda}, this torch needs {machine.torch_cuda}"
        return state, f"update the driver, or {torch_command(machine.driver_cuda)}; {on_cpu}"
    return "an NVIDIA driver is here, but torch cannot open a card", f"restart after a driver update; {on_cpu}"


def torch_command(cuda: str) -> str:
    """How to install the build of torch that fits a driver."""
    with contextlib.suppress(SystemExit):
        options = install.torch_source(cuda, platform.system()).options
        return " ".join(["python -m pip install --force-reinstall", f"torch=={install.pins()['torch']}", *options])
    return "no build of torch fits it"


def compiler(is_gpu: bool, headers: str = "") -> list[Finding]:
    """Triton compiles its launcher at the first step: with $CC, else gcc or clang, and Python.h (triton/runtime/build.py)."""
    if platform.system() == "Windows" or not is_gpu:
        return []
    chosen = os.environ.get("CC")
    lacking = []
    # Triton does not ask for `cc`
    if not any(map(shutil.which, ("gcc", "clang") if chosen is None else (chosen,))):
        lacking.append("gcc or clang" if chosen is None else f"the C compiler that CC={chosen!r} names")
    if not (Path(headers or sysconfig.get_paths()["include"]) / "Python.h").is_file():
        lacking.append("Python.h")
    if not lacking:
        return []
    state = f"{' and '.join(lacking)} missing: the first step on the GPU will fail"
    return [Finding("compiler", state, "apt install gcc python3-dev (or your system's names for them)")]


def kernels() -> list[Finding]:
    """What the kernels of a run lack, where there is a card for them."""
    is_gpu = has_driver()
    return [*compiler(is_gpu), *fused_kernels(is_gpu)]


def check_compiler(is_gpu: bool) -> None:
    """Raises ToolkitError where the first step on a card would fail for want of a compiler: before anything is downloaded."""
    for finding in compiler(is_gpu):
        raise ToolkitError(f"{finding.state}. {finding.fix}, then the same command again")


def fused_kernels(is_gpu: bool) -> list[Finding]:
    """Without Triton Unsloth goes on, slower, and says so in the log only (unsloth/_gpu_init.py)."""
    if not is_gpu or importlib.util.find_spec("triton"):
        return []
    fix = "python -m toolkit setup"
    if platform.system() == "Windows":
        fix = f'python -m pip install "{install.TRITON_FOR_WINDOWS}"'
    return [Finding("triton", "missing: Unsloth's fused kernels are off, training is slower or fails", fix)]
