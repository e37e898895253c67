"""A model's chat template and tokenizer: conversation to text, text to ids, as transformers gives them.

from toolkit.data.chat import load_chat; load_chat("pocket").render([{"role": "user", "content": "Hi"}])
"""

import functools
import re
from typing import TYPE_CHECKING, cast

import jinja2
import numpy as np

from toolkit.data.readers import Rejected
from toolkit.data.tokenize import TEMPLATE_ERRORS, Sandbox, Tokenizers, compile_template, loaded
from toolkit.family import ANSWERED_PROBE, PROBE, PROBE_REPLY, STRUCTURE, end_of_turn, family_of, kind_of
from toolkit.files import POCKET, ToolkitError, download, find, read_json, read_text
from toolkit.records import Json, JsonObject, Messages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json")
# What a template may ask the tokenizer for (transformers' special_tokens_map).
TOKENS = [f"{name}_token" for name in "bos eos unk sep pad cls mask".split()]
# How a tokenizer.json of SentencePiece's kind (Llama 2, Mistral, Phi-3) says that a space is put before every text,
# and how it says that none is.
SPACE_BEFORE = (
    (r'("prepend":\s*)"[^"]+"', r'\1""'),
    (r'("prepend_scheme":\s*)"(?:first|always)"', r'\1"never"'),
)


