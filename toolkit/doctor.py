"""What is installed, what will run, and the fix for what will not.

from toolkit.doctor import examine; print(*examine(), sep="\\n")     (`python -m toolkit doctor`)
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from toolkit import install
from toolkit.files import ROOT

DRIVER_FILES = ("/proc/driver/nvidia/version", "/usr/lib/wsl/lib/nvidia-smi")  # what unsloth_zoo/device_type.py asks
SMALL = 5 * 2**30
ON_CPU = "to train on the CPU instead: UNSLOTH_FORCE_CPU=1"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report; `fix` is empty where nothing is wrong."""

    what: str
    state: str
    fix: str = ""


@dataclass(frozen=True)
class Card:
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
    """All findings, quickest first."""
    return [_python(), _packages(), *compiler(), *gpu(look()), _hub(), _wandb(), _disk(), _default_recipe()]


# --- the GPU ---------------------------------------------------------------------------------------------------------


def look() -> Machine:
    """This machine."""
    import torch

    from toolkit.model import has_bf16

    reachable = torch.cuda.is_available()
    count = torch.cuda.device_count() if reachable else 0
    names = [torch.cuda.get_device_name(i) for i in range(count)]
    memory = [torch.cuda.mem_get_info(i) for i in range(count)]
    apps = _nvidia_smi("--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits")
    header = re.search(r"CUDA Version: *([\d.]+)", _nvidia_smi())
    return Machine(
        has_driver=any(Path(file).exists() for file in DRIVER_FILES),
        cards=read_cards(
            _nvidia_smi("--query-gpu=name,memory.total,memory.free,uuid", "--format=csv,noheader,nounits")
        ),
        driver_cuda=header[1] if header else "",
        processes=read_processes(apps),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        torch_cuda=torch.version.cuda,
        seen=tuple(Card(name, total, free) for name, (free, total) in zip(names, memory, strict=True)),
        half="bf16" if reachable and has_bf16() else "fp16 (no bf16 on this card)",
    )


def _nvidia_smi(*options: str) -> str:
    tool = shutil.which("nvidia-smi")
    done = tool and subprocess.run([tool, *options], capture_output=True, text=True, timeout=30)
    return done.stdout if done and not done.returncode else ""


def read_cards(text: str) -> tuple[Card, ...]:
    """nvidia-smi's lines `name, total MiB, free MiB, uuid`."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.count(",") == 3]
    return tuple(Card(n, int(t) * 2**20, int(f) * 2**20, u) for n, t, f, u in rows if t.isdigit() and f.isdigit())


def read_processes(text: str) -> tuple[str, ...]:
    """nvidia-smi's lines `pid, name, MiB`."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.count(",") == 2]
    return tuple(
        f"pid {p} ({Path(n).name}" + (f", {int(m) / 1024:.1f} GiB)" if m.isdigit() else ")") for p, n, m in rows
    )


def gpu(m: Machine) -> Iterator[Finding]:
    """What a run will train on, and why a card that is there cannot be used."""
    if not m.seen:
        yield _unreachable(m)
        return
    first = m.seen[0]
    count = f"; the first of {len(m.seen)} cards is used" if len(m.seen) > 1 else ""
    part = ", a MIG slice: the rest of the card is not yours" if " MIG " in first.name else ""
    small = "only Qwen3-0.6B and 1.7B fit: see `python -m toolkit fit --table`" if first.total < SMALL else ""
    state = f"{first.name}{part}, {first.total / 2**30:.1f} GiB, {m.half}; CUDA {m.torch_cuda}{count}"
    yield Finding("gpu", state, small)
    if len(m.seen) > 1 and max(card.total for card in m.seen) > first.total:
        yield Finding("cards", "a larger card is there", "unset CUDA_VISIBLE_DEVICES: the largest is then chosen")
    held = first.total - first.free
    if held > first.total / 8:
        state = (
            f"{held / 2**30:.1f} of {first.total / 2**30:.1f} GiB are in use by {', '.join(m.processes) or 'others'}"
        )
        yield Finding("gpu memory", state, "end those processes (kill PID), or plan with less: fit --vram")


