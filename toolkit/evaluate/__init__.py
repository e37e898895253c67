"""Score a run against its own base: accuracy, mode adherence, forgetting.

    result = evaluate(model, tokenizer, questions, chat_questions, load_probes(), validation, level="quick")

Base and tuned are one loaded model with its adapter off and on. A question is {"messages": [...up to a user turn],
"expected_answer": "42", "set": "sums"}. Accuracy counts replies that ended by themselves; `cut` is the share that did not.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import mean, median

import numpy as np

from toolkit.evaluate.questions import LEVELS, MODES, Ask, Clock, budget_of, choose, fingerprint, plan
from toolkit.evaluate.score import Judge, answers_at_once, has_tags, leaks, obeys_no_think, thinks, too_long
from toolkit.evaluate.stats import difference, interval
from toolkit.evaluate.subject import Subject, bind
from toolkit.files import ToolkitError
from toolkit.generate import Reply

MAY_CHANGE = {"identity"}
"""Probe categories a run may mean to change ("who made you?"): reported, but not part of the pooled kl and nll."""
KEPT = ("accuracy", "accuracy/chat", "adherence", "kl")
"""Metrics whose sums and counts per question are written out, so that `compare` can pair runs question by question."""
PARTS = ("adherence/", "kl/", "nll/")
Sums = dict[str, tuple[list[float], list[float]]]
"""Metric → (sums, counts), one entry per question, probe or row: what intervals are made from."""


def evaluate(
    model,
    tokenizer,
    questions: Sequence[dict],
    chat_questions: Sequence[dict],
    probes: Sequence[dict],
    validation: Sequence[dict],
    *,
    level: str = "quick",
    seed: int = 3407,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    say: Callable[[str], None] = print,
) -> dict:
    """eval.json's content for a loaded run (a PeftModel). `say` gets the budget, then the time after the first batch.

    `validation` holds rows {"input_ids", "prompt_length", "source", "mode"}. `seed` is evaluation's own, not the recipe's: runs that
    differ in their training seed must be asked alike. Raises ToolkitError without questions."""
    limit, clock = max_new_tokens or LEVELS[level].max_new_tokens, Clock(say)
    subject = bind(model, tokenizer, seed=seed, max_new_tokens=limit, batch_size=batch_size, progress=clock.tick)
    return score(
        subject,
        questions,
        chat_questions,
        probes,
        validation,
        level=level,
        seed=seed,
        max_new_tokens=limit,
        clock=clock,
    )


def score(
    subject: Subject,
    questions: Sequence[dict],
    chat_questions: Sequence[dict],
    probes: Sequence[dict],
    validation: Sequence[dict],
    *,
    level: str,
    seed: int,
    max_new_tokens: int,
    clock: Clock | None = None,
) -> dict:
    """The same for anything that replies."""
    size, clock = LEVELS[level], clock or Clock(lambda _: None)
    asked = [{**q, "chat": False} for q in choose(questions, size.questions, "set")]
    asked += [{**q, "chat": True} for q in choose(chat_questions, size.questions, "set")]
    if not asked:
        raise ToolkitError(
            "nothing to ask: evaluation needs questions with an expected_answer (recipe: evaluate.questions)"
        )
    kinds = {(probe["category"], probe["language"]) for probe in probes}
    probes = choose(probes, size.probes * len(kinds), "category", "language")
    validation = choose(validation, size.validation, "source", "mode")
    plans = {mode: plan(asked, mode, size) for mode in MODES}
    budget = budget_of(plans, probes, validation, size, max_new_tokens)
    clock.start(level, budget)
    replies = {(m, on): subject.reply([ask.messages for ask in plans[m]], m, on) for m in MODES for on in (False, True)}
    sums, timeouts = _mode_sums(subject, plans, replies, asked)
    sums["forgetting"] = forgetting(subject, probes, validation, size.probe_tokens)
    return {
        "level": level,
        "seed": seed,
        "budget": budget,
        "seconds": clock.seconds(),
        "answer_timeouts": timeouts,
        "fingerprints": {
            "questions": fingerprint(asked),
            "probes": fingerprint(probes),
            "validation": fingerprint(validation),
        },
        **summarize(sums, seed),
        "samples": samples(plans, replies, asked),
    }


def _mode_sums(subject: Subject, plans: dict, replies: dict, asked: list[dict]) -> tuple[dict[str, list[Sums]], int]:
    """([base, tuned] sums of each mode, comparisons of answers that took too long)."""
    sums: dict[str, list[Sums]] = {mode: [] for mode in MODES}
    with Judge() as judge:
        for mode in MODES:
            for on in (False, True):
                scored = marks(plans[mode], replies[mode, on], replies[mode, False], asked, judge)
                chances = subject.first([q["messages"] for q in asked], mode, on)
                sums[mode].append(scored | {"think_probability": (chances, [1] * len(asked))})
        return sums, judge.timeouts


def marks(asks: list[Ask], replies: list[Reply], base: list[Reply], asked: list[dict], judge: Judge) -> Sums:
    """What the replies score, summed up per question; `base` holds the base's replies to the same prompts."""
    lengths = defaultdict(list)
    for ask, reply in zip(asks, base, strict=True):
        lengths[ask.question, ask.purpose].append(reply.answer_tokens)
    typical = median(mean(tokens) for tokens in lengths.values())
    table: dict[str, np.ndarray] = defaultdict(lambda: np.zeros((2, len(asked))))
    for name in {"accuracy", *(name for question in asked for name in _accuracies(question))}:
        table[name] += 0  # there, with n = 0, even when every reply was cut
    for ask, reply in zip(asks, replies, strict=True):
        tokens = max(mean(lengths[ask.question, ask.purpose]), typical, 1)
        for metric, value in _marks(ask, reply, asked[ask.question], tokens, judge):
            table[metric][:, ask.question] += value, 1
    return {metric: (values[0].tolist(), values[1].tolist()) for metric, values in table.items()}


