"""An evaluation for people: in words, as a table, and as the flat numbers that are charted.

print("\\n".join(verdict(result))); score_rows(result); wandb.run.summary.update(summary(result))
"""

from collections.abc import Collection

from toolkit.evaluation.stats import is_rate
from toolkit.family import MODES, mode_title

SET = "accuracy/set/"
POOLED = ("accuracy", "accuracy/chat")
"""Reasoning and chat questions of all sets together."""
CHARTED = (*POOLED, "adherence")
"""Metrics that `summary` gives out for base, tuned and their difference."""
CHARTED_TUNED = (*CHARTED, "cut", "reasoning_tokens", "kl", "nll")
TITLES = {
    "accuracy": "reasoning questions",
    "accuracy/chat": "chat questions",
    "adherence": "keeps to its mode",
    "reasoning_tokens": "reasoning tokens",
    "answer_tokens": "answer tokens",
    "cut": "cut by the token limit",
    "kl": "KL from the base (nats)",
    "nll": "loss, base's own answers",
}
CUT = 0.05
"""Share of replies that hit the token limit from which the verdict says so."""
ADVICE = "Try a lower train.learning_rate, fewer steps, or more general data."


def verdict(result: dict) -> list[str]:
    """What a training did, in four to eight lines: what it learned and kept, modes, forgetting; the last line says
    whether the run is better or worse than its base. "certain": the 95% interval of the difference excludes zero."""
    lines, better, worse = [], [], []
    for name, section, metric in _judged(result):
        # only what the interval is sure of counts for or against a run
        rises = _direction(result["difference"][section][metric])
        if is_rate(metric):
            lines.append(f"{name}: {_change(result, section, metric)}")
        if rises:  # a loss is better when it falls
            (better if (rises > 0) == is_rate(metric) else worse).append(name)
    kl = result["tuned"].get("forgetting", {}).get("kl")
    if kl and not kl["n"]:
        return [*lines, f"result: BROKEN: the tuned model computes no numbers (NaN), the training diverged. {ADVICE}"]
    if kl:
        lines.append(f"forgetting: {kl['value']:.3f} nats per token from the base (KL on the base's own answers)")
    return [*lines, _conclusion(better, worse)]


def _judged(result: dict) -> list[tuple[str, str, str]]:
    """(name, section, metric) of what decides the verdict: accuracy by question set, or pooled where that would take more
    than four lines, adherence and held-out loss."""
    measured = [(section, metric) for section, metrics in result["difference"].items() for metric in metrics]
    by_set = [key for key in measured if key[1].startswith(SET)]
    keys = by_set if len(by_set) <= 4 else [key for key in measured if key[1] in POOLED]
    keys += [key for key in measured if key[1] == "adherence" or key[1].startswith("loss/")]
    return [(title(section, metric, result["modes"]), section, metric) for section, metric in keys]


def _change(result: dict, mode: str, metric: str) -> str:
    """`23% → 95% (+72 points, certain)`."""
    base, tuned, change = (result[model][mode][metric] for model in ("base", "tuned", "difference"))
    cut = result["tuned"][mode]["cut"]["value"] or 0
    note = f"{cut:.0%} of replies cut by the token limit" if cut > CUT else ""
    if change["value"] is None:
        return f"not measured ({note or 'no question'})"
    # the change is paired over questions that both answered, the shares are over all that each answered: where many are
    # cut, only its direction can be said of them
    before, after = round(100 * base["value"]), round(100 * tuned["value"])
    sure = f"{after - before:+d} points, certain" if _direction(change) * (after - before) > 0 else "no change shown"
    return f"{before}% → {after}% ({sure}{note and '; ' + note})"


def _direction(change: dict) -> int:
    """1 where the whole interval lies above zero, -1 where it lies below, else 0. Fewer than six pairs show nothing at
    95%, even where all agree: a sign test's least p is 2 * 0.5 ** n."""
    return 0 if change["value"] is None or change["n"] < 6 else int(change["low"] > 0) - int(change["high"] < 0)


def _conclusion(better: list[str], worse: list[str]) -> str:
    gains, losses = (", ".join(few[:3]) + f" and {len(few) - 3} more" * (len(few) > 3) for few in (better, worse))
    if losses:
        return f"result: WORSE than the base in {losses}{gains and '; better in ' + gains}. {ADVICE}"
    if gains:
        return f"result: better than the base in {gains}; nothing is shown to be worse."
    return "result: no change shown. `--level full` asks more questions, which shows smaller changes."


def summary(result: dict) -> dict[str, float]:
    """The 24 numbers (at most) that people chart, by the names they have in wandb; what was not measured is left out.

    `eval/{base,tuned,difference}/{thinking,non_thinking}/{accuracy,accuracy/chat,adherence}`,
    `eval/tuned/{thinking,non_thinking}/{cut,reasoning_tokens}`, `eval/tuned/forgetting/{kl,nll}`. Intervals and all
    other metrics are in eval.json."""
    return {
        f"eval/{model}/{section}/{metric}": found["value"]
        for model in ("base", "tuned", "difference")
        for section, metrics in result[model].items()
        for metric, found in metrics.items()
        if metric in (CHARTED_TUNED if model == "tuned" else CHARTED) and found["value"] is not None
    }


def score_rows(result: dict) -> list[dict]:
    """What was measured, base and tuned, and their paired difference with its 95% interval, in words. What is zero for both
    models is left out, and so is what only pools other rows."""
    rows = []
    for section, metrics in result["difference"].items():
        for metric, change in metrics.items():
            pair = {model: result[model][section][metric] for model in ("base", "tuned")}
            if metric not in POOLED and any(round(found["value"] or 0, 3) for found in pair.values()):
                values = {model: show(metric, found).partition(" ")[0] for model, found in pair.items()}
                values["difference"] = show(metric, change, sign="+", unit="")
                rows.append({"95% intervals": title(section, metric, result["modes"]), **values, "n": change["n"]})
    return rows


def title(section: str, metric: str, sections: Collection[str]) -> str:
    """`sums with thinking`; without the mode where only one of the modes is among `sections`, or the metric has none."""
    if metric.startswith("loss/"):
        source, _, mode = metric.removeprefix("loss/").rpartition("/")
        return f"loss on {source} ({mode_title(mode)})"
    how = {"thinking": " with thinking", "non_thinking": " without thinking"} if set(MODES) <= set(sections) else {}
    return TITLES.get(metric, metric.removeprefix(SET).replace("kl/", "KL, ")) + how.get(section, "")


def amount(metric: str, value: float, sign: str = "", unit: str = "%") -> str:
    """`70%` for a rate, `0.220` or `41` for others."""
    return f"{100 * value:{sign}.0f}{unit}" if is_rate(metric) else f"{value:{sign}.{3 if abs(value) < 20 else 0}f}"


def show(metric: str, found: dict | None, sign: str = "", unit: str = "%") -> str:
    """A number with its interval, `70% [59, 81]`; a dash where nothing could be measured."""
    if found is None or found["value"] is None:
        return "-"
    low, high = (amount(metric, found[end], sign, "") for end in ("low", "high"))
    return f"{amount(metric, found['value'], sign, unit)} [{low}, {high}]"
