"""A recipe is read strictly: a mistake names the file and the key and says what was probably meant."""

import dataclasses
import subprocess
import sys
import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import recipe_strategies
from toolkit import recipe
from toolkit.files import ROOT, ToolkitError
from toolkit.recipe import from_dict, load, to_dict, to_yaml

RECIPES = sorted((ROOT / "data_recipes").glob("*.yaml"))
GOOD = {
    "name": "small",
    "data": {
        "sources": [
            {"path": "a.jsonl", "mode": "thinking", "fraction": 0.6},
            {"path": "b.jsonl", "mode": "thinking", "fraction": 0.2},
            {"path": "c.jsonl", "mode": "non_thinking", "fraction": 0.2},
        ]
    },
    "model": {"model_name": "pocket"},
}


def broken(*path_and_value):
    """GOOD with one value changed, or removed when the value is None."""
    *path, last, value = path_and_value
    values = yaml.safe_load(yaml.safe_dump(GOOD))
    node = values
    for key in path:
        node = node.setdefault(key, {}) if isinstance(node, dict) else node[key]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return values


def test_a_quantization_may_be_written_as_export_takes_it():
    assert from_dict(broken("export", "quantization_method", ["F16"])).export.quantization_method == ("F16",)


def test_recipes_ship():
    assert len(RECIPES) >= 4


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_recipe_that_ships_loads_and_says_how_to_run_it(path):
    assert load(path).name == path.stem
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(path.name in line and "make" in line for line in header)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_recipe_that_ships_saves_where_it_evaluates(path):
    """Otherwise transformers refuses load_best_model_at_end, with the model loaded by then."""
    train = load(path).train
    assert (train["save_steps"] / train["eval_steps"]).is_integer()


def test_evaluating_more_or_less_often_saves_as_often_unless_told_otherwise():
    assert load("hybrid", ["train.eval_steps=7"]).train["save_steps"] == 7
    assert load("hybrid", ["train.eval_steps=7", "train.save_steps=14"]).train["save_steps"] == 14
    assert load("hybrid").train["save_steps"] == 0.25


