"""Compile sources to a training mix: plan, draw, hold out, measure, check.

mixed = compile_mix(recipe.load("data_recipes/hybrid.yaml")); mixed.report["achieved"]
"""

import hashlib
import itertools
import json
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from toolkit.dedup import Duplicates, Grams, NearDuplicates, signatures, text_key
from toolkit.files import ToolkitError, outputs
from toolkit.lint import lint
from toolkit.recipe import Data, Recipe, Source
from toolkit.render import SWITCH, Chat, examples, load_chat
from toolkit.sources import Rejected, conversations, fingerprint
from toolkit.sources.conversation import CJK

UNITS = ("examples", "tokens", "supervised_tokens")
BATCH = 256
"""Conversations rendered while the batch before is tokenized: two batches are under way."""
AHEAD = 16
"""Batches under way at most, while the tokenizer is still being loaded (1 s)."""
TOLERANCE = 0.01  # an achieved share further than one point from its plan stops the run
DECIDES = ("mix.py", "render.py", "dedup.py", "sources/*.py")
NOT_MALFORMED = {"too_long", "duplicate", "near_duplicate", "validation_prompt", "contaminated"}


@dataclass(frozen=True, eq=False)
class Row:
    """One training example: `ids` (prompt, then completion), of which the first `prompt_length` are not supervised."""

    ids: np.ndarray
    prompt_length: int
    source: str
    mode: str
    number: int
    conversation: dict = field(default_factory=dict, repr=False)
    """Only held-out rows keep theirs: evaluation asks them again."""
    signature: np.ndarray | None = field(default=None, repr=False)
    """MinHash of the supervised text, while near duplicates are looked for."""

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


@dataclass
class _Draw:
    """What one source gave so far."""

    source: Source
    quota: float
    seen: int = 0
    train: list[Row] = field(default_factory=list)
    validation: list[Row] = field(default_factory=list)
    dropped: Counter = field(default_factory=Counter)
    languages: Counter = field(default_factory=Counter)
    quarantine: list[dict] = field(default_factory=list)
    numbers: set[int] = field(default_factory=set)
    amount: float = 0
    dry: bool = False

    def drop(self, number: int, reason: str, detail: str) -> None:
        self.dropped[reason] += 1
        self.quarantine.append({"source": self.source.name, "row": number, "reason": reason, "detail": detail})


def compile_mix(recipe: Recipe, *, fresh: bool = False) -> Mix:
    """The recipe's mix, compiled or read from the cache (keyed by everything that decides a row).

    Raises ToolkitError on unreadable sources, too many malformed rows, or an achieved share off its plan.
    """
    chat = load_chat(recipe.model.model_name, recipe.model.revision)
    fingerprints = {s.name: fingerprint(s) for s in (*recipe.data.sources, *recipe.evaluate.questions)}
    folder = cache_folder() / _key(recipe, chat, fingerprints)
    if fresh or not (folder / "mix.json").is_file():
        _compile(recipe, chat, fingerprints, folder)
    return read(folder)


def cache_folder() -> Path:
    """Where compiled mixes lie."""
    return outputs() / ".mixes"


def plan(data: Data) -> dict[str, dict]:
    """Per source: planned share and quota in `data.unit` (null where the budget is open) and rows held out."""
    held = _allot(data.validation_size, [s.fraction for s in data.sources])
    return {
        s.name: {
            "share": s.fraction,
            "quota": None if data.budget is None else round(s.fraction * data.budget),
            "validation": n,
        }
        for s, n in zip(data.sources, held, strict=True)
    }


def _allot(total: int, fractions: list[float]) -> list[int]:
    """`total` split by fractions; every source that takes part holds out at least one row."""
    return [max(1, round(total * f)) if total and f > 0 else 0 for f in fractions]


