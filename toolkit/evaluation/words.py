"""An evaluation for people: in words, as a table, and as the flat numbers that are charted.

print("\\n".join(verdict(result))); score_rows(result); wandb.run.summary.update(summary(result))
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

from toolkit.evaluation.lengths import EXCESS
from toolkit.evaluation.stats import direction, is_rate
from toolkit.family import MODES, mode_title
from toolkit.records import Evaluation, Interval

SET = "accuracy/set/"
LOSS = "loss/"
TOKEN_ACCURACY = "token_accuracy/"
BEGINS = {"thinking": "begins/thinking", "non_thinking": "begins/answer"}
"""Mode → the metric that says how surely a reply begins as the mode asks."""
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
    "begins/thinking": "begins by thinking",
    "begins/answer": "begins by answering",
    "kl": "KL from the base (nats)",
    "nll": "loss, base's own answers",
}
CUT = 0.05
"""Share of replies that hit the token limit from which the verdict says so."""
WORSE_BEGINNING = 0.05
"""Share of probability that a mode's beginning must lose to count as a loss; smaller ones can be certain too."""
SHOWN_SOURCES = 4
"""Sources of which the verdict speaks; the table has all."""
ADVICE = "Try a lower train.learning_rate, fewer steps, or more general data."


@dataclass(frozen=True)
class Change:
    """A share of replies, before and after."""

    before: int
    """Per cent."""
    after: int
    certain: bool
    """The whole interval of the paired difference lies on the side of the change.

    The change is paired over questions that both answered, the shares are over all that each answered: where many are
    cut, only its direction can be said of them."""
    cut: float
    """Share of tuned replies that the limit cut."""

    def __str__(self) -> str:
        """`23% → 95% (+72 points, certain)`."""
        points = f"{self.after - self.before:+d} points, certain" if self.certain else "no change shown"
        return f"{self.before}% → {self.after}% ({points}{_cut_note(self.cut, '; ')})"


def verdict(result: Evaluation) -> list[str]:
    """What a training did, in a few lines: the person's own rows first, then questions, modes, lengths, forgetting; the
    last line says whether the run is better or worse than its base. "certain": the 95% interval excludes zero."""
    kl = result["tuned"].get("forgetting", {}).get("kl")
    lines = [*own_rows_lines(result), *question_lines(result), *mode_lines(result), *length_lines(result)]
    if kl and not kl["n"]:
        return [*lines, f"result: BROKEN: the tuned model computes no numbers (NaN), the training diverged. {ADVICE}"]
    if kl:
        lines.append(f"forgetting: {kl['value']:.3f} nats per token from the base (KL on the base's own answers)")
    better, worse = gains_and_losses(result)
    return [*lines, _conclusion(better, worse, generated=bool(result["lengths"]))]


def own_rows_lines(result: Evaluation) -> list[str]:
    """`your held-out replies, openmath (thinking): 2.4 times likelier (certain)`, per token, a line for each source."""
    lines = []
    for metric, change in result["difference"].get("forgetting", {}).items():
        if metric.startswith(LOSS) and change["value"] is not None:
            source = title("forgetting", metric, result["modes"]).removeprefix("loss on ")
            certain = "certain" if direction(change) else "no change shown"
            lines.append(f"your held-out replies, {source}: {times_likelier(change['value'])} ({certain})")
    return lines[:SHOWN_SOURCES]


def times_likelier(loss_change: float) -> str:
    """A change of the mean loss in nats as a ratio of probabilities: `2.4 times likelier`."""
    # beyond e^50 the number says nothing, and a diverged loss would overflow
    factor = math.exp(min(50.0, abs(loss_change)))
    if factor < 1.005:
        return "as likely as before"
    return f"{factor:.3g} times {'likelier' if loss_change < 0 else 'less likely'}"


def question_lines(result: Evaluation) -> list[str]:
    """A line for each question set and mode; sets that ship are named as what they are, a check of what was kept."""
    lines = []
    for name, section, metric in judged_questions(result):
        kept = "what was kept, " if metric.removeprefix(SET) in result["shipped"] else ""
        lines.append(f"{kept}{name}: {describe(result, section, metric)}")
    return lines


