"""Tokenizers and templates without the seconds that importing transformers takes, several times as fast, equal to it.

from toolkit.data.tokenize import Tokenizers, compile_template; Tokenizers(Path("tokenizer.json").read_text()).encode(["Hi"])
"""

import functools
import itertools
import json
import re
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox
import numpy as np

from toolkit.files import ToolkitError
from toolkit.records import Json

if TYPE_CHECKING:
    import fastokens
    import tokenizers

# Texts of each call whose ids are compared with the Hugging Face tokenizer's: of 5M tokens, four took a tenth of the
# time.
COMPARED = 2
# What code in a template can raise: its own raise_exception, and Python's errors on a row it was not written for.
TEMPLATE_ERRORS = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError
)  # fmt: skip


# --- text to ids -----------------------------------------------------------------------------------------------------


class Tokenizers:
    """The tokenizers of one tokenizer.json, each loaded when it is first needed: that takes a second."""

    def __init__(self, text: str):
        self.text = text
        self.fallback_reason: str | None = None  # how the fast tokenizer was found to differ

    @functools.cached_property
    def fast(self) -> "fastokens.Tokenizer | None":
        """fastokens' tokenizer: the same ids several times sooner. None where it does not know the kind."""
        import fastokens

        try:
            return without_limits(fastokens.Tokenizer.from_json_str(self.text))
        except ValueError:
            return None

    @functools.cached_property
    def reference(self) -> "tokenizers.Tokenizer":
        """Hugging Face's tokenizer, which decides."""
        import tokenizers

        return without_limits(tokenizers.Tokenizer.from_str(self.text))

    @property
    def slow_reason(self) -> str | None:
        """Why the Hugging Face tokenizer is used; None where the fast one is."""
        return self.fallback_reason or (None if self.fast else "fastokens does not know this kind of tokenizer")

    def reference_ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text by the Hugging Face tokenizer."""
        return [encoding.ids for encoding in self.reference.encode_batch(texts, add_special_tokens=False)]

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text as int32, special tokens recognised, nothing added.

        Every call compares a few texts with the Hugging Face tokenizer; once they differ, that one is used."""
        if self.fallback_reason or not self.fast:
            return [np.array(ids, np.int32) for ids in self.reference_ids(texts)]
        flat, ends = self.fast.encode_batch_flat(texts)
        ids = np.frombuffer(flat, np.int32)
        bounds = itertools.pairwise(np.frombuffer(ends, np.int64).tolist())
        encoded = [ids[start:end] for start, end in bounds]
        sample = range(0, len(texts), len(texts) // COMPARED + 1)
        for i, expected in zip(sample, self.reference_ids([texts[i] for i in sample]), strict=True):
            if encoded[i].tolist() != expected:
                self.fallback_reason = f"fastokens gives other ids for {texts[i][:60]!r}"
                return self.encode(texts)
        return encoded

    @functools.cached_property
    def added(self) -> dict[str, bool]:
        """{added token: whether it is special}; only this list is parsed, as the whole file takes half a second."""
        start = re.search(r'"added_tokens"\s*:\s*(?=\[)', self.text)
        tokens = json.JSONDecoder().raw_decode(self.text, start.end())[0] if start else []
        return {token["content"]: token["special"] for token in tokens}


def without_limits(tokenizer: "tokenizers.Tokenizer") -> "tokenizers.Tokenizer":
    """Without a training script's truncation and padding, which some checkpoints keep and which would cut rows."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


loaded = functools.lru_cache(maxsize=1)(Tokenizers)


# --- Jinja as transformers sets it up (transformers/utils/chat_template_utils.py) --------------------------------------

DICT = frozenset(dir(dict))
CHECKED_BY_NAME = (str, jinja2.runtime.LoopContext, jinja2.utils.Namespace)
# Turns of loops and calls in one rendering, half a second of them; Qwen3's template takes about ten for each message.
MAX_STEPS = 1_000_000
# `{% generation %}` marks assistant text for trainers; when rendering it means nothing.
GENERATION = ((r"({%[-+]?\s*)generation\b", r"\1if true"), (r"({%[-+]?\s*)endgeneration\b", r"\1endif"))


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which of the kinds in CHECKED_BY_NAME refuses what begins with an underscore and nothing else.

    It asks eleven questions about every attribute to find that out, and looks for an attribute before it looks for a key, so
    that each key of a message costs an exception; rendering took three quarters as long again."""

    name = ""
    """Of the model, for messages."""
    steps = 0
    """Of the rendering under way."""

    def count(self, steps: int = 1) -> None:
        """So many steps more. Raises ToolkitError for too many."""
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise ToolkitError(
                f"{self.name}: its chat template takes more than {MAX_STEPS:,} steps for one conversation: a loop in it does "
                "not end. Use the model's official template: chat_template.jinja"
            )

    def counted(self, items: Iterable[Json]) -> Iterator[Json]:
        """The same items; Jinja limits a single range, but not loops inside loops."""
        for item in items:
            self.count()
            yield item

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = jinja2.nodes.Filter(loop.iter, "counted", [], [], None, None)
        return tree

    intercepted_binops = frozenset(("*", "**", "%"))

    def call_binop(
        self,
        context: jinja2.runtime.Context,
        operator: str,
        left: Json,
        right: Json,
    ) -> Json:
        """Text times a number, a power, text % values: each counts as many steps as what it makes may be long."""
        sides = [len(side) if isinstance(side, str | list) else side for side in (left, right)]
        if operator == "**":
            self.count(abs(int(right)))
        elif operator == "*" and sides != [left, right]:
            self.count(abs(sides[0] * sides[1]))
        elif isinstance(left, str):  # "%9s" % value
            self.count(sum(map(int, re.findall(r"\d+", left))))
        return super().call_binop(context, operator, left, right)

    def call(self, context: jinja2.runtime.Context, obj: Json, *args: Json, **values: Json) -> Json:
        """Call a macro, or a function that the sandbox allows: a macro may call itself twice."""
        self.count()
        return super().call(context, obj, *args, **values)

    def getattr(self, obj: Json, attribute: str) -> Json:
        """A key of an object, or an attribute that the sandbox allows."""
        if type(obj) is not dict or attribute in DICT:
            return super().getattr(obj, attribute)
        return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)

    def is_safe_attribute(self, obj: Json, attr: str, value: Json) -> bool:
        """Whether a template may read an attribute."""
        if type(obj) in CHECKED_BY_NAME:
            return not attr.startswith("_")
        return super().is_safe_attribute(obj, attr, value)


def compile_template(text: str, name: str) -> jinja2.Template:
    """The chat template of a model, ready to render. Raises jinja2.TemplateSyntaxError."""
    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    env.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    env.globals["raise_exception"] = refuse
    env.globals["strftime_now"] = time.strftime
    env.filters["counted"] = env.counted
    env.name = name
    for tag, plain in GENERATION:
        text = re.sub(tag, plain, text)
    template = env.from_string(text)
    # every rendering copies the globals; out of Jinja's chain of two dicts that takes a tenth of its time
    template.globals = dict(template.globals)
    return template


def refuse(message: str) -> NoReturn:
    """What templates call as raise_exception."""
    raise jinja2.exceptions.TemplateError(message)
