"""What is installed, what will run, and the fix for what will not: `python -m toolkit doctor`."""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass

from toolkit.files import ROOT


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report; `fix` is empty where nothing is wrong."""

    what: str
    state: str
    fix: str = ""


def examine() -> list[Finding]:
    """All findings, quickest first."""
    return [*_python(), *_packages(), _gpu(), _hub(), _wandb(), _disk(), default_recipe_finding()]


def _python():
    version = platform.python_version()
    fix = "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer and make the .venv again"
    yield Finding("python", f"{version} on {platform.system()} {platform.machine()}", fix)


def _packages():
    pinned = re.findall(
        r"^(?:# --no-deps )?([\w\-]+)==([^\s;]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE
    )
    wrong = []
    for name, version in [*pinned, ("unsloth_zoo", dict(pinned)["unsloth"])]:
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed = "missing"
        if installed.split("+")[0] != version:
            wrong.append(f"{name} {installed} (tried with {version})")
    state = f"{len(pinned) + 1 - len(wrong)} of {len(pinned) + 1} at the versions that were tried"
    yield Finding("packages", state, f"{', '.join(wrong)}: python -m toolkit setup" if wrong else "")


def _gpu() -> Finding:
    import torch

    from toolkit.model import has_bf16

    if not torch.cuda.is_available():
        has_driver = shutil.which("nvidia-smi") is not None
        fix = "a driver is here, but this torch has no CUDA: pip install torch with CUDA" if has_driver else ""
        return Finding("gpu", f"none: {os.cpu_count()} CPU cores, the pocket model trains, larger ones crawl", fix)
    gpu = torch.cuda.get_device_properties(0)
    half = "bf16" if has_bf16() else "fp16 (no bf16 on this card)"
    count = f", {torch.cuda.device_count()} cards" if torch.cuda.device_count() > 1 else ""
    return Finding("gpu", f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, {half}{count}; CUDA {torch.version.cuda}")


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


def default_recipe_finding() -> Finding:
    from toolkit.run import default_recipe

    recipe, why = default_recipe()
    return Finding("make train", f"{recipe}: {why}")
