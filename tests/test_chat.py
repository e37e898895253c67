"""The terminal chat: what is typed is done, both modes, and Ctrl-C stops a reply but not the chat."""

import io
import json
import os
import subprocess
import sys
import threading
import time

import pexpect
import pytest
from rich.console import Console

from tests.pocket_run import make_gguf, make_run
from toolkit.files import ROOT
from toolkit.serve import chat as chatting
from toolkit.serve.chat import chat
from toolkit.serve.request import Job, Piece, Refused
from toolkit.sources.formats import canonical

SLOW = """
import time
from toolkit.serve import chat
from tests.test_chat import Echo
chat.open_engine = lambda *_: Echo(delay=0.2)
chat.chat("any", source="adapter")
"""


class Echo:
    """Answers with the mode, the model and the question; /slow replies never end by themselves."""

    names, context = ("tuned", "base"), 100

    def __init__(self, delay=0.0):
        self.delay, self.jobs = delay, []

    def start(self, job: Job) -> None:
        self.jobs.append(job)
        question = job.ask.messages[-1]["content"]
        if question == "too long":
            raise Refused("the prompt has 200 tokens", 400, "context_length_exceeded")
        threading.Thread(target=self._tell, args=(job, question), daemon=True).start()

    def _tell(self, job, question):
        if job.ask.thinking:
            job.emit(Piece("reasoning", "let me [red]see[/red]"))
        words = [f"{job.ask.model} says \x1b[2Jno to {question}"]
        for word in words if question != "forever" else ["on and "] * 500:
            if job.cancelled.is_set():
                return
            time.sleep(self.delay)
            job.emit(Piece("content", word))
        job.emit(Piece("end", finish="stop", usage={"completion_tokens": 7}))


@pytest.fixture
def talk(monkeypatch):
    """talk("line", "line") → (what was printed, the engine)."""

    def run(*lines, **options):
        engine, out = Echo(), io.StringIO()
        monkeypatch.setattr(chatting, "open_engine", lambda *_: engine)
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        chat("any", source="adapter", console=Console(file=out, width=200), **options)
        return out.getvalue(), engine

    return run


def test_a_line_is_answered_with_its_thinking_labelled_in_a_pipe(talk):
    said, _ = talk("Hello")
    assert "thinking: let me [red]see[/red]" in said
    assert "answer: tuned says" in said
    assert "(7 tokens)" in said


def test_the_model_s_text_cannot_drive_the_terminal(talk):
    said, _ = talk("Hello")
    assert "\x1b" not in said
    assert "[2Jno to Hello" in said


def test_switches_reach_the_model(talk):
    _, engine = talk("one", "/no_think", "two", "/base", "three", "/base", "/think", "four", "/no_think five")
    assert [(j.ask.messages[-1]["content"], j.ask.thinking, j.ask.model) for j in engine.jobs] == [
        ("one", True, "tuned"), ("two", False, "tuned"), ("three", False, "base"), ("four", True, "tuned"),
        ("five", False, "tuned"),
    ]  # fmt: skip


def test_the_conversation_goes_on_until_it_is_cleared(talk):
    _, engine = talk("one", "two", "/clear", "three")
    assert [len(job.ask.messages) for job in engine.jobs] == [1, 3, 1]
    assert engine.jobs[1].ask.messages[1]["reasoning_content"]


def test_a_question_that_does_not_fit_is_taken_back_and_the_way_out_named(talk):
    said, engine = talk("one", "too long", "two")
    assert "error: the prompt has 200 tokens; /clear begins a new conversation" in said
    assert [m["content"] for m in engine.jobs[-1].ask.messages if m["role"] == "user"] == ["one", "two"]


def test_quit_leaves_and_so_does_the_end_of_input(talk):
    _, engine = talk("one", "/quit", "two")
    assert len(engine.jobs) == 1


def test_help_lists_every_command_and_a_wrong_one_is_told(talk):
    said, engine = talk("/help", "/thin")
    assert all(command in said for command in chatting.COMMANDS)
    assert "/thin: no such command" in said
    assert not engine.jobs


def test_a_saved_conversation_can_be_trained_on(talk, tmp_path):
    file = tmp_path / "talk.jsonl"
    said, _ = talk("one", "two", f"/save {file}", "/clear", "three", f"/save {file}")
    assert "saved" in said
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [len(row["messages"]) for row in rows] == [4, 2]
    clean = json.loads(json.dumps(rows[1]).replace("\\u001b", ""))
    assert canonical(clean, "messages", {}, {})["messages"][1]["reasoning_content"]


def test_a_markdown_file_that_is_there_is_not_overwritten(talk, tmp_path):
    file = tmp_path / "talk.md"
    said, _ = talk("one", f"/save {file}", f"/save {file}", "/save", f"/save {tmp_path}/no/where.md")
    assert file.read_text().startswith("**one**\n\n> let me")
    assert said.count("error: ") == 3
    assert "File exists" in said


def test_the_base_is_refused_where_there_is_none(talk, monkeypatch):
    monkeypatch.setattr(Echo, "names", ("tuned",))
    said, _ = talk("/base")
    assert "error: only the adapter can be switched off" in said


def test_a_real_gguf_is_talked_to_through_a_pipe(tmp_path):
    make_gguf(make_run(tmp_path / "tuned"))
    code = "import sys; from toolkit.serve.chat import chat; chat(sys.argv[1], source='gguf', max_tokens=60)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "tuned")], input="What is 17 + 25?\n/no_think\nHello!\n", text=True,
        capture_output=True, check=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert done.stdout.count("thinking: ") == 1
    assert done.stdout.count("answer: ") == 2
    assert "<think>" not in done.stdout


@pytest.fixture
def terminal(tmp_path):
    """The chat on a terminal of its own, with an engine whose replies are slow."""
    env = os.environ | {"TOOLKIT_OUTPUTS": str(tmp_path), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    child = pexpect.spawn(sys.executable, ["-c", SLOW], cwd=ROOT, env=env, encoding="utf-8", timeout=20)
    child.expect("›")
    yield child
    child.close(force=True)


@pytest.mark.skipif(sys.platform == "win32", reason="pexpect needs a POSIX terminal")
def test_ctrl_c_stops_a_reply_but_not_the_chat(terminal):
    terminal.send("forever\r")
    terminal.expect("on and on and")
    terminal.sendintr()
    terminal.expect("stopped")
    terminal.send("short\r")
    terminal.expect("no to short")
    terminal.expect("7 tokens")


@pytest.mark.skipif(sys.platform == "win32", reason="pexpect needs a POSIX terminal")
def test_on_a_terminal_thinking_is_dimmed_and_arrow_up_brings_the_last_line_back(terminal, tmp_path):
    terminal.send("first\r")
    terminal.expect(r"\x1b\[2;3mlet me")
    terminal.expect("7 tokens")
    terminal.send("\x1b[A\r")
    terminal.expect("no to first")
    terminal.expect("7 tokens")
    terminal.sendintr()  # at the prompt: an unfinished line goes, the chat stays
    terminal.send("/quit\r")
    terminal.expect(pexpect.EOF)
    assert "+first" in (tmp_path / ".chat_history").read_text()
