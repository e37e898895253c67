"""The API is OpenAI's, its limits hold, and nothing that comes over the wire takes the server down."""

import contextlib
import json
import random
import signal
import socket
import string
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pocket_run import make_gguf, make_run
from toolkit.files import ROOT, ToolkitError
from toolkit.generate import split_reply
from toolkit.serve import Limits, create_app, listen, serve, settings
from toolkit.serve.api import read_body
from toolkit.serve.engine import best_source, gguf_of, open_engine
from toolkit.serve.request import Ask, Job, Piece, Refused, converse
from toolkit.serve.splitter import Splitter

LIMITS = Limits(max_tokens=256, seconds=120, waiting=64)
HELLO = [{"role": "user", "content": "Hello!"}]
SUM = [{"role": "user", "content": "What is 17 + 25?"}]
QUIET = {"chat_template_kwargs": {"enable_thinking": False}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


class Running:
    """A served engine on a free port of 127.0.0.1."""

    def __init__(self, engine, limits=LIMITS, token=None):
        import uvicorn

        listener = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.server = uvicorn.Server(settings(create_app(engine, limits, token)))
        self.thread = threading.Thread(target=self.server.run, args=([listener],), daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def post(self, body, **options):
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=120, **options)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(timeout=10)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    return [make_run(folder / "tuned", seed=1), make_run(folder / "other.v2", seed=2)]


@pytest.fixture(scope="module")
def engine(runs):
    return open_engine(runs)


@pytest.fixture(scope="module")
def server(engine):
    running = Running(engine)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def llama(runs):
    make_gguf(runs[0])
    running = Running(open_engine(runs[:1], "gguf"))
    yield running
    running.stop()


@pytest.fixture(scope="module", params=["adapter", "gguf"])
def either(request):
    return request.getfixturevalue({"adapter": "server", "gguf": "llama"}[request.param])


class Scripted:
    """An engine without a model: every reply is the pieces it was given, as slowly as asked for."""

    names, context = ("scripted",), 100

    def __init__(self, pieces=(), delay=0.0, raises=None):
        self.pieces, self.delay, self.raises, self.jobs = pieces, delay, raises, []

    def start(self, job: Job) -> None:
        self.jobs.append(job)
        if self.raises:
            raise self.raises
        threading.Thread(target=self._tell, args=(job,), daemon=True).start()

    def _tell(self, job):
        for piece in self.pieces:
            time.sleep(self.delay)
            job.emit(piece)


def client(running):
    import openai

    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="-", max_retries=0)


# What a client sees


def test_the_openai_client_gets_reasoning_apart_from_content(either):
    reply = client(either).chat.completions.create(model="tuned", messages=SUM, temperature=0, max_tokens=120)
    message = reply.choices[0].message
    assert message.reasoning_content
    assert "<think>" not in message.content + message.reasoning_content
    assert reply.usage.completion_tokens_details.reasoning_tokens > 0
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_enable_thinking_false_gives_an_answer_without_reasoning(either):
    reply = client(either).chat.completions.create(
        model="tuned", messages=SUM, temperature=0, max_tokens=60, extra_body=QUIET
    )
    assert reply.choices[0].message.content
    assert "reasoning_content" not in reply.choices[0].message.model_dump(exclude_none=True)


def test_both_places_where_clients_put_the_switch_are_read_and_must_agree():
    def thinking(**fields):
        ask, _ = read_body(json.dumps({"messages": HELLO, **fields}).encode(), 256)
        return ask.thinking

    assert thinking()
    assert not thinking(enable_thinking=False)
    assert not thinking(enable_thinking=False, **QUIET)
    with pytest.raises(Refused, match="true in one place and false in another"):
        thinking(enable_thinking=True, **QUIET)


def test_a_repetition_penalty_is_refused_rather_than_ignored():
    with pytest.raises(Refused, match="repetition_penalty is not offered here"):
        read_body(json.dumps({"messages": HELLO, "repetition_penalty": 1.05}).encode(), 256)
    read_body(json.dumps({"messages": HELLO, "repetition_penalty": 1.0}).encode(), 256)


def test_a_stream_says_the_same_as_the_whole_reply(either):
    options = {"model": "tuned", "messages": SUM, "temperature": 0, "max_tokens": 120}
    whole = client(either).chat.completions.create(**options).choices[0]
    reasoning = content = finish = ""
    counted = None
    for chunk in client(either).chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        counted = chunk.usage or counted
        for choice in chunk.choices:
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            content += choice.delta.content or ""
            finish = choice.finish_reason or finish
    assert (reasoning.strip(), content, finish) == (
        whole.message.reasoning_content,
        whole.message.content,
        whole.finish_reason,
    )
    assert counted.completion_tokens > 0


