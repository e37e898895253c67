"""A recipe: everything that decides a run, in one YAML file, strictly read.

from toolkit import recipe; loaded = recipe.load("hybrid", ["train.max_steps=10", "data.reasoning=0.5"])
"""

import ast
import functools
import hashlib
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

import yaml
from msgspec import Meta, ValidationError, convert, to_builtins

from toolkit import files
from toolkit.family import family_named
from toolkit.files import ToolkitError, did_you_mean, find, read_json, read_text, remedy, without_home
from toolkit.records import JsonObject

Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(gt=0)]
Seed = Annotated[int, Meta(ge=0, lt=2**32)]  # what numpy and torch accept
AboveZero = Annotated[float, Meta(gt=0)]
# GGUF file type, by llama.cpp's name → the type of most of its tensors.
QUANTS = {"f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q6_k": "Q6_K", "q5_k_m": "Q5_K", "q4_k_m": "Q4_K"}


@dataclass(frozen=True)
class Source:
    """One dataset of a mix."""

    path: str
    """A Hub name, `modelscope://owner/name`, or a local file or folder; `path:subset` and `path#500` (examples) work too."""
    name: str = ""
    """What reports call it; by default the last part of `path`."""
    split: str = "train"
    """Of a Hub dataset."""
    subset: str | None = None
    """Of a Hub dataset that has several: its configuration."""
    revision: str | None = None
    """Pins a Hub dataset to a commit; the commit used is recorded either way."""
    format: str = "auto"
    """alpaca, messages, sharegpt, query_response, prompt_completion, openmath, question, preference, chosen or columns; detected if clear."""
    system: str | None = None
    """System prompt for rows that have none."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column names by role, e.g. {user: question, assistant: answer_zh}."""
    mode: Literal["auto", "thinking", "non_thinking"] = "auto"
    """`auto` decides per row: a row with reasoning is thinking, one without is not."""
    fraction: Share | None = None
    """Share of the mix, counted in `data.unit`; the fractions of all sources sum to 1. Without any fraction, `path#500`
    takes 500 examples and a plain path all there are."""
    turns: Literal["last", "each"] = "last"
    """Supervise the last assistant turn, or make every assistant turn an example of its own."""
    max_rows: Positive | None = None
    """Use at most so many examples."""
    max_repeats: Positive = 1
    """How often a row may be used when the source is smaller than its quota."""
    placeholders: dict[Literal["NAME", "AUTHOR", "AUTHOER"], str | dict[str, str]] = field(default_factory=dict)
    """What fills {{name}} and {{author}} in this source, in every spelling (LLaMA-Factory's identity set)."""
    soft_switch: Share = 0.0
    """Share of rows that carry /think or /no_think in the user turn, as Qwen3 was trained."""


Sources = tuple[Source, ...]


@dataclass(frozen=True)
class Data:
    """What is mixed, counted in which unit, and what is held out."""

    sources: tuple[Source, ...]
    """The datasets; their fractions or counts are the mix."""
    seed: Seed = 3407
    """Draws rows, shuffles them and initializes the adapter: same recipe and seed, same run."""
    unit: Literal["supervised_tokens", "tokens", "examples"] = "supervised_tokens"
    """What fractions and budget count; supervised tokens are those that the loss sees."""
    budget: Positive | None = None
    """Size of the mix in `unit`; null takes as much as the fractions allow."""
    validation_size: Count = 100
    """Rows held out before anything trains, shared between the sources by their fractions."""
    max_rejected: Share = 0.05
    """Stop when more than this share of a source's rows is malformed."""
    reasoning: Share | None = None
    """Rescales the thinking sources' fractions to this share; the resolved recipe holds the result."""
    duplicates: Literal["near", "exact", "keep"] = "near"
    """`near` drops rows whose text is almost the same (MinHash), `exact` only equal ones after normalisation."""
    decontaminate: bool = True
    """Drop training rows that share a 13-gram with an evaluation prompt."""
    placeholders: dict[Literal["NAME", "AUTHOR", "AUTHOER"], str | dict[str, str]] = field(default_factory=dict)
    """What fills {{NAME}} and {{AUTHOR}}, spelled exactly so: a text, or one for Chinese rows and one for others:
    {NAME: {zh: 小麦, en: Wheat}}. AUTHOER is how some self-cognition sets spell it."""


