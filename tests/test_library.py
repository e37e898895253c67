"""Three calls in somebody's own notebook: a plain TRL trainer takes the mix, and what it made is evaluated and exported."""

import numpy as np
import pytest

import toolkit
from toolkit.files import POCKET

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


def test_a_model_of_ones_own_is_exported_with_a_certificate(trained):
    trainer, tokenizer, _, folder = trained
    certificate = toolkit.export_model(trainer.model, tokenizer, folder / "my-model", gguf=["f16"])
    assert certificate["passed"]
    assert (folder / "my-model" / "gguf").is_dir()


def test_importing_the_three_names_loads_nothing_heavy():
    import subprocess
    import sys

    code = "import toolkit, sys; toolkit.compile_mix; print({'torch', 'transformers', 'trl'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
