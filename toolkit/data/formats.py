"""Raw rows, in whatever convention they were kept, become one canonical conversation, or are rejected with a reason.

canonical({"query": "Hi", "response": "Hello!"}, "query_response", columns={}, placeholders={})
"""

import functools
import math
import re
from dataclasses import dataclass

from toolkit.data.conversation import Fillings, Placeholders, checked
from toolkit.data.keys import is_empty, is_setting, is_trained, meaning, yes_or_no
from toolkit.data.messages import TEXTS, Notes, field_of, read_notes, read_turns, role_of
from toolkit.data.readers import Rejected
from toolkit.data.tools import check_calls, parsed
from toolkit.family import THINK_OPEN
from toolkit.files import ToolkitError, did_you_mean
from toolkit.records import Conversation, Json, JsonObject, Messages

# What is read (COLUMN_KEYS) → the column that holds it.
Columns = dict[str, str]
# Column names by what they hold. A format is recognised by its columns, `input` apart.
FORMATS = {
    "alpaca": {"user": "instruction", "assistant": "output", "input": "input"},
    "messages": {"messages": "messages"},
    "sharegpt": {"messages": "conversations"},
    "query_response": {"user": "query", "assistant": "response"},
    "prompt_completion": {"user": "prompt", "assistant": "completion"},
    "openmath": {"user": "problem", "assistant": "generated_solution"},
    "question": {"user": "problem", "assistant": "expected_answer"},
    "preference": {"user": "prompt", "assistant": "chosen"},
    "preference_alpaca": {"user": "instruction", "assistant": "chosen", "input": "input"},
    "preference_question": {"user": "question", "assistant": "chosen"},
    "chosen": {"messages": "chosen"},
}
# Empty cells as pandas turns them into text; None and null may be answers.
NOT_A_NUMBER = ("nan", "NaN", "<NA>")
# Formats that give way to others that fit too: an openmath row holds a question as well.
POORER = ("question", "chosen", "preference_question", "preference_alpaca", "preference")
# How a list of calls begins.
CALLS = re.compile(r'\s*\[\s*\{\s*"name"\s*:\s*"[^"]*"\s*,\s*"(?:arguments|parameters)"\s*:')
# Roles of turns that an answer follows.
ASKING = ("system", "user")
SHARED = {"history": "history", "expected_answer": "expected_answer"}
COLUMN_KEYS = "user assistant input messages reasoning system history tools expected_answer".split()
# Words in column names, other languages' too, by what such a column holds.
LIKELY = {
    "user": "question instruction prompt query problem input user human 问题 提问 指令 输入 質問 질문 frage pregunta pergunta вопрос",
    "assistant": (
        "answer response output completion attempt solution reply chosen assistant 回答 答案 输出 回复 답변 antwort réponse reponse "
        "respuesta resposta ответ"
    ),
    "input": "context document passage 上下文",
}
# Words in the names of columns of which the answers must not be taught.
DISLIKED = re.compile(
    r"reject|worse|worst|negative|incorrect|wrong|unsafe|dispreferred|undesir|hallucinat|(?<![a-z])(?:bad|false|lose|loser|lost)(?![a-z])",
    re.IGNORECASE,
)
# How names end that differ in a number or letter: response_0, answer_a.
NUMBERED = re.compile(r"[\W_]*\d+$|[\W_]+[a-z]$")


