"""Any OpenAI-compatible server is asked the same and scored the same; what it answered before it went away is kept."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console

from tests.support.pocket_run import trained
from toolkit import run
from toolkit.data.render import load_chat
from toolkit.export.llama import Engine
from toolkit.family import MODES, QWEN3_SAMPLING
from toolkit.files import ToolkitError
from toolkit.serving import public
from toolkit.serving.client import connect
from toolkit.serving.scored import Model, ServedRun, evaluate_url, kept_line
from toolkit.view.progress import Progress

QUESTIONS = [[{"role": "user", "content": f"{i} + 1?"}] for i in range(12)]


class Api(ThreadingHTTPServer):
    """A server of two models that thinks when it is told to; after `answers` replies it cuts every connection."""

    def __init__(self, answers: float = float("inf"), apart: bool = True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.apart, self.asked = answers, apart, []
        self.guard = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send({"data": [{"id": "base", "owned_by": "vllm"}, {"id": "tuned", "owned_by": "vllm"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.guard:
            self.server.asked.append(body)
            if len(self.server.asked) > self.server.answers:
                self.connection.close()
                return
        number = int(body["messages"][-1]["content"].split()[0])
        message = {"role": "assistant", "content": str(number + 1)}
        if body["chat_template_kwargs"]["enable_thinking"]:
            if self.server.apart:
                message["reasoning_content"] = "one more"
            else:
                message["content"] = f"<think>\none more\n</think>\n\n{number + 1}"
        cut = number == 11
        self.send({"choices": [{"message": message, "finish_reason": "length" if cut else "stop"}]})

    def send(self, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(tmp_path))


def subject(api: Api, identity: str = "weights", clients: int = 3) -> ServedRun:
    engine = Engine(api.url, sampling=QWEN3_SAMPLING)
    models = [Model(engine, name, identity) for name in ("base", "tuned")]
    return ServedRun(*models, MODES, load_chat("pocket"), clients)


def ask(served: ServedRun, mode: str = "thinking", adapter: bool = True):
    with Progress(Console(quiet=True), "", len(QUESTIONS)) as progress:
        return served.reply(QUESTIONS, mode, adapter, progress, max_new_tokens=64)


@pytest.mark.parametrize("apart", [True, False])
def test_reasoning_apart_and_between_tags_are_the_same_reply(apart):
    reply = ask(subject(Api(apart=apart)))[3]
    assert (reply.reasoning, reply.answer, reply.opened, reply.closed, reply.finished) == (
        "one more",
        "4",
        True,
        True,
        True,
    )
    assert reply.reasoning_tokens > 0 < reply.answer_tokens


def test_every_mode_is_asked_with_its_own_sampling_and_a_cut_reply_says_so():
    api = Api()
    direct = ask(subject(api), "non_thinking", adapter=False)
    assert [reply.answer for reply in direct] == [str(i + 1) for i in range(12)]
    assert [reply.finished for reply in direct] == [True] * 11 + [False]
    assert not any(reply.opened for reply in direct)
    assert {body["model"] for body in api.asked} == {"base"}
    assert {body["temperature"] for body in api.asked} == {QWEN3_SAMPLING["non_thinking"]["temperature"]}
    assert len({body["seed"] for body in api.asked}) == 12


def test_after_a_cut_connection_the_same_command_asks_only_what_is_missing():
    broken = Api(answers=5)
    with pytest.raises(ToolkitError, match="does not answer"):
        ask(subject(broken))
    whole = Api()
    replies = ask(subject(whole))
    assert len(whole.asked) == 12 - 5
    assert [reply.answer for reply in replies] == [str(i + 1) for i in range(12)]
    ask(subject(whole))
    assert len(whole.asked) == 7
    ask(subject(whole, identity="other weights"))
    assert len(whole.asked) == 7 + 12


def test_a_model_that_is_not_served_is_named_with_those_that_are():
    url = Api().url
    assert not connect(url, ["base", "tuned"]).takes_scale
    with pytest.raises(ToolkitError, match=r"serves base, tuned, not pocket"):
        connect(url, ["base", "pocket"])


def test_a_server_that_does_not_answer_is_named():
    with pytest.raises(ToolkitError, match="is the server running"):
        connect("http://127.0.0.1:9", ["base"])


def per_question(right: list[int]) -> dict:
    mode = {"tuned": {"accuracy": [right, [1] * len(right)]}}
    return {"per_question": {"thinking": mode}, "modes": ["thinking"], "fingerprints": {"questions": "q"}}


def test_a_file_is_paired_with_the_adapter_s_answers(tmp_path):
    adapter = per_question([1, 1, 1, 0]) | {"base": {}, "tuned": {}, "difference": {}}
    (tmp_path / "eval.json").write_text(json.dumps(adapter))
    line = kept_line(tmp_path, per_question([1, 1, 0, 1]), "q4_k_m")
    assert line == "q4_k_m keeps 2 of the adapter's 3 right answers, and has 1 right that it had wrong"
    other = per_question([1, 1, 0, 1]) | {"fingerprints": {"questions": "others"}}
    assert "not asked the same" in kept_line(tmp_path, other, "q4_k_m")


@pytest.mark.slow
def test_a_run_scores_alike_in_this_process_and_through_the_server_that_serve_starts():
    """llama.cpp's real server, by the address and the names that `serve RUN` prints; the base in F16, as it was trained on."""
    folder, _ = trained("served", "evaluate.max_new_tokens=96")
    here = run.evaluate(folder, Console(quiet=True), minutes=3)
    engine = public([folder], "127.0.0.1", 0, None, print, {"quant": "f16"})
    served = evaluate_url(folder, engine.url, "base", "served", console=Console(quiet=True))
    assert served["fingerprints"]["questions"] == here["fingerprints"]["questions"]
    compared = [
        (model, mode, kind) for model in ("base", "tuned") for mode in MODES for kind in ("accuracy", "accuracy/chat")
    ]
    for model, mode, kind in compared:
        one, other = here[model][mode][kind], served[model][mode][kind]
        print(model, mode, kind, one["value"], other["value"], one["n"])
        assert one["low"] <= other["high"], (model, mode, kind)
        assert other["low"] <= one["high"], (model, mode, kind)
        assert abs(one["value"] - other["value"]) < 0.2
