"""Compile sources to a training mix: plan, draw, hold out, measure, check.

from toolkit import mix, recipe; mixed = mix.compile_mix(recipe.load("pocket")); mixed.report["achieved"]
"""

import functools
import hashlib
import itertools
import json
import re
import shutil
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from toolkit.dedup import Duplicates, Grams, NearDuplicates, prompt_key, signatures
from toolkit.family import KINDS, SWITCH
from toolkit.files import (
    ToolkitError,
    find,
    lock,
    outputs,
    read_json,
    read_jsonl,
    sha256,
    write_error,
    write_json,
    write_jsonl,
)
from toolkit.lint import lint
from toolkit.recipe import Data, Recipe, Source
from toolkit.render import Chat, Example, chat_of, examples, load_chat
from toolkit.sources import Rejected, conversations, fingerprint

UNITS = ("examples", "tokens", "supervised_tokens")
BATCH = 256
MAX_PREFETCH = 16
"""Batches rendered ahead while the tokenizer is still being loaded (1 s); afterwards one, while another is encoded."""
CHECK_EVERY = 2000
"""Rows of a source after which a hopeless one is given up: it may have millions."""
TOLERANCE = 0.01
"""An achieved share further from its plan than one point stops the run."""
CACHE_KEY_FILES = ("mix.py", "render.py", "dedup.py", "family.py", "sources/*.py")
NOT_MALFORMED = {"too_long", "duplicate", "near_duplicate", "validation_prompt", "near_validation", "contaminated"}
FILES = ("train.npz", "validation.npz", "validation.jsonl", "quarantine.jsonl", "mix.json")
CHECKSUMS = "checksums.json"


@dataclass(frozen=True, eq=False)
class Row:
    """One training example: `ids` (prompt, then completion), of which the first `prompt_length` are not supervised."""

    ids: np.ndarray
    prompt_length: int
    source: str
    mode: str
    number: int
    conversation: dict = field(default_factory=dict, repr=False)
    """Only held-out rows keep theirs, up to the supervised turn: evaluation asks them again."""

    @property
    def labels(self) -> np.ndarray:
        """Token ids with -100 (ignored by the loss) on the prompt."""
        return np.where(np.arange(len(self.ids)) < self.prompt_length, -100, self.ids)

    def size(self, unit: str) -> int:
        """This row counted in examples, tokens or supervised tokens."""
        if unit == "examples":
            return 1
        return len(self.ids) if unit == "tokens" else len(self.ids) - self.prompt_length


@dataclass(frozen=True)
class Mix:
    """A compiled mix: rows to train on, rows held out, `mix.json`'s content, and rejected rows with their reasons."""

    train: list[Row]
    validation: list[Row]
    report: dict
    quarantine: list[dict]
    folder: Path

    @functools.cached_property
    def train_dataset(self):
        """A datasets.Dataset with input_ids and labels, as SFTTrainer takes it (SFTConfig: max_length=None)."""
        return dataset(self.train)

    @functools.cached_property
    def validation_dataset(self):
        """The same of the held-out rows; None without any."""
        return dataset(self.validation) if self.validation else None

    @property
    def validation_by_source(self) -> dict | None:
        """{"source/mode": data set} of the held-out rows: SFTTrainer then logs a loss for each. None without any."""
        return datasets_by_source(self.validation) or None


# --- the steps -------------------------------------------------------------------------------------------------------


def compile_mix(recipe: Recipe, tokenizer=None, *, fresh: bool = False) -> Mix:
    """The recipe's mix, compiled or read from the cache (keyed by everything that decides a row).

    `tokenizer` is the transformers tokenizer of a loaded model; by default the recipe's model gives its own. Raises
    ToolkitError on unreadable sources, a template that cannot be trained on, too many malformed rows, or an achieved
    share off its plan.
    """
    chat = chat_of(tokenizer) if tokenizer else load_chat(recipe.model.model_name, recipe.model.revision)
    _ = chat.end  # what is wrong with template or tokenizer is said before any source is opened
    fingerprints = {s.name: fingerprint(s) for s in (*recipe.data.sources, *recipe.evaluate.questions)}
    folder = cache_folder() / _key(recipe, chat, fingerprints)
    with lock(folder, "mix", wait=True):
        if fresh or not is_whole(folder):
            _compile(recipe, chat, fingerprints, folder)
        mixed = read(folder)
    mixed.report["warnings"] = lint(chat, mixed.report, recipe.lora, recipe.train)
    return mixed


