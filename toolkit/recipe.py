"""A recipe: everything that decides a run, in one YAML file, strictly read.

from toolkit import recipe; loaded = recipe.load("hybrid", ["train.max_steps=10", "data.reasoning=0.5"])
"""

import ast
import dataclasses
import functools
import hashlib
import importlib.util
import json
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import yaml

from toolkit.files import ROOT, ToolkitError, did_you_mean, find

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(gt=0)]
Seed = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]  # what numpy and torch accept
AboveZero = Annotated[float, msgspec.Meta(gt=0)]
QUANTS = {"f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q6_k": "Q6_K", "q5_k_m": "Q5_K", "q4_k_m": "Q4_K"}
"""GGUF file type, by llama.cpp's name → the type of most of its tensors."""


@dataclass(frozen=True)
class Source:
    """One dataset of a mix."""

    path: str
    """A Hub name, `modelscope://owner/name`, or a local file or folder; `path:subset` and `path#500` (examples) work too."""
    name: str = ""
    """What reports call it; by default the last part of `path`."""
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    """Pins a Hub dataset to a commit; the commit used is recorded either way."""
    format: str = "auto"
    """alpaca, messages, sharegpt, query_response, prompt_completion, openmath, question or columns; detected if clear."""
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
    max_repeats: Positive = 1
    """How often a row may be used when the source is smaller than its quota."""
    soft_switch: Share = 0.0
    """Share of rows that carry /think or /no_think in the user turn, as Qwen3 was trained."""


@dataclass(frozen=True)
class Data:
    """What is mixed, counted in which unit, and what is held out."""

    sources: tuple[Source, ...]
    seed: Seed = 3407
    unit: Literal["supervised_tokens", "tokens", "examples"] = "supervised_tokens"
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
    """What fills {{NAME}} and {{AUTHOR}}: a text, or one for Chinese rows and one for others:
    {NAME: {zh: 小麦, en: Wheat}}. AUTHOER is how some self-cognition sets spell it."""


@dataclass(frozen=True)
class Model:
    """The base model; further keys are arguments of Unsloth's `FastLanguageModel.from_pretrained`."""

    model_name: str
    """A Hub name, a local folder, `pocket` (ships with the package) or `auto` (the largest Qwen3 that fits this card)."""
    max_seq_length: Positive = 4096
    """Longest row in tokens; longer rows are dropped and counted, never cut."""
    load_in_4bit: bool = True
    revision: str | None = None
    extra: dict = field(default_factory=dict)


INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of PEFT's init_lora_weights that leave the base as it is. PiSSA, OLoRA and others change it: with the adapter switched
off, the model is then not the base any more, and base plus adapter is not the run."""


@dataclass(frozen=True)
class Lora:
    """The adapter; further keys are arguments of Unsloth's `FastLanguageModel.get_peft_model`."""

    r: Positive = 16
    lora_alpha: int | float = 32
    lora_dropout: Share = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    use_rslora: bool = False
    extra: dict = field(default_factory=dict)

    @property
    def trained_whole(self) -> list[str]:
        """Modules that train as a whole instead of by an adapter; Unsloth does that with embedding and head as targets."""
        outer = [name for name in self.target_modules if name in ("embed_tokens", "lm_head")]
        return [*outer, *(self.extra.get("modules_to_save") or ())]


REPLY_LIMIT = 1024
"""The least limit of a reply in tokens, unless a recipe sets another."""


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
    """Stop after so many evaluations without a better validation loss."""


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
    extra: dict = field(default_factory=dict)


OWNED = {
    "train.output_dir": "a run is written to outputs/<name>: set `name`",
    "train.max_length": "set model.max_seq_length; rows are never truncated",
    "train.assistant_only_loss": "labels follow the label rule (README, “How it works”)",
    "train.completion_only_loss": "labels follow the label rule (README, “How it works”)",
    "train.seed": "set data.seed: one seed decides rows and training",
    "train.run_name": "set `name`",
}