@dataclass(frozen=True)
class Model:
    """The base model; further keys are arguments of Unsloth's `FastLanguageModel.from_pretrained`."""

    model_name: str
    """A Hub name, a local folder, `pocket` (ships with the package) or `auto` (the largest Qwen3 that fits this card)."""
    max_seq_length: Positive = 4096
    """Longest row in tokens; longer rows are dropped and counted, never cut."""
    load_in_4bit: bool = True
    """QLoRA; by default false for Qwen3.5 to 3.8, which Unsloth advises to train in 16 bits."""
    revision: str | None = None
    adapter: str | None = None
    """A run, or an adapter's folder, that the training continues on the same base, with its `lora`; scored beside the result."""
    extra: dict[str, Any] = field(default_factory=dict)


# Values of PEFT's init_lora_weights that leave the base as it is. PiSSA, OLoRA and others change it: with the adapter
# switched off, the model is then not the base any more, and base plus adapter is not the run.
INITS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Lora:
    """The adapter; further keys are arguments of Unsloth's `FastLanguageModel.get_peft_model`."""

    r: Positive = 16
    lora_alpha: int | float = 32
    lora_dropout: Share = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Of Qwen3.5 to 3.8 by default also in_proj_qkv, in_proj_z and out_proj of the gated delta net."""
    use_rslora: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def trained_whole(self) -> list[str]:
        """Modules that train as a whole instead of by an adapter; Unsloth does that with embedding and head as targets."""
        outer = [name for name in self.target_modules if name in ("embed_tokens", "lm_head")]
        return [*outer, *(self.extra.get("modules_to_save") or ())]


# The least limit of a reply in tokens, unless a recipe sets another.
REPLY_LIMIT = 1024


@dataclass(frozen=True)
class Evaluate:
    """How a run is scored."""

    level: Literal["fast", "quick", "full"] = "quick"
    """fast: no reply is generated. full: two hours of replies."""
    questions: tuple[Source, ...] = ()
    """Held-out sets with an expected answer. Without any: reasoning questions are the validation rows that carry one, or
    else those that ship; chat questions are those that ship."""
    prompts: tuple[str, ...] = ("Who are you?", "What is 17 + 25?")
    """Answered without the adapter and with it, in both modes, when a run ends."""
    max_new_tokens: Positive | None = None
    """Longest reply. By default the 90th percentile of the mix's completions in the mode, and at least REPLY_LIMIT. The table
    of `prompts` before and after stops at 256."""
    minutes: AboveZero | None = None
    """Time for replies, by default a third of the training's, at least 3; it decides how many questions are asked."""
    questions_per_mode: Positive | None = None
    """Questions of each kind, reasoning and chat, asked in each mode whatever it takes: for runs that are to be compared."""
    early_stopping_patience: Positive | None = None
    """Stop after so many evaluations without a better one, by `keep_best_by`."""
    keep_best_by: Literal["loss", "kl", "accuracy"] = "loss"
    """Which checkpoint is kept, of those within `forgetting_limit`: lowest validation loss, lowest KL from the base, or
    highest token accuracy on held-out rows."""
    forgetting_limit: AboveZero | None = None
    """Most KL from the base in nats per token; training stops at the second evaluation beyond it."""
    forgetting_probes: Count = 8
    """Questions whose answers by the base measure that KL at every evaluation, in each mode; 0 measures none."""


@dataclass(frozen=True)
class Export:
    """What `export` makes unless told otherwise."""

    quantization_method: tuple[str, ...] = ("q8_0",)
    """Some of QUANTS."""


