"""Three calls in somebody's own notebook: a plain TRL trainer takes the mix, and what it made is evaluated and exported."""

import numpy as np
import pytest

import toolkit
from toolkit.files import POCKET, ToolkitError

RECIPE = {
    "name": "mine",
    "data": {
        "budget": 1500,
        "validation_size": 4,
        "sources": [
            {
                "path": "data_recipes/samples/openmath_sample.jsonl",
                "format": "openmath",
                "mode": "thinking",
                "fraction": 0.5,
            },
            {"path": "data_recipes/samples/finetome_sample.jsonl", "mode": "non_thinking", "fraction": 0.5},
        ],
    },
    "model": {"model_name": "whatever the notebook loaded", "max_seq_length": 512},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The pocket model, trained for two steps on the mix by a plain Unsloth notebook's calls: nothing of our own trainer."""
    from unsloth import FastLanguageModel  # isort: skip  # first, as Unsloth asks: it patches the others
    import trl

    folder = tmp_path_factory.mktemp("library")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOLKIT_OUTPUTS", str(folder / "outputs"))
        model, tokenizer = FastLanguageModel.from_pretrained(str(POCKET), max_seq_length=512, load_in_4bit=True)
        model = FastLanguageModel.get_peft_model(model, r=4, target_modules=["q_proj", "v_proj"])
        mixed = toolkit.compile_mix(RECIPE, tokenizer)
        trainer = trl.SFTTrainer(
            model=model,
            train_dataset=mixed.train_dataset,
            eval_dataset=mixed.validation_dataset,
            processing_class=tokenizer,
            args=trl.SFTConfig(
                output_dir=str(folder / "trainer"), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2,
                report_to="none", max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
            ),
        )  # fmt: skip
        trainer.train()
        yield trainer, tokenizer, mixed, folder


def test_labels_reach_a_plain_trainer_as_they_were_compiled(trained):
    trainer, _, mixed, _ = trained
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    for row, labels in zip(mixed.train, batch["labels"].tolist(), strict=False):
        assert np.array_equal(row.labels, labels[: len(row.ids)])
        assert set(labels[len(row.ids) :]) <= {-100}


def test_a_model_of_ones_own_is_scored_in_both_modes(trained, capsys):
    trainer, tokenizer, mixed, _ = trained
    result = toolkit.evaluate_model(trainer.model, tokenizer, mixed, max_new_tokens=8, steps=2)
    assert set(result["tuned"]) >= {"thinking", "non_thinking", "forgetting"}
    assert "result:" in capsys.readouterr().out


def test_a_model_of_ones_own_is_exported_with_a_certificate_from_any_folder(trained, monkeypatch):
    """By a relative path too, although other processes, which begin in folders of their own, take part in the check."""
    trainer, tokenizer, _, folder = trained
    monkeypatch.chdir(folder)
    certificate = toolkit.export_model(trainer.model, tokenizer, "my-model", gguf=["f16"])
    assert certificate["passed"]
    assert (folder / "my-model" / "gguf").is_dir()


def test_dir_shows_the_public_calls_and_nothing_else():
    assert dir(toolkit) == [
        "RunRecorder",
        "__version__",
        "blend",
        "compile_mix",
        "dial",
        "evaluate_model",
        "export_model",
    ]
    assert all(getattr(toolkit, name) for name in dir(toolkit))


def test_importing_the_three_names_loads_nothing_heavy():
    import subprocess
    import sys

    code = "import toolkit, sys; toolkit.compile_mix; print({'torch', 'transformers', 'trl'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.fixture
def peft_model(tmp_path):
    """(function that makes a PeftModel of a tiny Qwen3 of its own, its tokenizer, folder of the base)."""
    import shutil

    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tmp_path / "base"
    shutil.copytree(POCKET, base)

    def made(*, name="default", model=None, **options):
        torch.manual_seed(1)
        model = model or AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
        made = peft.get_peft_model(model, config, adapter_name=name)
        with torch.no_grad():  # an adapter that does something
            for weight in (w for n, w in made.named_parameters() if "lora_B" in n):
                weight.normal_(std=0.02)
        return made

    return made, AutoTokenizer.from_pretrained(base), base


def test_an_adapter_of_any_name_is_exported(peft_model, tmp_path):
    made, tokenizer, _ = peft_model
    model = made(name="mine")
    assert toolkit.export_model(model, tokenizer, tmp_path / "out", gguf="f16")["passed"]
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_base_that_was_merged_in_memory_is_not_exported_onto_its_old_name(peft_model, tmp_path):
    made, tokenizer, _ = peft_model
    second = made(model=made().merge_and_unload())
    with pytest.raises(ToolkitError, match=r"q_proj.weight: the model in memory is not .* any more"):
        toolkit.export_model(second, tokenizer, tmp_path / "out", gguf=())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_changed_its_base_is_neither_scored_nor_exported(init, peft_model, tmp_path):
    made, tokenizer, _ = peft_model
    model = made(init_lora_weights=init)
    with pytest.raises(ToolkitError, match=f"init_lora_weights='{init}'"):
        toolkit.evaluate_model(model, tokenizer)
    with pytest.raises(ToolkitError, match=r"any more|init_lora_weights"):
        toolkit.export_model(model, tokenizer, tmp_path / "out", gguf=())


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"), ({"use_dora": True}, "use_dora")],
)
def test_an_adapter_that_is_more_than_two_factors_is_not_merged(settings, told, peft_model, tmp_path):
    made, tokenizer, _ = peft_model
    with pytest.raises(ToolkitError, match=told):
        toolkit.export_model(made(**settings), tokenizer, tmp_path / "out", gguf=())


