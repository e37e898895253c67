"""An evaluation for people: in words, as a table, and as the flat numbers that are charted.

print("\\n".join(verdict(result))); rich.print(table(result, width=80)); wandb.run.summary.update(summary(result))
"""

from toolkit.evaluate.stats import is_rate
from toolkit.family import mode_title

CHARTED = {
    "base": ("accuracy", "accuracy/chat", "adherence"),
    "tuned": ("accuracy", "accuracy/chat", "adherence", "cut", "reasoning_tokens", "kl", "nll"),
    "difference": ("accuracy", "accuracy/chat", "adherence"),
}
"""Metrics of each mode and of forgetting that `summary` gives out: those that people chart."""
TITLES = {
    "accuracy": "reasoning questions right",
    "accuracy/chat": "chat questions right",
    "adherence": "keeps to the mode",
    "cut": "cut by the token limit",
    "reasoning_tokens": "tokens of reasoning",
    "answer_tokens": "tokens of the answer",
    "think_probability": "probability of <think>",
    "switch/think": "obeys /think",
    "switch/no_think": "obeys /no_think",
    "switch/mid_conversation": "obeys the later switch",
    "switch/hard": "ignores /think",
    "kl": "KL from the base (nats)",
    "nll": "loss, base's own answers",
}
PARTS = ("adherence/", "kl/", "nll/")
"""Parts of a metric, which stay in eval.json."""
CUT = 0.05
"""Share of replies that hit the token limit from which the verdict says so."""
ADVICE = "Try a lower train.learning_rate, fewer steps, or more general data."