def _marks(ask: Ask, reply: Reply, question: dict, base_tokens: float, judge: Judge) -> Iterable[tuple[str, float]]:
    if ask.purpose == "switch/hard":
        yield ask.purpose, not has_tags(reply.text)
    elif ask.purpose != "answer":
        yield ask.purpose, thinks(reply) if ask.must_think else obeys_no_think(reply)
    else:
        yield "cut", not reply.finished
        yield "reasoning_tokens", reply.reasoning_tokens
        yield "answer_tokens", reply.answer_tokens
        yield from _adherence(ask.mode, reply, base_tokens)
        if reply.finished:
            right = judge.right(reply.answer, question["expected_answer"])
            yield from ((name, right) for name in _accuracies(question))


def _accuracies(question: dict) -> tuple[str, str]:
    return "accuracy/chat" if question["chat"] else "accuracy", f"accuracy/set/{question['set']}"


def _adherence(mode: str, reply: Reply, base_tokens: float) -> Iterable[tuple[str, float]]:
    """One mark, and the parts it is made of. A block that the limit cut open did not close: it counts against thinking
    mode (endless thinking is how that mode dies), and `cut` stands beside it."""
    if mode == "thinking":
        yield "adherence", thinks(reply)
        yield "adherence/thought", bool(reply.opened and reply.reasoning)
        yield "adherence/closed", reply.closed
        yield "adherence/answered", bool(reply.answer)
        if reply.finished:
            yield "adherence/finished", thinks(reply)
    else:
        yield "adherence", answers_at_once(reply, base_tokens)
        yield "adherence/no_tags", not has_tags(reply.text)
        yield "adherence/no_leak", not leaks(reply)
        yield "adherence/short", not too_long(reply, base_tokens)
        yield "adherence/answered", bool(reply.answer)


def forgetting(subject: Subject, probes: list[dict], validation: list[dict], tokens: int) -> list[Sums]:
    """[base, tuned]: NLL and KL per token on the base's own greedy answers to the probes, and held-out loss by source."""
    rows = {mode: subject.own([p["messages"] for p in probes], mode, tokens) for mode in MODES}
    found = {mode: subject.divergence(rows[mode]) for mode in MODES}
    result: list[Sums] = [{}, {}]
    for on, nll in enumerate(("base", "tuned")):
        for metric, key in (("kl", "kl"), ("nll", nll)):
            values = {mode: [r[key] if on or key != "kl" else 0.0 for r in found[mode]] for mode in MODES}
            result[on].update(_by_category(metric, values, {m: [r["tokens"] for r in found[m]] for m in MODES}, probes))
    losses = subject.divergence(validation)
    for name in sorted({(row["source"], row["mode"]) for row in validation}):
        here = [
            (x, x["tokens"]) for x, row in zip(losses, validation, strict=True) if (row["source"], row["mode"]) == name
        ]
        for on, nll in enumerate(("base", "tuned")):
            result[on]["loss/" + "/".join(name)] = ([x[nll] for x, _ in here], [n for _, n in here])
    return result


