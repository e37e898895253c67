"""The label rule: a conversation becomes the prompt that inference shows, and the completion it must give.

from toolkit.data.render import load_chat, examples; examples({"messages": messages}, "auto", load_chat("pocket"))
"""

import os
from dataclasses import dataclass

from toolkit.data.chat import Chat, chat_of, load_chat
from toolkit.data.conversation import asked
from toolkit.data.readers import Rejected
from toolkit.family import SWITCH
from toolkit.records import Conversation, JsonObject, Message, Messages

__all__ = ["Chat", "chat_of", "load_chat"]


@dataclass(frozen=True)
class Example:
    """One supervised turn as text: labels are `completion`, nothing else."""

    prompt: str
    completion: str
    mode: str
    conversation: Conversation
    """Up to and including the supervised turn."""


def examples(
    conversation: Conversation,
    mode: str,
    chat: Chat,
    turns: str = "last",
) -> list[Example]:
    """The label rule, for each supervised assistant turn that its set does not leave out of training.

    `mode` is thinking, non_thinking or auto (a turn with reasoning is thinking); `turns` is last or each. Raises
    Rejected when a turn cannot be supervised: reasoning where `mode` or the model has none, no reasoning where `mode`
    asks for it, special tokens in the text, or a rendering that loses text or does not continue the prompt.
    """
    messages = conversation["messages"]
    check_special_tokens(conversation, chat)
    positions = [i for i in supervised_turns(messages, turns) if messages[i].get("train", True)]
    if not positions:
        raise Rejected("untrained_turn", "its set marks the turn as not to be trained on")
    # a row of n answers is one example, or n: Qwen's template drops the reasoning of earlier turns, so that no single
    # rendering shows every turn as inference does
    made = [example_of({**conversation, "messages": messages[: i + 1]}, mode, chat) for i in positions]
    for example in made:
        if len(example.conversation["messages"]) < len(messages):
            example.conversation.pop("expected_answer", None)  # which is that of the last turn
    return made


def supervised_turns(messages: Messages, turns: str) -> list[int]:
    """Places of the assistant turns that `turns` asks for."""
    positions = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return positions[-1:] if turns == "last" else positions


def check_special_tokens(conversation: Conversation, chat: Chat) -> None:
    """Raises Rejected for a text that holds what the tokenizer at hand reads as structure."""
    texts = [str(conversation.get("tools", ""))]
    for message in conversation["messages"]:
        texts += [message["content"], message.get("reasoning_content", ""), str(message.get("tool_calls", ""))]
    if hit := chat.special.search("\n".join(texts)):
        raise Rejected("control_token", f"the text holds {hit.group()!r}, which {chat.name} reads as structure")


def example_of(conversation: Conversation, mode: str, chat: Chat) -> Example:
    """The prompt of a conversation without its last turn, and what the last turn adds to it."""
    *before, reply = conversation["messages"]
    tools = conversation.get("tools")
    mode = turn_mode(reply, mode, chat)
    # After /no_think Qwen3 writes the empty block itself: inference shows the prompt of thinking mode, so it is taught
    thinking_prompt = mode == "thinking" or (chat.switches and last_switch(before) == "no_think")
    prompt = chat.render(before, tools, thinking_prompt)
    full = chat.render(conversation["messages"], tools, thinking_prompt, add_generation_prompt=False)
    # templates that rewrite earlier turns, e.g. drop their reasoning, once a reply follows
    if not full.startswith(prompt):
        at = len(os.path.commonprefix([prompt, full]))  # noqa: RUF071 - it is character by character that is wanted
        shown = f"prompt has {prompt[at : at + 40]!r} where it has {full[at : at + 40]!r}"
        raise Rejected("template_mismatch", f"the reply does not continue the prompt: {shown}")
    check_kept(before, tools or [], prompt, reply, full[len(prompt) :])
    # templates write a line break after the end-of-turn token, which no model is asked to generate
    end = full.rfind(chat.end)
    if end < len(prompt):
        raise Rejected("no_end_of_turn", f"the template does not close the reply with {chat.end!r}")
    return Example(prompt, full[len(prompt) : end + len(chat.end)], mode, conversation)


def turn_mode(reply: Message, mode: str, chat: Chat) -> str:
    """The mode a reply is taught in. Raises Rejected where neither the source's mode nor the model allows it."""
    if "reasoning_content" not in reply:
        if mode == "thinking":
            raise Rejected(
                "no_reasoning",
                "mode is thinking, but the reply has no reasoning: it would teach an empty think block. Set mode: "
                "non_thinking (or auto), or use rows with reasoning",
            )
        return "non_thinking"
    if mode == "non_thinking":
        raise Rejected(
            "reasoning_in_non_thinking", "mode is non_thinking, but the reply has reasoning: set mode: auto or thinking"
        )
    if chat.kind == "instruct":
        raise Rejected(
            "no_thinking_mode",
            f"the reply has reasoning (mode: {mode}), but {chat.name} has no thinking mode (instruct): choose a hybrid "
            "model, or leave this source out",
        )
    return "thinking"


def check_kept(
    before: Messages,
    tools: list[JsonObject],
    prompt: str,
    reply: Message,
    completion: str,
) -> None:
    """Templates for images drop text that is not a list of parts, others reasoning, tools or calls, and say nothing."""
    for tool in tools:
        _expect("tool", tool["function"]["name"], prompt)
    for message in before:
        if message["role"] in ("system", "user"):
            _expect("text", message["content"], prompt)
    _expect("answer", reply["content"], completion)
    _expect("reasoning", reply.get("reasoning_content", ""), completion)
    for message in [*before, reply]:
        for call in message.get("tool_calls", ()):
            _expect("call", call["function"]["name"], completion if message is reply else prompt)


def _expect(what: str, text: str, rendered: str) -> None:
    if text.strip() not in rendered:
        raise Rejected(f"{what}_lost", f"the chat template leaves out the {what} {text.strip()[:60]!r}")


# --- Qwen3's soft switches -------------------------------------------------------------------------------------------


def last_switch(messages: Messages) -> str | None:
    """The latest soft switch a user typed: `think`, `no_think` or None. Qwen3 obeys the most recent one (model card)."""
    # joined by a line break, at which a switch ends
    typed = SWITCH.findall("\n".join(asked(messages)))
    return typed[-1] if typed else None


def with_switch(conversation: Conversation, chat: Chat) -> Conversation:
    """The same with /think or /no_think at the end of the last user turn, as the replies to it are.

    It stays as it is where they differ (a call without reasoning, then a reasoned answer), where a switch is typed
    already, and with a model that knows none."""
    if not chat.switches or chat.kind != "hybrid":
        return conversation
    messages = list(conversation["messages"])
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    question = messages[last]["content"]
    reasoned = {"reasoning_content" in message for message in messages[last:] if message["role"] == "assistant"}
    if len(reasoned) > 1 or SWITCH.search(question):
        return conversation
    switch = "/no_think" if False in reasoned else "/think"
    messages[last] = {"role": "user", "content": f"{question} {switch}"}
    return {**conversation, "messages": messages}
