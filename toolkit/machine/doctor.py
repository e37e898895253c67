"""What is installed, what will run, and the fix for what will not.

from toolkit.machine.doctor import examine; print(*examine(), sep="\\n")     (`python -m toolkit doctor`)
"""

import contextlib
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
from typing import NamedTuple

from toolkit.files import ROOT
from toolkit.machine import install
from toolkit.machine.fit import CONTEXT

DRIVER_FILES = ("/proc/driver/nvidia/version", "/usr/lib/wsl/lib/nvidia-smi")  # what unsloth_zoo/device_type.py asks
CARD_QUERY = "--query-gpu=name,memory.total,memory.free,uuid", "--format=csv,noheader,nounits"
GIB = 2**30
ON_CPU = "to train on the CPU instead: UNSLOTH_FORCE_CPU=1"


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
    """All findings, quickest first."""
    from toolkit.training.tracking import has_account

    wrong, count, free = install.differing(), len(install.pins()), shutil.disk_usage(ROOT).free / GIB
    system = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    pinned = f"{count - len(wrong)} of {count} as pinned; torch {install.installed('torch')}"
    hub, account = hub_answers(), has_account()
    recipe, why = default_recipe()
    checks = {  # what → is it as it should be?, state, fix
        "python": (sys.version_info >= (3, 11), system, "install Python 3.11 or newer and make the .venv again"),
        "packages": (not wrong, pinned, f"{', '.join(wrong)}: python -m toolkit setup"),
        "hub": (hub, "answers" if hub else "does not answer", "local folders and the pocket model still work"),
        "wandb": (account, "account found" if account else "no account: runs stay offline", "optional: wandb login"),
        "disk": (free > 20, f"{free:.0f} GiB free", "a 4B export needs about 20 GiB"),
        "make train": (True, f"{recipe}: {why}", ""),
    }
    found = [Finding(what, state, "" if is_good else fix) for what, (is_good, state, fix) in checks.items()]
    return [*found[:2], *compiler(), *gpu(look()), *found[2:]]


def default_recipe() -> tuple[str, str]:
    """(recipe, why): `hybrid` where there is a CUDA card and the Hub answers, else `pocket`."""
    import torch

    if not torch.cuda.is_available():
        card = next(iter(gpu(look())))
        # where there is a driver, the reason why torch cannot use it
        reason = "no CUDA card here" if card.state.startswith("none") else card.state
        return "data_recipes/pocket.yaml", f"{reason}: the pocket Qwen3 that ships with the package, on the CPU"
    if not hub_answers():
        return "data_recipes/pocket.yaml", "the Hub does not answer: the pocket Qwen3 that ships with the package"
    return "data_recipes/hybrid.yaml", f"{torch.cuda.get_device_name(0)} and the Hub answers"


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


def show(findings: list[Finding], console) -> None:
    """Print findings, each with its fix below it."""
    for what, state, fix in findings:
        console.print(f"{'[yellow]![/]' if fix else '[green]✓[/]'} {what:<11} {state}")
        if fix:
            console.print(f"{'':14}→ {fix}", markup=False)


def look() -> Machine:
    """This machine."""
    import torch

    from toolkit.training.model import has_bf16

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    memory = [torch.cuda.mem_get_info(i) for i in range(count)]
    apps = nvidia_smi("--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits")
    header = re.search(r"CUDA Version: *([\d.]+)", nvidia_smi())
    return Machine(
        has_driver=has_driver(),
        cards=read_cards(nvidia_smi(*CARD_QUERY)),
        driver_cuda=header[1] if header else "",
        processes=read_processes(apps),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        torch_cuda=torch.version.cuda,
        seen=tuple(Card(torch.cuda.get_device_name(i), total, free) for i, (free, total) in enumerate(memory)),
        half="bf16" if count and has_bf16() else "fp16 (no bf16 on this card)",
    )


def nvidia_smi(*options: str) -> str:
    """What the tool prints; nothing where it is missing or fails."""
    tool = shutil.which("nvidia-smi")
    done = tool and subprocess.run([tool, *options], capture_output=True, text=True, timeout=30)
    return done.stdout if done and not done.returncode else ""


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
        fix = "install torch with CUDA by the command that pytorch.org shows for your system: set-up keeps it"
        return f"{name} is here, but this torch has no CUDA", f"{fix}; {ON_CPU}"
    # a driver runs programs built for its CUDA or an older one
    if 0 < driver < needed:
        state = f"{name}: its driver supports CUDA {m.driver_cuda}, this torch needs {m.torch_cuda}"
        return state, f"update the driver, or install a build of torch for CUDA {driver}; {ON_CPU}"
    return f"{name} is here, but torch cannot open it", f"restart after a driver update; {ON_CPU}"


def largest_card(cards: tuple[Card, ...], environment: dict) -> Card | None:
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


def compiler(which: Callable = shutil.which, headers: Path | None = None, is_gpu: bool | None = None) -> list[Finding]:
    """Triton compiles its launcher with a C compiler and Python.h at the first step (triton/runtime/build.py)."""
    folder = headers or Path(sysconfig.get_paths()["include"])
    has_compiler = os.environ.get("CC") or any(map(which, ("cc", "gcc", "clang")))
    lacking = [] if has_compiler else ["a C compiler"]
    lacking += [] if (folder / "Python.h").is_file() else ["Python.h"]
    if not (has_driver() if is_gpu is None else is_gpu) or not lacking or platform.system() == "Windows":
        return []
    state = f"{' and '.join(lacking)} missing: the first step on the GPU will fail"
    return [Finding("compiler", state, "apt install gcc python3-dev (or your system's names for them)")]


def has_driver() -> bool:
    """Whether NVIDIA's driver is loaded; nothing is imported for it."""
    return any(Path(file).exists() for file in DRIVER_FILES)
