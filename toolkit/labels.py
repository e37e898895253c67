"""What a row teaches, here and the usual way, coloured for a notebook.

labels.compared(mixed, chat); labels.first_row(Source("data/mine.csv"), chat, {})
"""

from html import escape

from toolkit.files import ToolkitError
from toolkit.recipe import Source
from toolkit.render import Chat, examples
from toolkit.sources import Rejected, conversations, detect, open_rows

THOUGHT, TAUGHT = "#777777", "#c8e6c9"


def usual_way(conversation: dict, chat: Chat) -> tuple[str, str]:
    """(shown, taught) as common trainers mask a row: everything after the last assistant header is taught, so a direct
    answer teaches the empty think block that Qwen3's template writes there (TRL's assistant_only_loss, Unsloth's
    train_on_responses_only)."""
    whole = chat.render(conversation["messages"], conversation.get("tools"), add_generation_prompt=False)
    header = "<|im_start|>assistant\n"
    start = whole.rindex(header) + len(header)
    return whole[:start], whole[start:]


def here(conversation: dict, chat: Chat) -> tuple[str, str]:
    """(shown, taught) by the label rule, for the last assistant turn."""
    example = examples(conversation, "auto", chat)[-1]
    return example.prompt, example.completion


def compared(mixed, chat: Chat):
    """One held-out row of each source: what is taught here, and what the usual way would have taught."""
    from IPython.display import HTML

    rows = {(row.source, row.mode): row.conversation for row in reversed(mixed.validation)}
    heads = "".join(f"<th style='text-align:left'>{name}</th>" for name in ("here", "the usual way"))
    body = "".join(
        f"<tr><td colspan='2' style='text-align:left'><b>{escape(source)} · {mode.replace('_', '-')}</b></td></tr>"
        f"<tr>{cell(_coloured(*here(row, chat)))}{cell(_coloured(*usual_way(row, chat)))}</tr>"
        for (source, mode), row in sorted(rows.items())
    )
    return HTML(f"<table style='width:100%;table-layout:fixed'><tr>{heads}</tr>{body}</table>")


def _coloured(shown: str, taught: str) -> str:
    font = "font-family:monospace"
    return (
        f"<span style='{font};color:{THOUGHT}'>{escape(shown)}</span>"
        f"<span style='{font};background:{TAUGHT};color:#111'>{escape(taught)}</span>"
    )


def first_row(source: Source, chat: Chat, placeholders: dict):
    """The first conversation of a file as the model sees it: its format, and every turn it teaches coloured."""
    from IPython.display import HTML

    number, found = next(conversations(source, seed=0, placeholders=placeholders))
    if isinstance(found, Rejected):
        raise ToolkitError(f"{source.path}, row {number}: {found.detail}")
    turns = [_coloured(e.prompt, e.completion) for e in examples(found, "auto", chat, source.turns)]
    title = f"{source.path} · {detect(source, open_rows(source))} · row {number}, {len(turns)} example(s)"
    return HTML(f"<b>{escape(title)}</b>" + "".join(f"<pre style='white-space:pre-wrap'>{t}</pre>" for t in turns))


def cell(content: str) -> str:
    style = "text-align:left;vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere"
    return f"<td style='{style}'>{content}</td>"
