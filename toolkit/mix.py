"""Compile sources to a training mix: plan, draw, hold out, measure, check.

from toolkit import mix, recipe; mixed = mix.compile_mix(recipe.load("pocket")); mixed.report["achieved"]
"""

import functools
import hashlib
import itertools
import json
import random
import shutil
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from toolkit.dedup import Duplicates, Grams, NearDuplicates, prompt_key, signatures
from toolkit.files import ToolkitError, complete, lock, outputs, read_json, read_jsonl, sha256, write_json, write_jsonl
from toolkit.lint import lint
from toolkit.recipe import Data, Recipe, Source
from toolkit.render import Chat, Example, chat_of, examples, load_chat, with_switch
from toolkit.sources import Rejected, conversations, fingerprint, split_count

UNITS = ("examples", "tokens", "supervised_tokens")
BATCH = 256
AHEAD = 16
"""Batches rendered before the first of them is tokenized: the tokenizer takes a second to load."""
CHECK_AT = 2000
"""Rows of a source after which a hopeless one is given up: it may have millions."""
TOLERANCE = 0.01
"""An achieved share further from its plan than one point stops the run."""
CACHE_KEY_FILES = ("mix.py", "render.py", "dedup.py", "family.py", "sources/*.py")
NOT_MALFORMED = {"too_long", "duplicate", "near_duplicate", "validation_prompt", "near_validation", "contaminated"}
FILES = ("rows.npz", "validation.jsonl", "quarantine.jsonl", "mix.json")
CHECKSUMS = "checksums.json"


@dataclass(eq=False)
class Row:
    """One training example: `ids` (prompt, then completion), of which the first `prompt_length` are not supervised."""

    ids: np.ndarray
    prompt_length: int
    source: str
    mode: str
    number: int
    conversation: dict = field(default_factory=dict, repr=False)
    """Up to the supervised turn. In a compiled mix only held-out rows have theirs: evaluation asks them again."""
    signature: np.ndarray | None = field(default=None, repr=False)
    """MinHash of the completion, by which near duplicates are found."""

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
        groups: dict[str, list[Row]] = {}
        for row in self.validation:
            groups.setdefault(f"{row.source}/{row.mode}", []).append(row)
        return {name: dataset(group) for name, group in sorted(groups.items())} or None


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
    draws = [Draw(s, planned[s.name]["validation"], data) for s in data.sources if s.fraction != 0]
    try:
        _draw(draws, recipe, chat)
        limited_by = _balance(draws, data)
        report = _report(recipe, draws, planned, limited_by) | {"fingerprints": fingerprints}
        _check_shares(report, data)
    except ToolkitError as error:
        if dropped := [entry for draw in draws for entry in draw.quarantine]:
            write_jsonl(folder / "quarantine.jsonl", dropped)
            raise ToolkitError(f"{error}. Every dropped row: {folder / 'quarantine.jsonl'}") from error
        raise
    _write(folder, draws, report, data.seed)


def _draw(draws: list["Draw"], recipe: Recipe, chat: Chat) -> None:
    """Hold out and draw every source's rows. All hold out first, so that none trains on another's validation prompt."""
    judge = Judge(recipe.data, recipe.model.max_seq_length, chat, _question_prompts(recipe))
    with ThreadPoolExecutor(1) as encoder, ThreadPoolExecutor(1) as loader:
        encoder.submit(getattr, chat, "fast")  # both tokenizers load while the first rows are rendered
        loader.submit(getattr, chat.tokenizers, "reference")
        streams = [_stream(draw, recipe.data, chat, encoder) for draw in draws]
        for hold_out in (True, False):
            for draw, stream in zip(draws, streams, strict=True):
                while draw.wants(hold_out) and (drawn := next(stream, None)):
                    draw.take(*drawn, judge, hold_out)
    for draw in draws:
        draw.check(recipe.data.max_rejected)
        draw.repeat()


def _stream(draw: "Draw", data: Data, chat: Chat, encoder: ThreadPoolExecutor) -> Iterator[tuple]:
    """(number, its Rows or Rejected) of a source in seeded order.

    They are rendered here while the encoder's one thread tokenizes the batch before."""
    source, dice, waiting = draw.source, random.Random(f"{data.seed} {draw.source.name}"), deque()
    rows = conversations(draw.pool, data.seed, data.placeholders)
    for batch in iter(lambda: [*itertools.islice(rows, BATCH)], []):
        rendered = [(n, _render(item, source, chat, dice.random() < source.soft_switch)) for n, item in batch]
        waiting.append(encoder.submit(_encode, rendered, source.name, chat, data.duplicates == "near"))
        while waiting and (waiting[0].done() or len(waiting) > AHEAD):
            yield from waiting.popleft().result()
    for encoded in waiting:
        yield from encoded.result()