def test_models_are_the_runs_and_their_base(server, llama):
    assert [m.id for m in client(server).models.list()] == ["tuned", "other.v2", "base"]
    assert [m.id for m in client(llama).models.list()] == ["tuned"]


def test_each_name_answers_with_its_own_adapter(engine):
    def logged(name):
        ask = Ask(HELLO, model=name, max_tokens=40, sampling={"temperature": 0})
        return "".join(piece.text for piece in converse(engine, ask))

    first = {name: logged(name) for name in ("tuned", "other.v2", "base")}
    model = engine.model
    logits = {}
    for name in first:
        with engine._wearing(engine.adapters[name]):
            import torch

            with torch.no_grad():
                logits[name] = model(torch.tensor([[1, 2, 3]])).logits[0, -1]
    assert not logits["tuned"].equal(logits["base"])
    assert not logits["tuned"].equal(logits["other.v2"])
    assert {name: logged(name) for name in reversed(first)} == first


def test_a_seed_gives_the_same_reply_alone_and_in_a_crowd(server):
    body = {"messages": SUM, "seed": 7, "max_tokens": 40, "temperature": 1.5}
    alone = server.post(body).json()["choices"][0]["message"]
    with ThreadPoolExecutor(6) as pool:
        crowd = list(
            pool.map(lambda i: server.post({**body, "seed": 7 + i % 2}).json()["choices"][0]["message"], range(6))
        )
    assert crowd[0] == crowd[2] == crowd[4] == alone


def test_max_tokens_cuts_and_says_length(either):
    reply = either.post({"messages": SUM, "max_tokens": 3}).json()
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 3


def test_a_stop_text_ends_the_answer_before_it(either):
    body = {"messages": SUM, "temperature": 0, "max_tokens": 60, **QUIET}
    whole = either.post(body).json()["choices"][0]["message"]["content"]
    middle = whole[len(whole) // 2 :][:2]
    cut = either.post({**body, "stop": middle}).json()["choices"][0]
    assert cut["message"]["content"].rstrip() == whole[: whole.index(middle)].rstrip()
    assert cut["finish_reason"] == "stop"


def test_tools_and_their_results_are_rendered(either):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    turns = [
        *HELLO,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
    ]
    with_tools = either.post({"messages": turns, "tools": [WEATHER], "max_tokens": 2}).json()["usage"]["prompt_tokens"]
    without = either.post({"messages": turns, "max_tokens": 2}).json()["usage"]["prompt_tokens"]
    assert with_tools > without + 50


def test_fifty_clients_at_once_are_all_answered(server):
    def ask(i):
        body = {"messages": [{"role": "user", "content": f"What is {i} + 25?"}], "max_tokens": 24, "stream": i % 2 == 0}
        body["model"] = ("tuned", "base", "other.v2")[i % 3]
        answer = server.post(body)
        return answer.status_code, answer.text.endswith(
            "data: [DONE]\n\n"
        ) if i % 2 == 0 else "choices" in answer.json()

    with ThreadPoolExecutor(50) as pool:
        assert list(pool.map(ask, range(50))) == [(200, True)] * 50


def test_fifty_clients_at_once_are_all_answered_from_a_gguf(llama):
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: llama.post({"messages": SUM, "max_tokens": 24}), range(50)))
    assert [answer.status_code for answer in answers] == [200] * 50


# Limits


def test_a_full_queue_says_429_and_frees_again():
    end = Piece("end", finish="stop", usage={"prompt_tokens": 1, "completion_tokens": 1, "reasoning_tokens": 0})
    running = Running(Scripted(raises=Refused("full", 429, "queue_full")))
    answer = running.post({"messages": HELLO})
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
    assert answer.headers["retry-after"]
    running.stop()
    running = Running(Scripted([Piece("content", "hi"), end]))
    assert running.post({"messages": HELLO}).json()["choices"][0]["message"]["content"] == "hi"
    running.stop()