@dataclass(frozen=True)
class Train:
    """TRL's `SFTConfig`: what matters is stated, since Unsloth rewrites its defaults; further keys are its own."""

    per_device_train_batch_size: Positive = 2
    gradient_accumulation_steps: Positive = 4
    per_device_eval_batch_size: Positive = 2
    learning_rate: AboveZero = 2.0e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.05
    num_train_epochs: AboveZero = 1
    max_steps: int = -1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    optim: str = "adamw_8bit"
    logging_steps: float = 1
    eval_strategy: Literal["no", "steps", "epoch"] = "steps"
    eval_steps: float = 0.25
    save_steps: float = 0.25
    save_total_limit: int | None = 2
    load_best_model_at_end: bool = True
    report_to: str | list[str] = "wandb"
    extra: dict[str, Any] = field(default_factory=dict)


SECRET = "a secret stays out of files: set the environment variable HF_TOKEN, or run `hf auth login`"
OWNED_WHY = {
    SECRET: "model.token train.hub_token",
    "nothing reads it here: leave it out": (
        "model.on_model_resolved train.do_predict train.do_train train.include_for_metrics train.batch_eval_metrics"
    ),
    "a run is not uploaded while it trains: `hf upload` takes its folder afterwards": (
        "train.push_to_hub train.hub_always_push train.hub_model_id train.hub_private_repo train.hub_revision train.hub_strategy"
    ),
    "rows reach the trainer as ids and labels: what a row holds is set in data.sources": (
        "train.dataset_kwargs train.dataset_text_field"
    ),
    "rows are rendered with the model's own template and tokens: change them in its folder, and name that": (
        "train.chat_template_path train.eos_token train.pad_token"
    ),
    "labels follow the label rule (README, “How it works”)": "train.assistant_only_loss train.completion_only_loss",
    "set evaluate.keep_best_by": "train.greater_is_better train.metric_for_best_model",
    "set data.seed: one seed decides rows and training": "train.data_seed train.seed",
    "rows are shuffled by the seed: set data.seed": "train.shuffle_dataset",
    "rows are never truncated: set model.max_seq_length": "train.truncation_mode",
    "set model.max_seq_length; rows are never truncated": "train.max_length",
    "set model.max_seq_length": "lora.max_seq_length",
    "set model.trust_remote_code": "train.trust_remote_code",
    "set them in the `model:` section": "train.model_init_kwargs",
    "set lora.use_gradient_checkpointing": "model.use_gradient_checkpointing",
    "set train.eval_strategy": "train.do_eval",
    "set `name`": "train.run_name",
    "a run is written to outputs/<name>: set `name`": "train.output_dir",
    "the toolkit trains adapters: leave it out": "model.full_finetuning",
    "where memory runs out, a smaller batch with the same effective batch is tried by itself": "train.auto_find_batch_size",
    "progress is shown by the toolkit": "train.disable_tqdm",
    "a loss of NaN is logged as it is": "train.logging_nan_inf_filter",
    "a run that is stopped writes a checkpoint by itself": "train.enable_jit_checkpoint",
    "the same command resumes by itself; --fresh begins anew": "train.resume_from_checkpoint",
    "the run could not be resumed": "train.save_only_model",
    "`accelerate launch` sets it": "train.local_rank",
}
# Keys that Unsloth and TRL know and a recipe may not set, since they would be ignored or change what was rendered.
OWNED = {key: why for why, keys in OWNED_WHY.items() for key in keys.split()}


@dataclass(frozen=True)
class Recipe:
    """One run."""

    name: str
    """Of the run, and of its folder."""
    data: Data
    model: Model
    lora: Lora = field(default_factory=Lora)
    train: dict[str, Any] = field(default_factory=dict)
    """By SFTConfig's names, as TRL takes it; what may stand in it says `Train`."""
    evaluate: Evaluate = field(default_factory=Evaluate)
    export: Export = field(default_factory=Export)


