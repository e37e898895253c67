"""What is installed, what will run, and the fix for what will not.

from toolkit.machine.doctor import examine; print(*examine(), sep="\\n")     (`python -m toolkit doctor`)
"""

import contextlib
import importlib.util
import os
import platform
import re
import shutil
import sys
import sysconfig
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.files import ROOT, ToolkitError
from toolkit.machine import install
from toolkit.machine.install import has_driver, nvidia_smi

CARD_QUERY = "--query-gpu=name,memory.total,memory.free,uuid", "--format=csv,noheader,nounits"
GIB = 2**30
CONTEXT = int(0.4 * GIB)
"""CUDA's own memory, beside what torch reserves; at most 0.23 GiB was left for it on a published T4 run."""
ON_CPU = "to train on the CPU instead: UNSLOTH_FORCE_CPU=1"
NEEDED = ("torch", "rich", "transformers", "msgspec")
"""Packages without which no verb but `setup` and `doctor` works."""


class Finding(NamedTuple):
    """One line of the doctor's report; `fix` is empty where nothing is wrong."""

    what: str
    state: str
    fix: str = ""


class Card(NamedTuple):
    """A card as nvidia-smi or torch sees it; memory in bytes."""

    name: str
    total: int
    free: int
    uuid: str = ""


@dataclass(frozen=True)
class Machine:
    """What there is to know about the GPU side of a machine: plain values, so that every case can be tested anywhere."""

    has_driver: bool = False
    cards: tuple[Card, ...] = ()
    """By nvidia-smi: all, in the order of the bus."""
    driver_cuda: str = ""
    """The newest CUDA the driver supports."""
    processes: tuple[str, ...] = ()
    """`pid 123 (python, 3.0 GiB)` of what holds GPU memory."""
    visible: str | None = None
    """CUDA_VISIBLE_DEVICES."""
    torch_cuda: str | None = None
    """The CUDA that torch was built with; None for a build without."""
    seen: tuple[Card, ...] = ()
    """By torch: those a run can use."""
    half: str = "bf16"


def examine() -> list[Finding]:
    """All findings, quickest first; what is not installed is named, and what needs it left out."""
    findings = [
        Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", python_fix())
    ]
    findings += [packages(), *compiler(), *fused_kernels()]
    if missing := missing_packages():
        reason = f"{', '.join(missing)} missing: nothing else can be examined, or trained"
        return [*findings, Finding("toolkit", reason, "python -m toolkit setup")]
    from toolkit.training.tracking import has_account

    answers, account = hub_answers(), has_account()
    recipe, why = default_recipe(answers)
    free = shutil.disk_usage(ROOT).free / GIB
    return [
        *findings,
        *gpu(look()),
        Finding("hub", "answers") if answers else Finding(
            "hub", "does not answer", "local folders and the pocket model still work"),
        Finding("wandb", "account found") if account else Finding(
            "wandb", "no account: runs stay offline", "optional: wandb login"),
        Finding("disk", f"{free:.0f} GiB free", "" if free > 20 else "a 4B export needs about 20 GiB"),
        Finding("make train", f"{recipe}: {why}"),
    ]  # fmt: skip


