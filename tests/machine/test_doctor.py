"""Doctor and set-up: every machine that cannot train says why and how to change it; the two never contradict."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from toolkit.files import ROOT, ToolkitError
from toolkit.machine import doctor, install
from toolkit.machine.doctor import Card, Machine

GIB = 2**30
RTX = Card("RTX 3060", 12 * GIB, int(11.5 * GIB))
T4 = Card("Tesla T4", 15 * GIB, 15 * GIB)


@pytest.mark.parametrize(
    ("machine", "state", "fix"),
    [
        (Machine(), "none: .* CPU cores", "^$"),
        (Machine(has_driver=True), "this torch has no CUDA", "pip install --force-reinstall torch==.*UNSLOTH_FORCE_CPU=1"),
        (Machine(True, "12.4", "13.0"), "supports CUDA 12.4, this torch needs 13.0", "update the driver, or python -m pip install .*whl/cu129"),
        (Machine(True, "12.4", "12.8", visible=""), "hidden: CUDA_VISIBLE_DEVICES='' names none", "unset it"),
        (Machine(True, "12.8", "12.8", visible="1"), "='1' names none", "unset it.*numbered from 0"),
        (Machine(True, "12.8", "12.8"), "torch cannot open a card", "restart"),
        (Machine(True, "13.0", "12.8", seen=(RTX,)), "RTX 3060, 12.0 GiB, bf16; CUDA 12.8", "^$"),
        (Machine(True, seen=(Card("GTX 1650", 4 * GIB, 4 * GIB),)), "GTX 1650, 4.0 GiB", "^$"),
    ],
)  # fmt: skip
def test_every_gpu_is_used_or_the_reason_and_the_fix_are_said(machine, state, fix):
    [found] = doctor.gpu(machine)
    assert re.search(state, found.state)
    assert re.search(fix, found.fix)


def test_memory_held_by_another_process_is_told_from_ones_own():
    _, found = doctor.gpu(Machine(True, seen=(Card("RTX 3060", 12 * GIB, 8 * GIB),)))
    assert found.state == "3.6 of 12.0 GiB are in use by others"
    assert "kill PID" in found.fix


def test_the_context_that_asking_a_small_card_makes_counts_as_nobodys():
    found = doctor.gpu(Machine(True, seen=(Card("GTX 1650", 4 * GIB, int(3.4 * GIB)),)))
    assert [finding.what for finding in found] == ["gpu"]


def test_a_larger_card_than_the_first_is_named_with_how_to_choose_it():
    _, found = doctor.gpu(Machine(True, seen=(RTX, T4)))
    assert (found.state, found.fix) == ("Tesla T4 is larger: 15.0 GiB", "CUDA_VISIBLE_DEVICES=1 trains on it")
    assert len([*doctor.gpu(Machine(True, seen=(RTX, RTX)))]) == 1


def test_a_missing_compiler_or_header_is_found_before_the_first_step(tmp_path, monkeypatch):
    there: list[str] = []
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name if name in there else None)
    monkeypatch.delenv("CC", raising=False)
    [both] = doctor.compiler(True, str(tmp_path))
    assert both.state.startswith("gcc or clang and Python.h missing")
    assert "gcc python3-dev" in both.fix
    (tmp_path / "Python.h").touch()
    there[:] = ["cc", "c99", "tcc"]
    [one] = doctor.compiler(True, str(tmp_path))
    assert one.state.startswith("gcc or clang missing"), "Triton does not look for `cc`"
    for name in ("gcc", "clang"):
        there[:] = [name]
        assert not doctor.compiler(True, str(tmp_path))
    assert not doctor.compiler(False, str(tmp_path / "nowhere"))
    monkeypatch.setenv("CC", "cc")
    there[:] = ["cc"]
    assert not doctor.compiler(True, str(tmp_path))
    monkeypatch.setenv("CC", "/opt/gone/gcc")
    [named] = doctor.compiler(True, str(tmp_path))
    assert "the C compiler that CC='/opt/gone/gcc' names missing" in named.state


def test_a_missing_compiler_stops_a_run_on_a_card_and_none_on_a_cpu(monkeypatch):
    monkeypatch.setenv("CC", "/opt/gone/gcc")
    doctor.check_compiler(is_gpu=False)
    with pytest.raises(ToolkitError, match=r"the first step on the GPU will fail. apt install gcc python3-dev"):
        doctor.check_compiler(is_gpu=True)


def test_what_triton_itself_looks_for_is_what_is_looked_for():
    """Triton's own source: $CC, else gcc, else clang."""
    import importlib.util

    root = importlib.util.find_spec("triton").submodule_search_locations[0]
    text = (Path(root) / "runtime" / "build.py").read_text()
    assert set(re.findall(r'shutil.which\("(\w+)"\)', text)) == {"gcc", "clang"}
    assert 'os.environ.get("CC")' in text


