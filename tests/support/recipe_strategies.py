"""Recipes and overrides as people and accidents write them: `@given(recipe_values(), overrides())`.

A valid recipe with some keys replaced by values of another kind, out of range, misspelled, missing or unheard of."""

import json

import yaml
from hypothesis import strategies as st

from toolkit import recipe
from toolkit.files import ToolkitError
from toolkit.recipe import from_dict, to_dict, to_yaml

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([2**31, 2**64, -(10**30), 0.5, 1.5, -0.1, 1e308, float("inf"), float("nan")])
    | st.sampled_from(
        ["", "auto", "pocket", "2e-4", "no", "thinking", "小麦", "x" * 4000, "../..", "\ud800", "\x00", "a#5"]
    )
    | st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(0, 3), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = """name data data.sources data.sources.0 data.sources.0.path data.sources.0.name data.sources.0.fraction data.sources.1.fraction
data.sources.0.mode data.sources.0.columns data.sources.0.max_rows data.sources.0.max_repeats data.sources.0.soft_switch
data.sources.0.system data.seed data.unit data.budget data.validation_size data.max_rejected data.duplicates data.placeholders
data.reasoning model model.model_name model.max_seq_length model.load_in_4bit model.dtype lora lora.r lora.target_modules
lora.lora_alpha lora.loftq_config train train.learning_rate train.max_steps train.optim train.eval_strategy
train.neftune_noise_alpha evaluate evaluate.prompts evaluate.questions evaluate.level export.quantization_method
export.quantisation data.sorces modle train.learning_rte""".split()  # fmt: skip


SENSIBLE = {"name": "other", "data.sources.0.name": "mine", "data.sources.0.max_repeats": 3, "data.sources.0.soft_switch": 0.5,
            "data.sources.0.system": "Be brief.", "data.seed": 1, "data.unit": "examples", "data.validation_size": 0,
            "data.placeholders": {"NAME": "x"}, "model.max_seq_length": 512, "model.dtype": "float16", "lora.r": 8,
            "lora.target_modules": ["q_proj"], "train.learning_rate": 1e-3, "train.eval_strategy": "no",
            "train.neftune_noise_alpha": 5, "evaluate.level": "full", "export.quantization_method": ["f16", "q8_0"]}  # fmt: skip


@st.composite
def recipe_values(draw) -> dict:
    """Plain values of a recipe: valid, but for up to two keys."""
    shares = draw(st.sampled_from([(0.75, 0.25), (1, 0), (None, None), (0.5, 0.5), (0.9, 0.9)]))
    modes = draw(st.sampled_from([("thinking", "non_thinking"), ("auto", "auto")]))
    paths = draw(st.sampled_from([("a.jsonl", "b.jsonl"), ("a/train.csv#5", "b/train.csv#7"), ("same", "same")]))
    sources = [{"path": p, "mode": m, "fraction": f} for p, m, f in zip(paths, modes, shares, strict=True)]
    values = {"name": "fuzz", "data": {"sources": sources}, "model": {"model_name": "pocket"}}
    for key in draw(st.lists(st.sampled_from(sorted(SENSIBLE)), max_size=4, unique=True)):
        _put(values, key.split("."), SENSIBLE[key])
    for key, value in draw(st.just([]) | st.lists(st.tuples(st.sampled_from(KEYS), VALUES), max_size=2)):
        _put(values, key.split("."), value)
    return values


def _put(node, keys: list[str], value) -> None:
    *parents, last = keys
    for key in parents:
        if isinstance(node, list) and key.isdigit() and int(key) < len(node):
            node = node[int(key)]
        elif isinstance(node, dict):
            node = node.setdefault(key, {})
    if isinstance(node, dict):
        node[last] = value


def overrides():
    """Up to three `key=value` words, some of them without key, value or sense."""
    texts = st.sampled_from(["", "1", "-1", "0.5", "[", "{", "{a: [", "2026-13-45", "&a [*a]", "!!python/object:os.system x",
                             "!!bool x", "{1: 2}", "no", "2e-4", "'", "- x", "*a", "%", "\t", "pocket", ".nan"])  # fmt: skip
    known = st.builds("{}={}".format, st.sampled_from(KEYS), texts | st.text(max_size=6))
    sensible = st.sampled_from(sorted(SENSIBLE)).map(lambda key: f"{key}={json.dumps(SENSIBLE[key])}")
    return st.lists(sensible, max_size=2) | st.lists(known | st.text(max_size=12), max_size=3)


def cases():
    """(plain values, overrides) of a recipe."""
    return st.tuples(recipe_values(), overrides())


def assert_recipe(case: tuple[dict, list[str]]) -> None:
    """It is refused in words that name the file or the override, or is read and written back equal."""
    values, words = case
    try:
        built = from_dict(values, "fuzz.yaml", words)
    except ToolkitError as error:
        if not str(error).startswith(("fuzz.yaml: ", "override ")):
            raise
        return
    assert from_dict(yaml.safe_load(to_yaml(built))) == built
    assert recipe.sha256(from_dict(to_dict(built))) == recipe.sha256(built)
    assert len({s.name for s in built.data.sources}) == len(built.data.sources)
