"""Install requirements.txt into the Python that runs this: standard library only.

python -m toolkit setup
"""

import importlib.metadata
import importlib.util
import os
import re
import signal
import subprocess
import sys

from toolkit.files import PACKAGE, ROOT

REQUIREMENTS = PACKAGE / "requirements.txt"
"""In an installed copy; a checkout has it at its root, and the lock beside it."""
if not REQUIREMENTS.is_file():
    REQUIREMENTS = ROOT / "requirements.txt"
LOCK = REQUIREMENTS.with_suffix(".lock")
NO_DEPS = ("unsloth", "unsloth_zoo")
"""They ask for torchvision, xformers and diffusers, which text fine-tuning does not use."""
TORCH = (2, 4), (2, 15)
"""Unsloth's range, the end excluded. A torch inside it stays, whatever requirements.txt pins: it may be the only build for
the driver here, and torchvision fits it (unsloth/import_fixes.py refuses a torchvision of another torch)."""


def setup() -> None:
    """Install what is pinned; nothing where all of it is installed. Raises SystemExit.

    A new environment gets torch and then every package of requirements.lock, each checked against its SHA-256. Where a torch
    works already (Colab), only what requirements.txt pins is installed, so that nothing else there is replaced."""
    if not differing():
        return
    torch = installed("torch")
    others = [[f"{name}=={version}" for name, version in pins().items() if name not in {"torch", *NO_DEPS}]]
    others += [["--no-deps", *(f"{name}=={pins()[name]}" for name in NO_DEPS)]]
    # Colab's torch is built for its driver, and replacing it takes minutes
    if torch_fits(torch):
        print(f"keeping torch {torch}")
        steps = others
    else:
        if torch:  # companions built for the old one would stop `import unsloth`
            subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", "torchaudio"])
        steps = [[f"torch=={pins()['torch']}"], ["--no-deps", "--require-hashes", "-r", str(LOCK)]]
        if not LOCK.is_file():  # an installed copy, for which pip resolved what these packages need
            steps[1:] = others
    print("installing packages (a few minutes the first time)", flush=True)
    for packages in steps:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if subprocess.run([*pip, *packages]).returncode:
            raise SystemExit("pip could not install the packages above: check the network, then run the same again")


def pins() -> dict[str, str]:
    """Package → version of requirements.txt, the `--no-deps` line included."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    stated = " ".join(line.split(" #")[0] for line in lines if line.startswith("# --no-deps") or line[:1] != "#")
    return dict(re.findall(r"([\w\-]+)==([^\s;]+)", stated))


def differing() -> list[str]:
    """Packages that `setup` would install or replace, each with its version here and the pinned one."""
    found = {name: (installed(name), version) for name, version in pins().items()}
    return [
        f"{name} {here or 'missing'} (pinned: {version})"
        for name, (here, version) in found.items()
        if (here or "").split("+")[0] != version and not (name == "torch" and torch_fits(here))
    ]


def installed(package: str) -> str | None:
    """The installed version of a package; None where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_fits(version: str | None) -> bool:
    """Whether a torch version is one that Unsloth accepts."""
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return bool(found) and TORCH[0] <= (int(found[1]), int(found[2])) < TORCH[1]


def replaced(modules: dict) -> list[str]:
    """Imported packages of which another version is installed by now, e.g. `pyarrow 18.1.0 → 26.0.1`."""
    loaded = {name: getattr(module, "__version__", None) for name, module in modules.items() if "." not in name}
    here = {name: installed(name) for name, version in loaded.items() if isinstance(version, str)}
    return [f"{n} {loaded[n]} → {v}" for n, v in here.items() if v and not v.startswith(loaded[n].split("+")[0])]


def prepare_notebook() -> None:
    """For the first cell of a notebook: install what is missing, Unsloth above all, which pip does not bring along."""
    if importlib.util.find_spec("unsloth") is None:
        setup()
    restart_if_replaced()


def restart_if_replaced() -> None:
    """For a notebook, after `setup`: restart the kernel where it holds modules of which set-up installed other versions.

    Old and new files of one package do not work together (pyarrow: "IpcWriteOptions size changed")."""
    if changes := replaced(sys.modules):
        print(f"restarting the kernel, as set-up replaced {', '.join(changes)}: run all cells once more", flush=True)
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # Colab and Jupyter start a new one at once
