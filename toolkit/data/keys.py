"""What the keys of rows and turns mean, by the names that public data sets give them: one table in one place.

from toolkit.data.keys import meaning; meaning("Complex_CoT")      # reasoning; "" for a key that no rule knows
"""

import functools
import re

from toolkit.data.readers import Rejected
from toolkit.records import Json

MEANINGS = {
    # text of the model's own thinking, kept apart from the answer
    "reasoning": (
        "reasoning_content reasoning thinking think thought thoughts thought_process thinking_content thinking_process "
        "reasoning_trace reasoning_process thinking_trace thinking_trajectory thinking_trajectories cot long_cot "
        "complex_cot chain_of_thought rationale rationales scratchpad inner_monologue 思考 思考过程 推理 推理过程 思维链"
    ),
    "system": "system system_prompt system_message system_instruction system_instructions sys_prompt 系统 系统提示",
    "tools": "tools functions tool_schema tool_schemas available_tools tool_definitions function_definitions",
    "media": (
        "image images img imgs picture pictures photo photos image_url image_urls image_path image_paths img_path pixel_values "
        "video videos video_url video_path audio audios audio_url audio_path speech sound media attachments input_audio"
    ),
    # yes or no: whether the loss counts a turn, or a whole row
    "train": (
        "train training trainable trained is_trained is_train do_train train_on train_detail training_detail loss loss_mask "
        "loss_weight loss_scale weights train_mask turn_mask include_in_loss is_trainable compute_loss calculate_loss has_loss weight supervise supervised learn learnable"
    ),
    "no_train": "masked is_masked ignore ignored skip exclude excluded no_loss no_train ignore_loss mask_loss",
    # in some sets 1 is "hidden from the loss", in others "counted by it"
    "unclear": "mask",
    # yes or no: whether people liked the answer (KTO and other preference data)
    "good": "label kto_tag kto_label desirable is_desirable preferred is_preferred chosen is_chosen is_good thumbs_up",
    "bad": "rejected is_rejected bad is_bad undesirable is_undesirable dispreferred thumbs_down",
    "nested": "metadata meta extra extra_info info additional_info",
    # beside preferred answers, which are what is trained on
    "harmless": "rejected_response rejected_messages chosen_rating rejected_rating refusal_reason annotator",
}
BY_NAME = {re.sub(r"[\W_]", "", name): kind for kind, names in MEANINGS.items() for name in names.split()}
# Keys that say where a row is from or what somebody thinks of it, alone or at the end of a name: conversation_id.
HARMLESS = re.compile(
    r"(?:num|n)_.*|(?:.*[_.-])?(?:ids?|idx|index|key|uuid|guid|hash|md5|sha256|(?:data)?sources?|dataset|corpus|origin|license|url|link|path"
    r"|filename|split|subset|scores?|ratings?|rewards?|rank|quality|difficulty|level|pass_?rate.*|accuracy|inference_mode"
    r"|lang|languages?|locale|country|category|categories|topics?|domain|subject|field|task|skill|tags?|keywords|type|types|kind"
    r"|style|intent|title|author|creator|user_?name|model|generator|engine|version|temperature|top_?p|seed|date|time|timestamp"
    r"|created(?:_at)?|updated(?:_at)?|count|counts|tokens|length|len|size|number|toxic|toxicity|redacted"
    r"|moderation|pii|cluster|embedding|ngram|perplexity|ppl|finish_reason|stop_reason|usage|annotations|logprobs)",
    re.IGNORECASE,
)
# What a key called `reasoning` or `thinking` holds that says how to answer, /no_think with its stroke too.
SETTINGS = frozenset(
    "on off true false yes no 0 1 think no_think nothink thinking non_thinking low medium high minimal auto enabled disabled"
    " enable disable default".split()
)
# How tables write that a cell is empty.
NO_VALUE = frozenset(("", "[]", "{}", "nan", "null", "none", "n/a"))
# Last words of names like image_path, which say where something is, not what somebody thinks of it.
KEPT_AT = frozenset("path paths url urls link file filename".split())
# First words of names that say which of two answers is to be learned.
WON = frozenset("better safer best winner".split())
YES_OR_NO = dict.fromkeys("true yes on 1 1.0".split(), True) | dict.fromkeys("false no off 0 0.0".split(), False)
# Values of `label` that are classes of a classification, which say nothing of the answer.
CLASSES = ("yes", "no", "on", "off")


@functools.cache
def meaning(key: str) -> str:
    """One of MEANINGS for a key, `harmless`, or "" where no rule knows it; case and underscores aside."""
    known = BY_NAME.get(re.sub(r"[\W_]", "", key.lower()))
    if known or not HARMLESS.fullmatch(key):
        return known or ""
    # image_path is a picture, and reasoning_tokens something that a person should look at
    *heads, last = re.split(r"[\W_]+", key.lower())
    kinds = {BY_NAME.get(word, "nested") for word in heads} - {"nested"}
    if kinds == {"media"} and last in KEPT_AT:
        return "media"
    # better_response_id says which answer won
    return "" if kinds or not WON.isdisjoint(heads) else "harmless"


def is_empty(value: Json) -> bool:
    """Whether a value holds nothing: null, blank text, an empty list or object."""
    return value.strip().lower() in NO_VALUE if type(value) is str else value in (None, [], {})


def is_setting(key: str, value: Json) -> bool:
    """Whether a key named like reasoning says how to answer, instead of holding a text; reasoning_content only holds one."""
    return key != "reasoning_content" and str(value).strip().lower().lstrip("/") in SETTINGS


def yes_or_no(value: Json) -> bool | None:
    """A mark as truth, whether it is a truth value, a number or text; None for what is neither yes nor no."""
    return YES_OR_NO.get(str(value).strip().lower())


def is_trained(key: str, value: Json, where: str) -> bool:
    """Whether the loss counts a turn, by one of its marks. Raises Rejected for a mark that can be read in two ways."""
    # axolotl's train_detail is a list of spans of the text, each with its mark
    spans = value if type(value) is list else [value]
    # all spans agree, or the turn cannot be trained on as a whole
    marks = {yes_or_no(span.get("train") if type(span) is dict else span) for span in spans}
    if meaning(key) != "unclear" and marks in ({True}, {False}):
        return marks == {meaning(key) == "train"}
    raise Rejected(
        "unclear_mark",
        f"{where}{key!r} is {str(value)[:60]}: a turn is trained on whole or not at all. Call the key `train` and write "
        "true or false, or take it out",
    )


def is_good(key: str, value: Json) -> bool | None:
    """What a key of preference data says of the answer; None where it says nothing."""
    name = key.lower()
    word = str(value).strip().lower()
    says = yes_or_no(value)
    if meaning(key) == "bad":
        # `rejected` is mostly the text of the answer that lost, and such a text may be "yes"
        is_text = name == "rejected" and word not in ("true", "false")
        return None if is_text or says is None else not says
    # `chosen` is mostly the answer that won, which `formats` compares
    if name == "chosen" and type(value) in (str, list, dict) and says is None:
        return True
    if name == "label" and type(value) is str:
        if word in CLASSES:
            return None
        if word in ("undesirable", "rejected"):
            return False
    return says
