"""Compile sources to a training mix: plan, draw, hold out, measure, check.

from toolkit import recipe; from toolkit.data import mix; mixed = mix.compile_mix(recipe.load("pocket")); mixed.report["achieved"]
"""

import functools
import hashlib
import itertools
import json
import random
import zipfile
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from toolkit.data.dedup import Duplicates, NearDuplicates, grams_of, prompt_key, shared_gram, signatures
from toolkit.data.lint import lint
from toolkit.data.render import Chat, Example, chat_of, examples, load_chat, with_switch
from toolkit.data.sources import Rejected, conversations, fingerprint, split_count
from toolkit.family import SWITCH
from toolkit.files import PACKAGE, ToolkitError, complete, lock, outputs, write_json, write_jsonl
from toolkit.recipe import Data, Recipe, Source

UNITS = ("examples", "tokens", "supervised_tokens")
BATCH = 256
AHEAD = 16
"""Batches rendered before the first of them is tokenized: the tokenizer takes a second to load."""
CHECK_AT = 2000
"""Rows of a source after which one that gave nothing is given up: it may have millions."""
TOLERANCE = 0.01
"""An achieved share further from its plan than one point stops the run."""
CACHE_KEY_FILES = ("family.py", "data/*.py")
NOT_MALFORMED = {"too_long", "duplicate", "near_duplicate", "validation_prompt", "near_validation", "contaminated"}


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
    bands: list[bytes] | None = field(default=None, repr=False)
    """The signature in parts, as keys of their index."""

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
    fingerprints = {s.name: fingerprint(s) for s in recipe.data.sources}
    fingerprints |= {f"questions/{q.name}": fingerprint(q) for q in recipe.evaluate.questions}
    folder = outputs() / ".mixes" / _key(recipe, chat, fingerprints)
    with lock(folder, "mix", wait=True):
        mixed = (None if fresh else read(folder)) or _compile(recipe, chat, fingerprints, folder)
        # not in the cache: the settings of adapter and trainer decide the warnings, but no row
        mixed.report["warnings"] = lint(chat, mixed.report, recipe.lora, recipe.train)
        write_json(folder / "mix.json", mixed.report)  # for people, as quarantine.jsonl: nothing here reads them again
        write_jsonl(folder / "quarantine.jsonl", mixed.quarantine)
    return mixed


def of_run(recipe: Recipe, manifest: dict) -> Mix:
    """The mix that a run was trained on: as it lies in the cache, else compiled again. Raises ToolkitError when the data have
    changed since."""
    mixed = read(outputs() / ".mixes" / manifest.get("mix", "")) or compile_mix(recipe)
    check_data(mixed, manifest)
    return mixed


def check_data(mixed: Mix, manifest: dict) -> None:
    """Raises ToolkitError where a source is not what it was when the run with this manifest began."""
    now, then = mixed.report["fingerprints"], manifest.get("data", {})
    if changed := [name for name in now if then.get(name, now[name]) != now[name]]:
        raise ToolkitError(
            f"{', '.join(changed)} changed since this run began ({manifest['started']}): which rows it trained on and held "
            "out is no longer known. Restore the data, or train under another name (name=...)"
        )


def _compile(recipe: Recipe, chat: Chat, fingerprints: dict, folder: Path) -> Mix:
    data, planned = recipe.data, plan(recipe.data)
    # a source with fraction 0, as at the ends of a sweep, is not opened
    draws = [Draw(s, planned[s.name]["validation"], data) for s in data.sources if s.fraction != 0]
    try:
        _draw(draws, recipe, chat)
        limited_by = _balance(draws, data)
        slow = None if chat.fast else chat.fallback_reason or "fastokens does not know this kind of tokenizer"
        report = _report(recipe, draws, planned, limited_by)
        report |= {"fingerprints": fingerprints, "slow_tokenizer": slow}
        _check_shares(report, data)
    except ToolkitError as error:
        # without a mix, too, people want to see which rows were dropped and why
        if dropped := [entry for draw in draws for entry in draw.quarantine]:
            write_jsonl(folder / "quarantine.jsonl", dropped)
            raise ToolkitError(f"{error}. Every dropped row: {folder / 'quarantine.jsonl'}") from error
        raise
    train = [row for draw in draws for row in draw.train]
    # The trainer shuffles each epoch again; here it keeps the file of a mix from being sorted by source
    order = np.random.default_rng(data.seed).permutation(len(train))
    validation = [row for draw in draws for row in draw.validation]
    quarantine = [entry for draw in draws for entry in draw.quarantine]
    mixed = Mix([train[i] for i in order], validation, report, quarantine, folder)
    write(mixed)
    return mixed