def _compile(recipe: Recipe, chat: Chat, fingerprints: dict, folder: Path) -> None:
    data, planned = recipe.data, plan(recipe.data)
    draws = [Draw(s, planned[s.name], data) for s in data.sources if s.fraction != 0]
    try:
        _fill(draws, recipe, chat)
        limited_by = _balance(draws, data)
        rows = [row for draw in draws for row in draw.train]
        report = _report(recipe, draws, planned, limited_by, fingerprints, chat, rows)
        _check_shares(report, draws)
    except IdsDiffer as difference:
        chat.fallback_reason = str(difference)
        _compile(recipe, chat, fingerprints, folder)
        return
    except ToolkitError as error:
        if dropped := [entry for draw in draws for entry in draw.quarantine]:
            write_jsonl(folder / "quarantine.jsonl", dropped)
            raise ToolkitError(f"{error}. Every dropped row: {folder / 'quarantine.jsonl'}") from error
        raise
    order = np.random.default_rng(data.seed).permutation(len(rows))
    _write(folder, [rows[i] for i in order], [r for d in draws for r in d.validation], report, draws)


def _fill(draws: list["Draw"], recipe: Recipe, chat: Chat) -> None:
    """Hold out and draw every source's rows. All hold out first, so that none trains on another's validation prompt."""
    judge = Judge(recipe.data, recipe.model.max_seq_length, chat, _question_prompts(recipe))
    with ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(lambda: chat.fast)
        streams = [_stream(draw, recipe.data, chat, pool, loaded) for draw in draws]
        for draw, stream in zip(draws, streams, strict=True):
            _hold_out(draw, stream, judge)
        for draw, stream in zip(draws, streams, strict=True):
            _take(draw, stream, judge)
            draw.repeat()
            draw.check(recipe.data.max_rejected)


def _stream(draw: "Draw", data: Data, chat: Chat, pool: ThreadPoolExecutor, loaded: Future) -> Iterator["Drawn"]:
    """A source's rows in seeded order, rendered here while the pool's one worker encodes the batch before."""
    source, waiting = draw.source, deque()
    rng = np.random.default_rng([data.seed, int(hashlib.sha256(source.name.encode()).hexdigest()[:8], 16)])
    rows = conversations(draw.pool, data.seed, data.placeholders)
    while batch := [_render(*item, source, chat, rng) for item in itertools.islice(rows, BATCH)]:
        waiting.append(pool.submit(_encode, batch, source.name, chat, data.duplicates == "near"))
        while len(waiting) > (1 if loaded.done() else MAX_PREFETCH):
            yield from draw.compared(waiting.popleft().result(), chat)
    for rest in waiting:
        yield from draw.compared(rest.result(), chat)


@dataclass
class Drawn:
    """One row of a source: its conversation, or why it was rejected, and its examples as text and as token ids."""

    number: int
    conversation: dict | None = None
    rejected: Rejected | None = None
    examples: list[Example] = ()
    rows: list[Row] = ()
    signatures: list = ()


def _render(number: int, item: dict | Rejected, source: Source, chat: Chat, rng) -> Drawn:
    switched = rng.random() < source.soft_switch  # spent on every row, so that one more rejected row changes no other
    if isinstance(item, Rejected):
        return Drawn(number, rejected=item)
    if source.mode == "thinking" and "thinking" not in KINDS[chat.kind]:
        raise ToolkitError(
            f"{source.path}, row {number}: the source {source.name} has mode: thinking, but {chat.name} has no thinking "
            "mode. Choose a hybrid model, or leave this source out"
        )
    try:
        conversation = _with_switch(item) if switched and chat.kind == "hybrid" and chat.switches else item
        return Drawn(number, conversation, examples=examples(conversation, source.mode, chat, source.turns))
    except Rejected as rejected:
        return Drawn(number, rejected=rejected)