@dataclass(frozen=True)
class RowReader:
    """Reads the rows of one source."""

    names: Columns
    """What is read → the column that holds it."""
    named_only: bool
    """Whether the recipe names the columns: no other is then taken for a system prompt, reasoning or tools."""
    placeholders: Placeholders
    system: str | None = None
    """The system prompt of rows that have none."""

    @functools.cached_property
    def kinds(self) -> dict[str, str]:
        """Column → what it holds: "text" is read here, the others by `read_notes`."""
        unread = "history" if "messages" in self.names else ""
        return {column: name if name in TEXTS else "text" for name, column in self.names.items() if name != unread}

    def read(self, row: JsonObject) -> tuple[Conversation, list[str]]:
        """A row's conversation, and the keys of row and turns that nothing read: "row label", "turn loss".

        Raises Rejected with the reason and the field or turn."""
        # what is beside the text comes first: a row that its set calls bad needs no further reading
        notes = read_notes(row, self.kinds, "", self.named_only)
        for key, value in notes.bad.items():
            raise Rejected(
                "marked_bad", f"{key!r} is {value}: preference data mark this answer as bad; it is not taught"
            )
        turns = self._turns(row)
        messages, turn_notes = read_turns(turns, marks_of_turns(notes, len(turns)))
        check_won(row, last_text(turns))
        add_system(messages, notes.system, self.system)
        # a column, other than a turn's key, may say how to answer instead
        reasoning = {key: value for key, value in notes.reasoning.items() if not is_setting(key, value)}
        notes.not_read += add_reasoning(messages, reasoning, "messages" in self.names)
        conversation = Conversation(messages=messages)
        tools = notes.tools + turn_notes.tools
        if tools:  # row and turns may each give all
            conversation["tools"] = [tool for place, tool in enumerate(tools) if tool not in tools[:place]]
        # only now are all tools known: a row may keep them in a column, in its system turn, or in both
        check_calls(messages, tools)
        answer = self._cell(row, "expected_answer")
        if answer not in (None, ""):
            conversation["expected_answer"] = expected_answer(answer)
        not_read = [f"row {key}" for key in notes.not_read] + [f"turn {key}" for key in turn_notes.not_read]
        return checked(conversation, self.placeholders), not_read

    def _turns(self, row: JsonObject) -> list[Json]:
        """The turns of a row, as they are kept, or made of its question and answer after the turns of its history."""
        names = self.names
        if "messages" in names:
            turns = field_of(row, names["messages"], list)
            # LLaMA-Factory's preference sets keep the answer that won beside the turns before it
            if type(row.get("chosen")) is dict and turns and role_of(turns[-1], len(turns)) in ASKING:
                return [*turns, row["chosen"]]
            return turns
        question, answer = row.get(names["user"]), row.get(names["assistant"])
        before = earlier_turns(row, names["history"]) if "history" in names else []
        texts = []
        # TRL's conversational prompt
        if type(question) is list:
            before += question
        elif type(answer) is not list or not is_empty(question):
            texts.append(field_of(row, names["user"]))
        if not is_empty(self._cell(row, "input")):
            texts.append(field_of(row, names["input"]))
        if texts:
            before.append({"role": "user", "content": "\n".join(text for text in texts if text.strip())})
        if type(answer) is not list:
            text = field_of(row, names["assistant"])
            if text.strip() in NOT_A_NUMBER:
                raise Rejected("empty_content", f"the answer is {text.strip()!r}, by which pandas writes an empty cell")
            # xLAM's answers are calls, as JSON text
            return [*before, {"role": "function_call" if CALLS.match(text) else "assistant", "content": text}]
        # preference sets often repeat the prompt in the answer; what is not repeated stays, or its role is out of order
        if answer and role_of(answer[0], 1) in ASKING:
            repeated = [last_text(turn) for turn in answer]
            before = [turn for turn in before if last_text(turn) not in repeated]
        return [*before, *answer]

    def _cell(self, row: JsonObject, part: str) -> Json:
        """The value of the column that this format has for a part; None where it has none, as a column may be called ''."""
        return row.get(self.names[part]) if part in self.names else None


def reader_of(
    format: str,
    columns: Columns,
    placeholders: Placeholders,
    system: str | None = None,
) -> RowReader:
    """The reader of a source's rows in a format of FORMATS, or by the recipe's own `columns`."""
    named_only = format == "columns"
    return RowReader(columns if named_only else SHARED | FORMATS[format], named_only, placeholders, system)


def canonical(
    row: JsonObject,
    format: str,
    columns: Columns,
    placeholders: Fillings,
) -> Conversation:
    """One raw row as {"messages": […], "tools": […] if any, "expected_answer": "…" if any}.

    Messages hold role, content, and where there is any reasoning_content and tool_calls (arguments as an object);
    train: False is a turn that its set leaves out of training. Raises Rejected with the reason and the field or turn."""
    return reader_of(format, columns, Placeholders(placeholders)).read(row)[0]