def _draw(draws: list["Draw"], recipe: Recipe, chat: Chat) -> None:
    """Hold out and draw every source's rows. All hold out first, so that none trains on another's validation prompt."""
    # one for all sources, so that a row which repeats another source's is found
    judge = Judge(recipe.data, recipe.model.max_seq_length, chat, _question_prompts(recipe))
    with ThreadPoolExecutor(1) as encoder:
        encoder.submit(getattr, chat, "fast")  # loads while the reference does, and the first rows are rendered
        _ = chat.tokenizers.reference
        streams = [_stream(draw, recipe.data, chat, encoder) for draw in draws]
        for hold_out in (True, False):
            for draw, stream in zip(draws, streams, strict=True):
                while draw.wants(hold_out) and (drawn := next(stream, None)):
                    draw.take(*drawn, judge, hold_out)
    for draw in draws:
        draw.check()
        draw.repeat()


def _stream(draw: "Draw", data: Data, chat: Chat, encoder: ThreadPoolExecutor) -> Iterator[tuple]:
    """(number, its Rows, or one Rejected) of a source in seeded order.

    They are rendered here while the encoder's one thread tokenizes the batch before."""
    source, dice, waiting = draw.source, random.Random(f"{data.seed} {draw.source.name}"), deque()
    rows = conversations(draw.pool, data.seed, data.placeholders)
    for batch in iter(lambda: [*itertools.islice(rows, BATCH)], []):
        # a number is drawn for every row, so that its switch does not depend on what was rejected before it
        rendered = [(n, _render(item, source, chat, dice.random() < source.soft_switch)) for n, item in batch]
        waiting.append(encoder.submit(_encode, rendered, source.name, chat, data.duplicates == "near"))
        while waiting and (waiting[0].done() or len(waiting) > AHEAD):
            yield from waiting.popleft().result()
    for encoded in waiting:
        yield from encoded.result()


def _render(item: dict | Rejected, source: Source, chat: Chat, switched: bool) -> list[Example | Rejected]:
    if isinstance(item, Rejected):
        return [item]
    try:
        return examples(with_switch(item, chat) if switched else item, source.mode, chat, source.turns)
    except Rejected as rejected:
        return [rejected]