def _with_switch(conversation: dict) -> dict:
    """The same with /think or /no_think at the end of the last user turn, as the replies to it are.

    Where those differ (a call without reasoning, then a reasoned answer) no switch would be right: it stays as it is."""
    messages = conversation["messages"]
    asked = max(i for i, m in enumerate(messages) if m["role"] == "user")
    reasoned = {bool(m.get("reasoning_content")) for m in messages[asked:] if m["role"] == "assistant"}
    if len(reasoned) > 1 or SWITCH.search(messages[asked]["content"]):
        return conversation
    switch = " /think" if True in reasoned else " /no_think"
    changed = messages[asked] | {"content": messages[asked]["content"] + switch}
    return {**conversation, "messages": [*messages[:asked], changed, *messages[asked + 1 :]]}


def _encode(batch: list[Drawn], source: str, chat: Chat, sign: bool) -> list[Drawn]:
    """Add token ids and signatures to a batch: prompt and completion are tokenized separately, as at inference."""
    flat, ends = chat.encode_flat([t for d in batch for e in d.examples for t in (e.prompt, e.completion)])
    starts, middles, stops = ends[:-1:2].tolist(), ends[1::2].tolist(), ends[2::2].tolist()
    completions = [flat[m:b] for m, b in zip(middles, stops, strict=True)]
    bounds = zip(starts, middles, stops, signatures(completions) if sign else [None] * len(stops), strict=True)
    for drawn in batch:
        found = [(e, *next(bounds)) for e in drawn.examples]
        drawn.rows = [Row(flat[a:b].copy(), m - a, source, e.mode, drawn.number) for e, a, m, b, _ in found]
        drawn.signatures = [signature for *_, signature in found]
    return batch


def _hold_out(draw: "Draw", stream: Iterator[Drawn], judge: "Judge") -> None:
    """The first usable conversations of a source never train, nor does any other row that asks the same."""
    kept = 0
    while kept < draw.plan["validation"] and (drawn := next(stream, None)):
        held = []
        for example, row, signature in draw.examples(drawn):
            key = prompt_key({"messages": drawn.conversation["messages"][: example.turn]})
            if why := judge.unusable(row, key):
                draw.drop(row.number, *why)
                continue
            told = drawn.conversation["messages"][: example.turn + 1]
            held.append((key, replace(row, conversation=drawn.conversation | {"messages": told}), signature))
        for key, row, signature in held:
            judge.hold(key, row, signature)
            draw.validation.append(row)
        kept += bool(held)


def _take(draw: "Draw", stream: Iterator[Drawn], judge: "Judge") -> None:
    """Draw rows until the source's quota is met or it is exhausted."""
    while draw.amount < draw.quota and (drawn := next(stream, None)):
        for example, row, signature in draw.examples(drawn):
            if why := judge.reason(example, row, signature, drawn.conversation):
                draw.drop(row.number, *why)
            else:
                draw.add(row)


class IdsDiffer(Exception):
    """The fast tokenizer gave other ids than Hugging Face's for a row."""


