"""A conversation becomes token ids and labels, by the model's own chat template.

chat = load_chat("pocket"); [(prompt, completion)] = examples(conversation, "thinking", chat)
"""

import functools
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
import numpy as np

from toolkit.files import POCKET, ToolkitError, find
from toolkit.sources import Rejected

SWITCH = re.compile(r"(?<!\S)/(no_think|think)(?!\S)")
DICT_ATTRIBUTES = frozenset(dir(dict))
PLAIN = (str, jinja2.runtime.LoopContext, jinja2.utils.Namespace)
PROBE = [{"role": "user", "content": "probe"}]


class Chat:
    """A model's chat template and tokenizer, without the seconds that importing transformers takes.

    `render` equals `tokenizer.apply_chat_template(tokenize=False)` and `encode` equals the Hugging Face tokenizer's ids
    (tests/test_render.py; `mix` compares ids again on a sample of every run's own rows).
    """

    def __init__(self, folder: Path, name: str):
        self.name = name
        self.distrust: str | None = None
        """What went wrong with the fast tokenizer, after which `encode` uses Hugging Face's."""
        self.json = (folder / "tokenizer.json").read_text(encoding="utf-8")
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        self.template_text = _template_text(folder, settings)
        self.eos = _token_text(settings.get("eos_token"))
        self.pad = _token_text(settings.get("pad_token"))
        self._variables = {
            k: _token_text(settings.get(k)) for k in ("bos_token", "eos_token", "pad_token", "unk_token")
        }

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        if self.template_text is None:
            raise ToolkitError(
                f"{self.name}: has no chat template: a base model cannot hold a conversation. Choose an instruct or "
                "hybrid model (e.g. unsloth/Qwen3-4B), or save a chat_template.jinja beside its tokenizer.json"
            )
        template = _environment().from_string(self.template_text)
        shown = [template.render(messages=PROBE, add_generation_prompt=p, **self._variables) for p in (True, False)]
        if shown[0] == shown[1]:
            raise ToolkitError(
                f"{self.name}: its chat template has no generation prompt (add_generation_prompt changes nothing), so "
                "a reply cannot be told from its header. Use the model's official template: chat_template.jinja"
            )
        return template

    @property
    def fast(self):
        """fastokens' tokenizer: the same ids several times sooner. None where it cannot be had."""
        return None if self.distrust else _fast(self.json)

    @property
    def reference(self):
        """Hugging Face's tokenizer: what `fast` is held against."""
        return _reference(self.json)

    def render(self, messages, tools=None, enable_thinking=None, add_generation_prompt=True) -> str:
        """The text a model sees, as `apply_chat_template` gives it; `enable_thinking=None` leaves the switch out."""
        switch = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        return self._template.render(
            messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **self._variables, **switch
        )

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, control tokens recognised, nothing added."""
        ids, ends = self.encode_flat(texts)
        return [ids[a:b].tolist() for a, b in itertools.pairwise(ends.tolist())]

    def encode_flat(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The same as one int32 array of all ids, and where each text starts and the last one ends in it."""
        if self.fast is None:
            found = self.encode_reference(texts)
            ids = np.fromiter(itertools.chain.from_iterable(found), np.int32)
            return ids, np.cumsum([0, *map(len, found)], dtype=np.int64)
        ids, ends = self.fast.encode_batch_flat(texts)
        return np.frombuffer(ids, np.int32), np.frombuffer(ends, np.int64)

    def encode_reference(self, texts: list[str]) -> list[list[int]]:
        """The same by Hugging Face's tokenizer."""
        return [e.ids for e in self.reference.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids) -> str:
        """Text of token ids, control tokens included."""
        return self.reference.decode(list(ids), skip_special_tokens=False)

    @functools.cached_property
    def kind(self) -> str:
        """hybrid, thinking_only, instruct or base: found by rendering the template, not by the model's name."""
        if self.template_text is None:
            return "base"
        on, off = (self.render(PROBE, enable_thinking=t) for t in (True, False))
        if on != off:
            return "hybrid"
        return "thinking_only" if re.search(r"<think>\s*$", on) else "instruct"


@functools.lru_cache(maxsize=1)
def _fast(tokenizer_json: str):
    import fastokens

    try:
        return fastokens.Tokenizer.from_json_str(_short_merges(tokenizer_json))
    except ValueError:
        return None


def _short_merges(tokenizer_json: str) -> str:
    """Merges in their older, shorter form, "a b" for ["a", "b"], which load sooner; another layout is left as it is.

    A line break stands in JSON only between values, so no token's text is touched.
    """
    head, merges, tail = tokenizer_json.partition('"merges"')
    for long, short in (('",\n        "', " "), ('[\n        "', '"'), ('"\n      ]', '"')):
        tail = tail.replace(long, short)
    return head + merges + tail


@functools.lru_cache(maxsize=1)
def _reference(tokenizer_json: str):
    import tokenizers

    return tokenizers.Tokenizer.from_str(tokenizer_json)


