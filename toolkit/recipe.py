"""A recipe: everything that decides a run, in one YAML file, strictly read.

from toolkit import recipe; loaded = recipe.load("hybrid", ["train.max_steps=10", "data.reasoning=0.5"])
"""

import ast
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import re
import typing
from collections.abc import Iterator, Sequence
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
    duplicates: Literal["near", "exact", "keep"] = "near"
    """`near` drops rows whose text is almost the same (MinHash), `exact` only equal ones after normalisation."""
    decontaminate: bool = True
    """Drop training rows that share a 13-gram with an evaluation prompt."""
    placeholders: dict[str, str | dict[str, str]] = field(default_factory=dict)
    """What fills {{NAME}} and {{AUTHOR}}: a text, or texts by language, e.g. {NAME: {zh: 小麦, en: Wheat}}."""


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


@dataclass(frozen=True)
class Lora:
    """The adapter; further keys are arguments of Unsloth's `FastLanguageModel.get_peft_model`."""

    r: Positive = 16
    lora_alpha: float = 32.0  # not 32: a value read back from YAML is written the same
    lora_dropout: Share = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    use_rslora: bool = False
    extra: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluate:
    """How a run is scored."""

    level: Literal["quick", "full"] = "quick"
    questions: tuple[Source, ...] = ()
    """Held-out sets with an expected answer; without any, validation rows that carry one are used."""
    prompts: tuple[str, ...] = ("Who are you?", "What is 17 + 25?")
    """Answered in both modes before, during and after training."""
    max_new_tokens: Positive = 1024
    early_stopping_patience: Positive | None = None
    """Stop after so many evaluations without a better validation loss."""


@dataclass(frozen=True)
class Export:
    """What `export` makes unless told otherwise."""

    quantization_method: tuple[str, ...] = ("q8_0",)
    """llama.cpp's names: f16, bf16, q8_0, q4_k_m …"""


# Every knob that matters is stated: Unsloth rewrites SFTConfig's own defaults when it is imported.
TRAIN_DEFAULTS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "per_device_eval_batch_size": 2,
    "learning_rate": 2.0e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "num_train_epochs": 1,
    "max_steps": -1,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "optim": "adamw_8bit",
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 0.25,
    "save_steps": 0.25,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "report_to": "wandb",
}
ABOVE_ZERO = """learning_rate num_train_epochs per_device_train_batch_size gradient_accumulation_steps
per_device_eval_batch_size""".split()
OWNED = {
    "output_dir": "a run is written to outputs/<name>: set `name`",
    "max_length": "set model.max_seq_length; rows are never truncated",
    "assistant_only_loss": "labels follow the label rule (README, “What is trained on”)",
    "completion_only_loss": "labels follow the label rule (README, “What is trained on”)",
    "seed": "set data.seed: one seed decides rows and training",
    "run_name": "set `name`",
}


@dataclass(frozen=True)
class Recipe:
    """One run."""

    name: str
    data: Data
    model: Model
    lora: Lora = field(default_factory=Lora)
    train: dict = field(default_factory=dict)
    """TRL SFTConfig's own names, passed straight through."""
    evaluate: Evaluate = field(default_factory=Evaluate)
    export: Export = field(default_factory=Export)


SECTIONS = {"data": Data, "model": Model, "lora": Lora, "evaluate": Evaluate, "export": Export}
CHOICES = {
    name: typing.get_args(hint)
    for section in (Source, Data, Evaluate)
    for name, hint in typing.get_type_hints(section).items()
    if typing.get_origin(hint) is Literal
}
KINDS = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "array": "a list"}
KINDS |= {"object": "a section with keys", "null": "nothing"}
HINTS = {
    "sources": " (at least one {path, fraction})",
    "model_name": " (e.g. unsloth/Qwen3-4B-unsloth-bnb-4bit, a local folder, auto or pocket)",
    "name": " (the run's folder will be outputs/<name>)",
}