class Draw:
    """What one source gave so far."""

    def __init__(self, source: Source, planned: dict, data: Data):
        self.source, self.plan, self.data, self.unit = source, planned, data, unit_of(data)
        self.pool, self.count = split_count(source)
        if source.fraction is not None:
            self.pool = source  # of a share, `#N` says out of how many rows it is drawn
        self.amount = self.drawn = self.seen = self.rows_compared = 0
        self.train: list[Row] = []
        self.validation: list[Row] = []
        self.dropped: Counter = Counter()
        self.quarantine: list[dict] = []

    @property
    def quota(self) -> float:
        """How much is to train, in the mix's unit; infinite where everything is taken."""
        if self.source.fraction is None:
            return self.count - len(self.validation) if self.count else float("inf")
        return self.source.fraction * (self.data.budget or float("inf"))

    @property
    def exhausted(self) -> bool:
        return self.amount < self.quota

    def compared(self, batch: list[Drawn], chat: Chat) -> list[Drawn]:
        """The batch, once Hugging Face's tokenizer gave the same ids for a sample: a source's first 16 rows, then every
        128th. Raises IdsDiffer."""
        sample = [d for d in (batch[::128] if self.rows_compared else batch[:16]) if d.rows]
        if chat.fast:
            texts = [t for d in sample for t in (d.examples[-1].prompt, d.examples[-1].completion)]
            found = iter(chat.encode_reference(texts) if texts else ())
            for drawn in sample:
                if drawn.rows[-1].ids.tolist() != next(found) + next(found):
                    raise IdsDiffer(f"fastokens gives other ids for row {drawn.number} of {self.source.name}")
            self.rows_compared += len(sample)
        return batch

    def examples(self, drawn: Drawn) -> Iterator[tuple[Example, Row, np.ndarray | None]]:
        """The examples of a row, counted; a rejected row has none. Raises ToolkitError once a source is hopeless."""
        if self.drawn and self.drawn % CHECK_EVERY == 0:
            self.check(max(0.5, self.data.max_rejected))
        self.drawn += 1
        self.seen += max(1, len(drawn.rows))
        if drawn.rejected:
            self.drop(drawn.number, drawn.rejected.reason, drawn.rejected.detail)
        return zip(drawn.examples, drawn.rows, drawn.signatures, strict=True)

    def drop(self, number: int, reason: str, detail: str) -> None:
        self.dropped[reason] += 1
        self.quarantine.append({"source": self.source.name, "row": number, "reason": reason, "detail": detail})

    def add(self, row: Row) -> None:
        self.train.append(row)
        self.amount += row.size(self.unit)

    def repeat(self) -> None:
        """Use rows again, in their order, where the source allows it (max_repeats) or asks for more than it has (#N)."""
        limit = len(self.train) * self.source.max_repeats
        if self.count and self.drawn < self.count:
            limit = max(limit, self.count - len(self.validation))
        again = itertools.cycle(list(self.train))
        while self.train and len(self.train) < limit and self.exhausted:
            self.add(next(again))

    def check(self, max_rejected: float) -> None:
        """Raise ToolkitError when more rows are malformed than allowed, or none is left."""
        where = f"{self.source.path} ({self.source.name})"
        malformed = Counter({r: n for r, n in self.dropped.items() if r not in NOT_MALFORMED})
        if malformed.total() > max_rejected * self.seen:
            first = next(q for q in self.quarantine if q["reason"] in malformed)
            reasons = ", ".join(f"{reason} {n}" for reason, n in malformed.most_common())
            raise ToolkitError(
                f"{where}: {malformed.total()} of {self.seen} rows rejected, more than data.max_rejected="
                f"{self.data.max_rejected:g} allows: {reasons}. First, row {first['row']}: {first['detail']}. "
                "Fix the rows, or raise data.max_rejected to leave them out"
            )
        if not self.train and (not self.validation or self.drawn % CHECK_EVERY):
            raise ToolkitError(f"{where}: no row is left to train on: {self._why_none()}")

    def _why_none(self) -> str:
        """The most frequent reason, with the value found and what to write."""
        reason = max(self.dropped, key=self.dropped.get, default="")
        held, tenth = len(self.validation), self.seen // 10
        if reason == "too_long":
            first = next(q for q in self.quarantine if q["reason"] == reason)
            return (
                f"{self.dropped[reason]} of {self.seen} are longer than model.max_seq_length, e.g. row {first['row']}: "
                f"{first['detail']}. Raise model.max_seq_length (rows are never truncated), or leave this source out"
            )
        if held:
            size = self.data.validation_size * tenth // self.plan["validation"]
            return (
                f"data.validation_size={self.data.validation_size} holds out {held} of its {self.seen} rows"
                f"{' and the rest ask the same' if reason == 'validation_prompt' else ''}. "
                f"Write data.validation_size={size} to hold out a tenth, or 0 to train on all"
            )
        return f"{self.seen} seen, dropped: {dict(self.dropped) or 'none'}"


