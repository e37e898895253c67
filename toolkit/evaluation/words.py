"""An evaluation for people: in words, as a table, and as the flat numbers that are charted.

print("\\n".join(verdict(result))); score_rows(result); wandb.run.summary.update(summary(result))
"""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from toolkit.evaluation.lengths import EXCESS
from toolkit.evaluation.stats import direction, is_rate
from toolkit.evaluation.table import MODELS
from toolkit.family import MODES, mode_title
from toolkit.records import Evaluation, Interval

SET = "accuracy/set/"
LOSS = "loss/"
TOKEN_ACCURACY = "token_accuracy/"
WITH = {"thinking": "with thinking", "non_thinking": "without thinking"}
# how surely a reply begins as the mode asks
BEGINS = {"thinking": "begins/thinking", "non_thinking": "begins/answer"}
# reasoning and chat questions of all sets together
POOLED = ("accuracy", "accuracy/chat")
CHARTED = (*POOLED, "adherence")
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
# the sets of the pocket recipes are called what they are called where sets are pooled
SETS = {"sums": TITLES["accuracy"], "chat": TITLES["accuracy/chat"]}
# the verdict names the share of replies that the limit cut only where it is larger
CUT = 0.05
# smaller losses of a mode's beginning can be certain too, but harm nobody
WORSE_BEGINNING = 0.05
# sources and question sets of which the verdict has a line each; the table has all
SHOWN = 4
ADVICE = "Try a lower train.learning_rate, fewer steps, or more general data."


class Finding(NamedTuple):
    """One thing that a verdict judges."""

    name: str
    """As the last line of the verdict lists it."""
    line: str
    """A line of its own; empty where another line says more."""
    change: int
    """1 where the interval is sure that it is better, -1 where it is worse, else 0."""


def verdict(result: Evaluation) -> list[str]:
    """What a training did, in a few lines: the person's own rows first, then questions, modes, lengths, forgetting; the
    last line says whether the run is better or worse than its base. "certain": the 95% interval excludes zero."""
    own = list(own_row_findings(result))
    others = [*question_findings(result), *mode_findings(result), *endless_findings(result)]
    lines = [finding.line for finding in [*own[:SHOWN], *others] if finding.line] + length_lines(result)
    kl = result["tuned"].get("forgetting", {}).get("kl")
    if kl and not kl["n"]:
        return [*lines, f"result: BROKEN: the tuned model computes no numbers (NaN), the training diverged. {ADVICE}"]
    if kl:
        lines.append(f"forgetting: {kl['value']:.3f} nats per token from the base (KL on the base's own answers)")
    return [*lines, conclusion([*own, *others], generated=bool(result["lengths"]))]


def conclusion(findings: Sequence[Finding], *, generated: bool) -> str:
    """The last line: better or worse, in what, and what to do."""
    gains = first_three([finding.name for finding in findings if finding.change > 0])
    losses = first_three([finding.name for finding in findings if finding.change < 0])
    unread = "" if generated else " No reply was generated: `--level quick` reads some."
    if losses:
        return f"result: WORSE than the base in {losses}{gains and '; better in ' + gains}. {ADVICE}{unread}"
    if gains:
        return f"result: better than the base in {gains}; nothing is shown to be worse.{unread}"
    return "result: no change shown." + (unread or " `--level full` asks more questions, which shows smaller changes.")