# --- reading and writing ---------------------------------------------------------------------------------------------


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or one of data_recipes/ by name, apply dotted overrides and check every key and type.

    Raises ToolkitError naming the file and the key, with the nearest known key where one was mistyped.
    """
    found = next((f for f in (find(path), find(f"data_recipes/{path}.yaml")) if f and f.is_file()), None)
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
    values = _plain(values, where)
    for override in overrides:
        apply_override(values, override)
    reasoning = values["data"].pop("reasoning", None) if isinstance(values.get("data"), dict) else None
    for path, section, node in _sections(values):
        _take_extra_keys(path, section, node, where)
    try:
        built = msgspec.convert(values, Recipe, strict=True)
    except msgspec.ValidationError as error:
        raise ToolkitError(f"{where}: {_explain(str(error), values)}") from error
    _check_train(built.train, where)
    if not re.fullmatch(r"\w[\w.\-]{0,99}", built.name):
        shown = built.name if len(built.name) <= 100 else f"{built.name[:100]}…"
        raise ToolkitError(
            f"{where}: name: {shown!r} becomes a folder: use up to 100 letters, digits, '-', '_' and '.'"
        )
    data = _with_fractions(dataclasses.replace(built.data, sources=_named(built.data.sources)), reasoning, where)
    # AUTHOER is how some self-cognition sets spell AUTHOR
    fill = {"AUTHOR" if name == "AUTHOER" else name: value for name, value in data.placeholders.items()}
    return dataclasses.replace(
        built,
        data=dataclasses.replace(data, placeholders=fill),
        train=TRAIN_DEFAULTS | built.train,
        evaluate=dataclasses.replace(built.evaluate, questions=_named(built.evaluate.questions)),
    )


def to_dict(recipe: Recipe) -> dict:
    """The resolved recipe as plain values; `from_dict` reads them back to an equal recipe."""
    values = msgspec.to_builtins(recipe)
    for name in ("model", "lora"):
        values[name] |= values[name].pop("extra")
    return json.loads(json.dumps(values))  # tuples become lists


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML: what the run folder keeps."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)


def sha256(recipe: Recipe) -> str:
    """Identity of a run: the resolved recipe's SHA-256."""
    return hashlib.sha256(to_yaml(recipe).encode()).hexdigest()


def _yaml(text: str, where: str):
    try:
        return _plain(yaml.safe_load(text), where)
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
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        value = float(value)  # YAML reads 2e-4 as text; on a command line nobody means text
    if value is False and text == "no":
        value = "no"  # eval_strategy=no is a word to SFTConfig; who means false writes false
    node, keys = values, path.split(".")
    for i, key in enumerate(keys):
        if isinstance(node, list):
            if not (key.isdecimal() and len(key) < 10 and int(key) < len(node)):
                raise ToolkitError(f"override {override!r}: {key!r} is not a position from 0 to {len(node) - 1}")
            key = int(key)
        elif not isinstance(node, dict):
            raise ToolkitError(f"override {override!r}: {'.'.join(keys[:i])} is {node!r}, not a section with keys")
        if i == len(keys) - 1:
            node[key] = value
        else:
            node = node[key] if isinstance(node, list) else node.setdefault(key, {})


# --- checks ----------------------------------------------------------------------------------------------------------


def _sections(values: dict) -> Iterator[tuple[str, type, dict]]:
    """(dotted path, class, values) of every section that is there."""
    found = [("", Recipe, values), *((f"{name}.", cls, values.get(name)) for name, cls in SECTIONS.items())]
    for parent, key in (("data", "sources"), ("evaluate", "questions")):
        section = values.get(parent)
        sources = section.get(key) if isinstance(section, dict) else None
        found += [
            (f"{parent}.{key}.{i}.", Source, s) for i, s in enumerate(sources if isinstance(sources, list) else ())
        ]
    return (entry for entry in found if isinstance(entry[2], dict))