@dataclass(frozen=True)
class Recipe:
    """One run."""

    name: str
    data: Data
    model: Model
    lora: Lora = field(default_factory=Lora)
    train: Train = field(default_factory=Train)
    """Checked as `Train`; a recipe that was read holds a dict by SFTConfig's names, as TRL takes it."""
    evaluate: Evaluate = field(default_factory=Evaluate)
    export: Export = field(default_factory=Export)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 as people write it: 2e-4 is a number; `no`, as in `eval_strategy: no`, is a word, and so are 010 and 1:30.
    A key that stands twice is an error."""

    yaml_implicit_resolvers: typing.ClassVar = {
        first: [(tag, pattern) for tag, pattern in known if first in "tTfF" or not tag.endswith((":bool", ":int"))]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"the key {twice[0]!r} stands twice{node.start_mark}")
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes a text that _Loader would read as a number."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9]\d*)$"), [*"-+0123456789"])
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), [*"-+0123456789"]
    )


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or one of data_recipes/ by name, apply dotted overrides and check every key and type.

    Raises ToolkitError naming the file and the key, with the nearest known key where one was mistyped.
    """
    found = next((f for f in (find(path), find(f"data_recipes/{path}.yaml")) if f and f.is_file()), None)
    if found is None and Path(path).name == "recipe.yaml" and Path(path).parent.is_dir():
        raise ToolkitError(
            f"{path}: not found. A folder of export_model has no recipe: verify, export, chat and serve work with it"
        )
    if found is None:
        known = [p.stem for p in (ROOT / "data_recipes").glob("*.yaml")]
        raise ToolkitError(
            f"{path}: no such recipe{did_you_mean(Path(path).stem, known)} (recipes lie in data_recipes/)"
        )
    try:
        text = found.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ToolkitError(f"{path}: expected a YAML file in UTF-8 ({error})") from error
    return from_dict(_yaml(text, str(path)), str(path), overrides)


