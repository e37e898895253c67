"""A conversation becomes prompt and completion, and those token ids, by the model's own chat template and tokenizer.

from toolkit.data.render import load_chat, examples; examples({"messages": messages}, "auto", load_chat("pocket"))
"""

import functools
import itertools
import json
import os
import re
import time
from dataclasses import dataclass

import jinja2
import jinja2.ext
import jinja2.runtime
import jinja2.sandbox
import numpy as np

from toolkit.data.sources import Rejected
from toolkit.family import SWITCH, family_of, kind_of
from toolkit.files import POCKET, ToolkitError, download, find, read_json

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json")
TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
"""What a template may ask the tokenizer for."""
COMPARED = 2
"""Texts of each call whose ids are compared with the Hugging Face tokenizer's: of 5M tokens, four took a tenth of the time."""
SPACE_BEFORE = re.compile(r'("prepend":\s*)"[^"]+"|("prepend_scheme":\s*)"(?:first|always)"')
"""How a tokenizer.json of SentencePiece's kind (Llama 2, Mistral, Phi-3) says that a space is put before every text."""
PROBE, REPLY = [{"role": "user", "content": "probe"}], "probe-reply"
TEMPLATE_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What code in a template can raise: its own raise_exception, and Python's errors on a row it was not written for."""


class Tokenizers:
    """The tokenizers of one tokenizer.json, each loaded when it is first needed: that takes a second."""

    def __init__(self, text: str):
        # Merges in their older form, "a b" for ["a", "b"], load 0.3 s sooner. A line break stands in JSON only between
        # values, so no token's text is touched; another layout is left as it is
        head, merges, tail = text.partition('"merges"')
        for long, short in (('",\n        "', " "), ('[\n        "', '"'), ('"\n      ]', '"')):
            tail = tail.replace(long, short)
        self.text = head + merges + tail

    @functools.cached_property
    def fast(self):
        """fastokens' tokenizer: the same ids several times sooner. None where it does not know the kind."""
        import fastokens

        try:
            return _whole(fastokens.Tokenizer.from_json_str(self.text))
        except ValueError:
            return None

    @functools.cached_property
    def reference(self):
        """Hugging Face's tokenizer, which decides."""
        import tokenizers

        return _whole(tokenizers.Tokenizer.from_str(self.text))

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text by the Hugging Face tokenizer."""
        return [e.ids for e in self.reference.encode_batch(texts, add_special_tokens=False)]

    @functools.cached_property
    def added(self) -> dict[str, bool]:
        """{added token: whether it is special}; only this list is parsed, as the whole file takes half a second."""
        start = re.search(r'"added_tokens"\s*:\s*(?=\[)', self.text)
        found = json.JSONDecoder().raw_decode(self.text, start.end())[0] if start else []
        return {token["content"]: token["special"] for token in found}


def _whole(tokenizer):
    """Without a training script's truncation and padding, which some checkpoints keep and which would cut rows."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


loaded = functools.lru_cache(maxsize=1)(Tokenizers)