def _take_extra_keys(path: str, section: type, node: dict, where: str) -> None:
    """Refuse unknown keys; those that Unsloth's function takes move to `extra`. One text where a list belongs is a list."""
    fields = {f.name: f.type for f in dataclasses.fields(section) if f.name != "extra"}
    extra = [key for key in node if key not in fields]
    allowed = passthrough(section) if extra else []
    for key in extra:
        if key not in allowed:
            raise ToolkitError(f"{where}: unknown key {path}{key}{did_you_mean(str(key), [*fields, *allowed])}")
    if extra:
        node["extra"] = {key: node.pop(key) for key in extra}
    for key, kind in fields.items():
        if kind == tuple[str, ...] and isinstance(node.get(key), str):
            node[key] = [node[key]]


def _explain(error: str, values: dict) -> str:
    """msgspec's message with the recipe's words: dotted key, what was expected, the value found."""
    text, _, location = error.partition(" - at `")
    keys = [word.strip("[]") for word in re.findall(r"\[[^]]*\]|[^.`$\[\]]+", location)]
    path = ".".join(keys)
    if missing := re.search(r"missing required field `(\w+)`", text):
        return f"{'.'.join([*keys, missing[1]])} is missing{HINTS.get(missing[1], '')}"
    found = values
    for key in keys:
        if key == "...":  # msgspec does not name the key of a free dictionary
            break
        found = found[int(key)] if isinstance(found, list) else found[key]
    if "enum" in text:
        expected = f"one of {', '.join(CHOICES[keys[-1]])}"
    else:
        expected = text.removeprefix("Expected ").partition(", got")[0]
        expected = re.sub(r"`([\w |]+)`", lambda m: " or ".join(KINDS.get(w, w) for w in m[1].split(" | ")), expected)
    return f"{path}: expected {expected}, found {found!r}{_number_hint(found)}"


def _number_hint(value) -> str:
    if isinstance(value, str) and re.fullmatch(r"\d+[eE][+-]?\d+", value):
        return f" (YAML reads {value} as text: write {value.replace('e', '.0e')})"
    return ""


def _check_train(train: dict, where: str) -> None:
    """Names and kinds of the `train:` section against TRL's SFTConfig, without importing it."""
    known = sft_fields() if train.keys() - TRAIN_DEFAULTS.keys() else {}
    for key, value in train.items():
        if key in OWNED:
            raise ToolkitError(f"{where}: train.{key}: not set here: {OWNED[key]}")
        if known and key not in known:
            raise ToolkitError(f"{where}: unknown key train.{key}{did_you_mean(str(key), known)}")
        default = type(TRAIN_DEFAULTS.get(key))
        kind = known.get(key) or {float: "float", int: "int | float", str: "str"}.get(default, "")
        if isinstance(value, bool) and "bool" not in kind and "str" in kind:
            raise ToolkitError(
                f"{where}: train.{key}: expected text, found {value} (YAML reads no as false: write 'no')"
            )
        if isinstance(value, str) and "str" not in kind and ("float" in kind or "int" in kind):
            raise ToolkitError(f"{where}: train.{key}: expected a number, found {value!r}{_number_hint(value)}")
        if key in ABOVE_ZERO and not (type(value) in (int, float) and math.isfinite(value) and value > 0):
            raise ToolkitError(f"{where}: train.{key}: expected a number above 0, found {value!r}")


# --- sources ---------------------------------------------------------------------------------------------------------