def _key(recipe: Recipe, chat: Chat, fingerprints: dict) -> str:
    code = [f.read_bytes() for name in DECIDES for f in sorted(Path(__file__).parent.glob(name))]
    decides = {
        "data": asdict(recipe.data),
        "questions": [asdict(q) for q in recipe.evaluate.questions],
        "max_seq_length": recipe.model.max_seq_length,
        "tokenizer": hashlib.sha256((chat.json + str(chat.template_text)).encode()).hexdigest(),
        "sources": fingerprints,
        "code": hashlib.sha256(b"".join(code)).hexdigest(),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def _compile(recipe: Recipe, chat: Chat, fingerprints: dict, folder: Path) -> None:
    data = recipe.data
    planned = plan(data)
    draws = [_Draw(s, planned[s.name]["quota"] or float("inf")) for s in data.sources if s.fraction > 0]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: chat.fast)
        compared = _fill_all(draws, planned, recipe, chat, pool)
    if chat.fast and (difference := _difference(chat, compared)):
        chat.distrust = difference
        _compile(recipe, chat, fingerprints, folder)
        return
    limited_by = _balance(draws, data)
    rows = [r for d in draws for r in d.train]
    order = np.random.default_rng(data.seed).permutation(len(rows))
    report = _report(recipe, draws, planned, limited_by, fingerprints, chat, rows)
    report["tokenizer"] = {"name": "fastokens", "rows_compared": len(compared)} if chat.fast else {"name": "tokenizers"}
    _check(report, data)
    _write(folder, [rows[i] for i in order], [r for d in draws for r in d.validation], report, draws)


def _fill_all(draws: list[_Draw], planned: dict, recipe: Recipe, chat: Chat, pool: ThreadPoolExecutor) -> list:
    """Fill every draw. The pool's one worker does what needs no interpreter, this thread all else.

    Returns rows to compare with the Hugging Face tokenizer, each with its texts: a source's first 16 and every 128th."""
    data, max_seq_length = recipe.data, recipe.model.max_seq_length
    compared: list[tuple[Row, tuple[str, str]]] = []
    streams = {d.source.name: _examples(d.source, data, chat, pool, compared) for d in draws}
    _ = chat.reference  # loaded now, while the worker still loads the fast one
    held: set[bytes] = set()
    grams = Grams(_question_prompts(recipe)) if data.decontaminate else Grams([])
    near, exact = NearDuplicates(), Duplicates()
    for draw in draws:  # all sources hold out first, so that no source trains on another's validation prompt
        name = draw.source.name
        _hold_out(draw, streams[name], planned[name]["validation"], max_seq_length, held, exact)
    for draw in draws:
        accept = _Filter(data, max_seq_length, held, grams, near, exact)
        _fill(draw, streams[draw.source.name], accept, data.unit)
        _stop_if_rotten(draw, data.max_rejected)
    return compared


def _examples(source: Source, data: Data, chat: Chat, pool: ThreadPoolExecutor, compared: list) -> Iterator:
    """(number, conversation, [Row] or Rejected, prompt's key) of a source in seeded order; its first batches start at once."""
    batches = _batches(source, data, chat, pool)
    ahead: deque = deque()
    _go_ahead(ahead, batches)
    return _finished(ahead, batches, source, compared)


def _go_ahead(ahead: deque, batches: Iterator) -> None:
    """Render two batches ahead, and more while the first is not tokenized yet."""
    while len(ahead) < AHEAD and (len(ahead) < 2 or not ahead[0][1].done()) and (batch := next(batches, None)):
        ahead.append(batch)


def _batches(source: Source, data: Data, chat: Chat, pool: ThreadPoolExecutor) -> Iterator:
    """Yield rendered batches, [(number, conversation, [Example] or Rejected, prompt's key)], and their tokenization under way."""
    rng = np.random.default_rng([data.seed, int(hashlib.sha256(source.name.encode()).hexdigest()[:8], 16)])
    passes = itertools.chain.from_iterable(
        conversations(source, data.seed, data.placeholders) for _ in range(source.max_repeats)
    )
    while batch := list(itertools.islice(passes, BATCH)):
        items = [(number, *_render(item, source, chat, rng)) for number, item in batch]
        texts = [
            t for _, _, found, _ in items if isinstance(found, list) for e in found for t in (e.prompt, e.completion)
        ]
        yield items, pool.submit(_tokenized, chat, texts, data.duplicates == "near")


