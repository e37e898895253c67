"""Raw rows, in whatever convention they were kept, become one canonical conversation, or are rejected with a reason.

canonical({"query": "Hi", "response": "Hello!"}, "query_response", columns={}, placeholders={})
"""

import functools
import math
from dataclasses import dataclass

from toolkit.data.conversation import Placeholders, checked
from toolkit.data.keys import is_empty, is_setting, is_trained, meaning, yes_or_no
from toolkit.data.messages import Notes, field_of, read_notes, read_turns
from toolkit.data.readers import Rejected
from toolkit.data.tools import check_calls, read_schema
from toolkit.family import THINK_OPEN
from toolkit.files import ToolkitError, did_you_mean
from toolkit.records import Conversation, Json, Message

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
"""Column names by what they hold. A format is recognised by its columns, `input` apart."""
POORER = ("question", "chosen", "preference_question", "preference_alpaca", "preference")
"""Formats that give way to others that fit too: an openmath row holds a question as well."""
SHARED = {"history": "history", "expected_answer": "expected_answer"}
COLUMN_KEYS = ("user", "assistant", "input", "messages", "reasoning", "system", "history", "tools", "expected_answer")
LIKELY = {
    "user": "question instruction prompt query problem input user human 问题 提问 指令 输入 質問 질문 frage pregunta pergunta вопрос",
    "assistant": (
        "answer response output completion solution reply chosen assistant 回答 答案 输出 回复 답변 antwort réponse reponse "
        "respuesta resposta ответ"
    ),
    "input": "context document passage 上下文",
}
"""Words in column names, other languages' too, by what such a column holds."""
DISLIKED = ("reject", "worse", "negative", "incorrect", "wrong")
"""Words in the names of columns of which the answers must not be taught."""


@dataclass(frozen=True)
class RowReader:
    """Reads the rows of one source."""

    names: dict[str, str]
    """What is read → the column that holds it."""
    named_only: bool
    """Whether the recipe names the columns: no other is then taken for a system prompt, reasoning or tools."""
    placeholders: Placeholders
    system: str | None = None
    """The system prompt of rows that have none."""

    @functools.cached_property
    def columns(self) -> frozenset[str]:
        """The columns that hold what is read."""
        return frozenset(self.names.values())

    def read(self, row: dict[str, Json]) -> tuple[Conversation, list[str]]:
        """A row's conversation, and the keys of row and turns that nothing read: "row label", "turn loss".

        Raises Rejected with the reason and the field or turn."""
        # what is beside the text comes first: a row that its set calls bad needs no further reading
        notes = read_notes(row, self.columns, "", self.named_only)
        self._check_marks(notes)
        turns = self._turns(row)
        messages, turn_notes = read_turns(turns, self._marks_of_turns(notes, len(turns)))
        if self.named_only:
            self._add_named(row, notes)
        else:  # a column, other than a turn's key, may say how to answer instead
            notes.reasoning = {key: value for key, value in notes.reasoning.items() if not is_setting(key, value)}
        add_system(messages, notes.system, self.system)
        notes.not_read += add_reasoning(messages, notes.reasoning, "messages" in self.names)
        conversation: Conversation = {"messages": messages}
        if tools := without_repeats(notes.tools + turn_notes.tools):
            conversation["tools"] = tools
        # only now are all tools known: a row may keep them in a column, in its system turn, or in both
        check_calls(messages, tools)
        answer = row.get(self.names.get("expected_answer", ""))
        if answer not in (None, ""):
            conversation["expected_answer"] = expected_answer(answer)
        not_read = [f"row {key}" for key in notes.not_read] + [f"turn {key}" for key in turn_notes.not_read]
        return checked(conversation, self.placeholders), not_read

    def _check_marks(self, notes: Notes) -> None:
        """Raises Rejected for a row that its set calls bad, or leaves out of training."""
        if notes.bad:
            raise Rejected("marked_bad", f"{notes.bad}: preference data mark this answer as bad; it is not taught")
        for key, value in notes.marks.items():
            # a number such as 0.7 is a statistic of the row, and a list has a mark for each turn
            if yes_or_no(value) is not None and meaning(key) != "unclear" and not is_trained(key, value, ""):
                raise Rejected("untrained_row", f"{key!r} is {value}: the row is marked as not to be trained on")

    def _marks_of_turns(self, notes: Notes, count: int) -> list[bool] | None:
        """A row's own mark for each of its turns, as in loss_mask: [0, 1]. Other numbers (a loss, a weight) are not read."""
        for key, value in notes.marks.items():
            marks = field_of({key: value}, key, list) if type(value) is str and "[" in value else value
            if type(marks) is not list:
                if yes_or_no(value) is None or meaning(key) == "unclear":
                    notes.not_read.append(key)
                continue
            if len(marks) != count:
                raise Rejected("unclear_mark", f"{key!r} has {len(marks)} marks for {count} turns")
            return [is_trained(key, mark, f"turn {number}: ") for number, mark in enumerate(marks, start=1)]
        return None

    def _turns(self, row: dict[str, Json]) -> list[Json]:
        """The turns of a row, as they are kept, or made of its question and answer after the turns of its history."""
        names = self.names
        if "messages" in names:
            turns = field_of(row, names["messages"], list)
            # LLaMA-Factory's preference sets keep the answer that won beside the turns before it
            is_open = bool(turns) and _speaker(turns[-1]) in ("user", "human")
            return [*turns, row["chosen"]] if is_open and type(row.get("chosen")) is dict else turns
        asked, answer = row.get(names["user"]), row.get(names["assistant"])
        # TRL's conversational prompt and completion; preference sets often repeat the prompt in the answer
        if type(answer) is list and answer[:1] and _speaker(answer[0]) in ("system", "user", "human"):
            return answer
        if type(asked) is not list:
            parts = [field_of(row, names["user"]), field_of(row, names.get("input", ""), default="")]
            asked = [{"role": "user", "content": "\n".join(part for part in parts if part.strip())}]
        if type(answer) is not list:
            answer = [{"role": "assistant", "content": field_of(row, names["assistant"])}]
        return [*earlier_turns(row, names.get("history", "")), *asked, *answer]

    def _add_named(self, row: dict[str, Json], notes: Notes) -> None:
        """The columns that the recipe names for what is not a turn."""
        if "tools" in self.names:
            notes.tools = read_schema(row.get(self.names["tools"]), "'tools': ")
        for kind, held in (("system", notes.system), ("reasoning", notes.reasoning)):
            column = self.names.get(kind)
            if column and not is_empty(row.get(column)):
                held[column] = row[column]


