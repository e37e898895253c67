"""A recipe: everything that decides a run, in one YAML file.

recipe = load("data_recipes/hybrid.yaml", ["train.max_steps=10", "data.reasoning=0.5"])
"""

import dataclasses
import difflib
import hashlib
import importlib.util
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from toolkit.files import ROOT, ToolkitError, did_you_mean, find


@dataclass(frozen=True)
class Source:
    """One dataset of a mix."""

    path: str
    """A Hub name, `modelscope://owner/name`, or a local file or folder; `path:subset` and `path#500` work too."""
    name: str = ""
    """What reports call it; by default the last part of `path`."""
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    """Pins a Hub dataset to a commit; the commit used is recorded either way."""
    format: str = "auto"
    """alpaca, messages, sharegpt, query_response, prompt_completion, openmath, question or columns; detected if clear."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column names by role, e.g. {user: question, assistant: answer_zh}."""
    mode: typing.Literal["auto", "thinking", "non_thinking"] = "auto"
    """`auto` decides per row: a row with reasoning is thinking, one without is not."""
    fraction: float | None = None
    """Share of the mix, counted in `data.unit`; the fractions of all sources sum to 1."""
    turns: typing.Literal["last", "each"] = "last"
    """Supervise the last assistant turn, or make every assistant turn an example of its own."""
    max_rows: int | None = None
    max_repeats: int = 1
    """How often a row may be used when the source is smaller than its quota."""
    soft_switch: float = 0.0
    """Share of rows that carry /think or /no_think in the user turn, as Qwen3 was trained."""


@dataclass(frozen=True)
class Data:
    """What is mixed, counted in which unit, and what is held out."""

    sources: tuple[Source, ...]
    seed: int = 3407
    unit: typing.Literal["supervised_tokens", "tokens", "examples"] = "supervised_tokens"
    budget: int | None = None
    """Size of the mix in `unit`; null takes as much as the fractions allow."""
    validation_size: int = 100
    """Rows held out before anything trains, shared between the sources by their fractions."""
    max_rejected: float = 0.05
    """Stop when more than this share of a source's rows is malformed."""
    duplicates: typing.Literal["near", "exact", "keep"] = "near"
    """`near` drops rows whose text is almost the same (MinHash), `exact` only equal ones after normalisation."""
    decontaminate: bool = True
    """Drop training rows that share a 13-gram with an evaluation prompt."""
    placeholders: dict = field(default_factory=dict)
    """What fills {{NAME}} and {{AUTHOR}}: a text, or texts by language, e.g. {NAME: {zh: 小麦, en: Wheat}}."""


@dataclass(frozen=True)
class Model:
    """The base model; further keys are arguments of Unsloth's `FastLanguageModel.from_pretrained`."""

    model_name: str
    """A Hub name, a local folder, `pocket` (ships with the package) or `auto` (the largest Qwen3 that fits this card)."""
    max_seq_length: int = 4096
    """Longest row in tokens; longer rows are dropped and counted, never cut."""
    load_in_4bit: bool = True
    revision: str | None = None
    extra: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Lora:
    """The adapter; further keys are arguments of Unsloth's `FastLanguageModel.get_peft_model`."""

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    use_rslora: bool = False
    extra: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluate:
    """How a run is scored."""

    level: typing.Literal["quick", "full"] = "quick"
    questions: tuple[Source, ...] = ()
    """Held-out sets with an expected answer; without any, validation rows that carry one are used."""
    prompts: tuple[str, ...] = ("Who are you?", "What is 17 + 25?")
    """Answered in both modes before, during and after training."""
    max_new_tokens: int = 1024
    early_stopping_patience: int | None = None
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
OWNED = {
    "output_dir": "runs live in outputs/<name>: set `name`",
    "max_length": "set model.max_seq_length; rows are never cut",
    "assistant_only_loss": "labels follow the label rule (README, “What is trained on”)",
    "completion_only_loss": "labels follow the label rule (README, “What is trained on”)",
    "seed": "set data.seed: one seed decides rows and training",
    "run_name": "set `name`",
}