def _tokenized(chat: Chat, texts: list[str], sign: bool) -> list[tuple]:
    """(ids, prompt length, signature) of each prompt and completion."""
    flat, ends = chat.encode_flat(texts)
    starts, middles, stops = ends[:-1:2], ends[1::2], ends[2::2]
    bounds = list(zip(starts.tolist(), middles.tolist(), stops.tolist(), strict=True))
    signed = signatures([flat[m:b] for _, m, b in bounds]) if sign else [None] * len(bounds)
    return [(flat[a:b].copy(), m - a, s) for (a, m, b), s in zip(bounds, signed, strict=True)]


def _finished(ahead: deque, batches: Iterator, source: Source, compared: list) -> Iterator:
    count = itertools.count()
    while ahead:
        items, tokenizing = ahead.popleft()
        _go_ahead(ahead, batches)
        tokenized = iter(tokenizing.result())
        for number, conversation, found, prompt in items:
            if isinstance(found, list):
                rows = [_row(e, *next(tokenized), source, number) for e in found]
                if (i := next(count)) < 16 or i % 128 == 0:
                    compared.append((rows[-1], (found[-1].prompt, found[-1].completion)))
                found = rows
            yield number, conversation, found, prompt


def _render(item, source: Source, chat: Chat, rng):
    """(conversation, [Example] or Rejected, its prompt's key); the random draw for soft switches is spent on every row."""
    switch = rng.random() < source.soft_switch
    if isinstance(item, Rejected):
        return None, item, None
    try:
        conversation = _with_switch(item) if switch and chat.kind == "hybrid" else item
        found = examples(conversation, source.mode, chat, source.turns)
        return conversation, found, prompt_key(conversation)
    except Rejected as rejected:
        return item, rejected, None


def _with_switch(conversation: dict) -> dict:
    """The same conversation with /think or /no_think, as its last reply is, at the end of the last user turn."""
    messages = [dict(m) for m in conversation["messages"]]
    last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
    asked = max((i for i, m in enumerate(messages[:last]) if m["role"] == "user"), default=None)
    if asked is None or SWITCH.search(messages[asked]["content"]):
        return conversation
    messages[asked]["content"] += " /think" if messages[last].get("reasoning_content") else " /no_think"
    return {**conversation, "messages": messages}


def _row(example, ids: np.ndarray, prompt_length: int, signature, source: Source, number: int) -> Row:
    return Row(ids, prompt_length, source.name, example.mode, number, signature=signature)


def _hold_out(draw: _Draw, stream, wanted: int, max_seq_length: int, held: set, exact: Duplicates) -> None:
    """The first `wanted` usable conversations of a source never train, nor does any other row with their prompts."""
    kept = 0
    while kept < wanted and (item := next(stream, None)):
        number, conversation, rows, prompt = item
        draw.seen += 1
        draw.numbers.add(number)
        if isinstance(rows, Rejected):
            draw.drop(number, rows.reason, rows.detail)
            continue
        fitting = [r for r in rows if len(r.ids) <= max_seq_length]
        if not fitting:
            draw.drop(number, "too_long", f"{len(rows[-1].ids)} tokens > max_seq_length {max_seq_length}")
            continue
        held.add(prompt)
        exact.seen(prompt, conversation)
        draw.validation += [replace(r, conversation=conversation) for r in fitting]
        kept += 1


def prompt_key(conversation: dict) -> bytes:
    """Rows with equal keys ask the same thing: all user turns, case, spacing and typed mode switches aside."""
    users = [m for m in conversation["messages"] if m["role"] == "user"]
    return text_key({"messages": [{**m, "content": SWITCH.sub("", m["content"])} for m in users]})