def check_won(row: JsonObject, answer: str) -> None:
    """Raises Rejected for an answer that is not the one that a row's preference data say won."""
    won, *lost = [last_text(row.get(key)) for key in ("chosen", "rejected", "rejected_response")]
    # a yes or no is a mark; where the answers that won and lost are the same there is nothing to tell apart
    is_won = answer not in lost if is_empty(won) or yes_or_no(won) is not None else answer == won
    if answer and not is_won:
        raise Rejected("marked_bad", f"{answer[:40]!r} is not `chosen`, or is `rejected`: it is not taught")


def last_text(value: Json) -> str:
    """The text, without its reasoning, of a text, a turn or the last of turns."""
    if type(value) is str and value.startswith("[{"):
        value = parsed(value, "", "wrong_type")
    if type(value) is list and value:
        value = value[-1]
    if type(value) is dict:
        value = value.get("content") or value.get("value")
    return str(value or "").rpartition("</think>")[2].strip()


def marks_of_turns(notes: Notes, count: int) -> list[bool]:
    """A row's own marks for each of its turns, as in loss_mask: [0, 1]. Other numbers (a loss, a weight) are not read.

    Raises Rejected for a row that is marked as a whole."""
    trained = [True] * count
    # one mark that says no is enough: sets repeat it under several names
    for key, value in notes.marks.items():
        marks = field_of(notes.marks, key, list) if type(value) is str and "[" in value else value
        if type(marks) is list:
            if len(marks) != count:
                raise Rejected("unclear_mark", f"{key!r} has {len(marks)} marks for {count} turns")
            said = [is_trained(key, mark, f"turn {number}: ") for number, mark in enumerate(marks, start=1)]
            trained = [*map(min, trained, said)]
        elif yes_or_no(value) is None or meaning(key) == "unclear":
            notes.not_read.append(key)
        elif not is_trained(key, value, ""):
            raise Rejected("untrained_row", f"{key!r} is {value}: the row is marked as not to be trained on")
    return trained


def add_system(messages: Messages, columns: JsonObject, default: str | None) -> None:
    """Put a row's system prompt, or else its source's, before the turns. Raises Rejected where a row has two."""
    turn = [message["content"] for message in messages[:1] if message["role"] == "system"]
    texts = [*(field_of(columns, column) for column in columns), *turn]
    # many sets repeat the system turn in a column; two that differ leave nobody to say which one holds
    if len({*map(str.strip, texts)}) > 1:
        raise Rejected("two_system_prompts", f"one is {texts[0][:40]!r}, another {texts[-1][:40]!r}")
    # the source's prompt is a default: it never replaces a row's own
    prompt = texts[0] if texts else default
    if prompt and messages and not turn:
        messages.insert(0, {"role": "system", "content": prompt})


def add_reasoning(messages: Messages, columns: JsonObject, listed: bool) -> list[str]:
    """Give the last turn the reasoning of a column, a text or a list of one; returns the columns that say something else than
    what it has. Raises Rejected.

    Where turns are `listed`, the turn's own reasoning goes first."""
    if not messages or messages[-1]["role"] != "assistant":
        return [*columns]
    last = messages[-1]
    ignored = []
    for column in columns:
        value = columns[column]
        is_lone = type(value) is list and len(value) == 1 and type(value[0]) is str
        text = value[0] if is_lone else field_of(columns, column)
        known = last.get("reasoning_content") or (last["content"] if THINK_OPEN in last["content"] else "")
        if "reasoning_content" not in last and not (known and listed):
            last["reasoning_content"] = text.strip("\r\n")
        elif text.strip() not in known:
            ignored.append(column)
    return ignored


def expected_answer(value: Json) -> str:
    """The answer a row is judged by, which JSON files keep as a number and CSV files as text. Raises Rejected."""
    if type(value) in (int, float) and math.isfinite(value):
        return str(value)
    return field_of({"expected_answer": value}, "expected_answer")


def earlier_turns(row: JsonObject, column: str) -> list[Json]:
    """The turns of a history, which is kept as [[question, answer], …]."""
    turns = []
    for pair in field_of(row, column, list, default=[]):
        if type(pair) is not list or len(pair) != 2:
            raise Rejected("wrong_type", f"{column!r} holds {pair!r}, expected [question, answer]")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


# --- which format a source has ---------------------------------------------------------------------------------------