def verdict(result: dict) -> list[str]:
    """What a training did, in four to eight lines: what it learned and kept, modes, forgetting; the last line says
    whether the run is better or worse than its base. "certain": the 95% interval of the difference excludes zero."""
    modes = [section for section in result.get("difference", {}) if section != "forgetting"]
    names = {
        (m, metric): _name(m, metric, modes) for m in modes for metric in accuracies(result, m, most=4 // len(modes))
    }
    lines = [f"{name}: {_change(result, *key)}" for key, name in names.items()]
    kept = {(mode, "adherence"): _name(mode, "adherence", modes) for mode in modes}
    lines += [f"{name}: {_change(result, *key)}" for key, name in kept.items()]
    forgetting = result.get("difference", {}).get("forgetting", {})
    if forgetting.get("nll", {}).get("value") is not None:
        base, tuned = (result[model]["forgetting"]["nll"]["value"] for model in ("base", "tuned"))
        kl = result["tuned"]["forgetting"]["kl"]["value"]
        lines.append(f"forgetting: loss on the base's own answers {base:.3f} → {tuned:.3f}, KL {kl:.3f} nats a token")
    losses = {
        ("forgetting", metric): f"held-out {_title(metric)}" for metric in forgetting if metric.startswith("loss/")
    }
    return [*lines, _conclusion(result, names | kept | losses)]


def _conclusion(result: dict, names: dict[tuple[str, str], str]) -> str:
    changes = {key: result["difference"][key[0]][key[1]] for key in names}
    measured = {key: change for key, change in changes.items() if change["value"] is not None}
    if not measured:
        return "result: nothing could be measured"
    if result["tuned"].get("forgetting", {}).get("kl", {}).get("n", 1) == 0:
        return f"result: BROKEN: the tuned model computes no numbers (NaN), the training diverged. {ADVICE}"
    found: dict[bool, list[str]] = {True: [], False: []}
    for key, change in measured.items():
        if change["low"] > 0 or change["high"] < 0:
            up = change["low"] > 0
            points = f" ({100 * change['value']:+.0f} points)" if is_rate(key[1]) else ""
            found[not up if key[0] == "forgetting" else up].append(names[key] + points)
    if found[False]:
        better = f"; better in {', '.join(found[True])}" if found[True] else ""
        return f"result: WORSE than the base in {', '.join(found[False])}{better}. {ADVICE}"
    if found[True]:
        return f"result: better than the base in {', '.join(found[True])}; nothing is shown to be worse."
    return "result: no change shown. `--level full` asks more questions, which shows smaller changes."


def accuracies(result: dict, section: str, most: int = 99) -> list[str]:
    """The accuracy metrics of a mode, each once: by question set, or pooled where a mode has more sets than `most`."""
    metrics = result["difference"][section]
    sets = [metric for metric in metrics if metric.startswith("accuracy/set/")]
    return sets if len(sets) <= most else [metric for metric in ("accuracy", "accuracy/chat") if metric in metrics]


def _name(mode: str, metric: str, modes: list[str]) -> str:
    what = metric.removeprefix("accuracy/set/")
    what = {"accuracy": "reasoning questions", "accuracy/chat": "chat questions", "adherence": "keeps to its mode"}.get(
        what, what
    )
    return what if len(modes) == 1 else f"{what} {'with' if mode == 'thinking' else 'without'} thinking"


def _change(result: dict, section: str, metric: str) -> str:
    """`23% → 95% (+72 points, certain)`."""
    base, tuned, change = (result[model][section][metric] for model in ("base", "tuned", "difference"))
    cut = result["tuned"][section]["cut"]["value"] or 0
    note = f"{100 * cut:.0f}% of replies cut by the token limit" if cut > CUT else ""
    if change["value"] is None:
        return f"not measured ({note or 'no question'})"
    sure = "certain" if change["low"] > 0 or change["high"] < 0 else ""
    parts = [f"{100 * change['value']:+.0f} points", sure] if sure else ["no change shown"]
    return (
        f"{100 * base['value']:.0f}% → {100 * tuned['value']:.0f}% ({', '.join([*parts, *([note] if note else [])])})"
    )


def summary(result: dict) -> dict[str, float]:
    """The 26 numbers (at most) that people chart, by the names they have in wandb; what was not measured is left out.

    `eval/{base,tuned,difference}/{thinking,non_thinking}/{accuracy,accuracy/chat,adherence}`,
    `eval/tuned/{thinking,non_thinking}/{cut,reasoning_tokens}`, `eval/tuned/forgetting/{kl,nll}`. Intervals and all
    other metrics are in eval.json."""
    return {
        f"eval/{model}/{section}/{metric}": found["value"]
        for model, metrics in CHARTED.items()
        for section, measured in result.get(model, {}).items()
        for metric, found in measured.items()
        if metric in metrics and found["value"] is not None
    }


def table(result: dict, width: int = 80):
    """A rich table of all metrics: base, tuned and their paired difference with its 95% interval; from 110 columns on
    with the intervals of base and tuned too. Left out are parts of a metric, pooled accuracies of one question set, and
    what is zero for both."""
    from rich.table import Table

    wide = width >= 110
    grid = Table(title=f"{result['level']} evaluation, seed {result['seed']}; 95% intervals, paired over questions")
    for heading in ("", "base", "tuned", "difference", "n"):
        grid.add_column(heading, justify="right" if heading else "left", overflow="fold", no_wrap=heading in ("n",))
    for section, metrics in result["difference"].items():
        title = "forgetting and held-out loss" if section == "forgetting" else f"{mode_title(section)} mode"
        grid.add_row(f"[bold]{title}")
        for metric in _rows(result, section):
            pair = [result[model][section].get(metric, NOTHING) for model in ("base", "tuned")]
            cells = [show(found) if wide else show(found).partition(" ")[0] for found in pair]
            grid.add_row(_title(metric), *cells, show(metrics[metric], sign="+"), str(metrics[metric]["n"]))
        grid.add_section()
    return grid


NOTHING = {"value": None, "low": None, "high": None, "n": 0}


def _rows(result: dict, section: str) -> list[str]:
    metrics = [m for m in result["difference"][section] if not m.startswith(PARTS)]
    one_set = [m for m in metrics if m.startswith("accuracy/set/")]
    same = {m for m in ("accuracy", "accuracy/chat") for s in one_set
            if m in metrics and all(result[x][section][m] == result[x][section][s] for x in ("base", "tuned"))}  # fmt: skip
    pairs = {m: [result[model][section].get(m, NOTHING)["value"] for model in ("base", "tuned")] for m in metrics}
    return [m for m in metrics if m not in same and any(round(value or 0, 3) for value in pairs[m])]


def _title(metric: str) -> str:
    kind, _, name = metric.partition("/")
    if kind == "loss":
        return f"loss, {name.replace('/', ', ')}".replace("non_thinking", "non-thinking")
    return TITLES.get(metric) or f"{metric.removeprefix('accuracy/set/')} right"


def show(found: dict, sign: str = "") -> str:
    """`0.81 [0.74, 0.87]`, or a dash where nothing could be measured."""
    if found["value"] is None:
        return "-"
    places = 0 if abs(found["value"]) >= 20 else 1 if abs(found["value"]) >= 5 else 3
    value, low, high = (f"{found[key]:{sign}.{places}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
