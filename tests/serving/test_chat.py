"""The terminal chat: what is typed is done, every mode, and Ctrl-C stops a reply but not the chat."""

import io
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pexpect
import pytest
from rich.console import Console

from tests.support.pocket_run import make_run
from toolkit.files import ROOT, ToolkitError
from toolkit.serving import chat as chatting
from toolkit.serving.chat import chat

CHAT = "from toolkit.serving.chat import chat; import sys; chat('tuned', url=sys.argv[1])"


class Echo(BaseHTTPRequestHandler):
    """An API as vLLM's that answers with mode, model and question; replies to "forever" never end by themselves."""

    def do_GET(self):
        if self.path == "/lora-adapters":
            self._send(200, json.dumps([{"path": f"/{name}.lora.gguf"} for name in ("other", "tuned")]))
            return
        models = [{"id": name, "owned_by": self.server.owner} for name in self.server.models]
        self._send(200, json.dumps({"data": models}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body)
        question = body["messages"][-1]["content"]
        if question == "too long":
            self._send(400, json.dumps({"error": {"message": "the prompt has 200 tokens"}}))
            return
        if not body.get("stream"):
            self._send(200, json.dumps(self.whole(body, question)))
            return
        self._send(200, "")
        if body["chat_template_kwargs"]["enable_thinking"]:
            self._chunk({self.server.reasoning: "let me [red]see[/red]"})
        words = [f"{body['model']} says \x1b[2Jno to {question}"] if question != "forever" else ["on and "] * 500
        try:
            for word in words:
                time.sleep(self.server.delay)
                self._chunk({"content": word})
        except OSError:  # the reader left
            return
        self._chunk({}, "stop")
        self.wfile.write(b'data: {"choices": [], "usage": {"completion_tokens": 7}}\n\ndata: [DONE]\n\n')

    def whole(self, body: dict, question: str) -> dict:
        """The same reply to a request without `stream`."""
        message = {"content": f"{body['model']} says \x1b[2Jno to {question}"}
        if body["chat_template_kwargs"]["enable_thinking"]:
            message[self.server.reasoning] = "let me [red]see[/red]"
        return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"completion_tokens": 7}}

    def _send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def _chunk(self, delta: dict, finish: str | None = None) -> None:
        self.wfile.write(f"data: {json.dumps({'choices': [{'delta': delta, 'finish_reason': finish}]})}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    server.asked, server.delay, server.reasoning = [], 0, "reasoning_content"
    server.owner = "vllm"
    server.models = ["base", "other", "tuned"]
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def talk(monkeypatch, tmp_path, server):
    """talk("line", "line") → (what was printed, the bodies that were sent)."""
    run = make_run(tmp_path / "tuned")

    def say(*lines, **options):
        out = io.StringIO()
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        chat(run, url=server.url, console=Console(file=out, width=200), **options)
        return out.getvalue(), server.asked

    return say


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
    _, asked = talk("one", "/no_think", "two", "/base", "three", "/tuned", "/think", "four", "/no_think five")
    said = [(b["messages"][-1]["content"], b["chat_template_kwargs"]["enable_thinking"], b["model"]) for b in asked]
    assert said == [
        ("one", True, "tuned"), ("two", False, "tuned"), ("three", False, "base"), ("four", True, "tuned"),
        ("five", False, "tuned"),
    ]  # fmt: skip
    scales = [[lora["scale"] for lora in b["lora"]] for b in asked]
    assert scales == [[0, 1], [0, 1], [0, 0], [0, 1], [0, 1]], "it is the second LoRA of the server"


def test_reasoning_is_read_where_vllm_puts_it(talk, server):
    server.reasoning = "reasoning"
    said, _ = talk("Hello")
    assert "thinking: let me" in said


def test_the_conversation_is_sent_until_it_is_cleared(talk):
    _, asked = talk("one", "two", "/clear", "three")
    assert [len(body["messages"]) for body in asked] == [1, 3, 1]
    assert asked[1]["messages"][1]["reasoning_content"]


def test_a_question_that_is_refused_is_taken_back(talk):
    said, asked = talk("one", "too long", "two")
    assert "error: the prompt has 200 tokens" in said
    assert [m["content"] for m in asked[-1]["messages"] if m["role"] == "user"] == ["one", "two"]


def test_an_instruct_model_has_one_mode(monkeypatch, tmp_path, server, family):
    run, out = make_run(tmp_path / "tuned", base=family("qwen2.5")), io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO("/think\nHello\n"))
    chat(run, url=server.url, console=Console(file=out, width=200))
    assert "error: /think: this model only answers non-thinking" in out.getvalue()
    assert server.asked[0]["chat_template_kwargs"] == {"enable_thinking": False}


def test_a_server_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ToolkitError, match=r"http://127.0.0.1:9: .*is the server running"):
        chat(make_run(tmp_path / "tuned"), url="http://127.0.0.1:9")