class Judge:
    """Decides, example by example, what may train; the reason otherwise."""

    def __init__(self, data: Data, max_seq_length: int, chat: Chat, prompts: list[str]):
        self.data, self.max_seq_length = data, max_seq_length
        self.grams, self.exact = Grams(prompts), Duplicates(chat.decode)
        self.near, self.near_held = NearDuplicates(chat.decode), NearDuplicates(chat.decode)
        self.held: set[bytes] = set()

    def hold(self, key: bytes, row: Row, signature: np.ndarray | None) -> None:
        """From now on nothing that asks the same as this held-out row, or nearly repeats it, may train."""
        self.held.add(key)
        self.near_held.add(row, signature)

    def unusable(self, row: Row, key: bytes) -> tuple[str, str] | None:
        if len(row.ids) > self.max_seq_length:
            return "too_long", f"{len(row.ids)} tokens > max_seq_length {self.max_seq_length}"
        return ("validation_prompt", "a held-out row asks the same") if key in self.held else None

    def reason(self, example: Example, row: Row, signature, conversation: dict) -> tuple[str, str] | None:
        """(reason, detail) of what keeps an example out of training, or None; remembers it if not."""
        messages = conversation["messages"][: example.turn]
        key = prompt_key({"messages": messages})
        if why := self.unusable(row, key):
            return why
        if gram := self.grams.shared({"messages": conversation["messages"][: example.turn + 1]}):
            return "contaminated", f"shares 13 words with an evaluation prompt: {gram!r}"
        asked = "\n".join(m["content"] for m in messages if m["role"] == "user")
        if earlier := self.near_held.find(row, asked, signature):
            return "near_validation", f"nearly repeats held-out row {earlier.number} of {earlier.source}"
        if self.data.duplicates == "keep":
            return None
        if earlier := self.exact.find(key, row):
            return "duplicate", f"repeats row {earlier.number} of {earlier.source}, case and spacing aside"
        if earlier := self.near.find(row, asked, signature):
            return "near_duplicate", f"nearly repeats row {earlier.number} of {earlier.source}"
        self.near.add(row, signature)
        return None


def _question_prompts(recipe: Recipe) -> list[str]:
    if not recipe.data.decontaminate:
        return []
    found = (
        c for q in recipe.evaluate.questions for _, c in conversations(q, recipe.data.seed, recipe.data.placeholders)
    )
    return [m["content"] for c in found if not isinstance(c, Rejected) for m in c["messages"] if m["role"] == "user"]


# --- shares ----------------------------------------------------------------------------------------------------------


def split_count(source: Source) -> tuple[Source, int | None]:
    """A source without its limit, and the limit: N of `path#N` or `max_rows`."""
    if (match := re.fullmatch(r"(.+)#(\d+)", source.path)) and not find(source.path):
        limit = min(int(match[2]), source.max_rows or int(match[2]))
        return replace(source, path=match[1], max_rows=None), limit
    return replace(source, max_rows=None), source.max_rows


def unit_of(data: Data) -> str:
    """What the plan is counted in: `data.unit`, or examples where `#N` counts stand in place of fractions."""
    counted = any(s.fraction is None and split_count(s)[1] for s in data.sources)
    return "examples" if counted else data.unit


def plan(data: Data) -> dict[str, dict]:
    """Per source: planned share and quota (in `unit_of(data)`, None where they come as they are) and rows held out.

    Every source that takes part holds out at least one row."""
    counts = [split_count(s)[1] for s in data.sources]
    quotas, weights = counts, [s.fraction for s in data.sources]
    if None not in weights:
        quotas = [data.budget and round(f * data.budget) for f in weights]
        shares = weights
    else:
        shares = [n / sum(counts) for n in counts] if None not in counts else [None] * len(counts)
        known = [n for n in counts if n] or [1]
        weights = [n or sum(known) / len(known) for n in counts]
    held = [
        max(1, round(data.validation_size * w / sum(weights))) if w and data.validation_size else 0 for w in weights
    ]
    return {
        s.name: {"share": share, "quota": quota, "validation": n}
        for s, share, quota, n in zip(data.sources, shares, quotas, held, strict=True)
    }


def _balance(draws: list[Draw], data: Data) -> str | None:
    """Where sources are exhausted, reduce the whole mix and keep its shares; returns the source that limits it."""
    if draws[0].source.fraction is None:
        return None
    short = {draw.source.name: draw.amount / draw.source.fraction for draw in draws if draw.exhausted}
    limiting = min(short, key=short.get, default=None)
    total = short[limiting] if limiting else data.budget
    for draw in draws:
        draw.train = _trim(draw.train, draw.source.fraction * total, data.unit)
    return limiting


