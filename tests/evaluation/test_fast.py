"""Fast evidence equals plain softmax over plain forward passes, follows the adapter's scale, and carries a verdict alone."""

import io

import pytest
from rich.console import Console

from toolkit.evaluation.fast import fast_evidence
from toolkit.evaluation.generate import inference, prompts
from toolkit.evaluation.measure import evaluate, summary
from toolkit.evaluation.questions import select
from toolkit.evaluation.score import Mark
from toolkit.evaluation.subject import LoadedRun
from toolkit.evaluation.watch import Forgetting
from toolkit.files import ToolkitError
from toolkit.view.progress import Progress

QUESTIONS = [{"messages": [{"role": "user", "content": f"What is {n} plus one"}], "expected_answer": "2", "set": "sums"}
             for n in ("one", "two", "three")]  # fmt: skip
PROBES = [{"id": "1", "category": "knowledge", "language": "en", "messages": [{"role": "user", "content": "hello"}]}]
ROWS = [{"input_ids": list(range(20 + i, 40 + i)), "prompt_length": 4, "source": "mine", "mode": "thinking"}
        for i in range(8)]  # fmt: skip


@pytest.fixture
def subject(model, tokenizer, tmp_path):
    return LoadedRun(model, tokenizer, tmp_path)


def asked():
    return select("fast", None, QUESTIONS, [], PROBES, ROWS)


def evidence(subject) -> list[Mark]:
    with Progress(Console(quiet=True), "", 0) as progress:
        return fast_evidence(subject, asked(), progress)


def value(marks: list[Mark], section: str, metric: str, model: str = "tuned") -> float:
    own = [mark for mark in marks if (mark.section, mark.metric, mark.model) == (section, metric, model)]
    return sum(mark.value for mark in own) / sum(mark.weight for mark in own)


def scaled(model, factor: float) -> None:
    """Give every LoRA layer `factor` times its weight, as a dial does."""
    for module in model.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling = {name: value * factor for name, value in module.scaling.items()}


def test_held_out_loss_and_token_accuracy_equal_a_plain_forward_pass(subject, model, tokenizer):
    import torch

    marks = evidence(subject)
    loss, hits, tokens = 0.0, 0, 0
    with inference(model, tokenizer):
        for row in ROWS:
            ids = torch.tensor([row["input_ids"]])
            log_probs = model(ids).logits[0, 3:-1].log_softmax(-1)
            loss -= log_probs.gather(-1, ids[0, 4:, None]).sum().item()
            hits += (log_probs.argmax(-1) == ids[0, 4:]).sum().item()
            tokens += 16
    assert value(marks, "forgetting", "loss/mine/thinking") == pytest.approx(loss / tokens, rel=1e-4)
    assert value(marks, "forgetting", "token_accuracy/mine/thinking") == hits / tokens


@pytest.mark.parametrize("adapter", [False, True])
def test_a_beginning_is_the_probability_of_its_first_tokens_one_after_the_other(subject, model, tokenizer, adapter):
    import torch

    from toolkit.evaluation.generate import switched

    conversations = [question["messages"] for question in QUESTIONS]
    found = subject.beginnings(conversations, "thinking", adapter=adapter)
    opening, empty = tokenizer(["<think>", "\n\n</think>"], add_special_tokens=False)["input_ids"]
    for prompt, beginning in zip(prompts(tokenizer, conversations, "thinking"), found, strict=True):
        ids, chances = list(prompt), []
        with inference(model, tokenizer), switched(model, adapter):
            for token in opening + empty:
                chances.append(model(torch.tensor([ids])).logits[0, -1].softmax(-1)[token].item())
                ids.append(token)
        opens = torch.tensor(chances[: len(opening)]).prod().item()
        closes_at_once = torch.tensor(chances[len(opening) :]).prod().item()
        assert beginning["thinking"] == pytest.approx(opens * (1 - closes_at_once), rel=1e-3)
        assert 0 <= beginning["answer"] <= 1 - opens * (1 - closes_at_once)


def test_at_scale_zero_tuned_is_the_base_and_between_the_scales_the_evidence_moves(subject, model):
    full = evidence(subject)
    scaled(model, 0.5)
    half = evidence(subject)
    scaled(model, 0.0)
    none = evidence(subject)
    for module in model.modules():  # back to what it was: the factor of a scale of 0 cannot be undone
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling = {name: module.lora_alpha[name] / module.r[name] for name in module.scaling}
    assert value(none, "forgetting", "kl") == pytest.approx(0, abs=1e-9)
    assert 0 < value(half, "forgetting", "kl") < value(full, "forgetting", "kl")
    for section, metric in {(mark.section, mark.metric) for mark in full}:
        assert value(full, section, metric, "base") == pytest.approx(value(none, section, metric), abs=1e-6)
    assert value(evidence(subject), "forgetting", "kl") == pytest.approx(value(full, "forgetting", "kl"))


def test_fast_evidence_alone_carries_a_verdict_and_generates_no_reply(model, tokenizer, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    result = evaluate(model, tokenizer, QUESTIONS, [], PROBES, ROWS, level="fast", console=console, cache=tmp_path)
    assert result["budget"]["replies"] == 0
    assert result["samples"] == result["own_rows"] == []
    assert set(result["tuned"]["thinking"]) == {"begins/thinking", "begins/answer"}
    assert result["verdict"][0].startswith("your held-out replies, mine (thinking): ")
    assert result["verdict"][-1].startswith("result: ")
    assert "eval/tuned/forgetting/kl" in summary(result)
    assert "without generation" in console.file.getvalue()


def test_no_limit_is_longer_than_what_the_model_was_loaded_for(model, tokenizer, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    settings = {"level": "fast", "limits": {"thinking": 10**6}, "console": console, "cache": tmp_path}
    result = evaluate(model, tokenizer, QUESTIONS, [], PROBES, **settings)
    positions = model.config.max_position_embeddings
    assert result["budget"]["limits"] == {"thinking": positions, "non_thinking": min(positions, 1024)}


def test_one_minute_reads_no_reply_and_says_so(model, tokenizer, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    result = evaluate(model, tokenizer, QUESTIONS, [], PROBES, ROWS, minutes=1, console=console, cache=tmp_path)
    assert result["budget"]["replies"] == 0
    assert "fast evidence only" in console.file.getvalue()


def test_while_a_model_trains_the_base_s_own_answers_are_asked_once_and_give_their_kl(model, tokenizer, tmp_path):
    watch = Forgetting(4, ROWS, tmp_path, tokens=6)
    first = watch(model, tokenizer)
    assert len(watch.answers) == 4 * 2  # in each mode
    assert first["forgetting_kl"] > 0
    stored = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert Forgetting(4, ROWS, tmp_path, tokens=6)(model, tokenizer) == first
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == stored
    marks = evidence(LoadedRun(model, tokenizer, tmp_path))
    assert first["token_accuracy"] == value(marks, "forgetting", "token_accuracy/mine/thinking")


@pytest.mark.parametrize("row", [{"expected_answer": "4"}, {"messages": [], "expected_answer": 4}])
def test_a_malformed_question_is_named_before_the_speed_is_measured(model, tokenizer, tmp_path, row):
    with pytest.raises(ToolkitError, match="a question needs messages"):
        evaluate(model, tokenizer, [row], [], PROBES, console=Console(file=io.StringIO()), cache=tmp_path)
    assert list(tmp_path.iterdir()) == []