def test_the_queue_is_bounded_and_what_waits_too_long_is_refused(engine):
    kept, engine.waiting = engine.waiting, 3
    outcomes = []
    jobs = [
        Job(Ask(HELLO, max_tokens=200, sampling={"top_k": 5 + i}), outcomes.append, time.monotonic()) for i in range(9)
    ]
    refused = 0
    for job in jobs:
        try:
            engine.start(job)
        except Refused as error:
            refused += error.status == 429
    engine.waiting = kept
    deadline = time.monotonic() + 20
    while len([p for p in outcomes if p.kind in ("end", "error")]) < 9 - refused and time.monotonic() < deadline:
        time.sleep(0.02)
    assert 5 <= refused <= 6
    assert {p.error.status for p in outcomes if p.error} == {503}


def test_a_prompt_beyond_the_context_is_refused_with_its_size(either):
    answer = either.post({"messages": [{"role": "user", "content": "7 + " * 3000}]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_body_beyond_the_limit_is_refused(server):
    answer = httpx.post(
        f"{server.url}/v1/chat/completions", content=b" " * (5 << 20), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 413


def test_a_reply_stops_when_its_reader_leaves():
    scripted = Scripted([Piece("content", "word ")] * 200, delay=0.02)
    running = Running(scripted)
    with httpx.stream("POST", f"{running.url}/v1/chat/completions", json={"messages": HELLO, "stream": True}) as answer:
        next(answer.iter_lines())
    assert scripted.jobs[0].cancelled.wait(5)
    running.stop()


def test_a_reply_nobody_waits_for_stops_before_its_first_word():
    scripted = Scripted()
    running = Running(scripted)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{running.url}/v1/chat/completions", json={"messages": HELLO}, timeout=0.3)
    assert scripted.jobs[0].cancelled.wait(5)
    running.stop()


def test_a_model_that_hangs_is_answered_for(monkeypatch):
    monkeypatch.setattr("toolkit.serve.GRACE", 0.1)
    running = Running(Scripted(), Limits(seconds=0.1))
    assert running.post({"messages": HELLO}).status_code == 503
    assert running.post({"messages": HELLO, "stream": True}).status_code == 503
    running.stop()


def test_a_failing_model_is_one_failed_request(engine, server, monkeypatch, capsys):
    def broken(**_options):
        raise RuntimeError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(engine.model, "generate", broken)
        answer = server.post({"messages": HELLO, "max_tokens": 2})
    assert answer.status_code == 500
    assert "CUDA" not in answer.text
    assert "CUDA out of memory" in capsys.readouterr().err
    assert server.post({"messages": HELLO, "max_tokens": 2}).status_code == 200


# Who may ask


def test_beyond_loopback_a_token_is_made_and_wanted(monkeypatch):
    said = []
    monkeypatch.setattr("toolkit.serve.open_engine", lambda *_a, **_k: Scripted())
    monkeypatch.setattr("uvicorn.Server.run", lambda *_a: None)
    serve(["any"], host="0.0.0.0", port=0, say=said.append)
    token = said[0].rsplit(" ", 1)[1]
    assert len(token) >= 20
    assert f"#token={token}" in said[-1]


def test_a_token_is_asked_of_everybody():
    running = Running(Scripted(), token="secret")
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer ü".encode()}):
        answer = httpx.post(f"{running.url}/v1/chat/completions", json={"messages": HELLO}, headers=headers)
        assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
        assert httpx.get(f"{running.url}/v1/models", headers=headers).status_code == 401
    assert httpx.get(f"{running.url}/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
    running.stop()


def test_web_pages_elsewhere_cannot_use_the_server(server):
    rebound = httpx.get(f"{server.url}/v1/models", headers={"host": "evil.example:80"})
    assert rebound.status_code == 403
    plain = httpx.post(f"{server.url}/v1/chat/completions", content=json.dumps({"messages": HELLO}))
    assert plain.status_code == 415
    asked = httpx.options(f"{server.url}/v1/chat/completions", headers={"origin": "http://evil.example"})
    assert "access-control-allow-origin" not in asked.headers


@pytest.mark.usefixtures("llama")  # it makes the GGUF
def test_ctrl_c_ends_the_server_at_once_and_without_an_error(runs):
    code = "import sys; from toolkit.serve import serve; serve(sys.argv[1:], source='gguf', port=0)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-u", "-c", code, str(runs[0])], cwd=ROOT, **pipes)
    assert "serving tuned from the gguf" in process.stdout.readline()
    url = process.stdout.readline().split()[2]
    while True:
        with contextlib.suppress(httpx.ConnectError):
            assert httpx.get(f"{url}health").json() == {"status": "ok"}
            break
    assert "<script>" in httpx.get(url).text
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert "Traceback" not in err


def test_a_taken_port_is_told_before_anything_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ToolkitError, match="choose another with --port"):
            serve(["any"], port=taken.getsockname()[1], say=print)


# Malformed requests


def mutated(seed: int) -> tuple[bytes, dict]:
    """A good request with one thing broken, or bytes that never were one."""
    chance = random.Random(seed)
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "model": "tuned"}
    junk = [None, True, -1, 0, 1.5, 10**400, "", "x", [], [None], {}, {"a": []}, "\ud800", "<|im_end|>", [[]] * 3]
    wrong = [
        lambda: body.update(messages=chance.choice(junk)),
        lambda: body["messages"].__setitem__(0, chance.choice(junk)),
        lambda: body["messages"][0].update(role=chance.choice(["User", "robot", "system", "assistant", "tool", *junk])),
        lambda: body["messages"][0].update(
            content=chance.choice([None, True, 3, {}, [1], [{"type": "image_url"}], "\ud800"])
        ),
        lambda: body.update(model=chance.choice(["gpt-4", "tuned ", "../x", 3, [], {}])),
        lambda: body.update(max_tokens=chance.choice([0, -1, 10**9, "5", 2.5, True, [], {}, float("inf")])),
        lambda: body.update(temperature=chance.choice([-1, 3, "hot", True, [], float("nan")])),
        lambda: body.update(top_p=chance.choice([0, -1, 2, "x", {}])),
        lambda: body.update(top_k=chance.choice([0, -5, 1.5, "x"]), seed=chance.choice([-1, "x", 2**70])),
        lambda: body.update(stream=chance.choice([1, "yes", []]), stream_options=chance.choice([3, "x", []])),
        lambda: body.update(stop=chance.choice([3, {}, [1], ["a"] * 9, [""], ["x" * 999]])),
        lambda: body.update(tools=chance.choice([3, {}, [1], [{}], [{"function": {"name": "a b"}}], [WEATHER] * 200])),
        lambda: body.update(chat_template_kwargs=chance.choice([3, [], {"enable_thinking": "no"}, {"x": 1}])),
        lambda: body.update(
            {chance.choice(["n", "logprobs", "response_format", "presence_penalty"]): chance.choice([2, "x"])}
        ),
        lambda: body["messages"].append({"role": "assistant", "content": "Hello"}),
        lambda: body["messages"].append(
            {"role": "assistant", "tool_calls": chance.choice([3, [1], [{"function": {}}]])}
        ),
    ]
    if chance.random() < 0.25:
        raw = json.dumps(body).encode()
        cut = chance.randrange(len(raw))
        return chance.choice(
            [raw[:cut], raw[:cut] + bytes([chance.randrange(128, 256)]), b"[" * 100_000, b"", b"null", b"\xff\xfe{}",
             "".join(chance.choices(string.printable, k=60)).encode(), b'{"messages": NaN}', b"9" * 5000]
        ), {"content-type": "application/json"}  # fmt: skip
    chance.choice(wrong)()
    return json.dumps(body).encode(), {"content-type": "application/json"}


