"""Doctor and set-up: every machine that cannot train says why and how to change it; the two never contradict."""

import importlib.metadata
import os
import re
import sys
import types

import pytest

from toolkit.machine import doctor, install
from toolkit.machine.doctor import Card, Machine

GIB = 2**30
RTX = Card("RTX 3060", 12 * GIB, int(11.5 * GIB), "GPU-a")
T4 = Card("Tesla T4", 15 * GIB, 15 * GIB, "GPU-b")


@pytest.mark.parametrize(
    ("machine", "state", "fix"),
    [
        (Machine(), "none: .* CPU cores", "^$"),
        (Machine(has_driver=True), "this torch has no CUDA", "pytorch.org.*UNSLOTH_FORCE_CPU=1"),
        (Machine(True, (RTX,), "12.4", torch_cuda="13.0"), "supports CUDA 12.4, this torch needs 13.0", "update the driver"),
        (Machine(True, (RTX,), "12.4", torch_cuda="12.8", visible=""), "hidden: CUDA_VISIBLE_DEVICES='' names no card", "unset it"),
        (Machine(True, (RTX,), "12.8", torch_cuda="12.8", visible="1"), "='1' names no card", "unset it.*numbered 0 to 0"),
        (Machine(True, (RTX,), "12.8", torch_cuda="12.8"), "torch cannot open it", "restart"),
        (Machine(True, (RTX,), "13.0", torch_cuda="12.8", seen=(RTX,)), "RTX 3060, 12.0 GiB, bf16; CUDA 12.8", "^$"),
        (Machine(seen=(Card("GTX 1650", 4 * GIB, 4 * GIB),)), "GTX 1650, 4.0 GiB", "only Qwen3-0.6B and 1.7B fit"),
        (Machine(seen=(Card("A100 MIG 1g.5gb", 5 * GIB, 5 * GIB),)), "a MIG slice", "^$"),
    ],
)  # fmt: skip
def test_every_gpu_is_used_or_the_reason_and_the_fix_are_said(machine, state, fix):
    import re

    [found] = doctor.gpu(machine)
    assert re.search(state, found.state)
    assert re.search(fix, found.fix)


def test_memory_held_by_another_process_is_named_by_its_pid():
    own = f"{os.getpid()}, python, 300\n"
    processes = doctor.read_processes(f"1234, /usr/bin/python3, 3072\n{own}77, python, [N/A]\n")
    assert processes == ("pid 1234 (python3, 3.0 GiB)", "pid 77 (python)")
    _, found = doctor.gpu(Machine(seen=(Card("RTX 3060", 12 * GIB, 8 * GIB),), processes=processes))
    assert found.state == "3.6 of 12.0 GiB are in use by pid 1234 (python3, 3.0 GiB), pid 77 (python)"
    assert "kill PID" in found.fix


def test_the_context_that_asking_a_small_card_makes_counts_as_nobodys():
    found = doctor.gpu(Machine(seen=(Card("GTX 1650", 4 * GIB, int(3.4 * GIB)),)))
    assert [finding.what for finding in found] == ["gpu"]


def test_the_larger_of_two_cards_is_chosen_unless_somebody_chose():
    cards = doctor.read_cards("RTX 3060, 12288, 11776, GPU-a\nTesla T4, 15360, 15360, GPU-b\nbroken line\n")
    assert cards == (RTX, T4)
    assert doctor.largest_card(cards, {}) == T4
    assert doctor.largest_card(cards, {"CUDA_VISIBLE_DEVICES": "0"}) is None
    assert doctor.largest_card(cards, {"LOCAL_RANK": "1"}) is None
    assert doctor.largest_card((RTX, RTX), {}) is None


def test_a_missing_compiler_or_header_is_found_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    [both] = doctor.compiler(lambda _: None, tmp_path, is_gpu=True)
    assert both.state.startswith("a C compiler and Python.h missing")
    assert "gcc python3-dev" in both.fix
    (tmp_path / "Python.h").touch()
    [one] = doctor.compiler(lambda _: None, tmp_path, is_gpu=True)
    assert one.state.startswith("a C compiler missing")
    assert not list(doctor.compiler(lambda _: "/usr/bin/cc", tmp_path, is_gpu=True))
    assert not list(doctor.compiler(lambda _: None, tmp_path, is_gpu=False))


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


def test_a_new_environment_is_installed_from_the_lock_and_one_with_a_torch_keeps_its_own(monkeypatch):
    asked = []
    monkeypatch.setattr(
        install.subprocess, "run", lambda command: asked.append(command[6:]) or types.SimpleNamespace(returncode=0)
    )
    monkeypatch.setattr(install, "installed", {}.get)
    install.setup()
    assert asked == [[f"torch=={install.pins()['torch']}"], ["--no-deps", "--require-hashes", "-r", str(install.LOCK)]]
    asked.clear()
    monkeypatch.setattr(install, "installed", {"torch": "2.11.0+cu128"}.get)
    install.setup()
    assert [len(command) > 10 for command in asked] == [True, False]
    assert not any(argument.startswith("torch==") for command in asked for argument in command)


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