def mode_lines(result: Evaluation) -> list[str]:
    """Whether replies keep to their mode; without replies, how surely they begin as it asks."""
    lines = []
    for mode in result["modes"]:
        measured = result["difference"].get(mode, {})
        # replies say more than the probability of their first tokens
        if "adherence" in measured:
            lines.append(f"{title(mode, 'adherence', result['modes'])}: {describe(result, mode, 'adherence')}")
        elif BEGINS[mode] in measured:
            base, tuned = (result[model][mode][BEGINS[mode]]["value"] for model in ("base", "tuned"))
            name = title(mode, BEGINS[mode], result["modes"])
            lines.append(f"{name}: {base:.0%} → {tuned:.0%} of the probability")
    return lines


def length_lines(result: Evaluation) -> list[str]:
    """How much longer replies are, and replies that never end where that is shown."""
    parts, endless = [], []
    for mode, lengths in result["lengths"].items():
        ratio = lengths["ratio"]
        where = f" {WITH[mode]}" if len(result["modes"]) > 1 else ""
        if ratio["value"] is not None:
            parts.append(f"{ratio['value']:.2g} times [{ratio['low']:.2g}, {ratio['high']:.2g}]{where}")
        if never_ends(lengths["endless"]):
            endless.append(
                f"{lengths['endless']['value']:.0%} of replies{where} never end, beyond what longer replies explain"
            )
    return ([f"length of replies: {', '.join(parts)}"] if parts else []) + endless


WITH = {"thinking": "with thinking", "non_thinking": "without thinking"}


def never_ends(endless: Interval) -> bool:
    """Whether it is certain that more than a few tuned replies never end."""
    return direction(endless) > 0 and (endless["low"] or 0) > EXCESS


def gains_and_losses(result: Evaluation) -> tuple[list[str], list[str]]:
    """Names of what is better and what is worse, of what the intervals are sure of."""
    better: list[str] = []
    worse: list[str] = []
    for name, section, metric in [*judged_questions(result), *judged_measures(result)]:
        change = direction(result["difference"][section][metric])
        # a loss is better when it falls
        if metric.startswith(LOSS):
            change = -change
        if change:
            (better if change > 0 else worse).append(name)
    for mode, lengths in result["lengths"].items():
        if never_ends(lengths["endless"]):
            worse.append(f"ending its replies{' ' + WITH[mode] if len(result['modes']) > 1 else ''}")
    return better, worse


def judged_questions(result: Evaluation) -> list[tuple[str, str, str]]:
    """(name, section, metric) of accuracy by question set, or pooled where that would take more than four lines."""
    measured = _measured(result)
    by_set = [key for key in measured if key[1].startswith(SET)]
    keys = by_set if len(by_set) <= 4 else [key for key in measured if key[1] in POOLED]
    return [(title(*key, result["modes"]), *key) for key in keys]


def judged_measures(result: Evaluation) -> list[tuple[str, str, str]]:
    """(name, section, metric) of mode adherence, held-out loss, and beginnings that lost a real share."""
    keys = [key for key in _measured(result) if key[1] == "adherence" or key[1].startswith(LOSS)]
    for mode in result["modes"]:
        change = result["difference"].get(mode, {}).get(BEGINS[mode])
        if change and change["value"] is not None and change["value"] < -WORSE_BEGINNING:
            keys.append((mode, BEGINS[mode]))
    return [(title(*key, result["modes"]), *key) for key in keys]


def _measured(result: Evaluation) -> list[tuple[str, str]]:
    return [(section, metric) for section, metrics in result["difference"].items() for metric in metrics]


def describe(result: Evaluation, mode: str, metric: str) -> str:
    """A change of a share of replies in words; `not measured (why)` where no question counts for both models."""
    base, tuned, change = (result[model][mode][metric] for model in ("base", "tuned", "difference"))
    cut = result["tuned"][mode]["cut"]["value"] or 0.0
    if change["value"] is None:
        return f"not measured ({_cut_note(cut) or 'no question'})"
    # rounded first: the points are the difference of the shares that stand beside them
    before, after = (round(100 * (estimate["value"] or 0.0)) for estimate in (base, tuned))
    return str(Change(before, after, direction(change) * (after - before) > 0, cut))


def _cut_note(cut: float, before: str = "") -> str:
    return f"{before}{cut:.0%} of replies cut by the token limit" if cut > CUT else ""