def _trim(rows: list[Row], target: float, unit: str) -> list[Row]:
    """The first rows, in drawn order, whose sum is nearest to `target`."""
    sums = np.cumsum([r.size(unit) for r in rows])
    n = int(np.searchsorted(sums, target))
    if n < len(rows) and (n == 0 or sums[n] - target <= target - sums[n - 1]):
        n += 1
    return rows[:n]


def shares(rows: list[Row], key=lambda r: r.source) -> dict[str, dict[str, float]]:
    """Share of each source (or other `key`) among rows, in all three units."""
    totals = {unit: Counter() for unit in UNITS}
    for row in rows:
        for unit in UNITS:
            totals[unit][key(row)] += row.size(unit)
    return {u: {k: n / max(1, c.total()) for k, n in sorted(c.items())} for u, c in totals.items()}


def _report(recipe, draws, planned, limited_by, fingerprints, chat, rows) -> dict:
    data, unit, achieved = recipe.data, unit_of(recipe.data), shares(rows)
    compared = sum(d.rows_compared for d in draws)
    return {
        "unit": unit,
        "budget": data.budget,
        "planned": {n: achieved[unit][n] if p["share"] is None else p["share"] for n, p in planned.items()},
        "achieved": achieved,
        "achieved_modes": shares(rows, key=lambda r: r.mode),
        "total": {u: sum(r.size(u) for r in rows) for u in UNITS},
        "limited_by": limited_by,
        "sources": {d.source.name: _source_report(d) for d in draws},
        "validation": dict(Counter(f"{r.source}/{r.mode}" for d in draws for r in d.validation)),
        "max_seq_length": recipe.model.max_seq_length,
        "model_kind": chat.kind,
        "tokenizer": {"name": "fastokens", "rows_compared": compared} if chat.fast else {"name": "tokenizers"},
        "fingerprints": fingerprints,
    }


def _source_report(draw: Draw) -> dict:
    rows = draw.train
    lengths = [len(r.ids) for r in rows]
    return {
        "mode": draw.source.mode,
        "modes": dict(Counter(r.mode for r in rows)),
        "rows_asked": draw.count,
        "rows_seen": draw.seen,
        "rows_kept": len(rows),
        "rows_repeated": len(rows) - len(set(map(id, rows))),
        "rows_held_out": len(draw.validation),
        "dropped": dict(draw.dropped.most_common()),
        "tokens": sum(lengths),
        "supervised_tokens": sum(r.size("supervised_tokens") for r in rows),
        "length": {f"p{p}": int(np.percentile(lengths, p)) for p in (50, 90)} | {"max": max(lengths)} if rows else {},
    }


def _check_shares(report: dict, draws: list[Draw]) -> None:
    if draws[0].source.fraction is None:
        return  # counts are the mix: what a source lacks of its own is in the report
    unit, total = report["unit"], max(1, report["total"][report["unit"]])
    off = {n: report["achieved"][unit].get(n, 0.0) - share for n, share in report["planned"].items()}
    name = max(off, key=lambda n: abs(off[n]))
    if abs(off[name]) <= TOLERANCE:
        return
    limit = report["limited_by"]
    fix = f"Add rows to {limit}, which is exhausted, or lower its fraction" if limit else "Raise data.budget"
    raise ToolkitError(
        f"data.sources: {name}: planned {report['planned'][name]:.1%} of {unit}, achieved "
        f"{report['planned'][name] + off[name]:.1%}: a mix of {total:,} {unit} is too small for rows of this length. {fix}"
    )


# --- the cache -------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where compiled mixes lie."""
    return outputs() / ".mixes"