def _unreachable(m: Machine) -> Finding:
    if not (m.has_driver or m.cards):
        return Finding("gpu", f"none: {os.cpu_count()} CPU cores, the pocket model trains, larger ones are slow")
    name = m.cards[0].name if m.cards else "an NVIDIA driver"
    if m.visible is not None and m.visible.strip() in ("", "-1"):
        return Finding(
            "gpu", f"{name} is hidden by CUDA_VISIBLE_DEVICES={m.visible!r}", "unset it to train on the card"
        )
    if m.torch_cuda is None:
        fix = f"pip install --force-reinstall a build of torch with CUDA; {ON_CPU}"
        return Finding("gpu", f"{name} is here, but this torch has no CUDA", fix)
    if m.driver_cuda and int(m.driver_cuda.split(".")[0]) < int(m.torch_cuda.split(".")[0]):
        fix = f"update the driver, or install a build of torch for CUDA {m.driver_cuda.split('.')[0]}; {ON_CPU}"
        return Finding("gpu", f"{name}: its driver supports CUDA {m.driver_cuda}, this torch needs {m.torch_cuda}", fix)
    if m.visible is not None:
        there = f"0 to {len(m.cards) - 1}" if len(m.cards) > 1 else "0"
        fix = f"the cards here are numbered {there}: correct or unset it"
        return Finding("gpu", f"CUDA_VISIBLE_DEVICES={m.visible} names no card", fix)
    return Finding("gpu", f"{name} is here, but torch cannot open it", f"restart after a driver update; {ON_CPU}")


def largest_card(cards: tuple[Card, ...], environment: dict) -> Card | None:
    """The card to use where several of different size are there and nobody has chosen; None: leave it as it is."""
    chosen = "CUDA_VISIBLE_DEVICES" in environment or "LOCAL_RANK" in environment  # by hand, or by accelerate
    if chosen or len({card.total for card in cards}) < 2:
        return None
    return max(cards, key=lambda card: card.total)


def use_largest_card(say: Callable[[str], None]) -> None:
    """Choose the largest card for this process. Call it before torch starts CUDA."""
    cards = read_cards(_nvidia_smi("--query-gpu=name,memory.total,memory.free,uuid", "--format=csv,noheader,nounits"))
    if card := largest_card(cards, dict(os.environ)):
        os.environ["CUDA_VISIBLE_DEVICES"] = card.uuid
        say(f"using {card.name}, the largest of {len(cards)} cards (CUDA_VISIBLE_DEVICES chooses another)")


# --- the rest --------------------------------------------------------------------------------------------------------


def compiler(
    which: Callable = shutil.which, headers: Path | None = None, is_gpu: bool | None = None
) -> Iterator[Finding]:
    """Triton compiles its launcher with a C compiler and Python.h at the first step (triton/runtime/build.py)."""
    if is_gpu is None:
        is_gpu = any(Path(file).exists() for file in DRIVER_FILES)
    folder = headers or Path(sysconfig.get_paths()["include"])
    lacking = [] if os.environ.get("CC") or any(map(which, ("cc", "gcc", "clang"))) else ["a C compiler"]
    lacking += [] if (folder / "Python.h").is_file() else ["Python.h"]
    if is_gpu and lacking and platform.system() != "Windows":
        fix = "apt install gcc python3-dev (or your system's names for them)"
        yield Finding("compiler", f"{' and '.join(lacking)} missing: the first step on the GPU will fail", fix)


def _python() -> Finding:
    fix = "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer and make the .venv again"
    return Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", fix)


def _packages() -> Finding:
    wrong, count = install.differing(), len(list(install.pins()))
    state = f"{count - len(wrong)} of {count} as pinned; torch {install.installed('torch')}"
    return Finding("packages", state, f"{', '.join(wrong)}: python -m toolkit setup" if wrong else "")


def _hub() -> Finding:
    from toolkit.run import hub_answers

    if hub_answers():
        return Finding("hub", "answers")
    return Finding("hub", "does not answer", "local folders, the Hub's local cache and the pocket model still work")


def _wandb() -> Finding:
    from toolkit.tracking import has_account

    if has_account():
        return Finding("wandb", "account found: runs are uploaded")
    return Finding("wandb", "no account: runs are kept offline", "optional: wandb login, or upload later: wandb sync")


def _disk() -> Finding:
    free = shutil.disk_usage(ROOT).free / 2**30
    return Finding("disk", f"{free:.0f} GiB free", "" if free > 20 else "a 4B export needs about 20 GiB")


def _default_recipe() -> Finding:
    from toolkit.run import default_recipe

    recipe, why = default_recipe()
    return Finding("make train", f"{recipe}: {why}")
