"""A run is served by llama.cpp: run and base from one copy of the weights, both what they are in PyTorch."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from tests.support.pocket_run import make_gguf, make_run
from toolkit.files import POCKET, ROOT, ToolkitError
from toolkit.serving import checked_key, public, welcome
from toolkit.serving.client import connect
from toolkit.serving.engine import BASE, exported_gguf, start

SUM = [{"role": "user", "content": "What is 17 + 25?"}]
QUIET = {"chat_template_kwargs": {"enable_thinking": False}}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOISE = 0.05
"""Adapters change the base enough to be told from it by every test here."""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("outputs")
        patch.setenv("TOOLKIT_OUTPUTS", str(folder))
        yield folder


@pytest.fixture(scope="module")
def runs(outputs):
    return [make_run(outputs / name, seed, NOISE) for seed, name in enumerate(("tuned", "other.v2"), start=1)]


@pytest.fixture(scope="module")
def engine(runs):
    return start(runs)


@pytest.fixture(scope="module")
def client(engine):
    import openai

    return openai.OpenAI(base_url=f"{engine.url}/v1", api_key=engine.key, max_retries=0)


def first_logprobs(engine, lora: dict, count: int = 5) -> list[float]:
    """Log-probabilities of the likeliest tokens after a fixed prompt, as the server reports them."""
    body = {"prompt": "<|im_start|>user\nWho are you?", "n_predict": 1, "n_probs": count, "temperature": 0}
    found = engine.call("/completion", body | lora)["completion_probabilities"][0]["top_logprobs"]
    return [round(top["logprob"], 3) for top in found]


# --- what is served is the run ---------------------------------------------------------------------------------------


def reference(base, run, texts: list[str]) -> dict[str, np.ndarray]:
    """Next-token log-probabilities by transformers and PEFT in fp32: {"base" | "tuned": (texts, vocabulary)}."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), run / "adapter")

    def ask() -> np.ndarray:
        with torch.no_grad():
            ids = [tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids for text in texts]
            return torch.stack([model(i).logits[0, -1].log_softmax(-1) for i in ids]).numpy()

    with model.disable_adapter():
        found = {"base": ask()}
    return found | {"tuned": ask()}


def divergence(engine, lora: dict, texts: list[str], expected: np.ndarray) -> float:
    """Mean KL of the server's top 200 tokens, and of the rest as one bucket, from the expected probabilities."""
    total = 0.0
    for text, row in zip(texts, expected.astype(np.float64), strict=True):
        tokens = engine.call("/tokenize", {"content": text, "parse_special": True})["tokens"]
        body = {"prompt": tokens, "n_predict": 1, "n_probs": 200, "temperature": 0, "logit_bias": [[0, 1000.0]]}
        top = engine.call("/completion", body | lora)["completion_probabilities"][0]["top_logprobs"]
        ours, theirs = row[[t["id"] for t in top]], np.array([t["logprob"] for t in top])
        rest, other = max(1 - np.exp(ours).sum(), 1e-9), max(1 - np.exp(theirs).sum(), 1e-9)
        total += np.sum(np.exp(ours) * (ours - theirs)) + rest * np.log(rest / other)
    return total / len(texts)


@pytest.mark.parametrize("name", ["pocket", "qwen2.5", "llama3", "smollm2", "gemma3", "qwen3_thinking_2507"])
def test_run_and_base_have_the_probabilities_they_have_in_pytorch(name, outputs, request):
    base = POCKET if name == "pocket" else request.getfixturevalue("family")(name)
    run = make_run(outputs / f"of_{name}", 3, NOISE, base)
    texts = ["The capital of France is", "What is 17 + 25?\n", "one two three four", "Hello"]
    expected, served = reference(base, run, texts), start([run], quant="f16")
    assert divergence(served, served.lora(run.name), texts, expected["tuned"]) < 1e-4
    assert divergence(served, served.lora(BASE), texts, expected["base"]) < 1e-4
    assert divergence(served, served.lora(BASE), texts, expected["tuned"]) > 1e-3, "the two must be told apart"


