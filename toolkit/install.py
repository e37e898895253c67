"""Install requirements.txt into the Python that runs this: `python -m toolkit setup`. Standard library only."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements.txt"
STAMP = Path(sys.prefix) / ".toolkit-requirements"


def setup() -> None:
    """Install what is pinned, then the one `--no-deps` line; does nothing when requirements.txt has not changed since.

    A torch with CUDA that already works (Colab, a shared machine) is left alone. Raises SystemExit when pip fails.
    """
    text = REQUIREMENTS.read_text(encoding="utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()
    if STAMP.is_file() and STAMP.read_text() == digest:
        return
    wanted = [line.split(" #")[0].strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if _torch_has_cuda():
        print("keeping the torch that is here: it already works with CUDA")
        wanted = [line for line in wanted if not line.startswith("torch==")]
    pip(*wanted)
    pip("--no-deps", *re.search(r"^# --no-deps (.*)$", text, re.MULTILINE)[1].split())
    STAMP.write_text(digest)


def pip(*packages: str) -> None:
    """`pip install` into this Python."""
    print(f"installing {len(packages)} packages (a few minutes the first time)", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
    if subprocess.run(command).returncode:
        raise SystemExit("pip could not install the packages above: check the network, then run the same command again")


def _torch_has_cuda() -> bool:
    check = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", check], capture_output=True).returncode == 0
