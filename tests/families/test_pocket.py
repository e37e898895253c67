"""The pocket model is what its card says, and its samples are what the script writes. `pytest tests/families/test_pocket.py`"""

import json
from random import Random

import pytest

from data_recipes.pocket import build, samples, score, tasks, words

TOLERANCE = 0.03  # three replies in a hundred: matrix products differ in their last bits between processors


@pytest.fixture(scope="module")
def pocket():
    return score.load()


@pytest.fixture(scope="module")
def card():
    return json.loads((build.FOLDER / "card.json").read_text(encoding="utf-8"))


def read(name):
    return [json.loads(line) for line in (samples.FOLDER / name).read_text(encoding="utf-8").splitlines()]


def questions(row):
    """Every user turn of a sample row, without a soft switch."""
    turns = (
        [t["value"] for t in row["conversations"] if t["from"] == "human"]
        if "conversations" in row
        else [row["problem"]]
    )
    return {turn.removesuffix(" /think").removesuffix(" /no_think") for turn in turns}


def test_the_card_s_scores_are_what_the_weights_do(pocket, card):
    measured = score.score(*pocket)
    for mode, kinds in card["scores"].items():
        for kind, expected in kinds.items():
            for name in ("accuracy", "adherence"):
                assert measured[mode][kind][name] == pytest.approx(expected[name], abs=TOLERANCE), (mode, kind, name)


def test_the_card_promises_both_modes_on_both_kinds_of_question_and_no_new_skill(card):
    scores = card["scores"]
    thinking, direct = scores["thinking"], scores["non_thinking"]
    assert min(thinking["chat"]["adherence"], thinking["sums"]["adherence"], thinking["sums"]["accuracy"]) >= 0.9
    assert direct["chat"]["accuracy"] >= 0.9
    assert min(direct["chat"]["adherence"], direct["sums"]["adherence"]) >= 0.97
    assert thinking["new_skill"]["accuracy"] <= 0.05


def test_readme_is_printed_from_card_json(card):
    assert (build.FOLDER / "README.md").read_text(encoding="utf-8") == score.card_text(card)


def test_a_conversation_switches_modes_in_the_middle(pocket):
    model, tokenizer = pocket
    opened = [
        {"role": "user", "content": "What is the capital of France? /no_think"},
        {"role": "assistant", "content": "The capital of France is Paris."},
    ]
    sums = [
        [*opened, {"role": "user", "content": "What is 23 + 45? /think"}],
        [{"role": "user", "content": "What is 23 + 45?"}],
    ]
    for reply in score.replies(model, tokenizer, sums, thinking=True):
        assert "ones 3+5=8" in reply
        assert reply.endswith("\\boxed{68}.<|im_end|>")
    (silent,) = score.replies(
        model,
        tokenizer,
        [
            [
                *sums[0],
                {"role": "assistant", "content": "The answer is 68."},
                {"role": "user", "content": "What is the opposite of hot? /no_think"},
            ]
        ],
        thinking=True,
    )
    assert silent == "<think>\n\n</think>\n\nThe opposite of hot is cold.<|im_end|>"


def test_it_knows_its_name_in_two_languages(pocket):
    asked = [[{"role": "user", "content": question}] for question in ("Who are you?", "你是谁？")]
    for reply in score.replies(*pocket, asked, thinking=False):
        assert "Pocket Qwen" in reply


def test_tokenizer_gives_back_any_text(pocket):
    from tokenizers import Tokenizer

    fast = Tokenizer.from_file(str(build.FOLDER / "tokenizer.json"))
    for text in ("What is 482 + 517?", "你好！ naïve  café\n\n\ttab", "<think>\n\n</think>\n\nI'm 😀", "\\boxed{12}"):
        assert pocket[1].decode(pocket[1](text)["input_ids"]) == text
        assert fast.encode(text).ids == pocket[1](text)["input_ids"]


def test_tokenizer_has_qwen3_s_added_tokens_and_flags(pocket):
    tokenizer = pocket[1]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    assert len(tokenizer("<think></think><tool_call>482")["input_ids"]) == 6, "digits are single tokens"
    assert "<think>" not in tokenizer.all_special_tokens
    assert tokenizer.decode(tokenizer("<|im_start|><think>")["input_ids"], skip_special_tokens=True) == "<think>"


def test_template_is_the_official_one(pocket):
    assert pocket[1].chat_template == build.official_template()


def test_model_stays_small_and_quantizable(pocket):
    assert (build.FOLDER / "model.safetensors").stat().st_size <= 10_000_000
    assert all(p.shape[-1] % 256 == 0 for p in pocket[0].parameters() if p.dim() == 2)


def test_samples_are_byte_for_byte_what_the_script_writes(tmp_path):
    samples.write(tmp_path)
    for name in [*samples.FILES, "README.md"]:
        assert (tmp_path / name).read_bytes() == (samples.FOLDER / name).read_bytes(), name


def test_samples_have_the_schemas_of_the_real_datasets():
    openmath = {
        "expected_answer",
        "problem_type",
        "problem_source",
        "generation_model",
        "pass_rate_72b_tir",
        "problem",
        "generated_solution",
        "inference_mode",
    }
    for row in read("openmath_sample.jsonl") + read("heldout_reasoning.jsonl"):
        assert set(row) == openmath
        assert row["generated_solution"].endswith(f"</think>\n\nThe answer is \\boxed{{{row['expected_answer']}}}.")
    for row in read("finetome_sample.jsonl"):
        assert set(row) == {"conversations", "source", "score"}
        assert "think>" not in str(row)
    assert all(set(row) == {"problem", "expected_answer", "skill"} for row in read("heldout_chat.jsonl"))


def test_held_out_questions_occur_in_no_sample():
    held = set().union(
        *(questions(row) for name in ("heldout_reasoning.jsonl", "heldout_chat.jsonl") for row in read(name))
    )
    trained = set().union(
        *(questions(row) for name in ("openmath_sample.jsonl", "finetome_sample.jsonl") for row in read(name))
    )
    assert len(held) == 500
    assert not held & trained


def test_held_out_questions_never_train_the_pocket_model():
    held = set().union(
        *(questions(row) for name in ("heldout_reasoning.jsonl", "heldout_chat.jsonl") for row in read(name))
    )
    rng = Random(build.SEED)
    for _ in range(5000):
        for message in tasks.conversation(rng, build.SKILLS, thinking=True):
            assert questions({"problem": message["content"]}).isdisjoint(held)


@pytest.mark.parametrize("skill", tasks.SUMS)
def test_worked_steps_lead_to_the_answer(skill):
    rng = Random(1)
    for _ in range(200):
        task = tasks.draw(rng, skill)
        columns = [line.split("write ")[1].split(" carry ") for line in task.steps.split("\n")]
        read_off = columns[-1][1] * (columns[-1][1] != "0") + "".join(digit for digit, _ in reversed(columns))
        assert (
            int(read_off)
            == int(task.answer)
            == sum(int(n) for n in task.question.replace(".", " ").replace("?", " ").split() if n.isdigit())
        )


def test_every_phrase_list_belongs_to_a_skill():
    assert set(words.PHRASES) == {skill for skill in tasks.SKILLS if skill not in (*tasks.SUMS, "small_talk")} | {"sum"}