def _conclusion(better: list[str], worse: list[str], *, generated: bool) -> str:
    gains, losses = _first_three(better), _first_three(worse)
    unread = "" if generated else " No reply was generated: `--level quick` reads some."
    if losses:
        return f"result: WORSE than the base in {losses}{gains and '; better in ' + gains}. {ADVICE}{unread}"
    if gains:
        return f"result: better than the base in {gains}; nothing is shown to be worse.{unread}"
    more = unread or " `--level full` asks more questions, which shows smaller changes."
    return f"result: no change shown.{more}"


def _first_three(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


# --- rows for people -------------------------------------------------------------------------------------------------


def own_rows_text(result: Evaluation, width: int = 76) -> list[str]:
    """The person's own held-out rows before and after, beside their reference, a line each."""
    lines = []
    for row in sorted(result["own_rows"], key=lambda row: (row["source"], row["mode"])):
        lines.append(f"{row['source']} ({mode_title(row['mode'])}): {' '.join(row['prompt'].split())}"[:width])
        for name in ("reference", "base", "tuned"):
            text = f"  {name:9}  {' '.join(row[name].split())}"
            lines.append(text if len(text) <= width else f"{text[: width - 2]} …")
    return lines


def summary(result: Evaluation) -> dict[str, float]:
    """The 24 numbers (at most) that people chart, by the names they have in wandb; what was not measured is left out.

    `eval/{base,tuned,difference}/{thinking,non_thinking}/{accuracy,accuracy/chat,adherence}`,
    `eval/tuned/{thinking,non_thinking}/{cut,reasoning_tokens}`, `eval/tuned/forgetting/{kl,nll}`. Intervals and all
    other metrics are in eval.json."""
    numbers = {}
    for model in ("base", "tuned", "difference"):
        charted = CHARTED_TUNED if model == "tuned" else CHARTED
        for section, metrics in result[model].items():
            for metric, estimate in metrics.items():
                if metric in charted and estimate["value"] is not None:
                    numbers[f"eval/{model}/{section}/{metric}"] = estimate["value"]
    return numbers


def score_rows(result: Evaluation) -> list[dict[str, object]]:
    """What was measured, base and tuned, and their paired difference with its 95% interval, in words. What is zero for both
    models is left out, and so is what only pools other rows."""
    rows = []
    for section, metrics in result["difference"].items():
        for metric, change in metrics.items():
            pair = {model: result[model][section][metric] for model in ("base", "tuned")}
            if metric not in POOLED and any(round(estimate["value"] or 0, 3) for estimate in pair.values()):
                values = {model: show(metric, estimate).partition(" ")[0] for model, estimate in pair.items()}
                values["difference"] = show(metric, change, sign="+", unit="")
                rows.append({"95% intervals": title(section, metric, result["modes"]), **values, "n": change["n"]})
    return rows


def title(section: str, metric: str, sections: Collection[str]) -> str:
    """`sums with thinking`; without the mode where only one of the modes is among `sections`, or the metric has none."""
    for prefix, words in ((LOSS, "loss on"), (TOKEN_ACCURACY, "next token right,")):
        if metric.startswith(prefix):
            source, _, mode = metric.removeprefix(prefix).rpartition("/")
            return f"{words} {source} ({mode_title(mode)})"
    name = TITLES.get(metric, metric.removeprefix(SET).replace("kl/", "KL, "))
    both = set(MODES) <= set(sections)
    return f"{name} {WITH[section]}" if both and section in WITH else name


def is_share(metric: str) -> bool:
    """Whether a metric reads as a percentage."""
    return is_rate(metric) or metric.startswith(("begins/", TOKEN_ACCURACY))


def amount(metric: str, value: float, sign: str = "", unit: str = "%") -> str:
    """`70%` for a share, `0.220` or `41` for others."""
    return f"{100 * value:{sign}.0f}{unit}" if is_share(metric) else f"{value:{sign}.{3 if abs(value) < 20 else 0}f}"


def show(metric: str, estimate: Interval | None, sign: str = "", unit: str = "%") -> str:
    """A number with its interval, `70% [59, 81]`; a dash where nothing could be measured."""
    if estimate is None or estimate["value"] is None:
        return "-"
    low, high = (amount(metric, estimate[end] or 0.0, sign, "") for end in ("low", "high"))
    return f"{amount(metric, estimate['value'], sign, unit)} [{low}, {high}]"