def test_a_plain_model_and_one_without_a_name_are_refused_by_name(peft_model, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    made, tokenizer, base = peft_model
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    with pytest.raises(ToolkitError, match="takes a PeftModel"):
        toolkit.export_model(plain, tokenizer, tmp_path / "out")
    plain.name_or_path = ""
    with pytest.raises(ToolkitError, match="has no name"):
        toolkit.export_model(made(model=plain), tokenizer, tmp_path / "out")


def test_overrides_change_a_recipe_that_is_one_already():
    from toolkit import recipe

    small = toolkit.compile_mix(
        recipe.from_dict(RECIPE | {"model": {"model_name": "pocket"}}), None, ["data.budget=900"]
    )
    assert small.report["total"]["supervised_tokens"] < 1000


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "2 + 2?"}]},
        {"expected_answer": "4"},
        {"messages": [], "expected_answer": 4},
    ],
)
def test_a_question_that_lacks_something_is_named_before_anything_is_generated(row, trained):
    trainer, tokenizer, mixed, _ = trained
    with pytest.raises(ToolkitError, match="a question needs messages"):
        toolkit.evaluate_model(trainer.model, tokenizer, mixed, questions=[row], max_new_tokens=4)


def test_own_questions_may_have_numbers_for_answers_and_stand_beside_a_mix(trained):
    trainer, tokenizer, mixed, _ = trained
    asked = [{"messages": [{"role": "user", "content": "2 + 2?"}], "expected_answer": 4}]
    result = toolkit.evaluate_model(trainer.model, tokenizer, mixed, questions=asked, max_new_tokens=4, steps=2)
    assert result["tuned"]["thinking"]["accuracy/set/questions"]["n"] <= 1


def test_tokens_that_the_embedding_lacks_are_named(peft_model, tmp_path):
    made, tokenizer, _ = peft_model
    model = made()
    tokenizer.add_tokens([f"<new{i}>" for i in range(model.config.vocab_size)])
    with pytest.raises(ToolkitError, match="without resize_token_embeddings"):
        toolkit.export_model(model, tokenizer, tmp_path / "out", gguf="f16")


def test_an_embedding_that_was_resized_in_memory_is_named(peft_model, tmp_path):
    made, tokenizer, base = peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(model.config.vocab_size + 64)
    with pytest.raises(ToolkitError, match="embed_tokens.weight: resized in memory"):
        toolkit.export_model(made(model=model), tokenizer, tmp_path / "out", gguf=())