def from_dict(values: dict, where: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Build a checked recipe from plain values, as read from YAML. Raises ToolkitError."""
    if not isinstance(values, dict):
        raise ToolkitError(f"{where}: expected keys like `name:`, `data:`, `model:`, found {type(values).__name__}")
    # a copy: the caller's dict stays as it is
    values = _plain(values, where)
    for override in overrides:
        apply_override(values, override)
    _check_keys(values, Recipe, where)
    try:
        # types, ranges and choices: as the classes above declare them
        built = msgspec.convert(values, Recipe)
    except msgspec.ValidationError as error:
        raise ToolkitError(f"{where}: {_explain(str(error), values)}") from error
    if not re.fullmatch(r"(?!base$)\w[\w.\-]{0,99}", built.name):
        raise ToolkitError(
            f"{where}: name: {built.name!r:.100} becomes a folder: use up to 100 letters, digits, '-', '_' and '.', "
            "and not `base`, which serve and chat call the model that a run was trained on"
        )
    # transformers reads 0 as `no limit is set`
    if built.train.max_steps == 0:
        raise ToolkitError(f"{where}: train.max_steps: expected a whole number >= 1, or -1 for no limit, found 0")
    if (init := built.lora.extra.get("init_lora_weights", True)) not in INITS:
        raise ToolkitError(
            f"{where}: lora.init_lora_weights: {init!r} changes the base: expected one of {', '.join(map(str, INITS))}"
        )
    if other := [q for q in built.export.quantization_method if q.lower() not in QUANTS]:
        raise ToolkitError(
            f"{where}: export.quantization_method: expected some of {', '.join(QUANTS)}, found {other[0]!r}"
        )
    fill = {name.replace("AUTHOER", "AUTHOR"): value for name, value in built.data.placeholders.items()}
    sources = _with_fractions(built.data, where)
    # The best checkpoint is known by its evaluation: every evaluation saves one
    train = values.get("train", {})
    saves = {"save_steps": train["eval_steps"]} if "eval_steps" in train else {}
    return dataclasses.replace(
        built,
        data=dataclasses.replace(built.data, sources=sources, reasoning=None, placeholders=fill),
        train=_flat(msgspec.to_builtins(Train()) | saves | train),  # as written: 1 stays 1, not 1.0
        evaluate=dataclasses.replace(built.evaluate, questions=_named(built.evaluate.questions)),
    )


def to_dict(recipe: Recipe) -> dict:
    """The resolved recipe as plain values; `from_dict` reads them back to an equal recipe."""
    values = {key: _flat(value) for key, value in msgspec.to_builtins(recipe).items()}
    del values["data"]["reasoning"]
    return json.loads(json.dumps(values))  # tuples become lists


def _flat(section):
    """A section with its further keys beside the known ones."""
    return section | section.pop("extra", {}) if isinstance(section, dict) else section


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML: what the run folder keeps."""
    return yaml.dump(to_dict(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def sha256(recipe: Recipe) -> str:
    """Identity of a run: the resolved recipe's SHA-256."""
    return hashlib.sha256(to_yaml(recipe).encode()).hexdigest()


def _yaml(text: str, where: str):
    try:
        return _plain(yaml.load(text, _Loader), where)
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        # PyYAML's constructors let the others through, for tagged values and dates that cannot be built
        raise ToolkitError(f"{where}: not readable as YAML: {error}") from error


def _plain(values, where: str):
    """A copy that holds only what JSON in UTF-8 can: no dates, NaN, loops, unpaired surrogates. Raises ToolkitError."""
    try:
        return json.loads(json.dumps(values, allow_nan=False, ensure_ascii=False).encode())
    except (ValueError, TypeError, RecursionError) as error:
        raise ToolkitError(f"{where}: expected text, finite numbers, lists and `key: value` only ({error})") from error


def apply_override(values: dict, override: str) -> None:
    """Set one dotted key of plain values, as in `train.max_steps=10` or `data.sources.0.fraction=0.5`."""
    path, separator, text = override.partition("=")
    if not separator:
        raise ToolkitError(f"override {override!r}: expected key=value, e.g. train.max_steps=10")
    value = _yaml(text, f"override {override!r}") if text else None
    node, (*parents, last) = values, path.split(".")
    try:
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        node[int(last) if isinstance(node, list) else last] = value
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise ToolkitError(
            f"override {override!r}: no such place: before each dot stands a section, or a list and a position in it from 0"
        ) from error


def _check_keys(node, kind, where: str, path: str = "") -> None:
    """Refuse keys that a section does not know, here and in the sections inside it. Keys that Unsloth or TRL take move to
    `extra`."""
    if isinstance(node, list):
        for i, item in enumerate(node):
            _check_keys(item, (*typing.get_args(kind), None)[0], where, f"{path}{i}.")
    if not (dataclasses.is_dataclass(kind) and isinstance(node, dict)):
        return
    known = {f.name: f.type for f in dataclasses.fields(kind) if f.name != "extra"}
    extra = {key: node.pop(key) for key in [*node] if key not in known}
    for key in extra:
        if path + key in OWNED:
            raise ToolkitError(f"{where}: {path}{key}: not set here: {OWNED[path + key]}")
        if key not in passthrough(kind):
            near = did_you_mean(key, [*known, *passthrough(kind)])
            raise ToolkitError(f"{where}: unknown key {path}{key}{near}")
    for key, value in node.items():
        _check_keys(value, known[key], where, f"{path}{key}.")
    if extra:
        node["extra"] = extra


WORDS = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "array": "a list",
         "object": "keys", "null": "nothing"}  # fmt: skip
CHOICES = {
    f.name: typing.get_args(f.type)
    for section in (Source, Data, Train, Evaluate)
    for f in dataclasses.fields(section)
    if typing.get_origin(f.type) is Literal
} | {"placeholders": ("NAME", "AUTHOR")}
"""Names of the keys that take one of a few words → those words."""


def _explain(error: str, values: dict) -> str:
    """msgspec's message with the recipe's words: dotted key, what was expected, the value found."""
    text, _, location = error.replace("`key` in ", "").partition(" - at `$")
    keys = re.findall(r"[^.`\[\]]+", location)
    if missing := re.search(r"missing required field `(\w+)`", text):
        return f"{'.'.join([*keys, missing[1]])} is missing (data_recipes/pocket.yaml shows a whole recipe)"
    # the value that msgspec refused, by walking along the keys it names
    found = functools.reduce(lambda node, key: node[int(key)] if isinstance(node, list) else node[key], keys, values)
    expected = text.removeprefix("Expected ").partition(", got")[0]
    expected = re.sub(
        "`(.+?)`", lambda kinds: " or ".join(dict.fromkeys(WORDS[k] for k in kinds[1].split(" | "))), expected
    )
    if text.startswith("Invalid enum"):
        expected = f"one of {', '.join(CHOICES[keys[-1]])}"
    return f"{'.'.join(keys)}: expected {expected}, found {found!r:.100}"


def _named(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    """Sources with a name each: that of the file; where two are equal also its folder's, then a number."""
    # rows.jsonl.gz#500 is called rows
    paths = [re.sub(r"(\.(jsonl?|csv|tsv|parquet|gz))*(#\d+)?$", "", s.path.rstrip("/")).split("/") for s in sources]
    names = [s.name or path[-1] or s.path for s, path in zip(sources, paths, strict=True)]
    names = [
        name if s.name or names.count(name) == 1 else "-".join(path[-2:])
        for s, path, name in zip(sources, paths, names, strict=True)
    ]
    names = [name if names.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(names, start=1)]
    return tuple(dataclasses.replace(s, name=name) for s, name in zip(sources, names, strict=True))


def _with_fractions(data: Data, where: str) -> tuple[Source, ...]:
    """Named sources whose fractions sum to 1 and obey `data.reasoning`; or none has a fraction: the mix is then the
    sources' `#N` counts, or all they hold."""
    sources, shared = list(_named(data.sources)), data.budget is not None or data.reasoning is not None
    if len({s.name for s in sources}) < max(1, len(sources)):
        raise ToolkitError(f"{where}: data.sources: expected at least one source, and names that differ")
    # a lone source is all of the mix, unless it asks for a number of rows
    if len(sources) == 1 and sources[0].fraction is None and (shared or "#" not in sources[0].path):
        sources = [dataclasses.replace(sources[0], fraction=1.0)]
    without = [i for i, s in enumerate(sources) if s.fraction is None]
    if without and (shared or len(without) < len(sources)):
        raise ToolkitError(
            f"{where}: data.sources.{without[0]}.fraction ({sources[without[0]].name}): expected a number from 0 to 1, found "
            f"none; write e.g. `fraction: {1 / len(sources):.10g}`, so that all fractions sum to 1 (or leave out every "
            "fraction, data.budget and data.reasoning: `path#500` then takes 500 examples, a plain path all there are)"
        )
    if without:
        return tuple(sources)
    if data.reasoning is not None:
        sources = _rescale(sources, data.reasoning, where)
    total = sum(s.fraction for s in sources)
    # written as decimals, thirds do not sum to exactly 1
    if abs(total - 1) > 1e-6:
        parts = " + ".join(f"{s.fraction:g} ({s.name})" for s in sources)
        raise ToolkitError(f"{where}: data.sources: fractions must sum to 1, found {parts} = {total:g}")
    return tuple(sources)


def _rescale(sources: list[Source], reasoning: float, where: str) -> list[Source]:
    """`data.reasoning=x`: thinking sources share x, the others 1 - x, in their old proportions."""
    if any(s.mode == "auto" for s in sources):
        raise ToolkitError(f"{where}: data.reasoning needs every source's `mode` to be thinking or non_thinking")
    # x of the whole for thinking sources together: each keeps its part of that
    factors = {}
    for mode, share in (("thinking", reasoning), ("non_thinking", 1.0 - reasoning)):
        total = sum(s.fraction for s in sources if s.mode == mode)
        if share and not total:
            raise ToolkitError(
                f"{where}: data.reasoning={reasoning}: no source with mode {mode} and a fraction above 0"
            )
        factors[mode] = share / total if total else 0.0
    return [dataclasses.replace(s, fraction=s.fraction * factors[s.mode]) for s in sources]


TAKEN_BY = {
    Model: [("unsloth", "models/loader.py", "from_pretrained")],
    Lora: [("unsloth", "models/llama.py", "get_peft_model")],
    Train: [("transformers", "training_args.py", "TrainingArguments"), ("trl", "trainer/sft_config.py", "SFTConfig")],
}


@functools.cache
def passthrough(section: type) -> list[str]:
    """Names of a section's further keys: arguments of the function, or fields of the class, that they go to.

    Read from the installed source, since importing it takes seconds. Empty for closed sections.
    """
    names = set()
    for package, file, name in TAKEN_BY.get(section, ()):
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise ToolkitError(f"{package} is not installed: run `make setup` or `python -m toolkit setup`")
        source = (Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef) and node.name == name:
                names |= {field.target.id for field in node.body if isinstance(field, ast.AnnAssign)}
            if isinstance(node, ast.FunctionDef) and node.name == name:
                names |= {argument.arg for argument in node.args.args + node.args.kwonlyargs}
    return sorted(names - {"model"})
