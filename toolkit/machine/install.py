"""Install requirements.txt into the Python that runs this: standard library only.

python -m toolkit setup
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from toolkit.files import PACKAGE, ROOT

# In an installed copy; a checkout has it at its root, and the lock beside it.
REQUIREMENTS = PACKAGE / "requirements.txt"
if not REQUIREMENTS.is_file():
    REQUIREMENTS = ROOT / "requirements.txt"
LOCK = REQUIREMENTS.with_suffix(".lock")
PIP = [sys.executable, "-m", "pip"]
# They ask for torchvision, xformers and diffusers, which text fine-tuning does not use.
NO_DEPS = ("unsloth", "unsloth_zoo")
# Unsloth's range, the end excluded. A torch inside it stays, whatever requirements.txt pins: it may be the only build
# for the driver here, and torchvision fits it (unsloth/import_fixes.py refuses a torchvision of another torch).
TORCH = (2, 4), (2, 15)

# What unsloth_zoo/device_type.py asks.
DRIVER_FILES = Path("/proc/driver/nvidia/version"), Path("/usr/lib/wsl/lib/nvidia-smi")
# CUDA's major version → where PyTorch's builds for it are; a driver runs builds for all minor versions of its major
# one. PyPI's build for Linux is for the newest, those for other systems have no CUDA.
INDEXES = {13: "https://download.pytorch.org/whl/cu130", 12: "https://download.pytorch.org/whl/cu129"}
TRITON_FOR_WINDOWS = "triton-windows>=3.7,<3.8"  # Triton's own wheels are for Linux; this one fits torch 2.13


class TorchSource(NamedTuple):
    """Where torch is installed from: options for pip, and why, in words."""

    options: list[str]
    reason: str


def setup() -> None:
    """Install what is pinned; nothing where all of it is installed. Raises SystemExit.

    A new environment gets torch and then every package of requirements.lock, each checked against its SHA-256. Where a torch
    works already (Colab), only what requirements.txt pins is installed, so that nothing else there is replaced."""
    if not differing():
        return
    torch = installed("torch")
    pinned = {name: f"{name}=={version}" for name, version in pins().items()}
    torch_pin = pinned.pop("torch")
    without_needs = [pinned.pop(name) for name in NO_DEPS]
    steps = [[*pinned.values()], ["--no-deps", *without_needs]]
    # Colab's torch is built for its driver, and replacing it takes minutes
    if torch_fits(torch):
        print(f"keeping torch {torch}")
    else:
        if torch:  # companions built for the old one would stop `import unsloth`
            subprocess.run([*PIP, "uninstall", "--quiet", "--yes", "torchvision", "torchaudio"])
        # the wrong build is 3 GB that ends in "no CUDA card here"
        source = torch_source(driver_cuda(), platform.system())
        print(f"{torch_pin}: {source.reason}", flush=True)
        # an installed copy has no lock: there pip resolved what these packages need
        steps = [["--no-deps", "--require-hashes", "-r", str(LOCK)]] if LOCK.is_file() else steps
        steps.insert(0, [torch_pin, *source.options])
    print("installing packages (a few minutes the first time)", flush=True)
    for packages in steps:
        if subprocess.run([*PIP, "install", "--quiet", "--disable-pip-version-check", *packages]).returncode:
            raise SystemExit("pip could not install the packages above: check the network, then run the same again")


def torch_source(cuda: str, system: str) -> TorchSource:
    """Which build of torch fits the newest CUDA that the driver supports, `12.4`, or "" without a driver.

    Raises SystemExit for a driver that no build fits."""
    if os.environ.get("UNSLOTH_FORCE_CPU"):
        return TorchSource([], "PyPI's build, as UNSLOTH_FORCE_CPU asks for the CPU")
    if not cuda:
        return TorchSource([], "PyPI's build, as nvidia-smi shows no driver")
    newest = max(INDEXES)
    major = min(newest, int(cuda.split(".")[0]))
    if major not in INDEXES:
        raise SystemExit(
            f"the NVIDIA driver here supports CUDA {cuda}, and torch {pins()['torch']} needs 12 or newer: update the "
            "driver to 525 or newer, or install for the CPU: UNSLOTH_FORCE_CPU=1"
        )
    why = f"as the driver here supports CUDA {cuda}"
    if major == newest and system == "Linux":
        return TorchSource([], f"PyPI's build for CUDA {newest}, {why}")
    other = f"is for CUDA {newest}" if system == "Linux" else f"for {system} has no CUDA"
    index = INDEXES[major]
    return TorchSource(["--index-url", index], f"the build for CUDA {major} from {index}, {why}; PyPI's {other}")


def driver_cuda() -> str:
    """The newest CUDA that the NVIDIA driver here supports, `12.4`; "" where nvidia-smi does not say."""
    header = re.search(r"CUDA Version: *([\d.]+)", nvidia_smi())
    return header[1] if header else ""


def nvidia_smi() -> str:
    """What the driver's tool prints; nothing where it is missing or fails."""
    tool = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=str(DRIVER_FILES[1].parent))
    if tool is None:
        return ""
    try:
        done = subprocess.run([tool], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):  # a driver that hangs after a failed update
        return ""
    return "" if done.returncode else done.stdout


def has_driver() -> bool:
    """Whether NVIDIA's driver is here; nothing is imported for it."""
    return any(file.exists() for file in DRIVER_FILES) or shutil.which("nvidia-smi") is not None


def pins() -> dict[str, str]:
    """Package → version of requirements.txt, the `--no-deps` line included."""
    stated = []
    for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        # pip reads the line as a comment, `setup` runs it
        if line.startswith("# --no-deps") or not line.startswith("#"):
            stated.append(line.split(" #")[0])
    return dict(re.findall(r"([\w\-]+)==([^\s;]+)", " ".join(stated)))


def differing() -> list[str]:
    """Packages that `setup` would install or replace, each with its version here and the pinned one."""
    lines = []
    for name, version in pins().items():
        here = installed(name)
        # any torch that Unsloth accepts is kept: it may be the only build for the driver here
        fits = torch_fits(here) if name == "torch" else (here or "").split("+")[0] == version
        if not fits:
            lines.append(f"{name} {here or 'missing'} (pinned: {version})")
    return lines


def installed(package: str) -> str | None:
    """The installed version of a package; None where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_fits(version: str | None) -> bool:
    """Whether a torch version is one that Unsloth accepts."""
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    if numbers is None:
        return False
    first, end = TORCH
    return first <= (int(numbers[1]), int(numbers[2])) < end


def replaced(modules: dict[str, ModuleType]) -> list[str]:
    """Imported packages of which another version is installed by now, e.g. `pyarrow 18.1.0 → 26.0.1`."""
    changes = []
    for name, module in modules.items():
        loaded = vars(module).get("__version__") if "." not in name else None
        here = installed(name) if isinstance(loaded, str) else None
        if loaded and here and not here.startswith(loaded.split("+")[0]):
            changes.append(f"{name} {loaded} → {here}")
    return changes


def prepare_notebook() -> None:
    """For the first cell of a notebook: install what is missing, Unsloth above all, which pip does not bring along."""
    # looked for, not imported: importing it takes 13 seconds and patches the libraries
    if importlib.util.find_spec("unsloth") is None:
        setup()
    # old and new files of one package do not work together (pyarrow: "IpcWriteOptions size changed")
    if changes := replaced(sys.modules):
        print(f"restarting the kernel, as set-up replaced {', '.join(changes)}: run all cells once more", flush=True)
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # Colab and Jupyter start a new one at once