def _key(recipe: Recipe, chat: Chat, fingerprints: dict) -> str:
    code = [f.read_bytes() for name in CACHE_KEY_FILES for f in sorted(Path(__file__).parent.glob(name))]
    decides = {
        "data": asdict(recipe.data),
        "questions": [asdict(q) for q in recipe.evaluate.questions],
        "max_seq_length": recipe.model.max_seq_length,
        "tokenizer": hashlib.sha256(f"{chat.json}{chat.template_text}{chat.tokens}".encode()).hexdigest(),
        "sources": fingerprints,
        "code": hashlib.sha256(b"".join(code)).hexdigest(),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def is_whole(folder: Path) -> bool:
    """Whether a cached mix is there with every byte as it was written."""
    try:
        sums = read_json(folder / CHECKSUMS)
        return all(sums.get(name) == sha256(folder / name) for name in FILES)
    except (ToolkitError, OSError):
        return False


def _write(folder: Path, train: list[Row], validation: list[Row], report: dict, draws: list[Draw]) -> None:
    """All files of a compiled mix, in a new folder that then takes the place of an old one. The caller holds the lock."""
    new = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(new, ignore_errors=True)  # a killed process left it
        new.mkdir(parents=True)
        _write_rows(new / "train.npz", train)
        _write_rows(new / "validation.npz", validation)
        write_jsonl(new / "validation.jsonl", (r.conversation for r in validation))
        write_jsonl(new / "quarantine.jsonl", (entry for draw in draws for entry in draw.quarantine))
        write_json(new / "mix.json", report)
        write_json(new / CHECKSUMS, {name: sha256(new / name) for name in FILES})
        if folder.exists():
            shutil.rmtree(folder)
        new.rename(folder)
    except OSError as error:
        raise write_error(folder, error) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)  # gone, unless the disk is full


def _write_rows(file: Path, rows: list[Row]) -> None:
    np.savez(
        file,
        ids=np.concatenate([r.ids for r in rows]) if rows else np.zeros(0, np.int32),
        lengths=np.array([len(r.ids) for r in rows], np.int64),
        prompt_lengths=np.array([r.prompt_length for r in rows], np.int64),
        numbers=np.array([r.number for r in rows], np.int64),
        sources=np.array([r.source for r in rows], str),
        modes=np.array([r.mode for r in rows], str),
    )


def read(folder: Path) -> Mix:
    """A compiled mix from its folder; training rows come without their conversation, which only validation needs."""
    told = read_jsonl(folder / "validation.jsonl")
    validation = [replace(r, conversation=c) for r, c in zip(_read_rows(folder / "validation.npz"), told, strict=True)]
    report, quarantine = read_json(folder / "mix.json"), read_jsonl(folder / "quarantine.jsonl")
    return Mix(_read_rows(folder / "train.npz"), validation, report, quarantine, folder)


def _read_rows(file: Path) -> list[Row]:
    with np.load(file) as arrays:
        parts = np.split(arrays["ids"], np.cumsum(arrays["lengths"])[:-1]) if len(arrays["lengths"]) else []
        columns = (arrays[name].tolist() for name in ("prompt_lengths", "sources", "modes", "numbers"))
        return [Row(*values) for values in zip(parts, *columns, strict=True)]


# --- for a trainer ---------------------------------------------------------------------------------------------------


def dataset(rows: list[Row]):
    """A datasets.Dataset of input_ids and labels (-100 on the prompt), without a copy of the ids."""
    import datasets
    import pyarrow as pa

    lengths = np.array([len(r.ids) for r in rows])
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32() if lengths.sum() < 2**31 else pa.int64())
    kind = pa.ListArray if offsets.type == pa.int32() else pa.LargeListArray
    flat = {"input_ids": [r.ids for r in rows], "labels": [r.labels for r in rows]}
    columns = {name: np.concatenate(parts).astype(np.int32) for name, parts in flat.items()}
    made = datasets.Dataset(pa.table({n: kind.from_arrays(offsets, pa.array(ids)) for n, ids in columns.items()}))
    # Unsloth's sign that no row needs cutting: without it, rows that hold ids are padded on a GPU
    made._unsloth_truncated_to = int(lengths.max())
    return made


def datasets_by_source(rows: list[Row]) -> dict:
    """One dataset per source/mode among held-out rows."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row.source}/{row.mode}", []).append(row)
    return {name: dataset(group) for name, group in sorted(groups.items())}