def first_three(names: Sequence[str]) -> str:
    """`a, b, c and 2 more`."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def own_row_findings(result: Evaluation) -> Iterator[Finding]:
    """`your held-out replies, openmath (thinking): 2.4 times likelier (certain)`, per token, for each source."""
    for metric, change in result["difference"].get("forgetting", {}).items():
        if metric.startswith(LOSS) and change["value"] is not None:
            name = title("forgetting", metric, ())
            certain = "certain" if direction(change) else "no change shown"
            likelier = f"{times_likelier(change['value'])} ({certain})"
            line = f"your held-out replies, {name.removeprefix('loss on ')}: {likelier}"
            # a loss is better when it falls
            yield Finding(name, line, -direction(change))


def times_likelier(loss_change: float) -> str:
    """A change of the mean loss in nats as a ratio of probabilities: `2.4 times likelier`."""
    # beyond e^50 the number says nothing, and a diverged loss would overflow
    factor = math.exp(min(50.0, abs(loss_change)))
    if factor < 1.005:
        return "as likely as before"
    return f"{factor:.3g} times {'likelier' if loss_change < 0 else 'less likely'}"


def question_findings(result: Evaluation) -> Iterator[Finding]:
    """Accuracy by question set and mode; sets that ship are named as what they are, a check of what was kept."""
    for _, section, metric in judged_questions(result):
        kept = "what was kept, " if metric.removeprefix(SET) in result["shipped"] else ""
        yield share_finding(result, section, metric, kept)


def judged_questions(result: Evaluation) -> list[tuple[str, str, str]]:
    """(name, section, metric) of accuracy by question set, or pooled where that would take more than four lines."""
    keys = [key for key in measured_keys(result) if key[1].startswith(SET)]
    if len(keys) > SHOWN:
        keys = [key for key in measured_keys(result) if key[1] in POOLED]
    return [(title(*key, result["modes"]), *key) for key in keys]


def mode_findings(result: Evaluation) -> Iterator[Finding]:
    """Whether replies keep to their mode, and how surely they begin as it asks."""
    for mode, begins in BEGINS.items():
        measured = result["difference"].get(mode, {})
        if "adherence" in measured:
            yield share_finding(result, mode, "adherence")
        if begins in measured:
            finding = share_finding(result, mode, begins)
            # replies say more than the probability of their first tokens
            if "adherence" in measured:
                finding = finding._replace(line="")
            # a surer beginning is no gain, and a little less sure no loss
            if (measured[begins]["value"] or 0) >= -WORSE_BEGINNING:
                finding = finding._replace(change=0)
            yield finding


def endless_findings(result: Evaluation) -> Iterator[Finding]:
    """Replies that never end, where that is shown."""
    for mode, lengths in result["lengths"].items():
        if never_ends(lengths["endless"]):
            replies = f"{lengths['endless']['value']:.0%} of {with_mode('replies', mode, result['modes'])}"
            name = with_mode("ending its replies", mode, result["modes"])
            yield Finding(name, f"{replies} never end, beyond what longer replies explain", -1)


def never_ends(endless: Interval) -> bool:
    """Whether it is certain that more than a few tuned replies never end."""
    return direction(endless) > 0 and (endless["low"] or 0) > EXCESS


def length_lines(result: Evaluation) -> list[str]:
    """`length of replies: 1.6 times [1.3, 1.9] with thinking, 1 times [0.9, 1.1] without thinking`."""
    ratios = []
    for mode, lengths in result["lengths"].items():
        ratio = lengths["ratio"]
        if ratio["value"] is not None:
            text = f"{ratio['value']:.2g} times [{ratio['low']:.2g}, {ratio['high']:.2g}]"
            ratios.append(with_mode(text, mode, result["modes"]))
    return [f"length of replies: {', '.join(ratios)}"] if ratios else []


def share_finding(result: Evaluation, section: str, metric: str, kept: str = "") -> Finding:
    """A change of a share in words, `23% → 95% (+72 points, certain)`; `not measured (why)` where no question counts for
    both models. The change is paired over questions that both finished, the shares are over all that each finished."""
    base, tuned, change = (result[model][section][metric] for model in (*MODELS, "difference"))
    # without replies there is nothing that could be cut
    cuts = result["tuned"][section].get("cut")
    cut = (cuts and cuts["value"]) or 0.0
    # rounded first: the points are the difference of the shares that stand beside them
    before, after = (round(100 * (estimate["value"] or 0.0)) for estimate in (base, tuned))
    # where many are cut, the shares may move against the pairs
    certain = direction(change) * (after - before) > 0
    reasons = [f"{after - before:+d} points, certain" if certain else "no change shown"]
    text = f"{before}% → {after}%"
    if change["value"] is None:
        text, reasons = "not measured", [] if cut > CUT else ["no question"]
    if cut > CUT:
        reasons.append(f"{cut:.0%} of replies cut by the token limit")
    name = title(section, metric, result["modes"])
    return Finding(name, f"{kept}{name}: {text} ({'; '.join(reasons)})", direction(change))


def measured_keys(result: Evaluation) -> list[tuple[str, str]]:
    """(section, metric) of every difference."""
    return [(section, metric) for section, metrics in result["difference"].items() for metric in metrics]


# --- rows for people -------------------------------------------------------------------------------------------------


def own_rows_text(result: Evaluation, width: int = 76) -> Iterator[str]:
    """The person's own held-out rows before and after, beside their reference, a line each."""
    for row in sorted(result["own_rows"], key=lambda row: (row["source"], row["mode"])):
        yield one_line(f"{row['source']} ({mode_title(row['mode'])}): {row['prompt']}", width)
        for name in ("reference", "base", "tuned"):
            yield f"  {name:9}  {one_line(row[name], width - 13)}"