@pytest.mark.parametrize("name", ["qwen2.5", "llama3", "smollm2", "qwen3_instruct_2507", "gemma3"])
def test_a_chat_of_an_instruct_family_is_answered_without_reasoning(name, outputs, family):
    served = start([make_run(outputs / f"chat_{name}", 1, NOISE, family(name))])
    assert list(served.sampling) == ["non_thinking"]
    said = [
        chunk["choices"][0]["delta"] for chunk in served.stream({"messages": SUM, "max_tokens": 12}) if chunk["choices"]
    ]
    assert any(delta.get("content") for delta in said)
    assert not any(delta.get("reasoning_content") for delta in said)


def test_a_request_without_a_lora_is_answered_by_the_run_whatever_was_asked_before(engine):
    """llama.cpp reuses the prefix that it cached for the base, unless told otherwise: Engine.lora."""
    tuned, base = first_logprobs(engine, engine.lora("tuned")), first_logprobs(engine, engine.lora(BASE))
    assert tuned != base
    for _ in range(2):
        assert first_logprobs(engine, engine.lora(BASE)) == base
        assert first_logprobs(engine, {}) == tuned
        assert first_logprobs(engine, engine.lora("tuned")) == tuned


def test_several_runs_and_their_base_are_answered_apart_and_at_the_same_time(engine):
    names = ("tuned", "other.v2", BASE)
    alone = {name: first_logprobs(engine, engine.lora(name)) for name in names}
    assert len({str(value) for value in alone.values()}) == 3
    with ThreadPoolExecutor(12) as pool:
        crowd = list(pool.map(lambda i: first_logprobs(engine, engine.lora(names[i % 3])), range(24)))
    assert crowd == [alone[names[i % 3]] for i in range(24)]


def test_a_server_says_which_runs_it_serves_in_the_order_of_their_loras(engine):
    assert connect(f"{engine.url}/", ["other.v2"], engine.key).runs == engine.runs == ("tuned", "other.v2")
    assert connect(f"{engine.url}/v1", ["other.v2"], engine.key).runs == engine.runs
    with pytest.raises(ToolkitError, match=r"serves tuned, base, other.v2, not another"):
        connect(engine.url, ["another"], engine.key)


def test_the_base_can_be_what_a_request_gets_that_names_nothing(runs, engine):
    """For tools that cannot ask for it."""
    served = start(runs[:1], scale=0)
    assert np.allclose(first_logprobs(served, {}), first_logprobs(engine, engine.lora(BASE)), atol=0.05)


def test_the_exported_file_is_served(runs):
    make_gguf(runs[0])
    served = start(runs[:1], source="merged-gguf", quant="q8_0")
    assert served.call("/v1/chat/completions", {"messages": SUM, "max_tokens": 8})["choices"][0]["message"]
    assert connect(served.url, ["tuned"], served.key).runs == ()


