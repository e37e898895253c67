"""The label rule, checked without toolkit.data.render: transformers' own template and tokenizer, and plain string work.

wrong = violations(tokenizer, ids, prompt_length, conversation)   # [] when the row teaches exactly what inference lacks
"""

import re


def violations(tokenizer, ids, prompt_length, conversation, end="<|im_end|>") -> list[str]:
    """What is wrong with one compiled row, given the conversation it came from (its last turn is the supervised one)."""
    messages, tools = conversation["messages"], conversation.get("tools")
    reply = messages[-1]
    reasoned = bool(reply.get("reasoning_content"))
    users = " ".join(m["content"] for m in messages if m["role"] == "user")
    typed = re.findall(r"(?<!\S)/(?:no_)?think(?!\S)", users)
    switched = bool(typed) and typed[-1] == "/no_think"
    shown = tokenizer.apply_chat_template(
        messages[:-1], tools=tools, tokenize=False, add_generation_prompt=True, enable_thinking=reasoned or switched
    )
    prompt, taught = tokenizer.decode(ids[:prompt_length]), tokenizer.decode(ids[prompt_length:])
    wrong = []
    if prompt != shown:
        wrong.append(f"prompt is not what inference shows: {prompt!r} != {shown!r}")
    if list(ids[:prompt_length]) != tokenizer(shown, add_special_tokens=False)["input_ids"]:
        wrong.append("prompt ids are not what inference tokenizes")
    if not taught.endswith(end) or taught.count(end) != 1:
        wrong.append(f"the reply does not end in one end-of-turn: {taught[-30:]!r}")
    if re.search(r"<think>\s*</think>", taught) and not switched:
        wrong.append("an empty think block is taught")
    body = taught.removesuffix(end)
    for said in (reply["content"], reply.get("reasoning_content", "")):
        if said.strip("\n") not in body:
            wrong.append(f"the reply lacks {said[:40]!r}")
    for call in reply.get("tool_calls", ()):
        name = call["function"]["name"]  # as JSON, or in XML (Qwen3.5)
        if f'"name": "{name}"' not in body and f"<function={name}>" not in body:
            wrong.append(f"the call of {call['function']['name']} is not taught")
    rest = body
    for said in (reply["content"].strip("\n"), reply.get("reasoning_content", "").strip("\n")):
        rest = rest.replace(said, "", 1) if said else rest
    calls = re.sub(r"<tool_call>.*?</tool_call>", "", rest, flags=re.DOTALL) if reply.get("tool_calls") else rest
    if re.sub(r"</?think>|\s", "", calls):
        wrong.append(f"something else is taught: {calls!r}")
    return wrong
