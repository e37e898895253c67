"""What a conversation must be before anything trains on it: turns in order, clean text, reasoning split off.

messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>\\nA greeting.\\n</think>\\n\\nHello!"}]
checked({"messages": messages}, Placeholders({}))["messages"][1]["reasoning_content"]
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from toolkit.data.readers import Rejected
from toolkit.family import THINK_CLOSE, THINK_OPEN, THINK_TAG
from toolkit.records import Conversation, Json, Message, Messages

# Characters of one row: Qwen3's longest context, 131,072 tokens, holds about half of that.
MAX_TEXT = 1_000_000
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
CONTROLS = bytes(c for c in range(32) if CONTROL.match(chr(c)))
# What is left of calls in an answer that could not be read as calls.
CALL_TAG = re.compile("</?tool_(?:call|response)>")
CJK = re.compile("[\u3400-\u9fff]")
# The turns of a conversation by their first letters: system?, then user and assistant in turns, an answer or a call
# (c) at the end; results of tools follow a call, and only a call.
ORDER = re.compile("s?(?:u(?:ct+)*a)*u(?:ct+)*[ac]")
# Placeholder → a text, or one for Chinese rows (zh) and one for others (en).
Fillings = Mapping[Any, str | dict[str, str]]


@dataclass(frozen=True)
class Placeholders:
    """What fills {{NAME}} and {{AUTHOR}} in the rows of a source."""

    values: Fillings
    any_spelling: tuple[str, ...] = ()
    """Names that are filled in every spelling, {{name}} and {{ Name }} too; the source says so of itself."""

    PATTERN = re.compile(r"(?<!{){{\s*(name|author|authoer)\s*}}(?!})", re.IGNORECASE)
    EXACT = ("{{NAME}}", "{{AUTHOR}}", "{{AUTHOER}}")
    """As ms-swift's self-cognition sets spell them. In other spellings they are also code: Vue, Jinja, f-strings."""

    def fill(self, conversation: Conversation) -> Conversation:
        """A copy of a conversation with every placeholder filled, wherever it stands. Raises Rejected."""
        # through JSON text, so that tools and nested arguments are filled too
        text = json.dumps(conversation, ensure_ascii=False)
        language = "zh" if CJK.search(text) else "en"
        return json.loads(self.PATTERN.sub(lambda match: self._text(match, language), text))

    def _text(self, match: re.Match, language: str) -> str:
        key = match[1].upper().replace("AUTHOER", "AUTHOR")
        if match[0] not in self.EXACT and key not in self.any_spelling:
            return match[0]
        text = self.values.get(key)
        if isinstance(text, dict):
            key, text = f"{key}.{language}", text.get(language)
        if not text:
            raise Rejected("unfilled_placeholder", f"{match[0]} is not filled: set data.placeholders.{key}")
        return json.dumps(text)[1:-1]


def checked(conversation: Conversation, placeholders: Placeholders) -> Conversation:
    """A conversation with placeholders filled and reasoning split off. Raises Rejected."""
    check_order(conversation["messages"])
    # joined: one search in a long text is quicker than one in each of its parts
    texts = "\n".join(strings_of(conversation))
    # the plain search is quick, and hardly any row has a brace
    if "{{" in texts and placeholders.PATTERN.search(texts):
        conversation = placeholders.fill(conversation)
        texts = "\n".join(strings_of(conversation))
    check_text(texts)
    for turn, message in enumerate(conversation["messages"], start=1):
        where = f"turn {turn} ({message['role']})"
        if message["role"] == "assistant":
            split_reasoning(message, where)
        if not message["content"].strip() and message["role"] != "tool" and "tool_calls" not in message:
            raise Rejected("empty_content", f"{where} is blank")
    return conversation


def asked(messages: Messages) -> list[str]:
    """What the user says, turn by turn."""
    return [message["content"] for message in messages if message["role"] == "user"]


def check_order(messages: Messages) -> None:
    """Raises Rejected where the turns are not in ORDER."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise Rejected("no_assistant", f"the turns are {', '.join(roles) or 'none'}: nothing to learn")
    letters = ["c" if "tool_calls" in message else message["role"][0] for message in messages]
    if not ORDER.fullmatch("".join(letters)):
        raise Rejected(
            "no_answer" if roles[-1] != "assistant" else "role_order",
            f"the turns are {', '.join(roles)}: expected user and assistant in turns, results of tools only after a call, an "
            "assistant at the end",
        )


def strings_of(value: Json) -> Iterator[str]:
    """Every text in a value, keys of tools and calls included, as the template prints them too."""
    if type(value) is str:
        yield value
    elif type(value) is dict:
        for key, item in value.items():
            yield key
            yield from strings_of(item)
    elif type(value) is list:
        for item in value:
            yield from strings_of(item)


def check_text(texts: str) -> None:
    """All texts of a row at once, for what no text may hold; the tokenizer's own special tokens are `render`'s matter."""
    if len(texts) > MAX_TEXT:
        raise Rejected("row_too_long", f"{len(texts):,} characters; the limit is {MAX_TEXT:,}")
    try:
        raw = texts.encode()
    except UnicodeEncodeError as error:
        raise Rejected("broken_text", f"invalid Unicode: unpaired surrogate {texts[error.start]!r}") from error
    # Deleting bytes takes a sixth of the time of a character class: 5 µs for 10,000 characters.
    if len(raw.translate(None, CONTROLS)) != len(raw):
        raise Rejected("control_character", f"the text holds {CONTROL.findall(texts)[0]!r}")


def split_reasoning(message: Message, where: str) -> None:
    """Bring an assistant's message to the form of training: reasoning apart, no tag left, an answer without a margin."""
    content = message["content"]
    if THINK_TAG.search(content):
        reasoning, message["content"] = split_think(content, where)
        if reasoning and "reasoning_content" in message:
            raise Rejected("nested_think", f"{where} has reasoning both in its own field and in <think> tags")
        if reasoning:
            message["reasoning_content"] = reasoning
    elif "reasoning_content" in message or content.startswith(("\n", "\r")):
        # white space would open every reply; blanks alone may be the indentation of code
        message["content"] = content.lstrip()
    for text in (message["content"], message.get("reasoning_content", "")):
        # tags that belong to a conversation's own form: what is still there was not understood
        if tag := THINK_TAG.search(text) or CALL_TAG.search(text):
            raise Rejected("control_token", f"{where} has {tag[0]!r} inside its text, which is read as structure")


def split_think(content: str, where: str) -> tuple[str, str]:
    """(reasoning, answer) of assistant text that may begin with <think>…</think>. Raises Rejected.

    Strict, since a training row must be well-formed; `generate` reads what a model really wrote."""
    start = content.lstrip()
    tags = THINK_TAG.findall(content)
    if not tags:
        return "", content
    if not start.startswith(THINK_OPEN):
        raise Rejected("think_in_answer", f"{where}: a think tag that does not open the text")
    if THINK_CLOSE not in tags:
        raise Rejected("unclosed_think", f"{where}: {THINK_OPEN} without {THINK_CLOSE}")
    if len(tags) > 2:
        raise Rejected("nested_think", f"{where}: more than one think block")
    reasoning, _, answer = start.removeprefix(THINK_OPEN).partition(THINK_CLOSE)
    # what follows the block would open every reply: blanks and line breaks, Windows' too
    return reasoning.strip("\r\n") if reasoning.strip() else "", answer.lstrip()