def test_an_exported_file_that_its_certificate_is_not_about_is_refused(outputs):
    run = make_run(outputs / "damaged", 1, NOISE)
    file = make_gguf(run)
    certificate = run / "certificate.json"
    sound, passed = file.read_bytes(), certificate.read_text()
    flipped = bytearray(sound)
    flipped[-1000] ^= 1
    cases = [
        (bytes(flipped), passed, "not the file that its certificate is about"),
        (sound[:-4096], passed, "not the file that its certificate is about"),
        (sound, passed.replace("true", "false"), "its certificate did not pass"),
        (sound, passed.replace("damaged.q8_0", "other.q8_0"), "not the file that its certificate is about"),
        (sound, passed[:-5], "certificate.json"),
        (sound, None, "not verified"),
    ]
    for content, record, message in cases:
        file.write_bytes(content)
        certificate.unlink(missing_ok=True)
        if record is not None:
            certificate.write_text(record)
        with pytest.raises(ToolkitError, match=message):
            start([run], source="merged-gguf")
    certificate.write_text(passed)
    assert start([run], source="merged-gguf").call("/health")


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_base_of_the_cache_is_made_again_and_said(outputs, damage):
    run = make_run(outputs / "repaired", 4, NOISE)
    said: list[str] = []
    sound = first_logprobs(start([run]), {})
    (file,) = outputs.glob(".gguf/pocket-*/q8_0-*.gguf")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes({"flipped": bytes(content), "cut": content[: len(content) // 2], "empty": b""}[damage])
    assert first_logprobs(start([run], say=said.append), {}) == sound
    assert sum("is made again" in line for line in said) == 1
    said.clear()
    start([run], say=said.append)
    assert not any("again" in line or "converting" in line for line in said)
    shutil.rmtree(run)


# --- how much of the adapter ------------------------------------------------------------------------------------------


def test_a_scale_of_nothing_is_the_base_of_one_the_run_and_of_half_between_the_two(runs, engine):
    def same(one: list[float], other: list[float]) -> bool:
        return bool(np.allclose(one, other, atol=0.05))  # a cached prefix rounds otherwise

    base, tuned = (first_logprobs(engine, engine.lora(name)) for name in (BASE, "tuned"))
    assert same(first_logprobs(engine, engine.lora("tuned", scale=0)), base)
    assert same(first_logprobs(engine, engine.lora("tuned", scale=1)), tuned)
    half = first_logprobs(engine, engine.lora("tuned", scale=0.5))
    assert not same(half, base)
    assert not same(half, tuned)
    served = start(runs[:1], scale=0.5)
    assert same(first_logprobs(served, {}), half)
    assert same(first_logprobs(served, served.lora("tuned")), half)
    connected = connect(served.url, ["tuned"], served.key, scale=0.5)
    assert same(first_logprobs(connected, connected.lora("tuned")), half)


def test_half_of_the_adapter_has_the_probabilities_that_peft_gives_half_its_alpha(outputs):
    run = make_run(outputs / "dialled", 3, NOISE)
    config = run / "adapter" / "adapter_config.json"
    text = config.read_text()
    texts = ["The capital of France is", "What is 17 + 25?\n", "Hello"]
    config.write_text(text.replace('"lora_alpha": 16', '"lora_alpha": 8'))
    expected = reference(POCKET, run, texts)["tuned"]
    config.write_text(text)
    served = start([run], quant="f16", scale=0.5)
    assert divergence(served, served.lora(run.name), texts, expected) < 1e-4
    assert divergence(served, served.lora(run.name, scale=1), texts, expected) > 1e-3


@pytest.mark.parametrize("scale", [-0.1, 2.1, float("nan"), float("inf")])
def test_a_scale_that_no_adapter_is_used_at_is_refused(runs, engine, scale):
    with pytest.raises(ToolkitError, match="from 0 .the base. to 2"):
        start(runs, scale=scale)
    with pytest.raises(ToolkitError, match="from 0 .the base. to 2"):
        connect(engine.url, ["tuned"], engine.key, scale)


# --- what clients get ------------------------------------------------------------------------------------------------


def test_the_openai_client_gets_reasoning_apart_from_content(client):
    reply = client.chat.completions.create(model="tuned", messages=SUM, temperature=0, max_tokens=200)
    message = reply.choices[0].message
    assert message.reasoning_content
    assert "think>" not in message.content + message.reasoning_content
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_thinking_can_be_switched_off_in_a_request(client):
    reply = client.chat.completions.create(model="tuned", messages=SUM, max_tokens=60, extra_body=QUIET)
    assert reply.choices[0].message.content
    assert "reasoning_content" not in reply.choices[0].message.model_dump(exclude_none=True)


def test_a_stream_says_the_same_as_the_whole_reply(client):
    options = {"model": "tuned", "messages": SUM, "temperature": 0, "max_tokens": 200}
    whole = client.chat.completions.create(**options).choices[0]
    parts = {"reasoning_content": "", "content": ""}
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    for delta in (choice.delta for chunk in chunks for choice in chunk.choices):
        for key in parts:
            parts[key] += getattr(delta, key, None) or ""
    assert parts == {key: getattr(whole.message, key) for key in parts}
    assert chunks[-1].usage.completion_tokens > 0


def test_a_seed_gives_the_same_reply_again_and_another_seed_another(client):
    def say(seed: int) -> str:
        asked, wild = [{"role": "user", "content": "Tell me a story."}], {"top_k": 200, "top_p": 1.0}
        options = {"model": "tuned", "messages": asked, "temperature": 2, "max_tokens": 40, "seed": seed}
        return client.chat.completions.create(**options, extra_body=wild).choices[0].message.model_dump_json()

    assert say(7) == say(7)
    assert len({say(seed) for seed in range(4)}) > 1


def test_a_json_schema_is_kept_to(client):
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer"}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    reply = client.chat.completions.create(
        model="tuned", messages=SUM, max_tokens=100, response_format=form, temperature=0, extra_body=QUIET
    )
    assert isinstance(json.loads(reply.choices[0].message.content)["sum"], int)


def test_tools_calls_and_results_are_shown_to_the_model(client):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    turns = [
        *SUM,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
    ]
    counts = [
        client.chat.completions.create(model="tuned", messages=turns, max_tokens=1, **tools).usage.prompt_tokens
        for tools in ({"tools": [WEATHER]}, {})
    ]
    assert counts[0] > counts[1] + 50


def test_a_stop_text_and_a_limit_end_the_answer(client):
    options = {"model": "tuned", "messages": SUM, "temperature": 0, "extra_body": QUIET}
    whole = client.chat.completions.create(**options, max_tokens=60).choices[0].message.content
    stopped = client.chat.completions.create(**options, max_tokens=60, stop=whole[6:8]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (whole[: whole.index(whole[6:8])], "stop")
    cut = client.chat.completions.create(**options, max_tokens=2)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 2)


def test_a_prompt_beyond_the_context_is_refused_with_its_size(engine):
    with pytest.raises(ToolkitError, match=r"exceeds the available context size \(2048 tokens\)"):
        engine.call("/v1/chat/completions", {"messages": [{"role": "user", "content": "7 + " * 3000}]})


def test_the_recommended_sampling_is_the_default(engine):
    defaults = engine.call("/props")["default_generation_settings"]["params"]
    found = {name: round(defaults[name], 3) for name in ("temperature", "top_p", "top_k", "min_p")}
    assert found == engine.sampling["thinking"] == {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0}


def test_fifty_clients_at_once_are_all_answered(engine):
    body = {"messages": SUM, "max_tokens": 12}
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: engine.call("/v1/chat/completions", body), range(50)))
    assert all(answer["usage"]["completion_tokens"] for answer in answers)


