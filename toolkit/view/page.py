"""A run's own page: report.html in its folder, one file that opens without a network.

from toolkit.view import page; page.write(Path("outputs/pocket"))

Everything on it is read from the run folder; nothing is measured for it. A section whose file is missing is left out.
"""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from toolkit import recipe as recipes
from toolkit.evaluation import words
from toolkit.family import mode_title
from toolkit.files import ToolkitError, read_if_there, read_json, read_jsonl, write_text
from toolkit.records import Evaluation, Interval, JsonObject, MixReport
from toolkit.view import figures, labels, tables, trained

PAGE = "report.html"
# Training rows that are shown.
ROWS = 10


class Bar(NamedTuple):
    """A share of replies with its 95% interval, all in per cent."""

    value: float
    low: float
    high: float
    text: str


class ScoreRow(NamedTuple):
    """A measured share, base and tuned."""

    name: str
    base: Bar
    tuned: Bar
    change: str


def write(folder: Path) -> Path:
    """Write the page of a run and return its file. Raises ToolkitError where the run has no manifest.json."""
    return render(PAGE, contents(folder), folder)


def render(template: str, values: Mapping[str, Any], folder: Path) -> Path:
    """Write a folder's report.html from a template and return its file."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    # autoescape: rows and replies hold whatever people's data holds
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    write_text(folder / PAGE, environment.get_template(template).render(values))
    return folder / PAGE


def contents(folder: Path) -> JsonObject:
    """What the template shows, by section; None or empty where the run has no such file yet."""
    manifest = read_json(folder / "manifest.json")
    report = cast(MixReport, read_if_there(folder / "mix.json"))
    result = cast(Evaluation, read_if_there(folder / "eval.json"))
    rows, why_no_rows = taught_rows(folder, manifest)
    file = folder / "samples.jsonl"
    samples = read_jsonl(file) if file.is_file() else []
    name = folder.resolve().name
    values = {
        "name": name,
        "manifest": manifest,
        "mix": report,
        "result": result,
        "rows": rows,
        "why_no_rows": why_no_rows,
        "curves": address(figures.png(figures.curves(folder))) if figures.logged(folder) else "",
        "prompts": [row for row in trained.paired(samples) if "after" in row],
        "certificate": read_if_there(folder / "certificate.json"),
        "dial": compared(folder / f"{name}-dial"),
        "mode_title": mode_title,
    }
    if report:
        values["mix_verdict"] = tables.verdict(report)
        values["mix_notes"] = tables.notes(report)
        values["colours"] = figures.source_colours(report["planned"])
    if result:
        values["scores"] = score_bars(result)
        values["metrics"] = words.score_rows(result)
    return values


def score_bars(result: Evaluation) -> list[ScoreRow]:
    """Accuracy of every question set, then how often replies keep to their mode."""
    keys = words.judged_questions(result)
    for mode in result["modes"]:
        if "adherence" in result["difference"].get(mode, {}):
            keys.append((words.title(mode, "adherence", result["modes"]), mode, "adherence"))
    rows = []
    for name, section, metric in keys:
        base, tuned = (bar(metric, result[model][section][metric]) for model in ("base", "tuned"))
        if base and tuned:
            rows.append(ScoreRow(name, base, tuned, words.show(metric, result["difference"][section][metric], "+", "")))
    return rows


def bar(metric: str, share: Interval) -> Bar | None:
    """None where nothing could be measured."""
    if share["value"] is None:
        return None
    value, low, high = (100 * (share[key] or 0.0) for key in ("value", "low", "high"))
    return Bar(value, low, high, words.show(metric, share))


def taught_rows(folder: Path, manifest: JsonObject) -> tuple[list[labels.TaughtRow], str]:
    """(the first training rows of every source and mode, why there are none)."""
    from toolkit.data import mix
    from toolkit.data.chat import load_chat

    try:
        mixed = mix.of_run(recipes.of_run(folder), manifest)
        chat = load_chat(manifest["model"]["name"])
    except ToolkitError as error:  # the data or the model are not on this machine any more
        return [], str(error)
    kinds = {(row.source, row.mode) for row in mixed.train}
    of_each = max(1, ROWS // max(1, len(kinds)))
    return labels.first_rows(mixed, chat, of_each), ""


def compared(folder: Path) -> JsonObject:
    """What a sweep, a comparison or a dial left in its folder: comparison.json, with its picture as part of the page."""
    found, picture = read_if_there(folder / "comparison.json"), folder / "comparison.png"
    if found and picture.is_file():
        found["picture"] = address(picture.read_bytes())
    return found


def address(png: bytes) -> str:
    """A picture as the address of an image that is part of the page."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
