"""A conversation becomes prompt and completion, and those token ids, by the model's own chat template and tokenizer.

from toolkit.render import load_chat, examples; examples({"messages": messages}, "auto", load_chat("pocket"))
"""

import functools
import itertools
import json
import os
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.runtime
import jinja2.sandbox
import numpy as np

from toolkit.family import SWITCH, family_of, kind_of
from toolkit.files import POCKET, ToolkitError, find, read_json
from toolkit.sources import Rejected

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json")
PROBE = [{"role": "user", "content": "probe"}]
REPLY = "probe-reply"
SCRIPT_SETTINGS = re.compile(r'"(truncation|padding)"\s*:\s*{(?:[^{}]|{[^{}]*})*}')
TEMPLATE_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What code in a template can raise: its own raise_exception, and Python's errors on a row it was not written for."""


class Chat:
    """A model's chat template and tokenizer, without the seconds that importing transformers takes.

    `render` equals `tokenizer.apply_chat_template(tokenize=False)` and `encode` equals the Hugging Face tokenizer's ids
    (tests/test_render.py; `mix` compares ids again on a sample of every run's own rows).
    """

    def __init__(
        self, name: str, tokenizer_json: str, template: str | None, tokens: dict, model_type: str | None = None
    ):
        # Some checkpoints keep a training script's truncation and padding here, which would cut rows
        head, key, rest = tokenizer_json.partition('"added_tokens"')
        self.json = SCRIPT_SETTINGS.sub(r'"\1": null', head) + key + rest
        self.name, self.template_text, self.tokens = name, template, tokens
        """`tokens`: bos_token, eos_token, pad_token and unk_token, as the template sees them."""
        self.fallback_reason: str | None = None
        """Why `encode` uses Hugging Face's tokenizer instead of the fast one."""
        self.switches = model_type is None or family_of(model_type).switches
        """Whether /think and /no_think in a user turn mean something; taken for granted where the family is unknown."""

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        if self.template_text is None:
            raise ToolkitError(
                f"{self.name}: has no chat template: a base model cannot hold a conversation. Choose an instruct or "
                "hybrid model (e.g. unsloth/Qwen3-4B), or save a chat_template.jinja beside its tokenizer.json"
            )
        try:
            return _environment().from_string(self.template_text)
        except jinja2.TemplateSyntaxError as error:
            raise ToolkitError(f"{self.name}: chat_template.jinja, line {error.lineno}: {error.message}") from error

    def render(self, messages, tools=None, enable_thinking=None, add_generation_prompt=True) -> str:
        """The text a model sees, as `apply_chat_template` gives it; `enable_thinking=None` leaves the switch out.

        Raises Rejected with the template's own words where it refuses the messages."""
        switch = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        values = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(values | self.tokens | switch)
        except ToolkitError:
            raise
        except TEMPLATE_ERRORS as error:
            raise Rejected("template_error", f"the chat template of {self.name} refuses it: {error}") from error

    def _probe(self, messages, **values) -> str:
        try:
            return self.render(messages, **values)
        except Rejected as error:
            raise ToolkitError(f"{self.name}: its chat template fails on a plain question: {error.detail}") from error

    @functools.cached_property
    def kind(self) -> str:
        """hybrid, thinking_only, instruct or base: found by rendering the template, not by the model's name."""
        return "base" if self.template_text is None else kind_of(self._probe)

    @functools.cached_property
    def end(self) -> str:
        """The token that ends a turn: the first that the template writes after a reply (Llama 3: <|eot_id|>).

        Raises ToolkitError for a template that does not mark where a reply begins or ends, and where the tokenizer lacks
        the token: both make a model that never stops, which is seen only after training."""
        if self._probe(PROBE) == self._probe(PROBE, add_generation_prompt=False):
            raise ToolkitError(
                f"{self.name}: its chat template has no generation prompt (add_generation_prompt changes nothing), so "
                "a reply cannot be told from its header. Use the model's official template: chat_template.jinja"
            )
        turn = [*PROBE, {"role": "assistant", "content": REPLY}]
        _, reply, after = self._probe(turn, add_generation_prompt=False).rpartition(REPLY)
        for known in (self._special, list(_added_tokens(self.json))):
            if reply and (found := [token for token in known if token in after]):
                return min(found, key=after.index)
        if not reply:
            fault = "leaves out a reply that is plain text: it was written for another kind of model"
        elif not after.strip():
            fault = "writes nothing after a reply: the model would never stop"
        else:
            fault = f"ends a reply with {after.strip()!r}, which is no token of its tokenizer.json: the model would never stop"
        raise ToolkitError(
            f"{self.name}: its chat template {fault}. Take tokenizer.json and chat_template.jinja from the same instruct model"
        )

    @functools.cached_property
    def _special(self) -> list[str]:
        return [token for token, special in _added_tokens(self.json).items() if special]

    @functools.cached_property
    def special(self) -> re.Pattern:
        """Matches the tokenizer's special tokens, which it reads as structure wherever they stand."""
        return re.compile("|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) or "(?!)")

    @property
    def fast(self):
        """fastokens' tokenizer: the same ids several times sooner. None where it cannot be used."""
        return None if self.fallback_reason else self._fast

    @functools.cached_property
    def _fast(self):
        return _fast(self.json)

    @functools.cached_property
    def _reference(self):
        """Hugging Face's tokenizer: what `fast` is compared with."""
        return _reference(self.json)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, special tokens recognised, nothing added."""
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
        return [e.ids for e in self._reference.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids) -> str:
        """Text of token ids, special tokens included."""
        return self._reference.decode(list(ids), skip_special_tokens=False)


@functools.lru_cache(maxsize=1)
def _fast(tokenizer_json: str):
    import fastokens

    try:
        return fastokens.Tokenizer.from_json_str(tokenizer_json)
    except ValueError:
        return None


@functools.lru_cache(maxsize=1)
def _reference(tokenizer_json: str):
    import tokenizers

    return tokenizers.Tokenizer.from_str(tokenizer_json)


@functools.lru_cache(maxsize=1)
def _added_tokens(tokenizer_json: str) -> dict[str, bool]:
    """{added token: whether it is special}; only this list is parsed, as the whole file takes half a second."""
    start = re.search(r'"added_tokens"\s*:\s*(?=\[)', tokenizer_json)
    found = json.JSONDecoder().raw_decode(tokenizer_json, start.end())[0] if start else []
    return {token["content"]: token["special"] for token in found}


def load_chat(model_name: str, revision: str | None = None) -> Chat:
    """Template and tokenizer of a local folder or a Hub model. Raises ToolkitError when neither can be reached."""
    folder = POCKET if model_name == "pocket" else find(model_name)
    if folder is None:
        folder = _download(model_name, revision)
    missing = [name for name in FILES[:2] if not (folder / name).is_file()]
    if missing:
        raise ToolkitError(f"{model_name}: {' and '.join(missing)} not found: expected a model folder or a Hub name")
    settings, file = read_json(folder / FILES[1]), folder / FILES[2]
    template = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    if isinstance(template, list):  # several templates by name, as some checkpoints of 2024 have
        template = {t["name"]: t["template"] for t in template}["default"]
    model_type = read_json(folder / FILES[3]).get("model_type") if (folder / FILES[3]).is_file() else None
    return Chat(model_name, (folder / FILES[0]).read_text(encoding="utf-8"), template, _tokens(settings), model_type)


def chat_of(tokenizer) -> Chat:
    """The same from a loaded transformers tokenizer, so that a mix is rendered by the very template a model trains with."""
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    tokens = {name: getattr(tokenizer, name) for name in names}
    return Chat(tokenizer.name_or_path, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokens)


def _tokens(settings: dict) -> dict[str, str | None]:
    found = {name: settings.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return {name: token["content"] if isinstance(token, dict) else token for name, token in found.items()}


def _download(model_name: str, revision: str | None) -> Path:
    """The tokenizer's few files from the Hub or its local cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model_name, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # the Hub library raises many kinds; to the reader they are one
        raise ToolkitError(
            f"{model_name}: no such folder here, and the Hub did not give it ({type(error).__name__}). "
            "Check the name or the network, or set model.model_name to a local folder or to pocket"
        ) from error


# --- the label rule --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One supervised turn as text: labels are `completion`, nothing else."""

    prompt: str
    completion: str
    mode: str
    turn: int
    """Index of the supervised message in its conversation."""


def examples(conversation: dict, mode: str, chat: Chat, turns: str = "last") -> list[Example]:
    """The label rule: for each supervised assistant turn, the prompt inference shows and the completion it must give.

    `mode` is thinking, non_thinking or auto (a turn with reasoning is thinking); `turns` is last or each. Raises
    Rejected when a turn cannot be supervised: reasoning where `mode` or the model has none, no reasoning where `mode`
    asks for it, special tokens in the text, or a rendering that loses text or does not continue the prompt.
    """
    messages, tools = conversation["messages"], conversation.get("tools")
    texts = [m.get(key, "") for m in messages for key in ("content", "reasoning_content")]
    calls = [m["tool_calls"] for m in messages if m.get("tool_calls")]
    if hit := chat.special.search("\n".join(texts) + str([tools, *calls] if tools or calls else "")):
        raise Rejected("control_token", f"the text holds {hit.group()!r}, which {chat.name} reads as structure")
    positions = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    positions = positions[-1:] if turns == "last" else positions
    return [_example(messages, t, _turn_mode(messages[t], mode, chat), tools, chat) for t in positions]


def _turn_mode(message: dict, mode: str, chat: Chat) -> str:
    reasoned = bool(message.get("reasoning_content"))
    if mode == "thinking" and not reasoned:
        raise Rejected(
            "no_reasoning",
            "mode is thinking, but the reply has no reasoning: it would teach an empty think block. "
            "Set mode: non_thinking (or auto), or use rows with reasoning",
        )
    if mode == "non_thinking" and reasoned:
        raise Rejected(
            "reasoning_in_non_thinking", "mode is non_thinking, but the reply has reasoning: set mode: auto or thinking"
        )
    if reasoned and chat.kind == "instruct":
        raise Rejected("no_thinking_mode", f"the reply has reasoning, but {chat.name} has no thinking mode (instruct)")
    return "thinking" if reasoned else "non_thinking"


def _example(messages: list, t: int, mode: str, tools, chat: Chat) -> Example:
    # After /no_think Qwen3 writes the empty block itself: inference shows the prompt of thinking mode, so it is taught
    thinking = mode == "thinking" or (chat.switches and last_switch(messages[:t]) == "no_think")
    prompt = chat.render(messages[:t], tools, thinking)
    full = chat.render(messages[: t + 1], tools, thinking, add_generation_prompt=False)
    _check_shown(messages[:t], prompt)
    if not full.startswith(prompt):
        raise Rejected("template_mismatch", _difference(prompt, full))
    _check_taught(messages[t], full[len(prompt) :])
    end = full.rfind(chat.end)
    if end < len(prompt):
        raise Rejected("no_end_of_turn", f"the template does not close the reply with {chat.end!r}")
    return Example(prompt, full[len(prompt) : end + len(chat.end)], mode, t)


def _check_shown(messages: list, prompt: str) -> None:
    """Templates for images drop text that is not a list of parts, and say nothing."""
    for message in messages:
        if message["role"] in {"system", "user"} and message["content"].strip() not in prompt:
            text = message["content"][:60]
            raise Rejected("text_lost", f"the chat template leaves out the {message['role']} turn {text!r}")


def _check_taught(reply: dict, completion: str) -> None:
    """Some templates drop reasoning, or the answer beside a tool call."""
    for key, what in (("content", "answer"), ("reasoning_content", "reasoning")):
        if (text := reply.get(key, "").strip()) not in completion:
            raise Rejected(f"{what}_lost", f"the chat template leaves out the {what} {text[:60]!r}")
    for call in reply.get("tool_calls", ()):
        if call["function"]["name"] not in completion:
            raise Rejected("call_lost", f"the chat template leaves out the call of {call['function']['name']!r}")


def last_switch(messages: list) -> str | None:
    """The latest soft switch a user typed: `think`, `no_think` or None. Qwen3 obeys the most recent one (model card)."""
    found = [s for m in messages if m["role"] == "user" for s in SWITCH.findall(m["content"])]
    return found[-1] if found else None


def _difference(prompt: str, full: str) -> str:
    at = len(os.path.commonprefix([prompt, full]))  # noqa: RUF071 - it is character by character that is wanted
    return f"the reply does not continue the prompt: prompt has {prompt[at : at + 40]!r} where it has {full[at : at + 40]!r}"


# --- Jinja as transformers sets it up (transformers/utils/chat_template_utils.py) --------------------------------------

DICT_ATTRIBUTES = frozenset(dir(dict))
PLAIN = (str, jinja2.runtime.LoopContext, jinja2.utils.Namespace)


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
    env = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = _tojson
    env.globals |= {"raise_exception": _raise, "strftime_now": lambda pattern: datetime.now().strftime(pattern)}
    return env


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str):
    raise jinja2.exceptions.TemplateError(message)