def recognise(
    fields: list[str],
    format: str,
    columns: Columns,
    where: str,
) -> str:
    """The name of a source's format: checked where it is given, found by the fields where it is `auto`.

    Raises ToolkitError that lists the fields and what to write where they fit none or several.
    """
    if format == "columns" or (columns and format == "auto"):
        return _check_columns(fields, columns, where)
    if format in FORMATS and not columns and set(signature(format)) <= set(fields):
        return format
    names = fitting(fields)
    # a format that is named wrongly is explained, never replaced by another that fits
    if format == "auto":
        if len(names) == 1:
            return names[0]
        problem = f"fits several formats: set `format:` to one of {', '.join(names)}" if names else "no known format"
    elif format not in FORMATS:
        problem = f"unknown format {format!r}: expected auto, columns, {', '.join(FORMATS)}"
    elif columns:
        problem = f"`columns` goes with `format: columns`, not with {format!r}"
    else:
        problem = f"not {format}, which needs {' and '.join(signature(format))}"
    raise ToolkitError(f"{where}: {problem}; the row's fields are {', '.join(fields)}. {advice(fields)}")


def fitting(fields: list[str]) -> list[str]:
    """The formats whose columns are all among the fields."""
    names = [name for name in FORMATS if set(signature(name)) <= set(fields)]
    for poorer in POORER:
        if len(names) > 1 and poorer in names:
            names.remove(poorer)
    return names


def signature(format: str) -> list[str]:
    """The columns that make a format: all but `input`."""
    return [column for key, column in FORMATS[format].items() if key != "input"]


def _check_columns(fields: list[str], columns: Columns, where: str) -> str:
    """`columns`, as a format, where the recipe's own names can be read."""
    for key, column in columns.items():
        if key not in COLUMN_KEYS:
            raise ToolkitError(f"{where}: columns.{key}: expected one of {', '.join(COLUMN_KEYS)}")
        if column not in fields:
            raise ToolkitError(f"{where}: columns.{key}: no field {column!r}{did_you_mean(str(column), fields)}")
    if "messages" not in columns and not {"user", "assistant"} <= columns.keys():
        raise ToolkitError(f"{where}: columns needs `user` and `assistant` (or `messages`). {advice(fields)}")
    # it is one slip of the pen from `chosen` to `rejected`, and nothing else would tell
    answers = columns.get("messages") or columns["assistant"]
    if DISLIKED.search(answers):
        raise ToolkitError(f"{where}: {answers!r} holds the answers that must not be learned. {advice(fields)}")
    return "columns"


def likely_columns(fields: list[str]) -> Columns:
    """{role: column} as the names of the columns suggest; a role without a likely column is left out."""
    columns = {meaning(field): field for field in reversed(fields) if meaning(field) in TEXTS}
    rest = [field for field in fields if not DISLIKED.search(field) and meaning(field) not in ("harmless", *TEXTS)]
    for field in filter(is_reasoning, rest):
        columns.setdefault("reasoning", field)
    for kind, words in LIKELY.items():
        # in order of their weight: `question` before `input`
        for word in words.split():
            hits = [field for field in rest if word in field.lower() and field not in columns.values()]
            # `answer` before `answer_de`, `corrected_answer` before `original_answer`
            hits.sort(key=lambda field: (field.lower() != word, "original" in field.lower()))
            if hits:
                # of response_0 and response_1 only their owner knows which one is good
                if len({NUMBERED.sub("", field.lower()) for field in hits}) == len(hits) or hits[0].lower() == word:
                    columns[kind] = hits[0]
                break
    return columns


def is_reasoning(field: str) -> bool:
    """Whether a column's name ends in words for reasoning: deepseek_reasoning, gemini_thinking_trajectory."""
    words = field.split("_")
    return any(meaning("_".join(words[start:])) == "reasoning" for start in range(len(words)))


def advice(fields: list[str]) -> str:
    """What to write in the recipe for rows that are not recognised: the columns, by likely names."""
    if fields == ["text"]:
        return "Plain text has no question and answer to tell apart: split it into `prompt` and `completion`"
    columns = {"user": "…", "assistant": "…"} | likely_columns(fields)
    if columns["assistant"] == "…" and len(fields) == 1:
        return f"The rows have {fields[0]!r} and no answer: there is nothing to learn from a question alone"
    named = ", ".join(f"{key}: {columns[key]}" for key in COLUMN_KEYS if key in columns)
    return f"To name the columns: columns: {{{named}}}"
