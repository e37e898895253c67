"""An evaluation for people: in words, as a table, and as the flat numbers that are charted.

print("\\n".join(verdict(result))); rich.print(table(result, width=80)); wandb.run.summary.update(summary(result))
"""

from toolkit.evaluate.stats import is_rate
from toolkit.family import mode_title

CHARTED = ("accuracy", "accuracy/chat", "adherence")
"""Metrics that `summary` gives out for base, tuned and their difference."""
CHARTED_TUNED = (*CHARTED, "cut", "reasoning_tokens", "kl", "nll")
TITLES = {
    "adherence": "keeps to its mode",
    "accuracy": "reasoning questions",
    "accuracy/chat": "chat questions",
    "answer_tokens": "answer tokens",
    "reasoning_tokens": "reasoning tokens",
    "think_probability": "probability of <think>",
    "cut": "cut by the token limit",
    "kl": "KL from the base (nats)",
    "nll": "loss, base's own answers",
    "switch/think": "obeys /think",
    "switch/no_think": "obeys /no_think",
    "switch/mid_conversation": "obeys the later switch",
    "switch/hard": "ignores /think",
}
IN_FILE_ONLY = ("accuracy", "accuracy/chat", "adherence/", "kl/", "nll/")
"""Metrics pooled from, or parts of, what the table shows: they stay in eval.json."""
CUT = 0.05
"""Share of replies that hit the token limit from which the verdict says so."""
ADVICE = "Try a lower train.learning_rate, fewer steps, or more general data."


def verdict(result: dict) -> list[str]:
    """What a training did, in four to eight lines: what it learned and kept, modes, forgetting; the last line says
    whether the run is better or worse than its base. "certain": the 95% interval of the difference excludes zero."""
    changes = result.get("difference", {})
    modes = [section for section in changes if section != "forgetting"]
    names, lines = {}, []
    for metric_of in (_accuracies, lambda *_: ["adherence"]):  # accuracy of every mode first
        for mode in modes:
            suffix = f" {'with' if mode == 'thinking' else 'without'} thinking" if len(modes) > 1 else ""
            for metric in metric_of(changes[mode], len(modes)):
                names[mode, metric] = _title(metric) + suffix
                lines.append(f"{names[mode, metric]}: {_change(result, mode, metric)}")
    forgetting = changes.get("forgetting", {})
    names |= {("forgetting", m): f"held-out {_title(m)}" for m in forgetting if m.startswith("loss/")}
    if forgetting.get("nll", {}).get("value") is not None:
        base, tuned = (result[model]["forgetting"] for model in ("base", "tuned"))
        loss = f"{base['nll']['value']:.3f} → {tuned['nll']['value']:.3f}"
        lines.append(f"forgetting: loss on the base's own answers {loss}, KL {tuned['kl']['value']:.3f} nats a token")
    return [*lines, _conclusion(result, names)]


def _accuracies(metrics: dict, modes: int) -> list[str]:
    """By question set, or pooled where that would make more than four lines."""
    sets = [metric for metric in metrics if metric.startswith("accuracy/set/")]
    return sets if len(sets) * modes <= 4 else [metric for metric in ("accuracy", "accuracy/chat") if metric in metrics]


def _change(result: dict, mode: str, metric: str) -> str:
    """`23% → 95% (+72 points, certain)`."""
    base, tuned, change = (result[model][mode][metric] for model in ("base", "tuned", "difference"))
    cut = result["tuned"][mode]["cut"]["value"] or 0
    note = f"{100 * cut:.0f}% of replies cut by the token limit" if cut > CUT else ""
    if change["value"] is None:
        return f"not measured ({note or 'no question'})"
    sure = f"{100 * change['value']:+.0f} points, certain" if _direction(change) else "no change shown"
    return f"{100 * base['value']:.0f}% → {100 * tuned['value']:.0f}% ({sure}{note and '; ' + note})"