@dataclass(frozen=True)
class Recipe:
    """One run, whole."""

    name: str
    data: Data
    model: Model
    lora: Lora = field(default_factory=Lora)
    train: dict = field(default_factory=dict)
    """TRL SFTConfig's own names, passed straight through."""
    evaluate: Evaluate = field(default_factory=Evaluate)
    export: Export = field(default_factory=Export)


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
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
        values = yaml.safe_load(found.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ToolkitError(f"{path}: not readable as YAML: {error}") from error
    return from_dict(values, str(path), overrides)


def from_dict(values: dict, where: str = "recipe", overrides: typing.Sequence[str] = ()) -> Recipe:
    """Build a checked recipe from plain values, as read from YAML. Raises ToolkitError."""
    if not isinstance(values, dict):
        raise ToolkitError(f"{where}: expected keys like `name:`, `data:`, `model:`, found {type(values).__name__}")
    values = yaml.safe_load(yaml.safe_dump(values))  # a copy that overrides may change
    for override in overrides:
        _override(values, override)
    reasoning = values["data"].pop("reasoning", None) if isinstance(values.get("data"), dict) else None
    recipe = _build(Recipe, values, where, "")
    recipe = dataclasses.replace(recipe, data=_with_names_and_fractions(recipe.data, reasoning, where))
    _check_train(recipe.train, where)
    if not re.fullmatch(r"[\w.\-]+", recipe.name) or recipe.name.startswith("."):
        raise ToolkitError(f"{where}: name: {recipe.name!r} becomes a folder: use letters, digits, '-', '_' and '.'")
    return dataclasses.replace(recipe, train={**TRAIN_DEFAULTS, **recipe.train})


def to_dict(recipe: Recipe) -> dict:
    """The resolved recipe as plain values; `from_dict` reads them back to an equal recipe."""

    def plain(value):
        if dataclasses.is_dataclass(value):
            fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return {**{k: v for k, v in fields.items() if k != "extra"}, **fields.get("extra", {})}
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value

    return plain(recipe)


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML: what the run folder keeps."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)


def sha256(recipe: Recipe) -> str:
    """Identity of a run: the resolved recipe's SHA-256."""
    return hashlib.sha256(to_yaml(recipe).encode()).hexdigest()


def _override(values: dict, override: str) -> None:
    path, sep, text = override.partition("=")
    if not sep:
        raise ToolkitError(f"override {override!r}: expected key=value, e.g. train.max_steps=10")
    value = yaml.safe_load(text) if text else None
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        value = float(value)  # YAML reads 2e-4 as text; on a command line nobody means text
    if value is False and text == "no":
        value = "no"  # eval_strategy=no is a word to SFTConfig; who means false writes false
    *parents, last = path.split(".")
    node = values
    for key in parents:
        node = _child(node, key, override)
    _child(node, last, override)  # checks that the last step leads somewhere too
    node[int(last) if isinstance(node, list) else last] = value


def _child(node, key: str, override: str):
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            raise ToolkitError(f"override {override!r}: {key!r} is not a position from 0 to {len(node) - 1}")
        return node[int(key)]
    if not isinstance(node, dict):
        raise ToolkitError(f"override {override!r}: nothing lies under {key!r}")
    return node.setdefault(key, {})


def _build(cls, values, where: str, path: str):
    """One section from plain values, strictly: unknown, missing and mistyped keys are errors."""
    if not isinstance(values, dict):
        raise ToolkitError(f"{where}: {path or 'recipe'}: expected a section with keys, found {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name != "extra"}
    hints = typing.get_type_hints(cls)
    extra = {k: v for k, v in values.items() if k not in fields}
    if extra:
        allowed = passthrough(cls)
        for key in extra:
            if key not in allowed:
                raise unknown_key(where, f"{path}{key}", key, [*fields, *allowed])
    kwargs = {k: _convert(hints[k], v, where, f"{path}{k}") for k, v in values.items() if k in fields}
    missing = [
        f.name
        for f in fields.values()
        if f.name not in kwargs and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ToolkitError(f"{where}: {path}{missing[0]} is missing" + MEANING.get(missing[0], ""))
    return cls(**kwargs, **({"extra": extra} if extra else {}))


def _convert(hint, value, where: str, path: str):
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _convert(args[0], value, where, path)
    if origin is typing.Literal:
        if value not in args:
            raise ToolkitError(f"{where}: {path}: expected one of {', '.join(map(str, args))}, found {value!r}")
        return value
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_convert(args[0], v, where, f"{path}.{i}") for i, v in enumerate(items))
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where, f"{path}.")
    accepted = {float: (int, float), int: (int,), str: (str,), bool: (bool,)}.get(hint, (dict,))
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        expected = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}.get(
            hint, "key: value"
        )
        raise ToolkitError(f"{where}: {path}: expected {expected}, found {value!r}{_number_hint(value)}")
    return value


def _number_hint(value) -> str:
    if isinstance(value, str) and re.fullmatch(r"\d+[eE][+-]?\d+", value):
        return f" (YAML reads {value} as text: write {value.replace('e', '.0e')})"
    return ""


