"""A subset of the fault campaign (`make faults`): kills, a stop, damage and two at once end as if nothing had happened."""

import subprocess
import sys

import filelock
import pytest

from tests.tools.faults.__main__ import rows_of
from tests.tools.faults.campaign import FAULTS
from toolkit.files import ROOT, lock


def test_nothing_is_lost_to_a_kill_a_stop_damage_or_a_second_process():
    command = [sys.executable, "-m", "tests.tools.faults", "--quick", "--workers", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    tried = sum(fault.quick for fault in FAULTS)
    survived, skipped = done.stdout.count(": survived"), done.stdout.count(": skipped")
    assert survived + skipped == tried, done.stdout
    assert survived >= 6, done.stdout


def test_the_table_names_what_was_lost_and_leaves_out_what_was_skipped():
    row = rows_of({0: [None, "differ: eval.json", "skipped: no tmpfs"]})[0]
    assert (row["tries"], row["survived"], row["skipped"], row["lost"]) == (3, 1, 1, ["differ: eval.json"])


def test_kills_come_at_every_phase_and_at_least_sixty_times():
    kills = [fault for fault in FAULTS if fault.name == "kill -9"]
    assert sum(fault.tries for fault in kills) >= 60
    phases = " ".join(fault.phase for fault in kills)
    for phase in (
        "mix",
        "early",
        "late",
        "writing a checkpoint",
        "between last checkpoint",
        "evaluation",
        "sweep",
        "export",
    ):
        assert phase in phases


def test_what_a_killed_process_left_half_written_is_removed_by_the_next_that_holds_the_folder(tmp_path):
    left, whole = tmp_path / "run" / "gguf" / "r.f16.gguf.123.partial", tmp_path / "run" / "eval.json"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    whole.write_text("{}")
    own = tmp_path / "run" / "thesis.partial"  # somebody's file, which only looks like one of ours
    own.write_text("chapter 1")
    with lock(tmp_path / "run", "train"):
        assert not left.exists()
        assert whole.exists()
        assert own.exists()


def test_a_lock_holds_where_its_note_cannot_be_written(tmp_path):
    (tmp_path / ".locks" / "run.txt").mkdir(parents=True)  # as on a full disk: writing it raises OSError
    with lock(tmp_path / "run", "train"), pytest.raises(filelock.Timeout):
        filelock.FileLock(tmp_path / ".locks" / "run.lock").acquire(timeout=0)