class Chat:
    """A model's chat template and tokenizer, without the seconds that importing transformers takes.

    `render` equals `tokenizer.apply_chat_template(tokenize=False)`, `encode` equals the Hugging Face tokenizer's ids.
    """

    def __init__(
        self, name: str, tokenizer_json: str, template: str | None, tokens: dict, model_type: str | None = None
    ):
        self.json = tokenizer_json
        self.name, self.template_text, self.tokens = name, template, tokens
        self.fallback_reason: str | None = None
        """Why `encode` uses Hugging Face's tokenizer instead of the fast one."""
        self.switches = model_type is None or family_of(model_type).switches
        """Whether /think and /no_think in a user turn mean something; taken for granted where the family is unknown."""
        self.tokenizers = loaded(self.json)

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        if self.template_text is None:
            raise ToolkitError(
                f"{self.name}: has no chat template: a base model cannot hold a conversation. Choose an instruct or "
                "hybrid model (e.g. unsloth/Qwen3-4B), or save a chat_template.jinja beside its tokenizer.json"
            )
        try:
            return _compiled(self.template_text)
        except jinja2.TemplateSyntaxError as error:
            raise ToolkitError(f"{self.name}: chat_template.jinja, line {error.lineno}: {error.message}") from error

    def render(self, messages, tools=None, enable_thinking=None, add_generation_prompt=True) -> str:
        """The text a model sees, as `apply_chat_template` gives it; `enable_thinking=None` leaves the switch out.

        Raises Rejected with the template's own words where it refuses the messages."""
        switch = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        values = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        template = self._template
        try:
            return template.render(values | self.tokens | switch)
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
        turn = [*PROBE, {"role": "assistant", "content": REPLY}]
        whole, prompt = (self._probe(messages, add_generation_prompt=False) for messages in (turn, PROBE))
        # Mistral's templates have no header of a reply: what closes the question is followed by it
        headless = whole.removeprefix(prompt).lstrip().startswith(REPLY)
        if self._probe(PROBE) == prompt and not headless:
            raise ToolkitError(
                f"{self.name}: its chat template has no generation prompt (add_generation_prompt changes nothing), so "
                "a reply cannot be told from its header. Use the model's official template: chat_template.jinja"
            )
        after = whole.rpartition(REPLY)[2]
        for known in (self._special, self.tokenizers.added):
            if found := [token for token in known if token in after]:
                return min(found, key=after.index)
        raise ToolkitError(
            f"{self.name}: its chat template ends a reply with {after.strip()!r}, which is no token of its "
            "tokenizer.json: the model would never stop. Take both files from the same instruct model"
        )

    @property
    def _special(self) -> list[str]:
        return [token for token, special in self.tokenizers.added.items() if special]

    @functools.cached_property
    def special(self) -> re.Pattern:
        """Matches the tokenizer's special tokens, which it reads as structure wherever they stand."""
        return re.compile("|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) or "(?!)")

    @functools.cached_property
    def following(self) -> Tokenizers:
        """The tokenizers for text that follows other text, where no space is put before it."""
        head, mark, tail = self.json.partition('"vocab"')
        plain = SPACE_BEFORE.sub(lambda found: f'{found[1]}""' if found[1] else f'{found[2]}"never"', head)
        return self.tokenizers if plain == head else Tokenizers(plain + mark + tail)

    @property
    def fast(self):
        """The fast tokenizer; None where it does not know the kind or gave other ids."""
        return None if self.fallback_reason else self.tokenizers.fast

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, special tokens recognised, nothing added."""
        ids, ends = self.encode_flat(texts)
        return [ids[a:b].tolist() for a, b in itertools.pairwise(ends.tolist())]

    def encode_flat(self, texts: list[str], *, following: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The same as one int32 array of all ids, and where each text starts and the last one ends in it; of texts that
        begin a conversation, or of texts `following` others.

        Every call compares a few texts with the Hugging Face tokenizer; once they differ, that one is used."""
        tokenizers = self.following if following else self.tokenizers
        if self.fast:
            ids, ends = map(np.frombuffer, tokenizers.fast.encode_batch_flat(texts), (np.int32, np.int64))
            sample = range(0, len(texts), len(texts) // COMPARED + 1)
            for i, expected in zip(sample, tokenizers.encode([texts[i] for i in sample]), strict=True):
                if ids[ends[i] : ends[i + 1]].tolist() != expected:
                    self.fallback_reason = f"fastokens gives other ids for {texts[i][:60]!r}"
            if self.fast:
                return ids, ends
        found = tokenizers.encode(texts)
        ids = np.fromiter(itertools.chain.from_iterable(found), np.int32)
        return ids, np.cumsum([0, *map(len, found)], dtype=np.int64)

    def decode(self, ids) -> str:
        """Text of token ids, special tokens included."""
        return self.tokenizers.reference.decode(list(ids), skip_special_tokens=False)


def load_chat(model_name: str, revision: str | None = None) -> Chat:
    """Template and tokenizer of a local folder or a Hub model. Raises ToolkitError when neither can be reached."""
    folder = POCKET if model_name == "pocket" else find(model_name) or download(model_name, revision, FILES)
    missing = [name for name in FILES[:2] if not (folder / name).is_file()]
    if missing:
        raise ToolkitError(f"{model_name}: {' and '.join(missing)} not found: expected a model folder or a Hub name")
    # newer checkpoints keep the template in a file of its own, older ones in their settings
    tokenizer, settings_file, template_file, config = (folder / name for name in FILES)
    settings = read_json(settings_file)
    template = template_file.read_text(encoding="utf-8") if template_file.is_file() else settings.get("chat_template")
    if isinstance(template, list):  # several templates by name, as some checkpoints of 2024 have
        template = {t["name"]: t["template"] for t in template}["default"]
    # a token is a text, or the object that describes it (AddedToken)
    given = {name: settings.get(name) for name in TOKENS}
    tokens = {name: token["content"] if isinstance(token, dict) else token for name, token in given.items()}
    model_type = read_json(config).get("model_type") if config.is_file() else None
    return Chat(model_name, tokenizer.read_text(encoding="utf-8"), template, tokens, model_type)


def chat_of(tokenizer) -> Chat:
    """The same from a loaded transformers tokenizer, so that a mix is rendered by the very template a model trains with."""
    tokens = {name: getattr(tokenizer, name) for name in TOKENS}
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name
        template = template["default"]
    return Chat(tokenizer.name_or_path, tokenizer.backend_tokenizer.to_str(), template, tokens)


# --- the label rule --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One supervised turn as text: labels are `completion`, nothing else."""

    prompt: str
    completion: str
    mode: str
    conversation: dict
    """Up to and including the supervised turn."""


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
    # a row of n answers is one example, or n: Qwen's template drops the reasoning of earlier turns, so that no single
    # rendering shows every turn as inference does
    positions = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    supervised = positions[-1:] if turns == "last" else positions
    found = [_example({**conversation, "messages": messages[: i + 1]}, mode, chat) for i in supervised]
    for example in found[:-1]:  # the expected answer is that of the last turn
        example.conversation.pop("expected_answer", None)
    return found


def _example(conversation: dict, mode: str, chat: Chat) -> Example:
    *asked, reply = conversation["messages"]
    tools, mode = conversation.get("tools"), _turn_mode(reply, mode, chat)
    # After /no_think Qwen3 writes the empty block itself: inference shows the prompt of thinking mode, so it is taught
    thinking = mode == "thinking" or (chat.switches and last_switch(asked) == "no_think")
    prompt = chat.render(asked, tools, thinking)
    full = chat.render(conversation["messages"], tools, thinking, add_generation_prompt=False)
    # templates that rewrite earlier turns, e.g. drop their reasoning, once a reply follows
    if not full.startswith(prompt):
        at = len(os.path.commonprefix([prompt, full]))  # noqa: RUF071 - it is character by character that is wanted
        shown = f"prompt has {prompt[at : at + 40]!r} where it has {full[at : at + 40]!r}"
        raise Rejected("template_mismatch", f"the reply does not continue the prompt: {shown}")
    _check_kept(asked, tools, prompt, reply, full[len(prompt) :])
    # templates write a line break after the end-of-turn token, which no model is asked to generate
    end = full.rfind(chat.end)
    if end < len(prompt):
        raise Rejected("no_end_of_turn", f"the template does not close the reply with {chat.end!r}")
    return Example(prompt, full[len(prompt) : end + len(chat.end)], mode, conversation)


def _turn_mode(message: dict, mode: str, chat: Chat) -> str:
    reasoned = bool(message.get("reasoning_content"))
    if mode == "thinking" and not reasoned:
        raise Rejected(
            "no_reasoning",
            "mode is thinking, but the reply has no reasoning: it would teach an empty think block. Set mode: non_thinking "
            "(or auto), or use rows with reasoning",
        )
    if mode == "non_thinking" and reasoned:
        raise Rejected(
            "reasoning_in_non_thinking", "mode is non_thinking, but the reply has reasoning: set mode: auto or thinking"
        )
    if reasoned and chat.kind == "instruct":
        why = f"the reply has reasoning (mode: {mode}), but {chat.name} has no thinking mode (instruct)"
        raise Rejected("no_thinking_mode", f"{why}: choose a hybrid model, or leave this source out")
    return "thinking" if reasoned else "non_thinking"


def _check_kept(asked: list, tools: list | None, prompt: str, reply: dict, completion: str) -> None:
    """Templates for images drop text that is not a list of parts, others reasoning, tools or calls, and say nothing."""
    parts = [("text", m["content"], prompt) for m in asked if m["role"] in {"system", "user"}]
    parts += [("tool", tool["function"]["name"], prompt) for tool in tools or ()]
    parts += [("call", call["function"]["name"], prompt) for m in asked for call in m.get("tool_calls", ())]
    parts += [("answer", reply["content"], completion), ("reasoning", reply.get("reasoning_content", ""), completion)]
    parts += [("call", call["function"]["name"], completion) for call in reply.get("tool_calls", ())]
    for what, text, rendered in parts:
        if text.strip() not in rendered:
            raise Rejected(f"{what}_lost", f"the chat template leaves out the {what} {text.strip()[:60]!r}")


def last_switch(messages: list) -> str | None:
    """The latest soft switch a user typed: `think`, `no_think` or None. Qwen3 obeys the most recent one (model card)."""
    found = [s for m in messages if m["role"] == "user" for s in SWITCH.findall(m["content"])]
    return found[-1] if found else None


def with_switch(conversation: dict, chat: Chat) -> dict:
    """The same with /think or /no_think at the end of the last user turn, as the replies to it are.

    It stays as it is where they differ (a call without reasoning, then a reasoned answer), where a switch is typed
    already, and with a model that knows none."""
    messages = list(conversation["messages"])
    asked = max(i for i, m in enumerate(messages) if m["role"] == "user")
    reasoned = {bool(m.get("reasoning_content")) for m in messages[asked:] if m["role"] == "assistant"}
    question = messages[asked]["content"]
    if not chat.switches or chat.kind != "hybrid" or len(reasoned) > 1 or SWITCH.search(question):
        return conversation
    messages[asked] = messages[asked] | {"content": question + (" /think" if True in reasoned else " /no_think")}
    return conversation | {"messages": messages}


# --- Jinja as transformers sets it up (transformers/utils/chat_template_utils.py) --------------------------------------

DICT = frozenset(dir(dict))
PLAIN = (str, jinja2.runtime.LoopContext, jinja2.utils.Namespace)
GENERATION = re.compile(r"({%[-+]?\s*)(end)?generation\b")
"""`{% generation %}` marks assistant text for trainers; when rendering it means nothing."""


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which of the kinds in PLAIN refuses what begins with an underscore and nothing else.

    It asks eleven questions about every attribute to find that out, and looks for an attribute before it looks for a key, so
    that each key of a message costs an exception; rendering took three quarters as long again."""

    def getattr(self, obj, attribute: str):
        key = type(obj) is dict and attribute in obj and attribute not in DICT
        return obj[attribute] if key else super().getattr(obj, attribute)

    def is_safe_attribute(self, obj, attr: str, value) -> bool:
        return not attr.startswith("_") if type(obj) in PLAIN else super().is_safe_attribute(obj, attr, value)


def _compiled(template: str) -> jinja2.Template:
    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    env.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    env.globals |= {"raise_exception": _raise, "strftime_now": time.strftime}
    return env.from_string(GENERATION.sub(lambda tag: tag[1] + ("endif" if tag[2] else "if true"), template))


def _raise(message: str):
    raise jinja2.exceptions.TemplateError(message)