def reader_of(format: str, columns: dict[str, str], placeholders: Placeholders, system: str | None = None) -> RowReader:
    """The reader of a source's rows in a format of FORMATS, or by the recipe's own `columns`."""
    named_only = format == "columns"
    names = columns if named_only else {**SHARED, **FORMATS[format]}
    return RowReader(names, named_only, placeholders, system)


def canonical(
    row: dict[str, Json], format: str, columns: dict[str, str], placeholders: dict, system: str | None = None
) -> Conversation:
    """One raw row as {"messages": […], "tools": […] if any, "expected_answer": "…" if any}.

    Messages hold role, content, and where there is any reasoning_content and tool_calls (arguments as an object);
    train: False is a turn that its set leaves out of training. `system` is the system prompt of rows that have none.
    Raises Rejected with the reason and the field or turn."""
    return reader_of(format, columns, Placeholders(placeholders), system).read(row)[0]


def add_system(messages: list[Message], columns: dict[str, Json], default: str | None) -> None:
    """Put a row's system prompt, or else its source's, before the turns. Raises Rejected where a row has two."""
    if not messages:
        return
    texts = [field_of(columns, column) for column in columns]
    if messages[0]["role"] == "system":
        texts.append(messages[0]["content"])
    # many sets repeat the system turn in a column; two that differ leave nobody to say which one holds
    if len({text.strip() for text in texts}) > 1:
        raise Rejected(
            "two_system_prompts", f"a system turn or column says {texts[0][:40]!r}, another {texts[-1][:40]!r}"
        )
    # the source's prompt is a default: it never replaces a row's own
    prompt = texts[0] if texts else default
    if prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": prompt})


def add_reasoning(messages: list[Message], columns: dict[str, Json], listed: bool) -> list[str]:
    """Give the last turn the reasoning of a column; returns the columns that say something else than what it has.

    Where turns are `listed`, the turn's own reasoning goes first."""
    ignored = []
    last = messages[-1] if messages else {"role": "user", "content": ""}
    for column in columns:
        text = field_of(columns, column)
        own = last.get("reasoning_content") or (last["content"] if THINK_OPEN in last["content"] else "")
        if last["role"] == "assistant" and not ("reasoning_content" in last or (own and listed)):
            last["reasoning_content"] = text.strip("\r\n")
        elif text.strip() not in own:
            ignored.append(column)
    return ignored