@dataclass
class _Filter:
    """Decides, row by row, what may train; the reason otherwise."""

    data: Data
    max_seq_length: int
    held: set
    grams: Grams
    near: NearDuplicates
    exact: Duplicates

    def reason(self, conversation: dict, rows: list[Row], prompt: bytes, repeated: bool) -> tuple[str, str] | None:
        longest = max(len(r.ids) for r in rows)
        if longest > self.max_seq_length:
            return "too_long", f"{longest} tokens > max_seq_length {self.max_seq_length}"
        if prompt in self.held:
            return "validation_prompt", "a held-out row asks the same"
        if gram := self.grams.shared(conversation):
            return "contaminated", f"shares 13 words with an evaluation prompt: {gram!r}"
        if repeated or self.data.duplicates == "keep":
            return None
        if self.exact.seen(prompt, conversation):
            return "duplicate", "the same conversation, case and spacing aside"
        if self.data.duplicates == "near" and self.near.seen([r.signature for r in rows if r.signature is not None]):
            return "near_duplicate", "nearly the same supervised text as a row before"
        return None


def _fill(draw: _Draw, stream, accept: _Filter, unit: str) -> None:
    """Draw rows until the source's quota is met or it runs dry; a pass after the first repeats rows on purpose."""
    held_numbers = {r.number for r in draw.validation}
    for number, conversation, rows, prompt in stream:
        if draw.amount >= draw.quota:
            return
        if number in held_numbers:
            continue
        repeated = number in draw.numbers
        draw.seen += not repeated
        draw.numbers.add(number)
        if isinstance(rows, Rejected):
            if not repeated:
                draw.drop(number, rows.reason, rows.detail)
        elif why := accept.reason(conversation, rows, prompt, repeated):
            if not repeated:
                draw.drop(number, *why)
        else:
            draw.train += rows
            draw.languages["zh" if CJK.search(conversation["messages"][-1]["content"]) else "other"] += 1
            draw.amount += sum(r.size(unit) for r in rows)
    draw.dry = draw.amount < draw.quota


def _stop_if_rotten(draw: _Draw, limit: float) -> None:
    malformed = {r: n for r, n in draw.dropped.items() if r not in NOT_MALFORMED}
    count = sum(malformed.values())
    if count and count > limit * draw.seen:
        first = next(q for q in draw.quarantine if q["reason"] in malformed)
        reasons = ", ".join(f"{r} {n}" for r, n in Counter(malformed).most_common())
        raise ToolkitError(
            f"{draw.source.path} ({draw.source.name}): {count} of {draw.seen} rows rejected, more than "
            f"data.max_rejected={limit:g} allows: {reasons}. First, row {first['row']}: {first['detail']}. "
            "Mend the rows, or raise data.max_rejected to go on without them"
        )
    if not draw.train:
        raise ToolkitError(
            f"{draw.source.path} ({draw.source.name}): no row left to train on: {draw.seen} seen, "
            f"dropped: {dict(draw.dropped) or 'none'}, held out: {len(draw.validation)}"
        )


def _balance(draws: list[_Draw], data: Data) -> str | None:
    """If a source ran dry the whole mix shrinks and keeps its shares; returns the source that limited it."""
    unit = data.unit
    possible = {d.source.name: d.amount / d.source.fraction for d in draws}
    limiting = min(draws, key=lambda d: possible[d.source.name]) if any(d.dry for d in draws) else None
    total = possible[limiting.source.name] if limiting else data.budget
    for draw in draws:
        draw.train = _trim(draw.train, draw.source.fraction * total, unit)
    return limiting.source.name if limiting else None


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
    return {u: {k: n / max(1, sum(c.values())) for k, n in sorted(c.items())} for u, c in totals.items()}


def _report(recipe, draws, planned, limited_by, fingerprints, chat, rows) -> dict:
    data = recipe.data
    return {
        "unit": data.unit,
        "budget": data.budget,
        "planned": {name: p["share"] for name, p in planned.items()},
        "achieved": shares(rows),
        "achieved_modes": shares(rows, key=lambda r: r.mode),
        "total": {u: sum(r.size(u) for r in rows) for u in UNITS},
        "limited_by": limited_by,
        "sources": {d.source.name: _source_report(d) for d in draws},
        "validation": dict(Counter(f"{r.source}/{r.mode}" for d in draws for r in d.validation)),
        "max_seq_length": recipe.model.max_seq_length,
        "model_kind": chat.kind,
        "fingerprints": fingerprints,
        "warnings": lint(recipe, chat, rows),
    }