def test_the_resolved_recipe_alone_gives_the_same_recipe_back():
    built = from_dict(GOOD, overrides=["train.learning_rate=1e-3", "model.offload_embedding=true"])
    assert from_dict(yaml.safe_load(to_yaml(built))) == built
    assert to_dict(built)["model"]["offload_embedding"] is True
    assert built.train["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (broken("data", "sources", 0, "fractoin", 0.5), "data.sources.0.fractoin.*Did you mean 'fraction'"),
        (broken("train", "learning_rte", 0.1), "train.learning_rte.*Did you mean 'learning_rate'"),
        (broken("train", "learning_rate", "2e-4"), "train.learning_rate: expected float, found '2e-4'"),
        (
            broken("train", "per_device_train_batch_size", "many"),
            "train.per_device_train_batch_size: expected int, found 'many'",
        ),
        (broken("train", "output_dir", "x"), "train.output_dir: not set here.*outputs/<name>"),
        (broken("model", "max_seq_length", "long"), "model.max_seq_length: expected int, found 'long'"),
        (broken("model", "load_in_4bit", 1), "model.load_in_4bit: expected bool, found 1"),
        (broken("model", "load_in_4bits", True), "model.load_in_4bits.*Did you mean 'load_in_4bit'"),
        (broken("lora", "lora_alhpa", 3), "lora.lora_alhpa.*Did you mean 'lora_alpha'"),
        (broken("data", "unit", "rows"), "data.unit: expected one of supervised_tokens, tokens, examples"),
        (broken("data", "sources", 0, "fraction", 0.5), "fractions must sum to 1.*= 0.9"),
        (
            broken("data", "sources", 0, "fraction", -0.5),
            r"data.sources.0.fraction: expected float >= 0.0, found -0.5",
        ),
        (broken("data", "sources", []), "at least one source"),
        (broken("data", None), "recipe: object missing required field data"),
        (broken("model", "model_name", None), "model: object missing required field model_name"),
        (broken("name", "a/b"), "name: 'a/b' becomes a folder"),
        (broken("name", "n" * 4000), "name: 'nnn.*up to 100 letters"),
        (broken("name", "base"), "name: 'base' becomes a folder: .*and not `base`"),
        (broken("train", "max_steps", 0), "train.max_steps: expected a whole number >= 1, or -1 for no limit, found 0"),
        (
            broken("export", "quantization_method", ["q8_0", "q9_9"]),
            "export.quantization_method: expected some of f16, bf16, .*q4_k_m, found 'q9_9'",
        ),
        (["name"], "expected keys"),
        (broken(7, "x"), "unknown key 7. Known"),
        (broken("data", "validation_size", -1), "data.validation_size: expected int >= 0, found -1"),
        (broken("data", "seed", -1), "data.seed: expected int >= 0, found -1"),
        (broken("data", "budget", 0), "data.budget: expected int >= 1, found 0"),
        (broken("data", "sources", 0, "soft_switch", 7), "soft_switch: expected float <= 1.0, found 7"),
        (broken("data", "sources", 0, "max_rows", 0), "data.sources.0.max_rows: expected int >= 1, found 0"),
        (
            broken("data", "placeholders", {"NOME": "x"}),
            "data.placeholders: expected one of NAME, AUTHOR, found {'NOME'",
        ),
        (broken("data", "placeholders", {"NAME": 7}), "data.placeholders: expected str . object, found {'NAME': 7}"),
        (broken("data", "sources", 0, "columns", {1: 2}), "data.sources.0.columns: expected str, found {'1': 2}"),
        (broken("train", "learning_rate", -1), "train.learning_rate: expected float > 0.0, found -1"),
        (broken("train", "learning_rate", float("nan")), "expected text, finite numbers"),
        (
            broken("data", "sources", 1, "fraction", None),
            r"data.sources.1.fraction \(b\): .*found none; write e.g. `fraction: 0.3333333333`",
        ),
    ],
)
def test_a_mistake_names_file_and_key_and_the_way_out(values, expected):
    with pytest.raises(ToolkitError, match=f"(?s)^here.yaml: .*{expected}"):
        from_dict(values, "here.yaml")


@pytest.mark.parametrize(
    ("override", "place"),
    [("budget=3", "data.budget"), ("budgt=3", "data.budget"), ("learning_rate=1", "train.learning_rate"),
     ("lora.model_name=a", "model.model_name"), ("data.budgt=3", "budget")],
)  # fmt: skip
def test_a_key_without_its_section_is_told_with_it(override, place):
    with pytest.raises(ToolkitError, match=rf"unknown key {override.partition('=')[0]}\. Did you mean '{place}'\?"):
        recipe.load("pocket", [override])


def test_a_recipe_that_is_not_there_suggests_the_nearest_or_lists_all():
    with pytest.raises(ToolkitError, match="no such recipe. Did you mean 'pocket'"):
        load("data_recipes/pokcet.yaml")
    with pytest.raises(ToolkitError, match="no such recipe. Known: .*hybrid, .*pocket"):
        load("zzz")


def test_a_recipe_that_ships_is_found_by_its_name():
    assert load("hybrid") == load("data_recipes/hybrid.yaml")


def test_broken_yaml_is_named(tmp_path):
    (tmp_path / "x.yaml").write_text("name: [")
    with pytest.raises(ToolkitError, match="x.yaml: not readable as YAML"):
        load(tmp_path / "x.yaml")


@pytest.mark.parametrize("share", [0, 0.05, 0.3, 1])
def test_data_reasoning_rescales_thinking_sources_and_keeps_their_proportions(share):
    sources = from_dict(GOOD, overrides=[f"data.reasoning={share}"]).data.sources
    assert sources[0].fraction + sources[1].fraction == pytest.approx(share)
    assert sources[2].fraction == pytest.approx(1 - share)
    assert sources[0].fraction == pytest.approx(3 * sources[1].fraction)


def test_data_reasoning_needs_to_know_which_sources_reason():
    with pytest.raises(ToolkitError, match="needs every source's `mode`"):
        from_dict(broken("data", "sources", 0, "mode", "auto"), overrides=["data.reasoning=0.5"])