def fuzz(running, seeds) -> None:
    with httpx.Client(timeout=60) as session:
        for seed in seeds:
            raw, headers = mutated(seed)
            answer = session.post(f"{running.url}/v1/chat/completions", content=raw, headers=headers)
            assert 400 <= answer.status_code < 500, (seed, answer.status_code, raw[:200], answer.text[:200])
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            assert answer.json()["error"]["message"]
    assert running.post({"messages": HELLO, "max_tokens": 2}).status_code == 200


def test_600_malformed_requests_get_4xx_and_the_server_lives(server):
    fuzz(server, range(600))


def test_malformed_requests_get_4xx_before_a_gguf_too(llama):
    fuzz(llama, range(600, 680))


def test_broken_http_does_not_hurt(server):
    address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    chance = random.Random(3407)
    for i in range(40):
        with socket.create_connection(address, timeout=5) as wire:
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            wire.sendall([chance.randbytes(200), head + b"Content-Length: -1\r\n\r\n", head + b"Content-Length: 50\r\n\r\n{",
                          head + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n", head + b"X: " + b"a" * 100_000][i % 5])  # fmt: skip
    assert server.post({"messages": HELLO, "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/v1/chat/completions", 405)])
def test_other_routes_answer_with_an_error_object_too(server, method, path, status):
    answer = httpx.request(method, server.url + path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


@hypothesis.settings(max_examples=60, deadline=None)  # nothing is timed: the machine may be busy
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(
    st.sampled_from(["role", "content", "messages", "tools", "function", "name", "stop", "model", "tool_calls"]) | st.text(), inner)))  # fmt: skip