def _render(item: dict | Rejected, source: Source, chat: Chat, switched: bool) -> list[Example] | Rejected:
    if isinstance(item, Rejected):
        return item
    try:
        return examples(with_switch(item, chat) if switched else item, source.mode, chat, source.turns)
    except Rejected as rejected:
        return rejected


def _encode(batch: list[tuple], source: str, chat: Chat, sign: bool) -> list[tuple]:
    """A rendered batch with Rows in place of examples: prompt and completion are tokenized apart, as at inference."""
    flat = [(n, example) for n, found in batch if not isinstance(found, Rejected) for example in found]
    ids, ends = chat.encode_flat([text for _, e in flat for text in (e.prompt, e.completion)])
    bounds = zip(ends[:-1:2].tolist(), ends[1::2].tolist(), ends[2::2].tolist(), strict=True)
    rows = [
        Row(ids[start:end].copy(), middle - start, source, example.mode, number, example.conversation)
        for (number, example), (start, middle, end) in zip(flat, bounds, strict=True)
    ]
    if sign:
        for row, signature in zip(rows, signatures([r.ids[r.prompt_length :] for r in rows]), strict=True):
            row.signature = signature
    found = iter(rows)
    return [(n, e if isinstance(e, Rejected) else list(itertools.islice(found, len(e)))) for n, e in batch]