OVERRIDES = ["train.max_steps", "data.sources.9.fraction=1", "data.sources.².fraction=1", "name.first=x", "data.budget=[",
             "data.seed=2026-13-45", "data.seed=&a [*a]", "data.seed=!!bool x", "name=" + "[" * 5000]  # fmt: skip


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda text: text[:30])
def test_an_override_that_points_nowhere_or_is_no_yaml_is_an_error(override):
    with pytest.raises(ToolkitError, match="override"):
        from_dict(GOOD, overrides=[override])


def test_everything_sftconfig_unsloth_and_peft_offer_is_reachable_by_its_own_name():
    built = from_dict(GOOD, overrides=["train.neftune_noise_alpha=5", "lora.loftq_config={}", "model.dtype=float16"])
    assert built.train["neftune_noise_alpha"] == 5
    assert built.lora.extra == {"loftq_config": {}}
    assert built.model.extra == {"dtype": "float16"}


def test_the_field_names_read_from_source_are_those_of_the_imported_class():
    # a process that ends at once needs no search for garbage, a fifth of its time
    code = "import gc; gc.disable(); import trl; print(*trl.SFTConfig.__dataclass_fields__)"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(names) <= set(recipe.passthrough(recipe.Train))


def test_every_field_of_the_train_section_is_one_of_sftconfig():
    fields = {field.name for field in dataclasses.fields(recipe.Train)} - {"extra"}
    assert fields <= set(recipe.passthrough(recipe.Train))


def test_yaml_numbers_and_words_are_read_as_people_mean_them(tmp_path):
    text = yaml.safe_dump(GOOD) + "train: {learning_rate: 2e-4, eval_strategy: no, num_train_epochs: 1}\n"
    (tmp_path / "x.yaml").write_text(text)
    built = load(tmp_path / "x.yaml", ["lora.lora_alpha=16", "name='2e-4'"])
    assert (built.name, built.train["learning_rate"], built.train["eval_strategy"]) == ("2e-4", 2e-4, "no")
    (tmp_path / "again.yaml").write_text(to_yaml(built))
    assert load(tmp_path / "again.yaml") == built
    assert {"num_train_epochs: 1", "lora_alpha: 16"} <= {line.strip() for line in to_yaml(built).splitlines()}


def sources_of(*paths, **data):
    return from_dict(broken("data", {"sources": [{"path": p} for p in paths], **data})).data.sources


def test_without_any_fraction_the_counts_are_the_mix():
    assert [s.fraction for s in sources_of("a.jsonl#500", "b.jsonl#200")] == [None, None]
    assert [s.fraction for s in sources_of("a.jsonl", "b.jsonl")] == [None, None]
    assert sources_of("a.jsonl", budget=100)[0].fraction == 1.0
    with pytest.raises(ToolkitError, match=r"data.sources.0.fraction.*leave out every fraction, data.budget"):
        sources_of("a.jsonl#500", "b.jsonl#200", budget=100)


def test_sources_of_one_file_name_are_told_apart_by_their_folder():
    names = [s.name for s in sources_of("a/train.csv#2000", "b/train.csv", "b/train.csv#5", "c/other.jsonl.gz")]
    assert names == ["a-train", "b-train-2", "b-train-3", "other"]


def test_the_misspelled_author_of_self_cognition_sets_is_the_author():
    assert from_dict(broken("data", "placeholders", {"AUTHOER": "We"})).data.placeholders == {"AUTHOR": "We"}


def test_a_path_of_4000_characters_is_no_such_recipe():
    with pytest.raises(ToolkitError, match="no such recipe"):
        load("x" * 4000)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipe_strategies.cases())
def test_any_recipe_is_read_and_written_back_equal_or_refused_in_words(case):
    recipe_strategies.assert_recipe(case)