@dataclass(frozen=True)
class _Checked(Recipe):
    """A recipe whose `train:` is checked too."""

    train: Train = field(default_factory=Train)  # type: ignore[assignment]  # a dict in a recipe, as TRL takes it


class _Loader(yaml.SafeLoader):
    """YAML 1.2 as people write it: 2e-4 is a number; `no`, as in `eval_strategy: no`, is a word, and so are 010 and 1:30.
    A key that stands twice is an error, and so are more than MOST_ALIASES: nine lines of them can stand for 10^9 values."""

    MOST_ALIASES: ClassVar = 30
    DEEPEST: ClassVar = 100
    aliases = 0

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in known if first in "tTfF" or not tag.endswith((":bool", ":int"))]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node; an alias is counted."""
        self.aliases += self.check_event(yaml.AliasEvent)
        if self.aliases > self.MOST_ALIASES:
            raise yaml.YAMLError(f"more than {self.MOST_ALIASES} aliases (`*name`)")
        if self.flow_level > self.DEEPEST:  # the scanner looks through all open brackets at every further one
            raise yaml.YAMLError(f"more than {self.DEEPEST} brackets inside each other")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """A mapping, refused where a key stands twice."""
        node = super().compose_mapping_node(anchor)
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in keys.most_common(1):
            if count > 1:
                raise yaml.YAMLError(f"the key {key!r} stands twice{node.start_mark}")
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes a text that _Loader would read as a number."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9]\d*)$"), [*"-+0123456789"])
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), [*"-+0123456789"]
    )


_remote_code_allowed = False


def allow_remote_code() -> None:
    """Let models run Python code of their repository in this process: what `--trust-remote-code` does."""
    global _remote_code_allowed
    _remote_code_allowed = True


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or one of data_recipes/ by name, apply dotted overrides and check every key and type.

    Raises ToolkitError naming the file and the key, with the nearest known key where one was mistyped; and where a file
    sets model.trust_remote_code, which only an override or `allow_remote_code` can: a run's folder may be somebody else's.
    """
    values = read_values(recipe_file(path), str(path))
    build = from_dict if any(word.startswith("model.trust_remote_code=") for word in overrides) else _build
    built = build(values, str(path), overrides)
    if built.model.extra.get("trust_remote_code") and not _remote_code_allowed:
        raise ToolkitError(
            f"{path}: model.trust_remote_code lets the model's repository run Python code here, which no file may allow: "
            "read that code, then add --trust-remote-code to this command"
        )
    return built


def read_values(file: Path, where: str = "") -> Any:
    """The plain values of a YAML file, unchecked. Raises ToolkitError."""
    return _yaml(read_text(file), where or str(file))


def recipe_file(path: str | Path) -> Path:
    """The file of a recipe, by path or by name in data_recipes/. Raises ToolkitError with the nearest name."""
    for file in (find(path), find(f"data_recipes/{path}.yaml")):
        if file and file.is_file():
            return file
    if Path(path).name == "recipe.yaml" and find(Path(path).parent):
        raise ToolkitError(
            f"{path}: not found. A folder of export_model has no recipe: verify, export, chat and serve work with it"
        )
    if find(path):
        raise ToolkitError(f"{path}: is a folder: expected a recipe, a YAML file or a name in data_recipes/")
    known = [p.stem for p in files.RECIPES.glob("*.yaml")]
    raise ToolkitError(f"{path}: no such recipe{did_you_mean(Path(path).stem, known)} (recipes lie in data_recipes/)")


def of_run(folder: Path) -> Recipe:
    """The recipe of a run's folder, as the run began with it. Raises ToolkitError when the file was changed since, or when
    the manifest cannot say whether it was."""
    file = folder / "recipe.yaml"
    loaded = load(file)
    recorded = read_json(folder / "manifest.json").get("recipe_sha256", "missing")
    if hashlib.sha256(read_text(file).encode()).hexdigest() != recorded:
        raise ToolkitError(
            f"{file}: was changed after this run began (its SHA-256 is not that of manifest.json, {recorded:.8}). Undo the "
            "change, or run the `train` command that began this run: it writes the file anew"
        )
    return loaded