def test_any_json_is_either_a_request_or_refused(value):
    for body in (value, {"messages": value}, {"messages": HELLO, "tools": value}, {"messages": HELLO, "stop": value}):
        with contextlib.suppress(Refused):  # any other exception would be a 500
            ask, _ = read_body(json.dumps(body).encode(), 10)
            assert ask.messages
            assert ask.max_tokens == 10


# Taking a reply apart

PARTS = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "</", "think>", "a", " ", "\n", "<tool_call>", "é", "</tool_call>"])
)


def split(text, cuts, **options):
    splitter, out, at = Splitter(opened=False, **options), [], 0
    for cut in sorted({min(c, len(text)) for c in cuts} | {len(text)}):
        out += splitter.feed(text[at:cut])
        at = cut
    out += splitter.close()
    return {kind: "".join(t for k, t in out if k == kind) for kind in ("reasoning", "content", "tool_call")}


@given(PARTS, st.lists(st.integers(0, 60)))
def test_a_reply_is_split_alike_however_it_is_cut(parts, cuts):
    text = "".join(parts)
    assert split(text, cuts, tools=True, stop=("aa",)) == split(text, [], tools=True, stop=("aa",))


@given(PARTS.map("".join), st.lists(st.integers(0, 60)))
def test_a_streamed_reply_is_split_as_a_whole_one_is(text, cuts):
    reasoning, answer, opened, _ = split_reply(text)
    if opened and not text.partition("<think>")[0].strip():
        found = split(text, cuts)
        assert (found["reasoning"], found["content"]) == (reasoning, answer)


def test_a_tool_call_is_read_and_a_broken_one_stays_text():
    text = '<think>x</think>\n\nSure.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    found = split(text, range(0, 200, 3), tools=True)
    assert found["content"] == "Sure."
    assert json.loads(found["tool_call"]) == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert split('<tool_call>{"name"</tool_call>', [], tools=True)["content"] == '<tool_call>{"name"</tool_call>'
    assert split('<tool_call>{"name": 1', [], tools=True)["content"] == '<tool_call>{"name": 1'
    assert split(text, [])["content"].endswith("</tool_call>")


def test_a_tool_call_reaches_the_client():
    end = Piece("end", finish="tool_calls", usage={"prompt_tokens": 1, "completion_tokens": 1, "reasoning_tokens": 0})
    call = json.dumps({"name": "weather", "arguments": '{"city": "Oslo"}'})
    running = Running(Scripted([Piece("reasoning", "hm"), Piece("tool_call", call), end]))
    choice = client(running).chat.completions.create(model="scripted", messages=HELLO, tools=[WEATHER]).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Oslo"}
    running.stop()


# Which weights


def test_runs_of_two_bases_are_not_served_together(runs, tmp_path):
    other = make_run(tmp_path / "far")
    text = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(text.replace("model_name: pocket", "model_name: elsewhere"))
    with pytest.raises(ToolkitError, match="only runs of one base"):
        open_engine([runs[0], other])


def test_the_quantization_asked_for_is_taken_or_missed_loudly(tmp_path):
    folder = make_run(tmp_path / "run")
    with pytest.raises(ToolkitError, match="there is none"):
        gguf_of(folder, None)
    (folder / "gguf").mkdir()
    for quant in ("f16", "q4_k_m", "q8_0"):
        (folder / "gguf" / f"run.{quant}.gguf").touch()
    assert gguf_of(folder, None).name == "run.q8_0.gguf"
    assert gguf_of(folder, "Q4_K_M").name == "run.q4_k_m.gguf"
    with pytest.raises(ToolkitError, match="no q5_k_m, there are"):
        gguf_of(folder, "q5_k_m")


def test_a_gguf_without_a_passed_certificate_is_not_chosen(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "gguf").mkdir()
    (folder / "gguf" / "run.q8_0.gguf").touch()
    assert best_source(folder)[0] == "adapter"
    (folder / "certificate.json").write_text('{"passed": false}')
    assert best_source(folder)[0] == "adapter"
    (folder / "certificate.json").write_text('{"passed": true}')
    assert best_source(folder)[0] == "gguf"