@settings(max_examples=100, deadline=None)
@given(st.text() | st.binary())
def test_any_file_is_a_recipe_or_an_error_in_words(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("fuzz") / "x.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
    with pytest.raises(ToolkitError, match="x.yaml: "):
        load(file)


def test_sections_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        from_dict(GOOD).name = "other"


def test_a_key_that_stands_twice_is_an_error(tmp_path):
    file = tmp_path / "twice.yaml"
    text = (ROOT / "data_recipes" / "pocket.yaml").read_text(encoding="utf-8")
    file.write_text(f"{text}\ntrain:\n  max_steps: 5\n", encoding="utf-8")
    with pytest.raises(ToolkitError, match=r"'train' stands twice.*line"):
        load(file)


@pytest.mark.parametrize("value", ["010", "1:30", "0x1F"])
def test_a_number_is_never_octal_or_a_time(value):
    with pytest.raises(ToolkitError, match=f"budget: expected int . null, found '{value}'"):
        load("pocket", [f"data.budget={value}"])


def test_an_initialisation_that_changes_the_base_is_refused_before_training():
    with pytest.raises(ToolkitError, match="lora.init_lora_weights: 'pissa' changes the base"):
        load("pocket", ["lora.init_lora_weights=pissa"])


def test_merged_anchors_are_no_repeated_keys():
    from toolkit.recipe import _yaml

    text = "b0: &b {x: 0}\nbase: {inner: &a {<<: *b, x: 1}}\nc: {<<: *a}"
    assert _yaml(text, "here")["c"] == {"x": 1}


def test_a_folder_without_a_recipe_says_what_works_with_it(tmp_path):
    with pytest.raises(ToolkitError, match="export_model has no recipe: verify, export, chat and serve work"):
        load(tmp_path / "recipe.yaml")


# --- keys that would be ignored, or would change what the rows were rendered with --------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "advice"),
    [
        ("train.chat_template_path", "x.jinja", "rows are rendered with the model's own template"),
        ("train.eos_token", "<|endoftext|>", "rows are rendered with the model's own"),
        ("train.pad_token", "<|pad|>", "rows are rendered with the model's own"),
        ("train.resume_from_checkpoint", "x", "the same command resumes by itself"),
        ("train.metric_for_best_model", "accuracy", "set evaluate.keep_best_by"),
        ("train.greater_is_better", "true", "set evaluate.keep_best_by"),
        ("train.dataset_text_field", "text", "reach the trainer as ids and labels"),
        ("train.dataset_kwargs", "{}", "reach the trainer as ids and labels"),
        ("train.truncation_mode", "keep_start", "never truncated"),
        ("train.shuffle_dataset", "true", "set data.seed"),
        ("train.data_seed", "7", "set data.seed"),
        ("train.model_init_kwargs", "{}", "`model:` section"),
        ("train.do_train", "true", "nothing reads it"),
        ("train.do_eval", "true", "set train.eval_strategy"),
        ("train.push_to_hub", "true", "hf upload"),
        ("train.hub_model_id", "me/x", "hf upload"),
        ("train.auto_find_batch_size", "true", "same effective batch"),
        ("train.save_only_model", "true", "could not be resumed"),
        ("train.disable_tqdm", "true", "progress is shown"),
        ("train.logging_nan_inf_filter", "true", "NaN is logged as it is"),
        ("model.use_gradient_checkpointing", "true", "set lora.use_gradient_checkpointing"),
        ("model.full_finetuning", "true", "trains adapters"),
        ("lora.max_seq_length", "64", "set model.max_seq_length"),
    ],
)
def test_a_key_that_would_be_ignored_or_change_the_tokenizer_afterwards_is_refused(key, value, advice):
    with pytest.raises(ToolkitError, match=f"{key}: not set here: .*{advice}"):
        load("pocket", [f"{key}={value}"])


def test_every_key_of_the_train_section_is_obeyed_by_the_trainer_or_refused():
    """What reaches SFTConfig must be what the recipe says: `sft_arguments` overwrites no key that a recipe may set."""
    from toolkit.training import trainer

    obeyed = set(recipe.passthrough(recipe.Train)) - {key.removeprefix("train.") for key in recipe.OWNED}
    # wandb is taken out of it, and the loaded recipe may evaluate nothing
    obeyed -= {"report_to", "eval_strategy", "load_best_model_at_end"}
    plain = load("pocket")
    marked = dataclasses.replace(plain, train=plain.train | dict.fromkeys(obeyed, "marked"))
    arguments = trainer.sft_arguments(marked, validates=True)
    assert {key for key in obeyed if arguments[key] != "marked"} == set()