def one_line(text: str, width: int) -> str:
    """The beginning of a text, without line breaks."""
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 2]} …"


def summary(result: Evaluation) -> dict[str, float]:
    """The 24 numbers (at most) that people chart, by the names they have in wandb; what was not measured is left out.

    `eval/{base,tuned,difference}/{thinking,non_thinking}/{accuracy,accuracy/chat,adherence}`,
    `eval/tuned/{thinking,non_thinking}/{cut,reasoning_tokens}`, `eval/tuned/forgetting/{kl,nll}`. Intervals and all
    other metrics are in eval.json."""
    numbers = {}
    for model in (*MODELS, "difference"):
        charted = CHARTED_TUNED if model == "tuned" else CHARTED
        for section, metric in measured_keys(result):
            value = result[model][section][metric]["value"]
            if metric in charted and value is not None:
                numbers[f"eval/{model}/{section}/{metric}"] = value
    return numbers


def score_rows(result: Evaluation) -> list[dict[str, object]]:
    """What was measured, base and tuned, and their paired difference with its 95% interval, in words. What is zero for both
    models is left out, and so is what only pools other rows."""
    rows = []
    for section, metric in measured_keys(result):
        pair = [result[model][section][metric] for model in MODELS]
        if metric in POOLED or not any(round(estimate["value"] or 0, 3) for estimate in pair):
            continue
        base, tuned = (show(metric, estimate).partition(" ")[0] for estimate in pair)
        change = result["difference"][section][metric]
        rows.append({
            "95% intervals": title(section, metric, result["modes"]), "base": base, "tuned": tuned,
            "difference": show(metric, change, sign="+", unit=""), "n": change["n"],
        })  # fmt: skip
    return rows


def title(section: str, metric: str, sections: Collection[str]) -> str:
    """`reasoning questions with thinking`; without the mode where only one of the modes is among `sections`, or the metric has none."""
    for prefix, words in ((LOSS, "loss on"), (TOKEN_ACCURACY, "next token right,")):
        if metric.startswith(prefix):
            source, _, mode = metric.removeprefix(prefix).rpartition("/")
            return f"{words} {source} ({mode_title(mode)})"
    name = metric.removeprefix(SET)
    name = TITLES.get(metric) or SETS.get(name) or name.replace("kl/", "KL, ")
    return with_mode(name, section, sections)


def with_mode(name: str, mode: str, modes: Collection[str]) -> str:
    """`name with thinking`, where a model has both modes."""
    return f"{name} {WITH[mode]}" if set(MODES) <= set(modes) and mode in WITH else name


def amount(metric: str, value: float, sign: str = "", unit: str = "%") -> str:
    """`70%` for a share, `0.220` or `41` for others."""
    if is_rate(metric) or metric.startswith(("begins/", TOKEN_ACCURACY)):
        return f"{100 * value:{sign}.0f}{unit}"
    return f"{value:{sign}.{3 if abs(value) < 20 else 0}f}"


def show(metric: str, estimate: Interval | None, sign: str = "", unit: str = "%") -> str:
    """A number with its interval, `70% [59, 81]`; a dash where nothing could be measured."""
    if estimate is None or estimate["value"] is None:
        return "-"
    value = amount(metric, estimate["value"], sign, unit)
    low = amount(metric, estimate["low"] or 0.0, sign, "")
    high = amount(metric, estimate["high"] or 0.0, sign, "")
    return f"{value} [{low}, {high}]"