def expected_answer(value: Json) -> str:
    """The answer a row is judged by, which JSON files keep as a number and CSV files as text. Raises Rejected."""
    if type(value) in (int, float) and math.isfinite(value):
        return str(value)
    return field_of({"expected_answer": value}, "expected_answer")


def earlier_turns(row: dict[str, Json], column: str) -> list[Json]:
    """The turns of a history, which is kept as [[question, answer], …]."""
    turns: list[Json] = []
    for pair in field_of(row, column, list, default=[]):
        if type(pair) is not list or len(pair) != 2:
            raise Rejected("wrong_type", f"{column!r} holds {pair!r}, expected [question, answer]")
        question, answer = pair
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return turns


def without_repeats(tools: list[dict[str, Json]]) -> list[dict[str, Json]]:
    """Tools, of which a row and its turns may each give all, once each."""
    kept: list[dict[str, Json]] = []
    for tool in tools:
        if tool not in kept:
            kept.append(tool)
    return kept


def _speaker(turn: Json) -> str:
    return str(turn.get("role") or turn.get("from")).lower() if type(turn) is dict else ""


# --- which format a source has ---------------------------------------------------------------------------------------


def recognise(fields: list[str], format: str, columns: dict[str, str], where: str) -> str:
    """The name of a source's format: checked where it is given, found by the fields where it is `auto`.

    Raises ToolkitError that lists the fields and what to write where they fit none or several.
    """
    if format == "columns" or (columns and format == "auto"):
        return _check_columns(fields, columns, where)
    if format in FORMATS and not columns and set(signature(format)) <= set(fields):
        return format
    names = fitting(fields)
    if format == "auto" and len(names) == 1:
        return names[0]
    if format == "auto":
        several = f"fits several formats: set `format:` to one of {', '.join(names)}"
        problem = several if names else "no known format"
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


def _check_columns(fields: list[str], columns: dict[str, str], where: str) -> str:
    for key, column in columns.items():
        if key not in COLUMN_KEYS:
            raise ToolkitError(f"{where}: columns.{key}: expected one of {', '.join(COLUMN_KEYS)}")
        if column not in fields:
            raise ToolkitError(f"{where}: columns.{key}: no field {column!r}{did_you_mean(str(column), fields)}")
    if "messages" not in columns and not {"user", "assistant"} <= columns.keys():
        raise ToolkitError(f"{where}: columns needs `user` and `assistant` (or `messages`). {advice(fields)}")
    # it is one slip of the pen from `chosen` to `rejected`, and nothing else would tell
    answers = columns.get("messages") or columns["assistant"]
    if is_disliked(answers):
        raise ToolkitError(f"{where}: {answers!r} holds the answers that must not be learned. {advice(fields)}")
    return "columns"


def is_disliked(column: str) -> bool:
    """Whether a column's name says that its answers are those which lost a comparison."""
    return any(word in column.lower() for word in DISLIKED)


def likely_columns(fields: list[str]) -> dict[str, str]:
    """{role: column} as the names of the columns suggest; a role without a likely column is left out."""
    columns = {
        kind: field for field in reversed(fields) if (kind := meaning(field)) in ("reasoning", "system", "tools")
    }
    # the words are in order of their weight: `question` before `input`
    rest = [field for field in fields if field not in columns.values() and not is_disliked(field)]
    for kind in ("user", "assistant", "input"):
        fitting = [field for word in LIKELY[kind].split() for field in rest if word in field.lower()]
        if fitting:
            rest.remove(fitting[0])
            columns[kind] = fitting[0]
    return columns


def advice(fields: list[str]) -> str:
    """What to write in the recipe for rows that are not recognised: the columns, by likely names."""
    if fields == ["text"]:
        return "Plain text has no question and answer to tell apart: split it into `prompt` and `completion`"
    columns = {"user": "…", "assistant": "…"} | likely_columns(fields)
    if columns["assistant"] == "…" and len(fields) == 1:
        return f"The rows have {fields[0]!r} and no answer: there is nothing to learn from a question alone"
    named = [f"{key}: {columns[key]}" for key in COLUMN_KEYS if key in columns]
    return f"To name the columns: columns: {{{', '.join(named)}}}"