# --- secrets, private paths, remote code ------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["model.token", "train.hub_token"])
def test_a_secret_comes_from_the_environment_only(key):
    with pytest.raises(ToolkitError, match=f"{key}: not set here: .*HF_TOKEN"):
        load("pocket", [f"{key}=hf_abc"])


@pytest.mark.parametrize("key", ["data.sources.0.revision", "evaluate.prompts.0", "model.revision"])
def test_a_token_anywhere_in_a_recipe_is_refused_and_not_shown(key):
    secret = "hf_" + "Ab3" * 11
    with pytest.raises(ToolkitError, match=r"looks like a Hugging Face token.*HF_TOKEN") as error:
        load("pocket", [f"{key}={secret}"])
    assert secret not in str(error.value)


def test_paths_in_the_home_folder_are_kept_so_that_they_work_and_name_nobody(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    built = from_dict(broken("data", "sources", 0, "path", str(tmp_path / "data" / "a.jsonl")),
                      overrides=[f"model.model_name={tmp_path}/models/mine"])  # fmt: skip
    assert str(tmp_path) not in to_yaml(built)
    assert (built.data.sources[0].path, built.model.model_name) == ("~/data/a.jsonl", "~/models/mine")
    assert from_dict(to_dict(built)) == built


REMOTE = to_yaml(from_dict(GOOD)).replace("load_in_4bit: true", "load_in_4bit: true\n  trust_remote_code: true")


@pytest.fixture
def shared_run(tmp_path, monkeypatch):
    """A run's folder as somebody else may have sent it."""
    monkeypatch.setattr(recipe, "_remote_code_allowed", False)
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(REMOTE)
    return folder


def test_a_file_cannot_allow_code_from_a_model_repository(shared_run):
    with pytest.raises(ToolkitError, match=r"trust_remote_code.*--trust-remote-code"):
        load(shared_run / "recipe.yaml")


def test_this_call_can_allow_code_from_a_model_repository(shared_run):
    assert load(shared_run / "recipe.yaml", ["model.trust_remote_code=true"]).model.extra == {"trust_remote_code": True}


def test_the_command_line_flag_allows_it_for_all_that_the_call_reads(shared_run):
    recipe.allow_remote_code()
    assert load(shared_run / "recipe.yaml").model.extra == {"trust_remote_code": True}


def test_an_override_that_forbids_it_is_obeyed(shared_run):
    assert load(shared_run / "recipe.yaml", ["model.trust_remote_code=false"]).model.extra == {
        "trust_remote_code": False
    }


@pytest.mark.parametrize("verb", ["evaluate", "export", "train"])
def test_every_verb_that_may_load_a_model_has_the_flag(verb):
    from toolkit import __main__ as cli

    assert "--trust-remote-code" in [flags[0] for flags, _ in cli.VERBS[verb][1]]


def test_the_flag_of_train_sets_the_key_of_the_run(monkeypatch):
    from toolkit import __main__ as cli
    from toolkit import run

    monkeypatch.setattr(recipe, "_remote_code_allowed", False)
    trained = []
    monkeypatch.setattr(run, "train", lambda loaded, *_, **__: trained.append(loaded))
    assert cli.main(["train", "pocket", "--trust-remote-code"]) == 0
    assert cli.main(["train", "pocket"]) == 0
    assert [loaded.model.extra for loaded in trained] == [{"trust_remote_code": True}, {}]


def test_a_recipe_that_was_edited_after_its_run_began_is_noticed(tmp_path):
    from toolkit.files import write_json, write_text

    built = from_dict(GOOD)
    write_text(tmp_path / "recipe.yaml", to_yaml(built))
    write_json(tmp_path / "manifest.json", {"recipe_sha256": recipe.sha256(built)})
    assert recipe.of_run(tmp_path) == built
    # a byte order mark and CRLF are an editor's, and change nothing
    (tmp_path / "recipe.yaml").write_bytes(b"\xef\xbb\xbf" + to_yaml(built).replace("\n", "\r\n").encode())
    assert recipe.of_run(tmp_path) == built
    write_text(tmp_path / "recipe.yaml", to_yaml(built).replace("pocket", "owner/other"))
    with pytest.raises(ToolkitError, match=r"recipe.yaml: was changed after this run began.*`train` command"):
        recipe.of_run(tmp_path)


def test_a_recipe_that_nothing_vouches_for_is_not_taken_for_the_runs(tmp_path):
    from toolkit.files import write_json, write_text

    write_text(tmp_path / "recipe.yaml", to_yaml(from_dict(GOOD)))
    with pytest.raises(ToolkitError, match=r"manifest.json: expected .*`train` command"):
        recipe.of_run(tmp_path)
    write_json(tmp_path / "manifest.json", {})
    with pytest.raises(ToolkitError, match=r"is not that of manifest.json, missing.*`train` command"):
        recipe.of_run(tmp_path)


def test_an_empty_recipe_of_a_run_says_how_to_write_it_anew(tmp_path):
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(ToolkitError, match=r"recipe.yaml: expected keys .*NoneType.*`train` command"):
        load(tmp_path / "recipe.yaml")


# --- files and names as people and accidents make them ---------------------------------------------------------------


@pytest.mark.parametrize("levels", [(9, 9), (40, 2), (12, 5)])
@pytest.mark.parametrize("merged", [False, True])
def test_a_file_whose_aliases_grow_without_end_is_refused_at_once(levels, merged, tmp_path):
    import time

    depth, width = levels
    lines = ["a0: &a0 {k: [x]}" if merged else "a0: &a0 [x]"]
    for level in range(1, depth):
        names = ", ".join([f"*a{level - 1}"] * width)
        lines.append(f"a{level}: &a{level} " + (f"{{<<: [{names}], k{level}: 1}}" if merged else f"[{names}]"))
    (tmp_path / "x.yaml").write_text("\n".join(lines))
    began = time.process_time()
    with pytest.raises(ToolkitError, match=r"x.yaml: "):
        load(tmp_path / "x.yaml")
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    "name", ["con", "CON", "nul.txt", "com1", "LPT9.yaml", "aux", "prn.x.y", "ref.", "a...", "麦" * 100]
)
def test_a_name_that_windows_cannot_have_is_refused_everywhere(name):
    with pytest.raises(ToolkitError, match=r"name: .* becomes a folder"):
        from_dict(broken("name", name))