@pytest.mark.parametrize(("models", "served"), [(["base", "other"], "base, other"), (["base"], "base")])
def test_a_server_of_other_runs_is_refused_with_what_it_serves(talk, server, models, served):
    server.models = models
    with pytest.raises(ToolkitError, match=f"serves {served}, not tuned"):
        talk("Hello")
    assert not server.asked


@pytest.mark.parametrize("line", ["/quit", "/quit now"])
def test_quit_leaves_and_so_does_the_end_of_input(talk, line):
    _, asked = talk("one", line, "two")
    assert len(asked) == 1


def test_help_lists_every_command_and_a_wrong_one_is_told(talk):
    said, asked = talk("/help", "/thin")
    assert all(command in said for command in chatting.COMMANDS)
    assert "/thin: no such command. Did you mean '/think'?" in said
    assert not asked


def test_other_spellings_of_a_command_are_told_the_right_one(talk):
    said, _ = talk("/nothink", "/no-think", "/tune", "/exit")
    assert said.count("Did you mean '/no_think'?") == 2
    assert "Did you mean '/tuned'?" in said
    assert "/quit" in said


def test_a_misspelt_switch_within_a_question_is_told_and_not_asked(talk):
    said, asked = talk("/nothink What is 2 + 2?", "What is 2 + 2? /no-think", "Is /usr/bin/nothink a path?")
    assert said.count("Did you mean '/no_think'?") == 2
    assert len(asked) == 1


def test_base_and_run_answer_side_by_side_and_the_conversation_goes_on_with_the_run(talk):
    said, asked = talk("/both one", "/no_think two", "/tuned three")
    assert {body["model"] for body in asked[:2]} == {"base", "tuned"}
    (line,) = [line for line in said.splitlines() if "no to one" in line]
    assert line.index("base says") < line.index("tuned says")
    assert "(7 and 7 tokens)" in said
    assert [m["content"] for m in asked[-1]["messages"]][1::2] == ["tuned says [2Jno to one", "tuned says [2Jno to two"]


def test_side_by_side_reads_at_80_columns(monkeypatch, tmp_path, server):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO("/both " + "a long question " * 20 + "\n"))
    chat(make_run(tmp_path / "tuned"), url=server.url, console=Console(file=out, width=80))
    table = out.getvalue().partition("base and tuned")[2]
    assert max(map(len, table.splitlines())) <= 80
    assert "…" not in table


def test_the_scale_of_the_adapter_is_set_where_the_server_has_one(talk, server):
    said, asked = talk("/scale 0.5", "Hello")
    assert "this server cannot scale an adapter" in said, "vLLM has none"
    server.owner = "llamacpp"
    said, asked = talk("one", "/scale 0.5", "two", "/scale 3", "/scale much", "/scale", "three", "/scale 0", "four")
    assert said.count("error: ") == 3
    assert [body["lora"][1]["scale"] for body in asked[-4:]] == [1, 0.5, 0.5, 0]
    _, asked = talk("five", scale=0.25)
    assert asked[-1]["lora"] == [{"id": 0, "scale": 0}, {"id": 1, "scale": 0.25}]


def test_a_real_run_is_talked_to_through_a_pipe(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(tmp_path))
    make_run(tmp_path / "tuned")
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 17 + 25?\n/no_think\n/base Hello!\n"))
    chat("tuned", max_tokens=60)
    said = capsys.readouterr().out
    assert said.count("thinking: ") == 1
    assert said.count("answer: ") == 2
    assert "(base)" in said
    assert "<think>" not in said


@pytest.fixture
def terminal(tmp_path, server):
    """The chat on a terminal of its own, with a server whose replies are slow."""
    make_run(tmp_path / "tuned")
    server.delay = 0.2
    env = os.environ | {"TOOLKIT_OUTPUTS": str(tmp_path), "TERM": "xterm"}
    child = pexpect.spawn(sys.executable, ["-c", CHAT, server.url], cwd=ROOT, env=env, encoding="utf-8", timeout=40)
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
    assert "on and on" not in terminal.before
    assert terminal.isalive()


@pytest.mark.skipif(sys.platform == "win32", reason="pexpect needs a POSIX terminal")
def test_on_a_terminal_thinking_is_dimmed_and_arrow_up_brings_the_last_line_back(terminal):
    terminal.send("first\r")
    terminal.expect(r"\x1b\[2;3mlet me")
    terminal.expect("7 tokens")
    terminal.expect("›")  # keys that are typed before the prompt are no line of readline yet
    terminal.send("\x1b[A\r")
    terminal.expect("no to first")
    terminal.expect("7 tokens")
    terminal.expect("›")
    terminal.sendintr()  # at the prompt: an unfinished line goes, the chat stays
    terminal.expect("›")
    terminal.send("/quit\r")
    terminal.expect(pexpect.EOF)