def _by_category(metric: str, values: dict, tokens: dict, probes: list[dict]) -> Sums:
    total, count = (np.sum([x[m] for m in MODES], axis=0) if probes else np.zeros(0) for x in (values, tokens))
    stays = np.array([p["category"] not in MAY_CHANGE for p in probes], bool)
    masks = {metric: stays} | {
        f"{metric}/{c}": np.array([p["category"] == c for p in probes], bool)
        for c in sorted({p["category"] for p in probes})
    }
    sums = {name: ((total * mask).tolist(), (count * mask).tolist()) for name, mask in masks.items()}
    return sums | {
        f"{metric}/{m}": ((np.array(values[m]) * stays).tolist(), (np.array(tokens[m]) * stays).tolist())
        for m in MODES
        if probes
    }


def summarize(sums: dict[str, list[Sums]], seed: int) -> dict:
    """Values, paired differences (tuned - base), and the kept values per question, from [base, tuned] sums by section."""
    result: dict = {"base": {}, "tuned": {}, "difference": {}, "per_question": {}}
    for section, pair in sums.items():
        for name, table in zip(("base", "tuned"), pair, strict=True):
            result[name][section] = {m: interval(*table[m], seed=seed, rate=is_rate(m)) for m in sorted(table)}
        shared = sorted(pair[0].keys() & pair[1].keys())
        result["difference"][section] = {
            m: difference(pair[0][m], pair[1][m], seed=seed, rate=is_rate(m)) for m in shared
        }
        result["per_question"][section] = {
            name: {m: [np.round(x, 6).tolist() for x in table[m]] for m in KEPT if m in table}
            for name, table in zip(("base", "tuned"), pair, strict=True)
        }
    return result


def is_rate(metric: str) -> bool:
    """Whether a metric counts replies, so that it lies between 0 and 1 and its extremes have an exact bound."""
    return metric.split("/")[0] in ("accuracy", "adherence", "switch", "cut")


def samples(plans: dict, replies: dict, asked: list[dict], count: int = 8) -> list[dict]:
    """A few prompts with both models' replies, for people to read."""
    rows = []
    for mode in MODES:
        for i in np.linspace(0, len(plans[mode]) - 1, min(count, len(plans[mode]))).astype(int).tolist():
            ask = plans[mode][i]
            rows.append(
                {
                    "mode": mode,
                    "purpose": ask.purpose,
                    "prompt": ask.messages[-1]["content"],
                    "expected_answer": asked[ask.question]["expected_answer"],
                    "base": replies[mode, False][i].text,
                    "tuned": replies[mode, True][i].text,
                }
            )
    return rows


def summary(result: dict) -> dict[str, float]:
    """Flat names for wandb: `eval/tuned/thinking/accuracy`, with `.low` and `.high` beside it. What was not measured is left out."""
    flat = {}
    for name in ("base", "tuned", "difference"):
        for section, metrics in result.get(name, {}).items():
            for metric, found in metrics.items():
                if found["value"] is not None:
                    key = f"eval/{name}/{section}/{metric}"
                    flat |= {key: found["value"], f"{key}.low": found["low"], f"{key}.high": found["high"]}
    return flat


def table(result: dict):
    """A rich table: base, tuned and their paired difference with 95% intervals; the parts of a metric stay in eval.json."""
    from rich.table import Table

    grid = Table(title=f"Evaluation ({result['level']}, seed {result['seed']}); 95% intervals, paired over questions")
    for heading in ("", "metric", "base", "tuned", "tuned - base", "n"):
        grid.add_column(heading, justify="left" if heading in ("", "metric") else "right")
    for section, metrics in result["difference"].items():
        whole = {m: change for m, change in metrics.items() if not m.startswith(PARTS)}
        for i, (metric, change) in enumerate(whole.items()):
            cells = [show(result[name][section][metric]) for name in ("base", "tuned")]
            grid.add_row(section if i == 0 else "", metric, *cells, show(change, sign="+"), str(change["n"]))
        grid.add_section()
    return grid


def show(found: dict, sign: str = "") -> str:
    """`0.81 [0.74, 0.87]`, or a dash where nothing could be measured."""
    if found["value"] is None:
        return "-"
    places = 0 if abs(found["value"]) >= 20 else 1 if abs(found["value"]) >= 5 else 3
    value, low, high = (f"{found[key]:{sign}.{places}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