def missing_packages() -> list[str]:
    """Those of NEEDED that are not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def python_fix() -> str:
    """What to do about a Python that is too old."""
    return "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer and make the .venv again"


def packages() -> Finding:
    """Whether what is pinned is installed."""
    different, count = install.differing(), len(install.pins())
    state = f"{count - len(different)} of {count} as pinned; torch {install.installed('torch') or 'missing'}"
    named = ", ".join(different[:5]) + (f" and {len(different) - 5} more" if len(different) > 5 else "")
    return Finding("packages", state, f"{named}: python -m toolkit setup" if different else "")


def default_recipe(answers: bool | None = None) -> tuple[str, str]:
    """(recipe, why): `hybrid` where there is a CUDA card and the Hub answers, else `pocket`."""
    machine = look()
    if not machine.seen:
        card = next(iter(gpu(machine)))
        # where there is a driver, the reason why torch cannot use it
        reason = "no CUDA card here" if card.state.startswith("none") else card.state
        return "data_recipes/pocket.yaml", f"{reason}: the pocket Qwen3 that ships with the package, on the CPU"
    if not (hub_answers() if answers is None else answers):
        return "data_recipes/pocket.yaml", "the Hub does not answer: the pocket Qwen3 that ships with the package"
    return "data_recipes/hybrid.yaml", f"{machine.seen[0].name} and the Hub answers"


def hub_answers(seconds: float = 3.0) -> bool:
    """Whether huggingface.co answers; never asked when HF_HUB_OFFLINE is set."""
    import requests

    if os.environ.get("HF_HUB_OFFLINE", "0") not in {"", "0"}:
        return False
    # any answer will do, an error page too: the question is whether there is a network
    with contextlib.suppress(requests.RequestException):
        requests.head(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=seconds)
        return True
    return False


def show(findings: list[Finding], say: Callable[[str], Any] = print) -> None:
    """Print findings, each with its fix below it. Plain text: rich may be what is missing."""
    width = max(60, shutil.get_terminal_size().columns)
    for what, state, fix in findings:
        say(textwrap.fill(f"{'!' if fix else '✓'} {what:<11} {state}", width, subsequent_indent=" " * 14))
        if fix:
            say(textwrap.fill(f"→ {fix}", width, initial_indent=" " * 14, subsequent_indent=" " * 16))


def look() -> Machine:
    """This machine; torch is imported where there is a driver."""
    if not has_driver():
        return Machine()
    import torch

    from toolkit.training.model import has_bf16

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    memory = [torch.cuda.mem_get_info(i) for i in range(count)]
    apps = nvidia_smi("--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits")
    return Machine(
        has_driver=True,
        cards=read_cards(nvidia_smi(*CARD_QUERY)),
        driver_cuda=install.driver_cuda(),
        processes=read_processes(apps),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        torch_cuda=torch.version.cuda,
        seen=tuple(Card(torch.cuda.get_device_name(i), total, free) for i, (free, total) in enumerate(memory)),
        half="bf16" if count and has_bf16() else "fp16 (no bf16 on this card)",
    )


def read_cards(text: str) -> tuple[Card, ...]:
    """nvidia-smi's lines `name, total MiB, free MiB, uuid`."""
    rows = re.findall(r"(?m)^(.+), (\d+), (\d+), (\S+)$", text)
    return tuple(Card(name, int(total) * 2**20, int(free) * 2**20, uuid) for name, total, free, uuid in rows)


def read_processes(text: str) -> tuple[str, ...]:
    """nvidia-smi's lines `pid, name, MiB`, without this process."""
    rows = [row for row in re.findall(r"(?m)^(\d+), (.*), (.+)$", text) if row[0] != str(os.getpid())]
    sizes = [f", {int(used) / 1024:.1f} GiB" if used.isdigit() else "" for _, _, used in rows]
    return tuple(f"pid {pid} ({Path(name).name}{size})" for (pid, name, _), size in zip(rows, sizes, strict=True))


def gpu(m: Machine) -> Iterator[Finding]:
    """What a run will train on, and why a card that is there cannot be used."""
    if not m.seen:
        yield Finding("gpu", *_unreachable(m))
        return
    first, total = m.seen[0], f"{m.seen[0].total / GIB:.1f}"
    count = f"; the first of {len(m.seen)} cards is used" if len(m.seen) > 1 else ""
    part = ", a MIG slice: the rest of the card is not yours" if " MIG " in first.name else ""
    small = "only Qwen3-0.6B and 1.7B fit: see `python -m toolkit fit --table`" if first.total < 5 * GIB else ""
    yield Finding("gpu", f"{first.name}{part}, {total} GiB, {m.half}; CUDA {m.torch_cuda}{count}", small)
    # torch numbers the fastest first, which need not be the largest
    if max(card.total for card in m.seen) > first.total:
        yield Finding("cards", "a larger card is there", "unset CUDA_VISIBLE_DEVICES: the largest is then chosen")
    if (held := first.total - first.free - CONTEXT) > first.total / 8:  # CUDA's own, for this process, is no one else's
        state = f"{held / GIB:.1f} of {total} GiB are in use by {', '.join(m.processes) or 'others'}"
        yield Finding("gpu memory", state, "end those processes (kill PID), or plan with less: fit --vram")