def test_a_reader_who_leaves_stops_the_generation(engine):
    long = {"messages": SUM, "max_tokens": 1900, "ignore_eos": True}
    for _ in range(8):  # twice as many as are generated at once: were they not stopped, the next would have to wait
        stream = engine.stream(long)
        next(stream)
        stream.close()
    assert engine.call("/v1/chat/completions", {"messages": SUM, "max_tokens": 1})


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_base_is_converted_once_and_an_adapter_again_when_it_changes(outputs):
    said = []
    run = make_run(outputs / "changing", 1, NOISE)
    first = first_logprobs(start([run], say=said.append), {})
    make_run(outputs / "changing2", 2, NOISE)
    (outputs / "changing2" / "adapter" / "adapter_model.safetensors").replace(
        run / "adapter" / "adapter_model.safetensors"
    )
    assert first_logprobs(start([run], say=said.append), {}) != first
    assert sum("converting" in line for line in said) <= 1


def test_two_processes_that_need_the_same_base_convert_it_once(tmp_path):
    make_run(tmp_path / "tuned")
    code = "from toolkit.serving.engine import start; start(['tuned'], say=print)"
    env = {"TOOLKIT_OUTPUTS": str(tmp_path)}
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True, "env": {**os.environ, **env}}
    both = [subprocess.Popen([sys.executable, "-c", code], **options) for _ in range(2)]
    said = "".join(process.communicate(timeout=120)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert said.count("converting") == 1
    assert not list(tmp_path.glob(".gguf/*/*.partial"))


def test_the_quantization_is_the_one_asked_for_or_the_smallest_that_is_exact(tmp_path):
    run = make_run(tmp_path / "tuned")
    with pytest.raises(ToolkitError, match="there is nothing: python -m toolkit export tuned"):
        exported_gguf(run)
    (run / "gguf").mkdir()
    for quant in ("f16", "q8_0", "q2_k"):
        (run / "gguf" / f"tuned.{quant}.gguf").touch()
    assert exported_gguf(run).name == "tuned.q8_0.gguf"
    assert exported_gguf(run, "Q2_K").name == "tuned.q2_k.gguf"
    with pytest.raises(ToolkitError, match="no q4_0, there is tuned.f16.gguf, tuned.q2_k.gguf, tuned.q8_0.gguf"):
        exported_gguf(run, "q4_0")


def test_what_cannot_be_served_is_refused_before_anything_is_loaded(runs, outputs, family):
    other = make_run(outputs / "of_another_base", 1, NOISE, family("qwen2.5"))
    named = make_run(outputs / "called", 1).rename(outputs / "base")
    busy = socket.create_server(("127.0.0.1", 0))
    cases = [
        ([*runs, other], {}, "trained on different bases"),
        ([named], {}, "not 'base'"),
        (runs, {"source": "merged-gguf"}, "leave out --from"),
        (runs[:1], {"source": "merged-gguf", "scale": 0.5}, "leave out --from"),
        (runs, {"port": busy.getsockname()[1]}, "choose another with --port"),
        (runs, {"host": "10.9.9.9"}, "cannot listen there"),
        (["nowhere"], {}, "no such run"),
        (runs, {"quant": "q9"}, "q9"),
    ]  # fmt: skip
    for given, options, message in cases:
        with pytest.raises(ToolkitError, match=message):
            start(given, **options)
    busy.close()


# --- the command -----------------------------------------------------------------------------------------------------


def served_command(runs, *words):
    command = [sys.executable, "-m", "toolkit", "serve", runs[0].name, "--port", "0", *words]
    env = {**os.environ, "TOOLKIT_OUTPUTS": str(runs[0].parent)}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_the_command_says_where_how_to_ask_for_the_base_and_ends_when_told_to(runs):
    process = served_command(runs)
    said = ""
    while "base: curl" not in said:
        said += process.stdout.readline()
    assert "Ctrl-C" in said
    url = re.search(r"http://127.0.0.1:\d+", said)[0]
    assert "app.start" in httpx.get(url, headers={"Accept-Encoding": "gzip"}).text
    body = json.loads(re.search(r"base: curl \S+ -d '(.*)'", said)[1])
    assert body["lora"] == [{"id": 0, "scale": 0}]
    assert httpx.post(f"{url}/v1/chat/completions", json=body | {"max_tokens": 2}).status_code == 200
    process.send_signal(signal.SIGTERM)
    assert "stopped" in process.communicate(timeout=20)[0]
    assert process.returncode == 0


def test_another_host_needs_a_key_which_is_made_and_printed_where_the_given_one_is_empty(runs):
    """`--api-key "$KEY"` of a variable that is not set never opens the server to every network."""
    process = served_command(runs, "--host", "0.0.0.0", "--api-key", "")
    said = ""
    while "API key" not in said:
        said += process.stdout.readline()
    assert "--api-key is empty" in said
    url, key = re.search(r"http://127.0.0.1:\d+", said)[0], said.rsplit(maxsplit=1)[-1]
    assert len(key) >= 32
    ask = {"messages": SUM, "max_tokens": 1}
    assert httpx.post(f"{url}/v1/chat/completions", json=ask).status_code == 401
    headers = {"Authorization": f"Bearer {key}"}
    assert httpx.post(f"{url}/v1/chat/completions", json=ask, headers=headers).status_code == 200
    process.send_signal(signal.SIGINT)
    assert "stopped" in process.communicate(timeout=20)[0]
    assert process.returncode == 0


@pytest.fixture(scope="module")
def keyless(runs):
    """The address of `serve` on this machine without a key."""
    served = public(runs[:1], "127.0.0.1", 0, None, print, {})
    yield served
    assert served.server


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example:80", "10.0.0.1", "", "0.0.0.0",
     "127.0.0.1@evil.example", "[::2]:80"],
)  # fmt: skip
@pytest.mark.parametrize("route", ["/v1/models", "/", "/props", "/v1/chat/completions"])
def test_a_page_whose_name_points_to_this_machine_gets_nothing(keyless, host, route):
    body = {"json": {"messages": SUM, "max_tokens": 1}} if route.endswith("completions") else {}
    method = "POST" if body else "GET"
    refused = httpx.request(method, f"{keyless.url}{route}", headers={"Host": host}, **body)
    assert refused.status_code == 403
    assert "127.0.0.1 and localhost only" in refused.json()["error"]["message"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:9000", "localhost:1", "LOCALHOST", "[::1]:80", "[::1]"])
def test_this_machine_by_any_of_its_names_is_answered(keyless, host):
    assert httpx.get(f"{keyless.url}/v1/models", headers={"Host": host}).status_code == 200


def test_a_second_request_of_a_connection_is_looked_at_too(keyless):
    """A client that keeps a connection could send a foreign name after a good one."""
    place = keyless.url.removeprefix("http://").split(":")
    with socket.create_connection((place[0], int(place[1])), timeout=20) as connection:
        request = "GET /v1/models HTTP/1.1\r\nHost: {}\r\n\r\n"
        connection.sendall((request.format("localhost") + request.format("evil.example")).encode())
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert answer.count(b"HTTP/1.") == 1


def test_two_names_or_none_are_refused(keyless):
    place = keyless.url.removeprefix("http://").split(":")
    for lines in ("", "Host: localhost\r\nHost: evil.example\r\n", "Host: evil.example\r\nhost: localhost\r\n"):
        with socket.create_connection((place[0], int(place[1])), timeout=20) as connection:
            connection.sendall(f"GET /v1/models HTTP/1.1\r\n{lines}\r\n".encode())
            assert connection.recv(65536).startswith(b"HTTP/1.0 403")


def test_without_a_key_clients_stream_and_many_at_once_are_answered(keyless):
    import openai

    client = openai.OpenAI(base_url=f"{keyless.url}/v1", api_key="-", max_retries=0)

    def say(_: int) -> int:
        chunks = client.chat.completions.create(
            model="tuned", messages=SUM, max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
        return list(chunks)[-1].usage.completion_tokens

    with ThreadPoolExecutor(20) as pool:
        assert all(pool.map(say, range(20)))


def test_without_a_key_a_reader_who_leaves_stops_the_generation(keyless):
    long = {"messages": SUM, "max_tokens": 1900, "ignore_eos": True}
    for _ in range(8):
        stream = keyless.stream(long)
        next(stream)
        stream.close()
    assert keyless.call("/v1/chat/completions", {"messages": SUM, "max_tokens": 1})


def test_what_sends_no_request_ends_nothing(keyless):
    place = keyless.url.removeprefix("http://").split(":")
    for text in (b"", b"\x00\xff" * 40000, b"GET / HTTP/1.1\r\nHost: localhost"):
        with socket.create_connection((place[0], int(place[1])), timeout=20) as connection:
            connection.sendall(text)
    assert httpx.get(f"{keyless.url}/health").status_code == 200


def test_an_engine_of_this_process_answers_only_its_own_client(engine):
    assert len(engine.key) >= 32
    assert httpx.post(f"{engine.url}/v1/chat/completions", json={"messages": SUM}).status_code == 401


@pytest.mark.parametrize("key", ["", " ", "\t"])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "127.0.0.2", "myhost"])
def test_an_empty_key_is_no_key(host, key):
    said: list[str] = []
    assert len(checked_key(host, key, said.append)) >= 32
    assert "--api-key is empty" in said[0]
    assert checked_key("127.0.0.1", key, said.append) is None