def _direction(change: dict) -> int:
    """1 where the whole interval lies above zero, -1 where it lies below, else 0."""
    return 0 if change["value"] is None else int(change["low"] > 0) - int(change["high"] < 0)


def _conclusion(result: dict, names: dict[tuple[str, str], str]) -> str:
    found: dict[int, list[str]] = {1: [], 0: [], -1: []}
    for (section, metric), name in names.items():
        change = result["difference"][section][metric]
        points = f" ({100 * change['value']:+.0f} points)" if is_rate(metric) and _direction(change) else ""
        found[-_direction(change) if section == "forgetting" else _direction(change)].append(name + points)
    better, worse = (", ".join(few[:3]) + f" and {len(few) - 3} more" * (len(few) > 3) for few in (found[1], found[-1]))
    if result.get("tuned", {}).get("forgetting", {}).get("kl", {}).get("n", 1) == 0:
        return f"result: BROKEN: the tuned model computes no numbers (NaN), the training diverged. {ADVICE}"
    if worse:
        return f"result: WORSE than the base in {worse}{better and '; better in ' + better}. {ADVICE}"
    if better:
        return f"result: better than the base in {better}; nothing is shown to be worse."
    if not names:
        return "result: nothing was measured"
    return "result: no change shown. `--level full` asks more questions, which shows smaller changes."


def summary(result: dict) -> dict[str, float]:
    """The 24 numbers (at most) that people chart, by the names they have in wandb; what was not measured is left out.

    `eval/{base,tuned,difference}/{thinking,non_thinking}/{accuracy,accuracy/chat,adherence}`,
    `eval/tuned/{thinking,non_thinking}/{cut,reasoning_tokens}`, `eval/tuned/forgetting/{kl,nll}`. Intervals and all
    other metrics are in eval.json."""
    return {
        f"eval/{model}/{section}/{metric}": found["value"]
        for model in ("base", "tuned", "difference")
        for section, metrics in result.get(model, {}).items()
        for metric, found in metrics.items()
        if metric in (CHARTED_TUNED if model == "tuned" else CHARTED) and found["value"] is not None
    }


def table(result: dict, width: int = 80):
    """A rich table: base, tuned and their paired difference with its 95% interval, the intervals of base and tuned too
    where `width` allows. What is zero for both models is left out."""
    from rich.table import Table

    grid = Table(title=f"{result['level']} evaluation, seed {result['seed']}; 95% intervals, paired over questions")
    for heading in ("", "base", "tuned", "difference", "n"):
        grid.add_column(heading, justify="right" if heading else "left", overflow="fold")
    for section, metrics in result["difference"].items():
        title = "forgetting, held-out loss" if section == "forgetting" else f"{mode_title(section)} mode"
        grid.add_row(f"[bold]{title}")
        for metric, change in metrics.items():
            pair = [result[model][section][metric] for model in ("base", "tuned")]
            zero = not any(round(found["value"] or 0, 3) for found in pair)
            if not zero and metric not in IN_FILE_ONLY and not metric.startswith(IN_FILE_ONLY[2:]):
                cells = [show(found) if width >= 110 else show(found).partition(" ")[0] for found in pair]
                grid.add_row(_title(metric), *cells, show(change, sign="+"), str(change["n"]))
        grid.add_section()
    return grid


def _title(metric: str) -> str:
    if metric.startswith("loss/"):
        source, _, mode = metric.removeprefix("loss/").rpartition("/")
        return f"loss, {source} ({mode_title(mode)})"
    return TITLES.get(metric, metric.removeprefix("accuracy/set/"))


def show(found: dict, sign: str = "") -> str:
    """`0.81 [0.74, 0.87]`, or a dash where nothing could be measured."""
    if found["value"] is None:
        return "-"
    places = 0 if abs(found["value"]) >= 20 else 1 if abs(found["value"]) >= 5 else 3
    value, low, high = (f"{found[key]:{sign}.{places}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