@dataclass(frozen=True)
class Example:
    """One supervised turn as text: labels are `completion`, nothing else."""

    prompt: str
    completion: str
    mode: str


def load_chat(model_name: str, revision: str | None = None) -> Chat:
    """Template and tokenizer of a local folder or a Hub model. Raises ToolkitError when neither can be reached."""
    folder = POCKET if model_name == "pocket" else find(model_name)
    if folder is None:
        folder = _download(model_name, revision)
    missing = [f for f in ("tokenizer.json", "tokenizer_config.json") if not (folder / f).is_file()]
    if missing:
        raise ToolkitError(f"{model_name}: {' and '.join(missing)} not found: expected a model folder or a Hub name")
    return Chat(folder, model_name)


def examples(conversation: dict, mode: str, chat: Chat, turns: str = "last") -> list[Example]:
    """The label rule: for each supervised assistant turn, the prompt inference shows and the completion it must give.

    `mode` is thinking, non_thinking or auto (a turn with reasoning is thinking). Raises Rejected when a turn cannot be
    supervised: no reasoning in thinking mode, reasoning in non-thinking mode, or a template whose full rendering does
    not continue the prompt.
    """
    messages = conversation["messages"]
    positions = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if turns == "last":
        positions = positions[-1:]
    return [
        _example(messages, t, _turn_mode(messages[t], mode, chat), conversation.get("tools"), chat) for t in positions
    ]


def _turn_mode(message: dict, mode: str, chat: Chat) -> str:
    reasoned = bool(message.get("reasoning_content"))
    if mode == "thinking" and not reasoned:
        raise Rejected(
            "no_reasoning", "mode is thinking, but the reply has no reasoning: it would teach an empty think block"
        )
    if mode == "non_thinking" and reasoned:
        raise Rejected(
            "reasoning_in_non_thinking", "mode is non_thinking, but the reply has reasoning: set mode: auto or thinking"
        )
    if reasoned and chat.kind == "instruct":
        raise Rejected("no_thinking_mode", f"{chat.name} has no thinking mode, but the reply has reasoning")
    return "thinking" if reasoned else "non_thinking"


def _example(messages: list, t: int, mode: str, tools, chat: Chat) -> Example:
    thinking = mode == "thinking" or last_switch(messages[:t]) == "no_think"
    prompt = chat.render(messages[:t], tools, thinking)
    full = chat.render(messages[: t + 1], tools, thinking, add_generation_prompt=False)
    if not full.startswith(prompt):
        raise Rejected("template_mismatch", _difference(prompt, full))
    end = full.rfind(chat.eos)
    if end < len(prompt):
        raise Rejected("no_end_of_turn", f"the template does not close the reply with {chat.eos!r}")
    return Example(prompt, full[len(prompt) : end + len(chat.eos)], mode)


def last_switch(messages: list) -> str | None:
    """The latest soft switch a user typed: `think`, `no_think` or None. Qwen3 obeys the most recent one (model card)."""
    found = [s for m in messages if m["role"] == "user" for s in SWITCH.findall(m["content"])]
    return found[-1] if found else None


def _difference(prompt: str, full: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), min(len(prompt), len(full)))
    return f"the reply does not continue the prompt: prompt has {prompt[at : at + 40]!r} where it has {full[at : at + 40]!r}"


def _download(model_name: str, revision: str | None) -> Path:
    """The tokenizer's few files from the Hub or its local cache."""
    from huggingface_hub import snapshot_download

    files = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    try:
        return Path(snapshot_download(model_name, revision=revision, allow_patterns=files))
    except Exception as error:  # the Hub library raises many kinds; to the user they are one: it cannot be had
        raise ToolkitError(
            f"{model_name}: no such folder here, and the Hub did not give it ({type(error).__name__}). "
            "Check the name or the network, or set model.model_name to a local folder or to pocket"
        ) from error


def _template_text(folder: Path, settings: dict) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    return {t["name"]: t["template"] for t in template}["default"] if isinstance(template, list) else template


def _token_text(token) -> str | None:
    return token["content"] if isinstance(token, dict) else token


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for trainers; when rendering it means nothing."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with a short way for what templates do all the time: a message's key, a text's method, `loop.last`.

    The sandbox looks for an attribute first and asks eleven questions about it; rendering took twice the time. Of the
    kinds in PLAIN it refuses what begins with an underscore and nothing else, and so does this.
    """

    def getattr(self, obj, attribute: str):
        if type(obj) is dict and attribute not in DICT_ATTRIBUTES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj, attr: str, value) -> bool:
        return not attr.startswith("_") if type(obj) in PLAIN else super().is_safe_attribute(obj, attr, value)


def _environment() -> jinja2.Environment:
    """Jinja as transformers sets it up for chat templates (transformers/utils/chat_template_utils.py)."""
    env = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise
    env.globals["strftime_now"] = _strftime_now
    return env


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str):
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(pattern)