def test_a_card_without_triton_is_told_that_fused_kernels_are_off(monkeypatch):
    assert doctor.fused_kernels(is_gpu=True) == doctor.fused_kernels(is_gpu=False) == []
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: None)
    [found] = doctor.fused_kernels(is_gpu=True)
    assert "fused kernels are off" in found.state
    monkeypatch.setattr(doctor.platform, "system", lambda: "Windows")
    assert "triton-windows" in doctor.fused_kernels(is_gpu=True)[0].fix
    assert doctor.fused_kernels(is_gpu=False) == []


BARE = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in sys.stdlib_module_names | {"toolkit"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import importlib.util, importlib.metadata
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: real(name, package) if name.startswith("toolkit") else None
def version(name): raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = version
from toolkit.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_where_no_package_is_installed_the_doctor_works_and_names_set_up():
    done = subprocess.run([sys.executable, "-S", "-c", BARE, "doctor"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "0 of " in done.stdout
    assert "torch, rich, transformers, msgspec missing" in done.stdout
    assert "python -m toolkit setup" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_the_doctor_takes_little_and_imports_no_torch_where_there_is_no_driver():
    code = "import sys; from toolkit.__main__ import main; main(['doctor']); print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_an_environment_that_was_cut_short_is_made_again(tmp_path):
    """`python -m venv` without Debian's python3-venv leaves a Python without pip behind."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements.txt", "requirements.lock"):
        (tmp_path / name).touch()
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    half = folder / "python"
    half.write_text("#!/bin/sh\necho No module named pip >&2\nexit 1\n")
    half.chmod(0o755)
    maker = tmp_path / "maker"
    maker.write_text(
        "#!/bin/sh\nmkdir -p .venv/bin\necho '#!/bin/sh\necho \"$@\" >> calls' > .venv/bin/python\nchmod +x .venv/bin/python\n"
    )
    maker.chmod(0o755)
    done = subprocess.run(["make", "setup", f"PYTHON={maker}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "-m toolkit setup"


@pytest.mark.slow
def test_a_card_that_torch_cannot_use_is_an_error_with_its_fix_and_not_a_traceback():
    import subprocess

    code = (
        "import os; there = os.path.exists; os.path.exists = lambda p: 'nvidia' in str(p) and 'driver' in str(p) or there(p)\n"
        "from toolkit.training import model; from toolkit.files import ToolkitError\n"
        "try: model.unsloth()\n"
        "except ToolkitError as error: print(error)"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "UNSLOTH_FORCE_CPU")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "python -m toolkit doctor" in done.stdout, done.stderr
    assert "UNSLOTH_FORCE_CPU=1" in done.stdout


@pytest.mark.parametrize(("version", "fits"), [("2.4.0", True), ("2.14.1+cu130", True), ("2.15.0", False), ("2.3.1", False),
                                               ("3.0", False), (None, False), ("unknown", False)])  # fmt: skip
def test_any_torch_in_unsloths_range_is_kept(version, fits):
    assert install.torch_fits(version) is fits


def test_the_range_is_unsloths_own():
    [torch] = [r for r in importlib.metadata.requires("unsloth_zoo") if r.startswith(("torch<", "torch>"))][:1]
    low, high = (".".join(map(str, bound)) for bound in install.TORCH)
    assert f">={low}" in torch
    assert f"<{high}" in torch


def test_doctor_asks_for_nothing_that_setup_would_not_do(monkeypatch):
    versions = dict(install.pins())
    monkeypatch.setattr(install, "installed", versions.get)
    assert install.differing() == []
    versions["torch"] = "2.11.0+cu128"  # Colab's
    assert install.differing() == []
    versions |= {"torch": "2.3.0", "rich": None}
    assert [line.split()[0] for line in install.differing()] == ["torch", "rich"]


def test_every_pin_is_read_the_no_deps_line_included():
    names = install.pins()
    assert {"torch", "pexpect", "unsloth", "unsloth_zoo"} <= set(names)


def test_the_lock_holds_every_pin_with_its_hashes_but_for_torch_whose_build_depends_on_the_machine():
    text = install.LOCK.read_text(encoding="utf-8")
    locked = {name.replace("-", "_"): version for name, version in re.findall(r"(?m)^([\w-]+)==([^\s;]+)", text)}
    pinned = {name.replace("-", "_"): version for name, version in install.pins().items() if name != "torch"}
    assert pinned.items() <= locked.items(), "run `make lock`"
    assert "torch" not in locked
    assert all("--hash=sha256:" in entry for entry in re.split(r"(?m)^(?=[\w-]+==)", text) if entry)


def test_the_lock_holds_what_one_system_alone_needs_at_a_version_that_is_asked_for():
    from packaging.requirements import Requirement

    lines = [line.split(" #")[0] for line in install.REQUIREMENTS.read_text(encoding="utf-8").splitlines()]
    [asked] = [Requirement(line) for line in lines if ";" in line and not line.startswith("#")]
    assert str(asked.marker) == 'sys_platform == "win32"'
    found = re.search(rf"(?m)^{asked.name}==(\S+) ; sys_platform == 'win32' ", install.LOCK.read_text(encoding="utf-8"))
    assert found[1] in asked.specifier
    assert Requirement(install.TRITON_FOR_WINDOWS).specifier == asked.specifier


@pytest.mark.parametrize(
    ("cuda", "system", "index", "why"),
    [
        ("", "Linux", None, "nvidia-smi shows no driver"),
        ("13.0", "Linux", None, "PyPI's build for CUDA 13, as the driver here supports CUDA 13.0"),
        ("14.1", "Linux", None, "as the driver here supports CUDA 14.1"),
        (
            "12.9",
            "Linux",
            "cu129",
            "the build for CUDA 12 from .*pytorch.org.*cu129, as the driver here supports CUDA 12.9",
        ),
        ("12.0", "Linux", "cu129", "PyPI's is for CUDA 13"),
        ("12.4", "Windows", "cu129", "PyPI's for Windows has no CUDA"),
        ("13.0", "Windows", "cu130", "PyPI's for Windows has no CUDA"),
        ("", "Windows", None, "nvidia-smi shows no driver"),
    ],
)
def test_torch_is_the_build_that_the_driver_runs_and_it_is_said_why(cuda, system, index, why, monkeypatch):
    monkeypatch.delenv("UNSLOTH_FORCE_CPU", raising=False)
    source = install.torch_source(cuda, system)
    assert re.search(why, source.reason)
    assert source.options == (["--index-url", f"https://download.pytorch.org/whl/{index}"] if index else [])


def test_a_driver_that_no_build_fits_is_refused_before_the_download(monkeypatch):
    monkeypatch.delenv("UNSLOTH_FORCE_CPU", raising=False)
    with pytest.raises(SystemExit, match=r"supports CUDA 11.4.*update the driver to 525 or newer"):
        install.torch_source("11.4", "Linux")
    monkeypatch.setenv("UNSLOTH_FORCE_CPU", "1")
    assert install.torch_source("11.4", "Linux").options == []


@pytest.mark.parametrize(
    ("printed", "cuda"),
    [("| NVIDIA-SMI 550.54.15  Driver Version: 550.54.15  CUDA Version: 12.4  |", "12.4"), ("NVIDIA-SMI has failed", ""), ("", "")],
)  # fmt: skip
def test_the_driver_s_cuda_is_read_from_its_tool(printed, cuda, monkeypatch):
    monkeypatch.setattr(install, "nvidia_smi", lambda: printed)
    assert install.driver_cuda() == cuda


def test_a_tool_of_the_driver_that_hangs_or_fails_says_nothing(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho broken\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert install.nvidia_smi() == ""
    assert install.has_driver()


def test_a_new_environment_is_installed_from_the_lock_and_one_with_a_torch_keeps_its_own(monkeypatch):
    asked = []
    monkeypatch.setattr(
        install.subprocess, "run", lambda command: asked.append(command[6:]) or types.SimpleNamespace(returncode=0)
    )
    monkeypatch.setattr(install, "driver_cuda", lambda: "12.8")
    monkeypatch.delenv("UNSLOTH_FORCE_CPU", raising=False)
    monkeypatch.setattr(install, "installed", {}.get)
    install.setup()
    index = ["--index-url", "https://download.pytorch.org/whl/cu129"]
    assert asked == [
        [f"torch=={install.pins()['torch']}", *index],
        ["--no-deps", "--require-hashes", "-r", str(install.LOCK)],
    ]
    asked.clear()
    monkeypatch.setattr(install, "installed", {"torch": "2.11.0+cu128"}.get)
    install.setup()
    assert [len(command) > 10 for command in asked] == [True, False]
    assert not any(argument.startswith("torch==") for command in asked for argument in command)


def test_on_windows_triton_comes_from_the_lock_with_its_hash(monkeypatch):
    asked = []
    monkeypatch.setattr(
        install.subprocess, "run", lambda command: asked.append(command[6:]) or types.SimpleNamespace(returncode=0)
    )
    monkeypatch.setattr(install, "driver_cuda", lambda: "12.8")
    monkeypatch.setattr(install.platform, "system", lambda: "Windows")
    monkeypatch.delenv("UNSLOTH_FORCE_CPU", raising=False)
    monkeypatch.setattr(install, "installed", {}.get)
    install.setup()
    assert [command[0] for command in asked] == [f"torch=={install.pins()['torch']}", "--no-deps"]
    assert not any("triton" in argument for command in asked for argument in command)


def test_a_module_that_setup_replaced_under_a_running_kernel_is_noticed():
    here = importlib.metadata.version("rich")
    old, same = types.ModuleType("rich"), types.ModuleType("msgspec")
    old.__version__, same.__version__ = "1.0", importlib.metadata.version("msgspec")
    unknown = types.ModuleType("mine")
    unknown.__version__ = "1"
    assert install.replaced({"rich": old, "msgspec": same, "mine": unknown, "rich.table": old}) == [
        f"rich 1.0 → {here}"
    ]


def test_nothing_imported_here_counts_as_replaced():
    assert install.replaced(dict(sys.modules)) == []


def test_a_next_command_is_quoted_for_the_shell_it_is_typed_in(monkeypatch):
    from toolkit import files

    words = ["python", "-m", "toolkit", "train", "my recipe.yaml", "train.lr=1e-4", "a=[x, 'y']"]
    assert files.command_line(words).endswith("""train 'my recipe.yaml' train.lr=1e-4 'a=[x, '"'"'y'"'"']'""")
    monkeypatch.setattr(files, "os", types.SimpleNamespace(name="nt"))
    assert files.command_line(words).endswith("train 'my recipe.yaml' train.lr=1e-4 'a=[x, ''y'']'")
