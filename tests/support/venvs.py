"""A virtual environment with the packages of this one but for the toolkit, made in a second and without a network.

python = venvs.make(tmp_path / "venv"); subprocess.run([python, "-c", "import torch"], check=True)
"""

import subprocess
import sys
import sysconfig
from pathlib import Path


def make(folder: Path) -> Path:
    """The new environment's Python; what is installed with it goes into its own folder."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = next(folder.rglob("site-packages"))
    (packages / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    return next(path for path in folder.glob("*/python*") if path.is_file())