def _unreachable(m: Machine) -> tuple[str, str]:
    """(state, fix) of a machine whose torch sees no card."""
    if not (m.has_driver or m.cards):
        return f"none: {os.cpu_count()} CPU cores: the pocket model trains, larger ones are slow", ""
    name = m.cards[0].name if m.cards else "an NVIDIA driver"
    driver, needed = (int((version or "0").split(".")[0]) for version in (m.driver_cuda, m.torch_cuda))
    # the likeliest reason first: the variable that hides a card is set by hand
    if m.visible is not None:
        fix = f"unset it to train on the card; cards are numbered 0 to {max(0, len(m.cards) - 1)}"
        return f"{name} is hidden: CUDA_VISIBLE_DEVICES={m.visible!r} names no card", fix
    if not needed:
        return f"{name} is here, but this torch has no CUDA", f"{torch_command(m.driver_cuda)}; {ON_CPU}"
    # a driver runs programs built for its CUDA or an older one
    if 0 < driver < needed:
        state = f"{name}: its driver supports CUDA {m.driver_cuda}, this torch needs {m.torch_cuda}"
        return state, f"update the driver, or {torch_command(m.driver_cuda)}; {ON_CPU}"
    return f"{name} is here, but torch cannot open it", f"restart after a driver update; {ON_CPU}"


def torch_command(cuda: str) -> str:
    """How to install the build of torch that fits a driver."""
    with contextlib.suppress(SystemExit):
        options = install.torch_source(cuda, platform.system()).options
        return " ".join(["python -m pip install --force-reinstall", f"torch=={install.pins()['torch']}", *options])
    return "no build of torch fits it"


def largest_card(cards: tuple[Card, ...], environment: dict[str, str]) -> Card | None:
    """The card to use where several of different size are there and nobody has chosen; None: leave it as it is."""
    chosen = "CUDA_VISIBLE_DEVICES" in environment or "LOCAL_RANK" in environment  # by hand, or by accelerate
    if chosen or len({card.total for card in cards}) < 2:
        return None
    return max(cards, key=lambda card: card.total)


def use_largest_card(say: Callable[[str], None]) -> None:
    """Choose the largest card for this process. Call it before torch starts CUDA."""
    cards = read_cards(nvidia_smi(*CARD_QUERY))
    if card := largest_card(cards, dict(os.environ)):
        os.environ["CUDA_VISIBLE_DEVICES"] = card.uuid
        say(f"using {card.name}, the largest of {len(cards)} cards (CUDA_VISIBLE_DEVICES chooses another)")


def compiler(
    which: Callable[[str], str | None] = shutil.which, headers: Path | None = None, is_gpu: bool | None = None
) -> list[Finding]:
    """Triton compiles its launcher at the first step: with $CC, else gcc or clang, and Python.h (triton/runtime/build.py)."""
    if platform.system() == "Windows" or not (has_driver() if is_gpu is None else is_gpu):
        return []
    chosen = os.environ.get("CC")
    lacking = []
    if chosen is not None and which(chosen) is None:
        lacking.append(f"the C compiler that CC={chosen!r} names")
    # `cc` alone is not asked for
    if chosen is None and not (which("gcc") or which("clang")):
        lacking.append("gcc or clang")
    if not ((headers or Path(sysconfig.get_paths()["include"])) / "Python.h").is_file():
        lacking.append("Python.h")
    if not lacking:
        return []
    state = f"{' and '.join(lacking)} missing: the first step on the GPU will fail"
    return [Finding("compiler", state, "apt install gcc python3-dev (or your system's names for them)")]


def check_compiler(is_gpu: bool | None = None) -> None:
    """Raises ToolkitError where the first step on a card would fail for want of a compiler: before anything is downloaded."""
    for finding in compiler(is_gpu=is_gpu):
        raise ToolkitError(f"{finding.state}. {finding.fix}, then the same command again")


def fused_kernels(is_gpu: bool | None = None) -> list[Finding]:
    """Without Triton Unsloth goes on, slower, and says so in the log only (unsloth/_gpu_init.py)."""
    if not (has_driver() if is_gpu is None else is_gpu) or importlib.util.find_spec("triton") is not None:
        return []
    fix = (
        f'python -m pip install "{install.TRITON_FOR_WINDOWS}"'
        if platform.system() == "Windows"
        else "python -m toolkit setup"
    )
    return [Finding("triton", "missing: Unsloth's fused kernels are off, training is slower or fails", fix)]