class Draw:
    """What one source gave so far."""

    def __init__(self, source: Source, to_hold: int, data: Data):
        self.source, self.to_hold, self.data, self.unit = source, to_hold, data, unit_of(data)
        self.pool, self.count = split_count(source)
        if source.fraction is not None:
            self.pool = source  # of a share, `#N` says out of how many rows it is drawn
        self.held = self.amount = self.drawn = self.seen = 0
        self.train: list[Row] = []
        self.validation: list[Row] = []
        self.quarantine: list[dict] = []

    def wants(self, hold_out: bool) -> bool:
        """Whether more conversations are to be held out, or more rows to train in the mix's unit."""
        if hold_out:
            return self.held < self.to_hold
        if self.source.fraction is None:
            return self.count is None or self.amount + len(self.validation) < self.count
        return self.data.budget is None or self.amount < self.source.fraction * self.data.budget

    def take(self, number: int, found: list[Row] | Rejected, judge: "Judge", hold_out: bool) -> None:
        """Hold out, train on or drop each example of a row. Raises ToolkitError once the source is hopeless."""
        self.drawn += 1
        self.seen += 1 if isinstance(found, Rejected) else len(found)
        if isinstance(found, Rejected):
            self.drop(number, found.reason, found.detail)
            found = []
        kept = []
        for row in found:
            if why := judge.reason(row, hold_out):
                self.drop(number, *why)
            else:
                kept.append(row)
        if hold_out:
            judge.hold(kept)
            self.held += bool(kept)
            self.validation += kept
        else:
            self.add(kept)
        if self.drawn == CHECK_AT:
            self.check(max(0.5, self.data.max_rejected), final=False)

    def drop(self, number: int, reason: str, detail: str) -> None:
        self.quarantine.append({"source": self.source.name, "row": number, "reason": reason, "detail": detail})

    def add(self, rows: list[Row]) -> None:
        """Train on these, of which only the ids are kept."""
        for row in rows:
            row.conversation = {}
            self.amount += row.size(self.unit)
        self.train += rows

    def repeat(self) -> None:
        """Use rows again, in their order, where the source allows it (max_repeats) or asks for more than it has (#N)."""
        limit = len(self.train) * self.source.max_repeats
        if self.count and self.drawn < self.count:
            limit = max(limit, self.count - len(self.validation))
        again = itertools.cycle(list(self.train))
        while self.train and len(self.train) < limit and self.wants(hold_out=False):
            self.add([next(again)])

    @property
    def dropped(self) -> dict[str, int]:
        """Reason → number of examples that are not used, the most frequent first."""
        return dict(Counter(entry["reason"] for entry in self.quarantine).most_common())

    def check(self, max_rejected: float, final: bool = True) -> None:
        """Raise ToolkitError when more rows are malformed than allowed, or none is left to train on."""
        where = f"{self.source.path} ({self.source.name})"
        malformed = [entry for entry in self.quarantine if entry["reason"] not in NOT_MALFORMED]
        why = ", ".join(f"{reason} {n}" for reason, n in self.dropped.items()) or "none dropped"
        for first in (malformed or self.quarantine)[:1]:
            why += f". First, row {first['row']}: {first['detail']}"
        if len(malformed) > max_rejected * self.seen:
            raise ToolkitError(
                f"{where}: {len(malformed)} of {self.seen} rows rejected, more than data.max_rejected="
                f"{self.data.max_rejected:g} allows: {why}. Fix the rows, or raise data.max_rejected to leave them out"
            )
        held, advice = len(self.validation), "Raise model.max_seq_length (rows are never truncated), or leave it out"
        if held:
            tenth = self.data.validation_size * (self.seen // 10) // self.to_hold
            advice = f"Write data.validation_size={tenth} to hold out a tenth, or 0 to train on all"
        if not self.train and (final or not held):
            raise ToolkitError(f"{where}: no row is left to train on: {held} of {self.seen} held out, {why}. {advice}")


class Judge:
    """Says, example by example, what keeps it out of training; remembers those it lets in."""

    def __init__(self, data: Data, max_seq_length: int, chat: Chat, prompts: list[str]):
        self.duplicates, self.max_seq_length = data.duplicates, max_seq_length
        self.grams, self.exact = Grams(prompts), Duplicates(chat.decode)
        self.near, self.near_held = NearDuplicates(chat.decode), NearDuplicates(chat.decode)
        self.held: set[bytes] = set()

    def hold(self, rows: list[Row]) -> None:
        """From now on nothing that asks the same as these held-out rows, or nearly repeats them, may train."""
        for row in rows:
            self.held.add(prompt_key(row.conversation))
            self.near_held.add(row)

    def reason(self, row: Row, hold_out: bool) -> tuple[str, str] | None:
        """(reason, detail) of what keeps an example from being held out, or from training; None where nothing does."""
        if len(row.ids) > self.max_seq_length:
            return "too_long", f"{len(row.ids)} tokens > max_seq_length {self.max_seq_length}"
        if prompt_key(row.conversation) in self.held:
            return "validation_prompt", "a held-out row asks the same"
        if hold_out:
            return None
        if gram := self.grams.shared(row.conversation):
            return "contaminated", f"shares 13 words with an evaluation prompt: {gram!r}"
        if earlier := self.near_held.find(row):
            return "near_validation", f"nearly repeats held-out row {earlier.number} of {earlier.source}"
        if self.duplicates == "keep":
            return None
        if earlier := self.exact.find(row):
            return "duplicate", f"repeats row {earlier.number} of {earlier.source}, case and spacing aside"
        if earlier := self.near.find(row):
            return "near_duplicate", f"nearly repeats row {earlier.number} of {earlier.source}"
        self.near.add(row)
        return None


def _question_prompts(recipe: Recipe) -> list[str]:
    data, questions = recipe.data, recipe.evaluate.questions if recipe.data.decontaminate else ()
    found = [c for source in questions for _, c in conversations(source, data.seed, data.placeholders)]
    return [m["content"] for c in found if isinstance(c, dict) for m in c["messages"] if m["role"] == "user"]


# --- shares ----------------------------------------------------------------------------------------------------------


def unit_of(data: Data) -> str:
    """What the plan is counted in: `data.unit`, or examples where `#N` counts stand in place of fractions."""
    counted = any(s.fraction is None and split_count(s)[1] for s in data.sources)
    return "examples" if counted else data.unit


def plan(data: Data) -> dict[str, dict]:
    """Per source: planned share and quota (in `unit_of(data)`, None where they come as they are) and rows held out.

    Every source that takes part holds out at least one row."""
    shares = weights = [s.fraction for s in data.sources]
    if None not in shares:
        quotas = [data.budget and round(share * data.budget) for share in shares]
    else:
        quotas = [split_count(s)[1] for s in data.sources]
        known = [n for n in quotas if n] or [1]
        weights = [n or sum(known) / len(known) for n in quotas]
        shares = [n / sum(quotas) for n in quotas] if None not in quotas else [None] * len(quotas)
    size, total = data.validation_size, sum(weights)
    held = [max(1, round(size * weight / total)) if weight and size else 0 for weight in weights]
    return {
        source.name: {"share": share, "quota": quota, "validation": n}
        for source, share, quota, n in zip(data.sources, shares, quotas, held, strict=True)
    }


def _balance(draws: list[Draw], data: Data) -> str | None:
    """Where sources are exhausted, reduce the whole mix and keep its shares; returns the source that limits it."""
    if draws[0].source.fraction is None:
        return None
    short = {d.source.name: d.amount / d.source.fraction for d in draws if d.wants(hold_out=False)}
    limiting = min(short, key=short.get, default=None)
    total = short[limiting] if limiting else data.budget
    for draw in draws:
        draw.train = _trim(draw.train, draw.source.fraction * total, data.unit)
    return limiting


def _trim(rows: list[Row], target: float, unit: str) -> list[Row]:
    """The first rows, in drawn order, whose sum is nearest to `target`, but at least one."""
    sums = np.cumsum([row.size(unit) for row in rows])
    return rows[: int(np.abs(sums - target).argmin()) + 1]


def shares(rows: list[Row], by: str = "source") -> dict[str, dict[str, float]]:
    """Share of each source (or mode) among rows, in all three units."""
    found = {}
    for unit in UNITS:
        sums = Counter()
        for row in rows:
            sums[getattr(row, by)] += row.size(unit)
        found[unit] = {name: n / sums.total() for name, n in sorted(sums.items())}
    return found


def _report(recipe: Recipe, draws: list[Draw], planned: dict, limited_by: str | None) -> dict:
    rows, unit = [row for draw in draws for row in draw.train], unit_of(recipe.data)
    achieved = shares(rows)
    return {
        "unit": unit,
        "budget": recipe.data.budget,
        "planned": {n: achieved[unit][n] if p["share"] is None else p["share"] for n, p in planned.items()},
        "achieved": achieved,
        "achieved_modes": shares(rows, by="mode"),
        "total": {u: sum(row.size(u) for row in rows) for u in UNITS},
        "limited_by": limited_by,
        "sources": {d.source.name: _source_report(d) for d in draws},
        "max_seq_length": recipe.model.max_seq_length,
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
        "rows_repeated": len(rows) - len({id(r) for r in rows}),
        "rows_held_out": len(draw.validation),
        "dropped": draw.dropped,
        "tokens": sum(lengths),
        "supervised_tokens": sum(r.size("supervised_tokens") for r in rows),
        "length": {f"p{p}": int(np.percentile(lengths, p)) for p in (50, 90)} | {"max": max(lengths)},
    }


def _check_shares(report: dict, data: Data) -> None:
    if data.sources[0].fraction is None:
        return  # counts are the mix: what a source lacks of its own is in the report
    unit, limit = report["unit"], report["limited_by"]
    achieved, planned = Counter(report["achieved"][unit]), report["planned"]
    name = max(planned, key=lambda n: abs(achieved[n] - planned[n]))
    if abs(achieved[name] - planned[name]) > TOLERANCE:
        fix = f"Add rows to {limit}, which is exhausted, or lower its fraction" if limit else "Raise data.budget"
        raise ToolkitError(
            f"data.sources: {name}: planned {planned[name]:.1%} of {unit}, achieved {achieved[name]:.1%}: "
            f"a mix of {report['total'][unit]:,} {unit} is too small for rows of this length. {fix}"
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


def _write(folder: Path, draws: list[Draw], report: dict, seed: int) -> None:
    """All files of a compiled mix, in a new folder that then takes the place of an old one. The caller holds the lock."""
    train = [row for draw in draws for row in draw.train]
    validation = [row for draw in draws for row in draw.validation]
    order = np.random.default_rng(seed).permutation(len(train))
    new = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(new, ignore_errors=True)  # a killed process left it
    try:
        _write_rows(new / "rows.npz", [train[i] for i in order] + validation)
        write_jsonl(new / "validation.jsonl", (row.conversation for row in validation))
        write_jsonl(new / "quarantine.jsonl", (entry for draw in draws for entry in draw.quarantine))
        write_json(new / "mix.json", report)
        write_json(new / CHECKSUMS, {name: sha256(new / name) for name in FILES})
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)  # gone, unless the disk is full


def _write_rows(path: Path, rows: list[Row]) -> None:
    with complete(path) as partial, open(partial, "wb") as file:
        np.savez(
            file,
            ids=np.concatenate([r.ids for r in rows]),
            ends=np.cumsum([len(r.ids) for r in rows]),
            numbers=np.array([(r.prompt_length, r.number) for r in rows]),
            names=np.array([(r.source, r.mode) for r in rows]),
        )


def read(folder: Path) -> Mix:
    """A compiled mix from its folder."""
    with np.load(folder / "rows.npz") as arrays:
        parts = np.split(arrays["ids"], arrays["ends"][:-1])
        described = zip(parts, arrays["numbers"].tolist(), arrays["names"].tolist(), strict=True)
        rows = [Row(ids, length, *names, number) for ids, (length, number), names in described]
    told = read_jsonl(folder / "validation.jsonl")
    train, validation = rows[: len(rows) - len(told)], rows[len(rows) - len(told) :]
    for row, conversation in zip(validation, told, strict=True):
        row.conversation = conversation
    return Mix(train, validation, read_json(folder / "mix.json"), read_jsonl(folder / "quarantine.jsonl"), folder)


# --- for a trainer ---------------------------------------------------------------------------------------------------


def dataset(rows: list[Row]):
    """A datasets.Dataset of input_ids and labels (-100 on the prompt)."""
    import datasets

    made = datasets.Dataset.from_dict({"input_ids": [r.ids for r in rows], "labels": [r.labels for r in rows]})
    # Unsloth's sign that no row needs cutting: without it, rows that hold ids are padded on a GPU
    made._unsloth_truncated_to = max(len(r.ids) for r in rows)
    return made