MEANING = {
    "sources": " (at least one {path, fraction})",
    "model_name": " (e.g. unsloth/Qwen3-4B-unsloth-bnb-4bit, a local folder, auto or pocket)",
    "name": " (the run's folder will be outputs/<name>)",
}


def unknown_key(where: str, path: str, key: str, known: typing.Iterable[str]) -> ToolkitError:
    """The error for a key nobody knows, with the nearest known one."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known)[:40])}"
    return ToolkitError(f"{where}: unknown key {path!r}: {hint}")


def _with_names_and_fractions(data: Data, reasoning: float | None, where: str) -> Data:
    if not data.sources:
        raise ToolkitError(f"{where}: data.sources: expected at least one source, found none")
    sources = [dataclasses.replace(s, name=s.name or _short_name(s.path)) for s in data.sources]
    names = [s.name for s in sources]
    sources = [
        dataclasses.replace(s, name=f"{s.name}-{i}") if names.count(s.name) > 1 else s for i, s in enumerate(sources)
    ]
    if len(sources) == 1 and sources[0].fraction is None:
        sources = [dataclasses.replace(sources[0], fraction=1.0)]
    for i, source in enumerate(sources):
        if source.fraction is None or not 0 <= source.fraction <= 1:
            raise ToolkitError(f"{where}: data.sources.{i}.fraction ({source.name}): expected a number from 0 to 1")
    if reasoning is not None:
        sources = _rescale(sources, reasoning, where)
    total = sum(s.fraction for s in sources)
    if abs(total - 1) > 1e-6:
        parts = " + ".join(f"{s.fraction:g} ({s.name})" for s in sources)
        raise ToolkitError(f"{where}: data.sources: fractions must sum to 1, found {parts} = {total:g}")
    return dataclasses.replace(data, sources=tuple(sources))


def _short_name(path: str) -> str:
    return re.sub(r"\.(jsonl?|csv|parquet|gz)\b", "", path.rstrip("/").split("/")[-1])


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


def _check_train(train: dict, where: str) -> None:
    """Names and kinds of the `train:` section against TRL's SFTConfig, without importing it."""
    known = sft_fields() if train.keys() - TRAIN_DEFAULTS.keys() else {}
    for key, value in train.items():
        if key in OWNED:
            raise ToolkitError(f"{where}: train.{key}: not set here: {OWNED[key]}")
        default = TRAIN_DEFAULTS.get(key)
        kind = known.get(key) or {float: "float", int: "int | float", str: "str"}.get(type(default), "")
        if known and key not in known:
            raise unknown_key(where, f"train.{key}", key, known)
        if isinstance(value, bool) and "bool" not in kind and "str" in kind:
            raise ToolkitError(
                f"{where}: train.{key}: expected text, found {value} (YAML reads no as false: write 'no')"
            )
        if isinstance(value, str) and "str" not in kind and ("float" in kind or "int" in kind):
            raise ToolkitError(f"{where}: train.{key}: expected a number, found {value!r}{_number_hint(value)}")


def sft_fields() -> dict[str, str]:
    """Field names of TRL's SFTConfig with their annotations, read from the installed source (importing takes seconds)."""
    files = ("transformers", "training_args.py", "TrainingArguments"), ("trl", "trainer/sft_config.py", "SFTConfig")
    return {name: kind for package, file, cls in files for name, kind in _class_fields(_installed(package) / file, cls)}


def passthrough(cls) -> list[str]:
    """Argument names of the Unsloth function a section's further keys go to; empty for closed sections."""
    target = {Model: ("loader.py", "from_pretrained"), Lora: ("llama.py", "get_peft_model")}.get(cls)
    if target is None:
        return []
    file, function = target
    return _arguments(_installed("unsloth") / "models" / file, function)


def _installed(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ToolkitError(f"{package} is not installed: run `make setup` or `python -m toolkit setup`")
    return Path(spec.submodule_search_locations[0])


def _class_fields(file: Path, cls: str) -> list[tuple[str, str]]:
    import ast

    tree = ast.parse(file.read_text(encoding="utf-8"))
    node = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls)
    return [(n.target.id, ast.unparse(n.annotation)) for n in node.body if isinstance(n, ast.AnnAssign)]


def _arguments(file: Path, function: str) -> list[str]:
    import ast

    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function]
    return sorted({a.arg for n in nodes for a in n.args.args + n.args.kwonlyargs} - {"model", "args", "kwargs"})
