"""Loading a model: what a Hub download shows."""

import io
import os
import pty
import subprocess
import sys
import termios

from rich.console import Console

from tests.support import hub_stand_in
from tests.support.terminal import shown
from toolkit.files import ROOT
from toolkit.recipe import Model
from toolkit.training.model import loading

LOAD = """
from rich.console import Console
from toolkit.recipe import Model
from toolkit.training.model import loading
with loading(Model("owner/bakery"), Console()):
    pass
"""


def on_a_terminal(env: dict) -> str:
    """What a person sees of LOAD."""
    outside, inside = pty.openpty()
    termios.tcsetwinsize(inside, (24, 100))
    with subprocess.Popen([sys.executable, "-c", LOAD], env=os.environ | env, cwd=ROOT, stdout=inside, stderr=inside):
        os.close(inside)
        return shown(outside)


def test_a_download_shows_its_size_and_nothing_is_said_of_it_once_the_model_is_here(tmp_path):
    # one wanted file: of two that begin at once, the Hub's bar can miss one's size (its sum is not locked)
    files = {"model.safetensors": bytes(3_000_000), "pytorch_model.bin": b"not wanted"}
    with hub_stand_in.repository(files) as address:
        hub = hub_stand_in.ONLINE | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path)}
        first, second = on_a_terminal(hub), on_a_terminal(hub)
    assert "/ 3.00MB" in first  # of a real Hub, by Xet, the speed stands behind it
    assert first.index("3.00MB") < first.index("loading owner/bakery")
    assert "3.00MB" not in second
    assert "loaded owner/bakery" in second
    assert {p.name for p in tmp_path.glob("hub/*/snapshots/*/*")} == {"model.safetensors"}


def test_while_a_model_loads_the_streams_stay_those_that_log_handlers_hold():
    before = sys.stdout, sys.stderr
    with loading(Model("pocket"), Console(file=io.StringIO(), force_terminal=True)):
        assert (sys.stdout, sys.stderr) == before