class Chat:
    """`render` equals `tokenizer.apply_chat_template(tokenize=False)`, `encode` equals the Hugging Face tokenizer's ids."""

    def __init__(
        self,
        name: str,
        tokenizer_json: str,
        template: str | None,
        tokens: dict[str, str],
        model_type: str | None = None,
    ):
        self.name = name
        self.json = tokenizer_json
        self.template_text = template
        self.tokens = tokens
        # whether /think and /no_think in a user turn mean something; taken for granted where the family is unknown
        self.switches = model_type is None or family_of(model_type).switches
        self.tokenizers = loaded(tokenizer_json)

    # --- text

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        if self.template_text is None:
            raise ToolkitError(
                f"{self.name}: has no chat template: a base model cannot hold a conversation. Choose an instruct or "
                "hybrid model (e.g. unsloth/Qwen3-4B), or save a chat_template.jinja beside its tokenizer.json"
            )
        try:
            return compile_template(self.template_text, self.name)
        except jinja2.TemplateSyntaxError as error:
            raise ToolkitError(f"{self.name}: chat_template.jinja, line {error.lineno}: {error.message}") from error

    def render(
        self,
        messages: Messages,
        tools: list[JsonObject] | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text a model sees, as `apply_chat_template` gives it; `enable_thinking=None` leaves the switch out.

        Raises Rejected with the template's own words where it refuses the messages."""
        if any("train" in message for message in messages):  # our own key, of which no template knows
            messages = [message.copy() for message in messages]
            for message in messages:
                message.pop("train", None)
        values = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt, **self.tokens}
        if enable_thinking is not None:
            values["enable_thinking"] = enable_thinking
        template = self._template
        cast(Sandbox, template.environment).steps = 0
        try:
            return template.render(values)
        except ToolkitError:  # a loop without an end is the template's fault, not the row's
            raise
        except TEMPLATE_ERRORS as error:
            raise Rejected("template_error", f"the chat template of {self.name} refuses it: {error}") from error

    def _probe(self, messages: Messages, **values: Json) -> str:
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
        """The token that ends a turn. Raises ToolkitError for a template that does not mark where a reply begins or ends,
        and where the tokenizer lacks the token: both make a model that never stops, which is seen only after training."""
        # three renderings of one question: with its reply, without, and as inference asks
        full = self._probe(ANSWERED_PROBE, add_generation_prompt=False)
        prompt = self._probe(PROBE, add_generation_prompt=False)
        # Mistral's templates have no header of a reply: what closes the question is followed by it
        headless = full.removeprefix(prompt).lstrip().startswith(PROBE_REPLY)
        if self._probe(PROBE) == prompt and not headless:
            raise ToolkitError(
                f"{self.name}: its chat template has no generation prompt (add_generation_prompt changes nothing), so "
                "a reply cannot be told from its header. Use the model's official template: chat_template.jinja"
            )
        if end := end_of_turn(self._probe, self.tokenizers.added):
            return end
        raise ToolkitError(
            f"{self.name}: its chat template ends a reply with {full.rpartition(PROBE_REPLY)[2].strip()!r}, which is no "
            "token of its tokenizer.json: the model would never stop. Take both files from the same instruct model"
        )

    @functools.cached_property
    def special(self) -> re.Pattern:
        """Matches what the tokenizer reads as structure wherever it stands: its special tokens, and of the other added ones
        those that look like it or are written by the template (Qwen's <tool_call>; not Gemma's <h1>)."""
        template = self.template_text or ""
        # Gemma's added tokens hold line breaks and HTML tags, which are ordinary text
        tokens = [
            re.escape(token)
            for token, special in sorted(self.tokenizers.added.items(), key=lambda item: -len(item[0]))
            if special or STRUCTURE.fullmatch(token) or (token.startswith("<") and token in template)
        ]
        return re.compile("|".join(tokens) or "(?!)")

    # --- ids

    @functools.cached_property
    def following(self) -> Tokenizers:
        """The tokenizers for text that follows other text, where no space is put before it."""
        head, mark, tail = self.json.partition('"vocab"')
        plain = head
        for pattern, none in SPACE_BEFORE:
            plain = re.sub(pattern, none, plain)
        return self.tokenizers if plain == head else Tokenizers(plain + mark + tail)

    @property
    def slow_reason(self) -> str | None:
        """Why `encode` uses Hugging Face's tokenizer instead of the fast one; None where it does not."""
        return self.tokenizers.slow_reason or self.following.slow_reason

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, special tokens recognised, nothing added."""
        return [ids.tolist() for ids in self.tokenizers.encode(texts)]

    def decode(self, ids: "Sequence[int] | np.ndarray") -> str:
        """Text of token ids, special tokens included."""
        return self.tokenizers.reference.decode(list(ids), skip_special_tokens=False)


def load_chat(model_name: str, revision: str | None = None) -> Chat:
    """Template and tokenizer of a local folder or a Hub model. Raises ToolkitError when neither can be reached."""
    folder = POCKET if model_name == "pocket" else find(model_name) or download(model_name, revision, FILES)
    tokenizer, settings_file, template_file, config = (folder / name for name in FILES)
    for file in (tokenizer, settings_file):
        if not file.is_file():
            raise ToolkitError(f"{model_name}: {file.name} not found: expected a model folder or a Hub name")
    settings = read_json(settings_file)
    # newer checkpoints keep the template in a file of its own, older ones in their settings
    template = read_text(template_file) if template_file.is_file() else settings.get("chat_template")
    if isinstance(template, list):  # several templates by name, as some checkpoints of 2024 have
        template = {t["name"]: t["template"] for t in template}["default"]
    # one that is null is left out: a template would print None
    tokens = {name: settings[name] for name in TOKENS if settings.get(name)}
    for name, token in tokens.items():
        if isinstance(token, dict):  # AddedToken, described as an object
            tokens[name] = token["content"]
    model_type = read_json(config).get("model_type") if config.is_file() else None
    return Chat(model_name, tokenizer.read_text(encoding="utf-8"), template, tokens, model_type)


def chat_of(tokenizer: "PreTrainedTokenizerBase") -> Chat:
    """The same from a loaded transformers tokenizer, so that a mix is rendered by the very template a model trains with."""
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name
        template = template["default"]
    return Chat(tokenizer.name_or_path, tokenizer.backend_tokenizer.to_str(), template, tokenizer.special_tokens_map)