@pytest.mark.parametrize("name", ["console", "nullable", "com10", "a.b", "v1.0-x", "小麦", "n" * 100, "麦" * 60])
def test_a_name_that_only_looks_like_one_of_them_is_taken(name):
    assert from_dict(broken("name", name)).name == name


def test_a_recipe_is_read_as_windows_editors_save_it(tmp_path):
    text = (ROOT / "data_recipes" / "pocket.yaml").read_text(encoding="utf-8")
    (tmp_path / "x.yaml").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert load(tmp_path / "x.yaml") == load("pocket")


def test_recipes_that_ship_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("pocket").name == "pocket"
    assert load("data_recipes/pocket.yaml") == load("pocket")


def test_a_folder_as_a_recipe_says_what_a_recipe_is(tmp_path):
    with pytest.raises(ToolkitError, match=r"is a folder: expected a recipe"):
        load(tmp_path)


def test_the_plain_values_of_a_file_are_read_by_the_same_rules_as_a_recipe(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xef\xbb\xbfname: no\r\nrate: 2e-4\r\n")
    assert recipe.read_values(tmp_path / "x.yaml") == {"name": "no", "rate": 2e-4}
    (tmp_path / "x.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(ToolkitError, match="x.yaml: expected a text file in UTF-8"):
        recipe.read_values(tmp_path / "x.yaml")


def test_brackets_without_end_are_refused_at_once(tmp_path):
    file = tmp_path / "deep.yaml"
    file.write_text("a: " + "[" * 3000)
    began = time.process_time()
    with pytest.raises(ToolkitError, match="more than 100 brackets inside each other"):
        recipe.load(file)
    assert time.process_time() - began < 5