def from_dict(values: JsonObject, where: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Build a checked recipe from plain values that the caller vouches for. Raises ToolkitError."""
    built = _build(values, where, overrides)
    if built.model.extra.get("trust_remote_code"):
        allow_remote_code()
    return built


def _build(values: Any, where: str, overrides: Sequence[str]) -> Recipe:
    if not isinstance(values, dict):
        raise ToolkitError(
            f"{where}: expected keys like `name:`, `data:`, `model:`, found {type(values).__name__}{remedy(Path(where))}"
        )
    # a copy: the caller's dict stays as it is
    values = _plain(values, where)
    for override in overrides:
        apply_override(values, override)
    _refuse_tokens(values, where)
    _check_keys(values, _Checked, where)
    built = _convert(values, where)
    built = _convert(_with_defaults(values, built.model), where)
    _check_values(built, where)
    # as written: 1 stays 1, not 1.0
    written = values.get("train", {})
    if "eval_steps" in written:
        # the best checkpoint is known by its evaluation: every evaluation saves one
        written = {"save_steps": written["eval_steps"], **written}
    data, model, evaluate = built.data, built.model, built.evaluate
    fill = {key.replace("AUTHOER", "AUTHOR"): value for key, value in data.placeholders.items()}
    adapter = model.adapter and without_home(model.adapter)
    return Recipe(
        name=built.name,
        data=replace(data, sources=_with_fractions(data, where), reasoning=None, placeholders=fill),
        model=replace(model, model_name=without_home(model.model_name), adapter=adapter),
        lora=built.lora,
        train=_flat(to_builtins(Train()) | written),
        evaluate=replace(evaluate, questions=_named(evaluate.questions)),
        export=built.export,
    )


# Keys of `lora` that a recipe with model.adapter has from there.
FROM_ADAPTER = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules")


def adapter_folder(name: str) -> Path | None:
    """The folder of an adapter by its run's name, the run's folder, or its own; None where there is none."""
    for folder in (files.outputs() / name / "adapter", find(f"{name}/adapter"), find(name)):
        if folder and (folder / "adapter_config.json").is_file():
            return folder
    return None


def adapter_settings(folder: Path) -> JsonObject:
    """{key of FROM_ADAPTER: value} of an adapter; by its run's recipe, since PEFT may keep the targets as a pattern."""
    of_run = folder.parent / "recipe.yaml"
    settings = read_values(of_run)["lora"] if of_run.is_file() else read_json(folder / "adapter_config.json")
    return {key: settings.get(key, getattr(Lora, key)) for key in FROM_ADAPTER}


def _with_defaults(values: JsonObject, model: Model) -> JsonObject:
    """What the model's family, or the adapter that is continued, asks for where a recipe says nothing, and the recipe."""
    config = find(f"{model.model_name}/config.json")
    family = family_named(model.model_name, read_json(config).get("model_type") if config else None)
    four_bit = family.in_4bit or model.model_name.endswith("-bnb-4bit")
    said = {**values, "model": {"load_in_4bit": four_bit, **values["model"]}}
    # one that is not there any more stops a training, and not the reading of a run's recipe
    if model.adapter and (folder := adapter_folder(model.adapter)):
        lora = adapter_settings(folder)
    elif family.more_targets:
        lora = {"target_modules": [*Lora.target_modules, *family.more_targets]}
    else:  # nothing where nothing differs: a recipe's checksum is that of its resolved text
        return said
    return {**said, "lora": {**lora, **values.get("lora", {})}}


def _refuse_tokens(values: JsonObject, where: str) -> None:
    """Raises ToolkitError for a text that looks like a token: the file is kept, and may be passed on."""
    for key, value in files.flat(values).items():
        if re.search(r"\bhf_[A-Za-z0-9]{20,}", str(value)):
            raise ToolkitError(f"{where}: {key}: looks like a Hugging Face token: {SECRET}")


# Bytes of a run's name; a file's has at most 255.
LONGEST_NAME = 180
# Names of runs that are taken: `base` by serve and chat for the untrained model, the others by Windows.
RESERVED = re.compile(r"(?i)base$|(con|prn|aux|nul|(com|lpt)[0-9¹²³])(\.|$)|.*\.$")


def _check_values(built: _Checked, where: str) -> None:
    """What types cannot say. Raises ToolkitError."""
    # file systems count bytes, and files add endings to a run's name
    is_name = re.fullmatch(r"\w[\w.\-]{0,99}", built.name) and len(built.name.encode()) <= LONGEST_NAME
    initialisation = built.lora.extra.get("init_lora_weights", True)
    section = built.evaluate
    measures_forgetting = section.forgetting_limit or section.keep_best_by != "loss"
    unknown = [repr(name) for name in built.export.quantization_method if name.lower() not in QUANTS]
    rules = (
        (not is_name or RESERVED.match(built.name), "name", f"{built.name!r:.100} becomes a folder: use up to 100 letters "
         "(60 Chinese ones), digits, '-', '_' and '.', without a '.' at the end, and not `base`, which serve and chat call "
         "the model that a run was trained on, nor a name that Windows keeps (con, nul, aux …)"),
        # transformers reads 0 as `no limit is set`
        (built.train.max_steps == 0, "train.max_steps", "expected a whole number >= 1, or -1 for no limit, found 0"),
        (initialisation not in INITS, "lora.init_lora_weights",
         f"{initialisation!r} changes the base: expected one of {', '.join(map(str, INITS))}"),
        (measures_forgetting and not section.forgetting_probes, "evaluate.forgetting_probes",
         "expected 1 or more where keep_best_by or a limit needs them"),
        (unknown, "export.quantization_method", f"expected some of {', '.join(QUANTS)}, found {', '.join(unknown)}"),
    )  # fmt: skip
    for is_wrong, key, message in rules:
        if is_wrong:
            raise ToolkitError(f"{where}: {key}: {message}")


def to_dict(recipe: Recipe) -> JsonObject:
    """The resolved recipe as plain values; `from_dict` reads them back to an equal recipe."""
    values = {key: _flat(value) for key, value in to_builtins(recipe).items()}
    del values["data"]["reasoning"]
    if recipe.model.adapter is None:
        del values["model"]["adapter"]  # runs from before this key have no such line
    return json.loads(json.dumps(values))  # tuples become lists


def _flat(section: Any) -> Any:
    """A section with its further keys beside the known ones."""
    return section | section.pop("extra", {}) if isinstance(section, dict) else section


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML: what the run folder keeps."""
    return yaml.dump(to_dict(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def sha256(recipe: Recipe) -> str:
    """Identity of a run: the resolved recipe's SHA-256."""
    return hashlib.sha256(to_yaml(recipe).encode()).hexdigest()


def _yaml(text: str, where: str) -> Any:
    try:
        return _plain(yaml.load(text, _Loader), where)
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        # PyYAML's constructors let the others through, for tagged values and dates that cannot be built
        raise ToolkitError(f"{where}: not readable as YAML: {error}{remedy(Path(where))}") from error


def _plain(values: Any, where: str) -> Any:
    """A copy that holds only what JSON in UTF-8 can: no dates, NaN, loops, unpaired surrogates. Raises ToolkitError."""
    try:
        return json.loads(json.dumps(values, allow_nan=False, ensure_ascii=False).encode())
    except (ValueError, TypeError, RecursionError) as error:
        raise ToolkitError(f"{where}: expected text, finite numbers, lists and `key: value` only ({error})") from error


def apply_override(values: JsonObject, override: str) -> None:
    """Set one dotted key of plain values, as in `train.max_steps=10` or `data.sources.0.fraction=0.5`."""
    path, separator, text = override.partition("=")
    if not separator:
        raise ToolkitError(f"override {override!r}: expected key=value, e.g. train.max_steps=10")
    value = _yaml(text, f"override {override!r}") if text else None
    *parents, last = path.split(".")
    node: Any = values
    try:
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        node[int(last) if isinstance(node, list) else last] = value
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise ToolkitError(
            f"override {override!r}: no such place: before each dot stands a section, or a list and a position in it from 0"
        ) from error


def _check_keys(node: Any, kind: Any, where: str, path: str = "") -> None:
    """Refuse keys that a section does not know, here and in the sections inside it. Keys that Unsloth or TRL take move to
    `extra`."""
    if isinstance(node, list):
        for i, item in enumerate(node):
            _check_keys(item, next(iter(get_args(kind)), None), where, f"{path}{i}.")
    if not (isinstance(kind, type) and is_dataclass(kind) and isinstance(node, dict)):
        return
    kinds = {f.name: f.type for f in fields(kind) if f.name != "extra"}
    extra = {}
    for key in [*node]:
        name = path + key
        if key in kinds:
            _check_keys(node[key], kinds[key], where, f"{name}.")
        elif name in OWNED:
            raise ToolkitError(f"{where}: {name}: not set here: {OWNED[name]}")
        elif key in passthrough(kind):
            extra[key] = node.pop(key)
        else:
            raise ToolkitError(f"{where}: unknown key {name}{_nearest(key, [*kinds, *passthrough(kind)])}")
    if extra:
        node["extra"] = extra


def _nearest(key: str, known: list[str]) -> str:
    """The end of an error about a key: the nearest one beside it, or of another section with that section's name."""
    places: dict[str, str] = {}
    for section in fields(_Checked):
        if is_dataclass(section.type):
            places |= {field.name: f"{section.name}.{field.name}" for field in fields(section.type)}
    places |= zip(known, known, strict=True)
    near = get_close_matches(key, places, n=1)
    return f". Did you mean {places[near[0]]!r}?" if near else did_you_mean(key, known)


def _convert(values: JsonObject, where: str) -> Any:
    """Plain values as dataclasses: types, ranges and choices are checked. Raises ToolkitError with msgspec's words, the
    dotted key and the value that was found."""
    try:
        return convert(values, _Checked)
    except ValidationError as error:
        text, _, place = str(error).replace("`", "").replace("key in ", "").partition(" - at $")
        keys = re.findall(r"[^.\[\]]+", place)
        value: Any = values
        for key in keys:
            value = value[int(key) if isinstance(value, list) else key]
        words = text[0].lower() + text[1:].partition(", got")[0]
        if text.startswith("Invalid enum"):
            words = f"expected one of {', '.join(CHOICES[keys[-1]])}"
        raise ToolkitError(f"{where}: {'.'.join(keys) or 'recipe'}: {words}, found {value!r:.100}") from error


# Names of the keys that take one of a few words → those words.
CHOICES = {
    f.name: get_args(f.type)
    for section in (Source, Data, Train, Evaluate)
    for f in fields(section)
    if get_origin(f.type) is Literal
} | {"placeholders": ("NAME", "AUTHOR")}


def _named(sources: Sources) -> Sources:
    """Sources with a name each: that of the file; where two are equal also its folder's, then a number. Their paths below
    the home folder are written with `~`."""
    # rows.jsonl.gz#500 is called rows
    paths = [re.sub(r"(\.(jsonl?|csv|tsv|parquet|gz))*(#\d+)?$", "", s.path.rstrip("/")).split("/") for s in sources]
    stems = [s.name or path[-1] or s.path for s, path in zip(sources, paths, strict=True)]
    longer = ["-".join(path[-2:]) for path in paths]
    names = [
        other if not s.name and stems.count(name) > 1 else name
        for s, name, other in zip(sources, stems, longer, strict=True)
    ]
    numbered = [name if names.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(names, start=1)]
    return tuple(replace(s, name=name, path=without_home(s.path)) for s, name in zip(sources, numbered, strict=True))


def _with_fractions(data: Data, where: str) -> Sources:
    """Named sources whose fractions sum to 1 and obey `data.reasoning`; or none has a fraction: the mix is then the
    sources' `#N` counts, or all they hold."""
    sources = _named(data.sources)
    if len({s.name for s in sources}) < max(1, len(sources)):
        raise ToolkitError(f"{where}: data.sources: expected at least one source, and names that differ")
    is_shared = data.budget is not None or data.reasoning is not None
    # a lone source is all of the mix, unless it asks for a number of rows
    if len(sources) == 1 and sources[0].fraction is None and (is_shared or "#" not in sources[0].path):
        sources = (replace(sources[0], fraction=1.0),)
    without = [f"data.sources.{i}.fraction ({s.name})" for i, s in enumerate(sources) if s.fraction is None]
    if len(without) == len(sources) and not is_shared:
        return sources
    if without:
        raise ToolkitError(
            f"{where}: {without[0]}: expected a number from 0 to 1, found "
            f"none; write e.g. `fraction: {1 / len(sources):.10g}`, so that all fractions sum to 1 (or leave out every "
            "fraction, data.budget and data.reasoning: `path#500` then takes 500 examples, a plain path all there are)"
        )
    if data.reasoning is not None:
        sources = _rescale(sources, data.reasoning, where)
    fractions = [s.fraction or 0.0 for s in sources]
    total = sum(fractions)
    # written as decimals, thirds do not sum to exactly 1
    if abs(total - 1) > 1e-6:
        shares = " + ".join(f"{fraction:g}" for fraction in fractions)
        raise ToolkitError(f"{where}: data.sources: fractions must sum to 1, found {shares} = {total:g}")
    return sources


def _rescale(sources: Sources, reasoning: float, where: str) -> Sources:
    """`data.reasoning=x`: thinking sources share x, the others 1 - x, in their old proportions."""
    if any(s.mode == "auto" for s in sources):
        raise ToolkitError(f"{where}: data.reasoning needs every source's `mode` to be thinking or non_thinking")
    factors = {}
    for mode, share in (("thinking", reasoning), ("non_thinking", 1.0 - reasoning)):
        total = sum(s.fraction or 0.0 for s in sources if s.mode == mode)
        if share and not total:
            raise ToolkitError(
                f"{where}: data.reasoning={reasoning}: no source with mode {mode} and a fraction above 0"
            )
        factors[mode] = share / total if total else 0.0
    return tuple(replace(s, fraction=(s.fraction or 0.0) * factors[s.mode]) for s in sources)


TAKEN_BY = {
    Model: [("unsloth", "models/loader.py", "from_pretrained")],
    Lora: [("unsloth", "models/llama.py", "get_peft_model")],
    Train: [("transformers", "training_args.py", "TrainingArguments"), ("trl", "trainer/sft_config.py", "SFTConfig")],
}


@functools.cache
def passthrough(section: type) -> set[str]:
    """Names of a section's further keys: arguments of the function, or fields of the class, that they go to.

    Read from the installed source, since importing it takes seconds. Empty for closed sections.
    """
    names: set[str] = set()
    for package, file, name in TAKEN_BY.get(section, ()):
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise ToolkitError(f"{package} is not installed: run `python -m toolkit setup`")
        source = (Path(str(spec.origin)).parent / file).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef) and node.name == name:
                names |= {ast.unparse(field.target) for field in node.body if isinstance(field, ast.AnnAssign)}
            if isinstance(node, ast.FunctionDef) and node.name == name:
                names |= {child.arg for child in ast.walk(node.args) if isinstance(child, ast.arg)}
    return names - {"model"}