def _encode(batch: list[tuple], source: str, chat: Chat, sign: bool) -> list[tuple]:
    """A rendered batch with Rows in place of examples: prompt and completion are tokenized apart, as at inference."""
    flat = [(n, example) for n, found in batch for example in found if isinstance(example, Example)]
    prompts, starts = chat.encode_flat([e.prompt for _, e in flat])
    completions, ends = chat.encode_flat([e.completion for _, e in flat], following=True)
    bounds = zip(itertools.pairwise(starts.tolist()), itertools.pairwise(ends.tolist()), strict=True)
    rows = [
        Row(np.concatenate([prompts[a:b], completions[c:d]]), b - a, source, example.mode, number, example.conversation)
        for (number, example), ((a, b), (c, d)) in zip(flat, bounds, strict=True)
    ]
    if sign:
        for row, signature in zip(rows, signatures([r.ids[r.prompt_length :] for r in rows]), strict=True):
            row.signature = signature
    made = iter(rows)
    return [(n, [next(made) if isinstance(x, Example) else x for x in found]) for n, found in batch]


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

    def take(self, number: int, found: list[Row | Rejected], judge: "Judge", hold_out: bool) -> None:
        """Hold out, train on or drop each example of a row."""
        kept = []
        for row in found:
            if why := row if isinstance(row, Rejected) else judge.reason(row, hold_out):
                entry = {"source": self.source.name, "row": number, "reason": why.reason, "detail": why.detail}
                self.quarantine.append(entry)
            else:
                kept.append(row)
        # conversations; `seen` counts their examples, of which `turns: each` makes several
        self.drawn += 1
        self.seen += len(found)
        if hold_out:  # whole conversations, so that no turn of one trains while another is held out
            judge.hold(kept)
            self.held += bool(kept)
            self.validation += kept
        else:
            self.add(kept)
        if self.drawn == CHECK_AT and not (self.train or self.validation):
            self.check()

    def add(self, rows: list[Row]) -> None:
        """Train on these, of which only the ids are kept."""
        for row in rows:
            row.conversation = {}
            self.amount += row.size(self.unit)
        self.train += rows

    def repeat(self) -> None:
        """Use rows again, in their order, where the source allows it (max_repeats) or asks for more than it has (#N)."""
        # in their drawn order, so that every row is used n times before one is used n + 1 times
        limit, counted = len(self.train) * self.source.max_repeats, self.count and not self.source.max_rows
        if counted:  # fewer usable rows than `#N`: ms-swift repeats them to N, and so do recipes taken over from it
            limit = max(limit, self.count - len(self.validation))
        again = itertools.cycle(list(self.train))
        while self.train and len(self.train) < limit and self.wants(hold_out=False):
            self.add([next(again)])
        # the last conversation may have had more examples than were wanted
        if counted and self.source.fraction is None:
            del self.train[self.count - len(self.validation) :]

    @property
    def dropped(self) -> dict[str, int]:
        """Reason → number of examples that are not used, the most frequent first."""
        return dict(Counter(entry["reason"] for entry in self.quarantine).most_common())

    def check(self) -> None:
        """Raise ToolkitError when more rows are malformed than allowed, or none is left to train on."""
        where = f"{self.source.path} ({self.source.name})"
        malformed = [entry for entry in self.quarantine if entry["reason"] not in NOT_MALFORMED]
        why = ", ".join(f"{reason} {n}" for reason, n in self.dropped.items()) or "none dropped"
        for first in (malformed or self.quarantine)[:1]:
            why += f". First, row {first['row']}: {first['detail']}"
        if len(malformed) > self.data.max_rejected * self.drawn:
            raise ToolkitError(
                f"{where}: {len(malformed)} of {self.drawn} rows rejected, more than data.max_rejected="
                f"{self.data.max_rejected:g} allows: {why}. Fix the rows, or raise data.max_rejected to leave them out"
            )
        held, advice = len(self.validation), "Leave it out, or add rows"
        if "too_long" in self.dropped:
            advice = "Raise model.max_seq_length (rows are never truncated), or leave it out"
        if held:
            tenth = self.data.validation_size * (self.seen // 10) // self.to_hold
            advice = f"Write data.validation_size={tenth} to hold out a tenth, or 0 to train on all"
        if not self.train:
            raise ToolkitError(f"{where}: no row is left to train on: {held} of {self.seen} held out, {why}. {advice}")


class Judge:
    """Says, example by example, what keeps it out of training; remembers those it lets in."""

    def __init__(self, data: Data, max_seq_length: int, chat: Chat, prompts: list[str]):
        self.duplicates, self.max_seq_length, self.grams = data.duplicates, max_seq_length, grams_of(prompts)
        self.exact, self.near = Duplicates(chat.decode), NearDuplicates(chat.decode)
        self.near_held = NearDuplicates(chat.decode)
        self.held: set[bytes] = set()

    def hold(self, rows: list[Row]) -> None:
        """From now on nothing that asks the same as these held-out rows, or nearly repeats them, may train."""
        for row in rows:
            self.held.add(prompt_key(row.conversation))
            self.near_held.add(row)

    def reason(self, row: Row, hold_out: bool) -> Rejected | None:
        """What keeps an example from being held out, or from training; None where nothing does."""
        # cheap checks first; what concerns validation comes before duplicates, since it is the graver reason
        if len(row.ids) > self.max_seq_length:
            return Rejected("too_long", f"{len(row.ids)} tokens > max_seq_length {self.max_seq_length}")
        if prompt_key(row.conversation) in self.held:
            return Rejected("validation_prompt", "a held-out row asks the same")
        if hold_out:  # evaluation may ask what it likes twice, and duplicates are a matter of training
            return None
        if gram := shared_gram(row.conversation, self.grams):
            return Rejected("contaminated", f"shares 13 words with an evaluation prompt: {gram!r}")
        if earlier := self.near_held.find(row):
            return Rejected("near_validation", f"nearly repeats held-out row {earlier.number} of {earlier.source}")
        if self.duplicates == "keep":
            return None
        if earlier := self.exact.find(row):
            return Rejected("duplicate", f"repeats row {earlier.number} of {earlier.source}, case and spacing aside")
        if earlier := self.near.find(row):
            return Rejected("near_duplicate", f"nearly repeats row {earlier.number} of {earlier.source}")
        self.near.add(row)
        return None


def _question_prompts(recipe: Recipe) -> list[str]:
    """User turns of the recipe's questions. All are read here: a row that cannot be asked is found before training."""
    data = recipe.data
    found = [q for source in recipe.evaluate.questions for q in read_questions(source, placeholders=data.placeholders)]
    return [m["content"] for q in found if data.decontaminate for m in q["messages"] if m["role"] == "user"]


def read_questions(source: Source, seed: int = 3407, placeholders: dict | None = None) -> list[dict]:
    """The questions of a source, of `#N` and `max_rows` those that `seed` draws: evaluation's own, not the recipe's, so that
    runs of several seeds are asked alike. Raises ToolkitError at a malformed row, as nobody would miss a question."""
    found = []
    for number, conversation in conversations(source, seed, placeholders or {}):
        try:
            if isinstance(conversation, Rejected):
                raise conversation
            found.append(as_question(conversation, source.name))
        except Rejected as rejected:
            raise ToolkitError(f"{source.path}, row {number}: {rejected.detail}") from rejected
    return found


def as_question(conversation: dict, name: str) -> dict:
    """{"messages", "expected_answer", "set"} of a canonical conversation: the messages before its last turn, without
    typed switches, as it is asked in each mode. Raises Rejected where it cannot be asked."""
    answer, messages = conversation.get("expected_answer", ""), conversation["messages"]
    if not answer.strip():
        raise Rejected("no_expected_answer", "a question needs an expected_answer")
    if "tools" in conversation or any("tool_calls" in message for message in messages):
        raise Rejected("needs_tools", "a question with tools or a tool call cannot be asked: evaluation shows no tools")
    asked = [m | {"content": SWITCH.sub("", m["content"]).strip()} if m["role"] == "user" else m for m in messages[:-1]]
    return {"messages": asked, "expected_answer": answer, "set": name}


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
        weights = [1] * len(quotas) if None in quotas else quotas
        shares = [None] * len(quotas) if None in quotas else [n / sum(quotas) for n in quotas]
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
    # The total at which each exhausted source would have its share; the smallest is what all of them can give
    short = {d.source.name: d.amount / d.source.fraction for d in draws if d.wants(hold_out=False)}
    limiting = min(short, key=short.get, default=None)
    total = short[limiting] if limiting else data.budget
    for draw in draws:
        draw.train = _trim(draw.train, draw.source.fraction * total, data.unit)
    return limiting


def _trim(rows: list[Row], target: float, unit: str) -> list[Row]:
    """The first rows, in drawn order, whose sum is nearest to `target`, but at least one."""
    # the row that crosses the target stays only where the sum is nearer with it
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


def _key(recipe: Recipe, chat: Chat, fingerprints: dict) -> str:
    # a change of the code that makes rows makes another mix: nobody remembers to raise a version number
    code = [f.read_bytes() for name in CACHE_KEY_FILES for f in sorted(PACKAGE.glob(name))]
    decides = {
        "data": asdict(recipe.data),
        "questions": [asdict(q) for q in recipe.evaluate.questions],
        "max_seq_length": recipe.model.max_seq_length,
        "tokenizer": hashlib.sha256(
            f"{chat.json}{chat.template_text}{chat.tokens}{chat.switches}".encode()
        ).hexdigest(),
        "sources": fingerprints,
        "code": hashlib.sha256(b"".join(code)).hexdigest(),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def write(mixed: Mix) -> None:
    """mix.npz: rows, report, dropped rows and held-out conversations. The caller holds the lock."""
    rows, held = mixed.train + mixed.validation, [row.conversation for row in mixed.validation]
    # one file, so that a kill leaves a whole mix or none; zip keeps a checksum of each part
    told = json.dumps({"report": mixed.report, "quarantine": mixed.quarantine, "held": held})
    with complete(mixed.folder / "mix.npz") as partial, open(partial, "wb") as file:
        np.savez(
            file,
            ids=np.concatenate([r.ids for r in rows]),
            ends=np.cumsum([len(r.ids) for r in rows]),
            numbers=np.array([(r.prompt_length, r.number) for r in rows]),
            names=np.array([(r.source, r.mode) for r in rows]),
            told=np.frombuffer(told.encode(), np.uint8),
        )


def read(folder: Path) -> Mix | None:
    """A compiled mix from its folder; None where there is none, or where a checksum in mix.npz says it is damaged."""
    try:
        if zipfile.ZipFile(folder / "mix.npz").testzip():
            return None
        with np.load(folder / "mix.npz") as file:
            arrays = dict(file)
    except Exception:  # missing, or damaged: zipfile and numpy have many kinds of error for that
        return None
    # views of one array, no copies
    parts = np.split(arrays["ids"], arrays["ends"][:-1])
    described = zip(parts, arrays["numbers"].tolist(), arrays["names"].tolist(), strict=True)
    rows = [Row(ids, length, *names, number) for ids, (length, number), names in described]
    told = json.loads(arrays["told"].tobytes())
    train, validation = rows[: len(rows) - len(told["held"])], rows[len(rows) - len(told["held"]) :]
    for row, conversation in zip(validation, told["held"], strict=True):
        row.conversation = conversation
    return Mix(train, validation, told["report"], told["quarantine"], folder)


# --- for a trainer ---------------------------------------------------------------------------------------------------


def dataset(rows: list[Row]):
    """A datasets.Dataset of input_ids and labels (-100 on the prompt)."""
    import datasets

    made = datasets.Dataset.from_dict({"input_ids": [r.ids for r in rows], "labels": [r.labels for r in rows]})
    # Unsloth's sign that no row needs cutting: without it, rows that hold ids are padded on a GPU
    made._unsloth_truncated_to = max(len(r.ids) for r in rows)
    return made