@pytest.mark.parametrize(
    ("host", "key"), [("", "secret"), (" ", None), ("127.0.0.1", "two words"), ("localhost", "ключ")]
)
def test_a_host_or_key_that_cannot_be_meant_is_refused(host, key):
    with pytest.raises(ToolkitError, match="--host is empty|--api-key: expected"):
        checked_key(host, key, print)


def test_the_chat_page_offers_no_tools(keyless):
    """The page adds its custom parameters to each request, over the tools that it offers by itself."""
    settings = httpx.get(f"{keyless.url}/props").json()["ui_settings"]
    custom = json.loads(settings["customJson"])
    tool = {
        "type": "function",
        "function": {"name": "get_datetime", "parameters": {"type": "object", "properties": {}}},
    }
    offered = {"messages": SUM, "max_tokens": 1, "tools": [tool]}
    counts = [
        keyless.call("/v1/chat/completions", body)["usage"]["prompt_tokens"]
        for body in ({"messages": SUM, "max_tokens": 1}, offered | custom, offered)
    ]
    assert counts[0] == counts[1] < counts[2]


def test_other_origins_read_nothing(keyless):
    allowed = httpx.get(f"{keyless.url}/v1/models", headers={"Origin": "http://elsewhere.example"}).headers
    assert allowed.get("access-control-allow-origin") not in ("*", "http://elsewhere.example")


def test_the_welcome_names_every_run_and_the_base(engine):
    text = welcome(engine)
    for i, name in enumerate(engine.runs):
        assert re.search(rf'{re.escape(name)}.*curl .*"id": {i}, "scale": 1', text)
    assert re.search(r'base: curl .*"id": 0, "scale": 0', text)