def _source_report(draw: _Draw) -> dict:
    rows = draw.train
    lengths = [len(r.ids) for r in rows]
    return {
        "mode": draw.source.mode,
        "modes": dict(Counter(r.mode for r in rows)),
        "languages": dict(draw.languages),
        "rows_seen": draw.seen,
        "rows_kept": len(rows),
        "rows_repeated": len(rows) - len({(r.number, r.prompt_length, len(r.ids)) for r in rows}),
        "rows_held_out": len(draw.validation),
        "dropped": dict(draw.dropped.most_common()),
        "tokens": sum(lengths),
        "supervised_tokens": sum(r.size("supervised_tokens") for r in rows),
        "length": {f"p{p}": int(np.percentile(lengths, p)) for p in (50, 90)} | {"max": max(lengths)} if rows else {},
    }


def _difference(chat: Chat, compared: list) -> str | None:
    """The first of the rows to compare, (row, its texts), whose ids are not Hugging Face's; None when all are."""
    found = iter(chat.encode_reference([t for _, texts in compared for t in texts]))
    for row, _ in compared:
        if row.ids.tolist() != next(found) + next(found):
            return f"fastokens gives other ids for row {row.number} of {row.source}"
    return None


def _question_prompts(recipe: Recipe) -> list[str]:
    found = (
        c for q in recipe.evaluate.questions for _, c in conversations(q, recipe.data.seed, recipe.data.placeholders)
    )
    return [m["content"] for c in found if not isinstance(c, Rejected) for m in c["messages"] if m["role"] == "user"]


def _check(report: dict, data: Data) -> None:
    for name, planned in report["planned"].items():
        achieved = report["achieved"][data.unit].get(name, 0.0)
        if abs(achieved - planned) > TOLERANCE:
            size = report["total"][data.unit]
            raise ToolkitError(
                f"data.sources {name}: planned {planned:.1%} of {data.unit}, achieved {achieved:.1%}: a mix of {size} "
                f"{data.unit} is too small for rows of this length. Raise data.budget or data.max_rows, or add rows"
            )


def _write(folder: Path, train: list[Row], validation: list[Row], report: dict, draws: list[_Draw]) -> None:
    """All files of a compiled mix; mix.json last, so that a folder with it is whole."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_rows(folder / "train.npz", train)
        _write_rows(folder / "validation.npz", validation)
        with open(folder / "validation.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(r.conversation, ensure_ascii=False) + "\n" for r in validation)
        with open(folder / "quarantine.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(q, ensure_ascii=False) + "\n" for d in draws for q in d.quarantine)
        partial = folder / "mix.json.partial"
        partial.write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
        partial.replace(folder / "mix.json")
    except OSError as error:
        raise ToolkitError(
            f"{folder}: the compiled mix could not be written ({error.strerror}): free some space"
        ) from error


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
    conversations_ = [
        json.loads(line) for line in (folder / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    quarantine = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    report = json.loads((folder / "mix.json").read_text(encoding="utf-8"))
    validation = _read_rows(folder / "validation.npz", conversations_)
    return Mix(_read_rows(folder / "train.npz", None), validation, report, quarantine, folder)


def _read_rows(file: Path, found: list[dict] | None) -> list[Row]:
    with np.load(file) as arrays:
        ids, lengths = arrays["ids"], arrays["lengths"]
        columns = zip(*(arrays[k].tolist() for k in ("prompt_lengths", "sources", "modes", "numbers")), strict=True)
        starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    return [
        Row(ids[starts[i] : starts[i + 1]], prompt, source, mode, number, found[i] if found else {})
        for i, (prompt, source, mode, number) in enumerate(columns)
    ]