def _named(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    """Sources with a name each: that of the file; where two are equal also its folder's, then a number."""
    paths = [re.sub(r"(\.(jsonl?|csv|tsv|parquet|gz))*(#\d+)?$", "", s.path.rstrip("/")).split("/") for s in sources]
    names = [s.name or path[-1] or s.path for s, path in zip(sources, paths, strict=True)]
    names = [
        name if s.name or names.count(name) == 1 else "-".join(path[-2:])
        for s, path, name in zip(sources, paths, names, strict=True)
    ]
    names = [name if names.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(names, start=1)]
    return tuple(dataclasses.replace(s, name=name) for s, name in zip(sources, names, strict=True))


def _with_fractions(data: Data, reasoning: float | None, where: str) -> Data:
    """Check that the fractions are all there, or none: the mix is then the sources' `#N` counts, or all they hold."""
    sources = list(data.sources)
    if len({s.name for s in sources}) < max(1, len(sources)):
        raise ToolkitError(f"{where}: data.sources: expected at least one source, and names that differ")
    shared = data.budget is not None or reasoning is not None
    if len(sources) == 1 and sources[0].fraction is None and (shared or "#" not in sources[0].path):
        sources = [dataclasses.replace(sources[0], fraction=1.0)]
    without = [i for i, s in enumerate(sources) if s.fraction is None]
    if without and (shared or len(without) < len(sources)):
        raise ToolkitError(
            f"{where}: data.sources.{without[0]}.fraction ({sources[without[0]].name}): expected a number from 0 to 1, found "
            f"none; write e.g. `fraction: {1 / len(sources):.2g}`, so that all fractions sum to 1 (or leave out every "
            "fraction, data.budget and data.reasoning: `path#500` then takes 500 examples, a plain path all there are)"
        )
    if without:
        return data
    if reasoning is not None:
        sources = _rescale(sources, reasoning, where)
    total = sum(s.fraction for s in sources)
    if abs(total - 1) > 1e-6:
        parts = " + ".join(f"{s.fraction:g} ({s.name})" for s in sources)
        raise ToolkitError(f"{where}: data.sources: fractions must sum to 1, found {parts} = {total:g}")
    return dataclasses.replace(data, sources=tuple(sources))


def _rescale(sources: list[Source], reasoning: float, where: str) -> list[Source]:
    """`data.reasoning=x`: thinking sources share x, the others 1 - x, in their old proportions."""
    if isinstance(reasoning, bool) or not isinstance(reasoning, int | float) or not 0 <= reasoning <= 1:
        raise ToolkitError(f"{where}: data.reasoning: expected a number from 0 to 1, found {reasoning!r}")
    if any(s.mode == "auto" for s in sources):
        raise ToolkitError(f"{where}: data.reasoning needs every source's `mode` to be thinking or non_thinking")
    totals = {m: sum(s.fraction for s in sources if s.mode == m) for m in ("thinking", "non_thinking")}
    shares = {"thinking": float(reasoning), "non_thinking": 1.0 - reasoning}
    for mode, share in shares.items():
        if share > 0 and not totals[mode]:
            raise ToolkitError(
                f"{where}: data.reasoning={reasoning}: no source with mode {mode} and a fraction above 0"
            )
    return [
        dataclasses.replace(s, fraction=shares[s.mode] * s.fraction / totals[s.mode]) if totals[s.mode] else s
        for s in sources
    ]


# --- what Unsloth and TRL accept, read from their installed source: importing them takes seconds ---------------------


def sft_fields() -> dict[str, str]:
    """Field names of TRL's SFTConfig with their annotations."""
    files = ("transformers", "training_args.py", "TrainingArguments"), ("trl", "trainer/sft_config.py", "SFTConfig")
    fields = [n for file in files for cls in _definitions(*file) for n in cls.body if isinstance(n, ast.AnnAssign)]
    return {node.target.id: ast.unparse(node.annotation) for node in fields}


def passthrough(section: type) -> list[str]:
    """Argument names of the Unsloth function that a section's further keys go to; empty for closed sections."""
    target = {Model: ("loader.py", "from_pretrained"), Lora: ("llama.py", "get_peft_model")}.get(section)
    if target is None:
        return []
    found = [f.args for f in _definitions("unsloth", f"models/{target[0]}", target[1])]
    return sorted({a.arg for args in found for a in args.args + args.kwonlyargs} - {"model", "args", "kwargs"})


@functools.cache
def _definitions(package: str, file: str, name: str) -> list[ast.ClassDef | ast.FunctionDef]:
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ToolkitError(f"{package} is not installed: run `make setup` or `python -m toolkit setup`")
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8"))
    return [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == name]
