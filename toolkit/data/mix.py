"""Compile sources to a training mix: plan, draw, hold out, measure, check.

from toolkit import recipe; from toolkit.data import mix; mixed = mix.compile_mix(recipe.load("pocket")); mixed.report["achieved"]
"""

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from toolkit.data import cache
from toolkit.data.conversation import Fillings, asked
from toolkit.data.dedup import Duplicates, NearDuplicates, grams_of, prompt_key, shared_gram, sign
from toolkit.data.joined import joined
from toolkit.data.lint import lint, looks_like
from toolkit.data.render import Chat, Example, chat_of, examples, load_chat, supervised_turns, with_switch
from toolkit.data.rows import UNITS, Mix, Row, dataset
from toolkit.data.sources import ReadRow, Rejected, conversations, fingerprint, read_rows, split_count
from toolkit.family import without_switch
from toolkit.files import ToolkitError, lock, write_json, write_jsonl
from toolkit.recipe import Data, Recipe, Source, from_dict, to_dict
from toolkit.records import (
    CompletionLengths,
    Conversation,
    DroppedRow,
    JsonObject,
    Manifest,
    MixReport,
    Question,
    Shares,
    SourceReport,
    Unit,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["UNITS", "Mix", "Row", "compile_mix", "dataset", "plan", "prompt_key"]

# Rows rendered and tokenized together.
BATCH = 256
# Rows of a source after which one that gave nothing is given up: it may have millions.
CHECK_AT = 2000
# An achieved share further from its plan than one point stops the run.
TOLERANCE = 0.01
# Reasons that say nothing against the quality of a source: they do not count for data.max_rejected.
NOT_MALFORMED = frozenset(
    "too_long duplicate near_duplicate validation_prompt near_validation contaminated"
    # what the set's own authors left out of training
    " marked_bad untrained_turn untrained_row".split()
)


# --- the steps -------------------------------------------------------------------------------------------------------


def compile_mix(recipe: Recipe, tokenizer: "PreTrainedTokenizerBase | None" = None, *, fresh: bool = False) -> Mix:
    """The recipe's mix, compiled or read from the cache (keyed by everything that decides a row).

    `tokenizer` is the transformers tokenizer of a loaded model; by default the recipe's model gives its own. Raises
    ToolkitError on unreadable sources, a template that cannot be trained on, too many malformed rows, or an achieved
    share off its plan.
    """
    chat = chat_of(tokenizer) if tokenizer else load_chat(recipe.model.model_name, recipe.model.revision)
    _ = chat.end  # what is wrong with template or tokenizer is said before any source is opened
    named = {s.name: s for s in recipe.data.sources} | {f"questions/{q.name}": q for q in recipe.evaluate.questions}
    fingerprints = {name: fingerprint(source) for name, source in named.items()}
    folder = cache.folder_of(recipe, chat, fingerprints)
    # two processes that need the same mix compile it once
    with lock(folder, "mix", wait=True):
        mixed = (None if fresh else cache.read(folder)) or _compile(recipe, chat, fingerprints, folder)
        # not in the cache: the settings of adapter and trainer decide the warnings, but no row
        mixed.report["warnings"] = lint(chat, mixed.report, recipe.lora, recipe.train)
        write_json(folder / "mix.json", mixed.report)  # for people, as quarantine.jsonl: nothing here reads them again
        write_jsonl(folder / "quarantine.jsonl", mixed.quarantine)
    return mixed


def of_run(recipe: Recipe, manifest: Manifest | JsonObject) -> Mix:
    """The mix that a run was trained on: as it lies in the cache, else compiled again; of a sum of runs those of its parents
    together. Raises ToolkitError when the data have changed since."""
    if parents := manifest.get("parents"):
        # the model is the sum's, which `load` has checked: a manifest may be somebody else's
        model = {"model": to_dict(recipe)["model"]}
        mixes = [of_run(from_dict(parent["recipe"] | model), parent["manifest"]) for parent in parents]
        return joined(mixes, manifest["weights"])
    mixed = cache.read(cache.folder_named(manifest.get("mix", ""))) or compile_mix(recipe)
    check_data(mixed, manifest)
    return mixed


def check_data(mixed: Mix, manifest: Manifest | JsonObject) -> None:
    """Raises ToolkitError where a source is not what it was when the run with this manifest began."""
    then = manifest.get("data", {})
    if changed := [name for name, now in mixed.report["fingerprints"].items() if then.get(name, now) != now]:
        raise ToolkitError(
            f"{', '.join(changed)} changed since this run began ({manifest['started']}): which rows it trained on and held "
            "out is no longer known. Restore the data, or train under another name (name=...)"
        )


def _compile(
    recipe: Recipe,
    chat: Chat,
    fingerprints: dict[str, str],
    folder: Path,
) -> Mix:
    data = recipe.data
    planned = plan(data)
    # a source with fraction 0, as at the ends of a sweep, is not opened
    draws = [Draw(s, planned[s.name]["validation"], data) for s in data.sources if s.fraction != 0]
    try:
        draw_all(draws, recipe, chat)
        limited_by = balance(draws, data)
        train = [row for draw in draws for row in draw.train]
        report = mix_report(recipe, draws, train, planned, limited_by)
        report |= {"fingerprints": fingerprints, "slow_tokenizer": chat.slow_reason}
        check_shares(report, data)
    except ToolkitError as error:
        # without a mix, too, people want to see which rows were dropped and why
        if dropped := dropped_rows(draws):
            write_jsonl(folder / "quarantine.jsonl", dropped)
            raise ToolkitError(f"{error}. Every dropped row: {folder / 'quarantine.jsonl'}") from error
        raise
    # The trainer shuffles each epoch again; here it keeps the file of a mix from being sorted by source
    order = np.random.default_rng(data.seed).permutation(len(train))
    mixed = Mix(
        train=[train[i] for i in order],
        validation=[row for draw in draws for row in draw.validation],
        report=report,
        quarantine=dropped_rows(draws),
        folder=folder,
    )
    cache.write(mixed)
    return mixed


def dropped_rows(draws: list["Draw"]) -> list[DroppedRow]:
    """What quarantine.jsonl holds."""
    return [entry for draw in draws for entry in draw.quarantine]


def draw_all(draws: list["Draw"], recipe: Recipe, chat: Chat) -> None:
    """Hold out and draw every source's rows. All hold out first, so that none trains on another's validation prompt."""
    # one for all sources, so that a row which repeats another source's is found
    row_filter = RowFilter(recipe.data, recipe.model.max_seq_length, chat, question_prompts(recipe))
    # each stream goes on after the hold-out where it stopped, so that no row is read twice
    streams = [draw_rows(draw, recipe.data, chat) for draw in draws]
    for hold_out in (True, False):
        for draw, stream in zip(draws, streams, strict=True):
            while draw.wants(hold_out) and (drawn := next(stream, None)):
                draw.take(drawn, row_filter, hold_out)
    for draw in draws:
        draw.check()
        draw.repeat()


@dataclass
class DrawnRow:
    """One row of a source on its way to ids."""

    number: int
    not_read: list[str]
    """Keys that no rule reads."""
    rejected: list[Rejected] = field(default_factory=list)
    """Why the row, or single turns of it, cannot be trained on."""
    examples: list[Example] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    """The examples as ids."""


def draw_rows(draw: "Draw", data: Data, chat: Chat) -> Iterator[DrawnRow]:
    """The rows of a source in seeded order, rendered and tokenized a batch at a time."""
    source = draw.source
    dice = random.Random(f"{data.seed} {source.name}")
    rows = read_rows(draw.pool, data.seed, data.placeholders)
    while read := list(itertools.islice(rows, BATCH)):
        # a number is drawn for every row, so that its switch does not depend on what was rejected before it
        batch = [render_row(row, source, chat, dice.random() < source.soft_switch) for row in read]
        # a batch at a time: the fast tokenizer works on all its texts at once, on every core
        tokenize(batch, source.name, chat)
        if data.duplicates == "near":
            sign([row for drawn in batch for row in drawn.rows])
        yield from batch


def render_row(
    row: ReadRow,
    source: Source,
    chat: Chat,
    switched: bool,
) -> DrawnRow:
    """A row as prompts and completions by the label rule, or the reasons why not."""
    drawn = DrawnRow(row.number, row.not_read)
    try:
        if isinstance(row.conversation, Rejected):
            raise row.conversation
        conversation = with_switch(row.conversation, chat) if switched else row.conversation
        drawn.examples = examples(conversation, source.mode, chat, source.turns)
        messages = conversation["messages"]
        for place in supervised_turns(messages, source.turns):
            if "train" in messages[place]:
                drawn.rejected.append(Rejected("untrained_turn", f"turn {place + 1} is marked as not to be trained on"))
    except Rejected as rejected:
        drawn.rejected = [rejected]
    return drawn


def tokenize(batch: list[DrawnRow], source: str, chat: Chat) -> None:
    """Give each drawn row its Rows: prompt and completion are tokenized apart, as at inference."""
    pairs = [(drawn, example) for drawn in batch for example in drawn.examples]
    prompts = chat.tokenizers.encode([example.prompt for _, example in pairs])
    completions = chat.following.encode([example.completion for _, example in pairs])
    for (drawn, example), prompt, completion in zip(pairs, prompts, completions, strict=True):
        # never as one text: a token could then span the end of the prompt, which inference does not show
        ids = np.concatenate([prompt, completion])
        drawn.rows.append(Row(ids, len(prompt), source, example.mode, drawn.number, example.conversation))


class Draw:
    """What one source gave so far."""

    def __init__(self, source: Source, to_hold: int, data: Data):
        self.source = source
        self.to_hold = to_hold
        self.data = data
        self.unit = unit_of(data)
        self.pool, self.count = split_count(source)
        if source.fraction is not None:
            self.pool = source  # of a share, `#N` says out of how many rows it is drawn
        self.held = 0  # conversations held out
        self.drawn = 0  # conversations taken from the source
        self.seen = 0  # their examples, of which `turns: each` makes several
        self.amount = 0  # size of `train` in the mix's unit
        self.train: list[Row] = []
        self.validation: list[Row] = []
        self.quarantine: list[DroppedRow] = []
        self.not_read: Counter[str] = Counter()
        self.looks_like: Counter[str] = Counter()  # rows in training by what their reply looks like (see `lint`)

    def wants(self, hold_out: bool) -> bool:
        """Whether more conversations are to be held out, or more rows to train in the mix's unit."""
        if hold_out:
            return self.held < self.to_hold
        if self.source.fraction is None:
            return self.count is None or self.amount + len(self.validation) < self.count
        return self.data.budget is None or self.amount < self.source.fraction * self.data.budget

    def take(self, drawn: DrawnRow, row_filter: "RowFilter", hold_out: bool) -> None:
        """Hold out, train on or drop each example of a row."""
        kept = []
        reasons = list(drawn.rejected)
        for row in drawn.rows:
            if reason := row_filter.reason(row, hold_out):
                reasons.append(reason)
            else:
                kept.append(row)
        name = self.source.name
        self.quarantine += [
            DroppedRow(source=name, row=drawn.number, reason=why.reason, detail=why.detail) for why in reasons
        ]
        self.drawn += 1
        self.seen += len(kept) + len(reasons)
        self.not_read.update(drawn.not_read)
        if hold_out:  # whole conversations, so that no turn of one trains while another is held out
            row_filter.hold(kept)
            self.held += bool(kept)
            self.validation += kept
        else:
            self.looks_like.update(name for row in kept for name in looks_like(row))
            self.add(kept)
        # of a source with millions of rows, the first 2,000 show that none can be used
        if self.drawn == CHECK_AT and not (self.train or self.validation):
            self.check()

    def add(self, rows: list[Row]) -> None:
        """Train on these, of which only the ids are kept."""
        for row in rows:
            # the texts of a million rows would fill the memory
            row.conversation = {"messages": []}
            self.amount += row.size(self.unit)
        self.train += rows

    def repeat(self) -> None:
        """Use rows again, in their order, where the source allows it (max_repeats) or asks for more than it has (#N)."""
        # in their drawn order, so that every row is used n times before one is used n + 1 times
        again = itertools.cycle(self.train.copy())
        limit = len(self.train) * self.source.max_repeats
        # ms-swift repeats rows to the number after `#`, and so do recipes taken over from it
        is_counted = self.count is not None and not self.source.max_rows
        wanted = (self.count or 0) - len(self.validation) if is_counted else 0
        while self.train and len(self.train) < max(limit, wanted) and self.wants(hold_out=False):
            self.add([next(again)])
        # the last conversation may have had more examples than were wanted
        if is_counted and self.source.fraction is None:
            del self.train[wanted:]

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
                f"{where}: {len(malformed)} of {self.drawn} rows rejected, more than "
                f"data.max_rejected={self.data.max_rejected:g} allows: {why}. Fix the rows, or raise "
                "data.max_rejected to leave them out"
            )
        if not self.train:
            raise ToolkitError(
                f"{where}: no row is left to train on: {len(self.validation)} of {self.seen} held out, {why}. "
                f"{self._advice()}"
            )

    def _advice(self) -> str:
        """What to change where no row is left to train on."""
        if self.validation:
            # a tenth of this source's rows, as a number for all sources
            tenth = self.data.validation_size * (self.seen // 10) // self.to_hold
            if tenth < self.data.validation_size and "validation_prompt" not in self.dropped:
                return f"Write data.validation_size={tenth} to hold out a tenth, or 0 to train on all"
            return "Write data.validation_size=0 to train on all: rows that ask what a held-out row asks never train"
        if "too_long" in self.dropped:
            return "Raise model.max_seq_length (rows are never truncated), or leave it out"
        return "Leave it out, or add rows"


class RowFilter:
    """Says, example by example, what keeps it out of training; remembers those it lets in."""

    def __init__(
        self,
        data: Data,
        max_seq_length: int,
        chat: Chat,
        prompts: list[str],
    ):
        self.duplicates = data.duplicates
        self.max_seq_length = max_seq_length
        self.grams = grams_of(prompts)
        self.exact = Duplicates(chat.decode)
        self.near = NearDuplicates(chat.decode)
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
        key = prompt_key(row.conversation)
        if key in self.held:
            return Rejected("validation_prompt", "a held-out row asks the same")
        if hold_out:  # evaluation may ask what it likes twice, and duplicates are a matter of training
            return None
        if gram := shared_gram(row.conversation, self.grams):
            return Rejected("contaminated", f"shares 13 words with an evaluation prompt: {gram!r}")
        if earlier := self.near_held.find(row):
            return Rejected("near_validation", f"nearly repeats held-out {earlier.place}")
        if self.duplicates == "keep":
            return None
        if earlier := self.exact.find(row, key):
            return Rejected("duplicate", f"repeats {earlier.place}, case and spacing aside")
        if earlier := self.near.find(row):
            return Rejected("near_duplicate", f"nearly repeats {earlier.place}")
        self.near.add(row)
        return None


# --- the evaluation's questions, which no row may give away -------------------------------------------------------------


def question_prompts(recipe: Recipe) -> list[str]:
    """User turns of the recipe's questions. All are read here: a row that cannot be asked is found before training."""
    prompts = []
    for source in recipe.evaluate.questions:
        for question in read_questions(source, placeholders=recipe.data.placeholders):
            prompts += asked(question["messages"])
    return prompts if recipe.data.decontaminate else []


def read_questions(source: Source, seed: int = 3407, placeholders: Fillings | None = None) -> list[Question]:
    """The questions of a source, of `#N` and `max_rows` those that `seed` draws: evaluation's own, not the recipe's, so that
    runs of several seeds are asked alike. Raises ToolkitError at a malformed row, as nobody would miss a question."""
    questions = []
    for number, conversation in conversations(source, seed, placeholders or {}):
        try:
            questions.append(as_question(conversation, source.name))
        except Rejected as rejected:
            raise ToolkitError(f"{source.path}, row {number}: {rejected.detail}") from rejected
    return questions


def as_question(conversation: Conversation | Rejected, name: str) -> Question:
    """A canonical conversation as a question: the messages before its last turn, without typed switches, as it is asked in
    each mode. Raises Rejected where it cannot be asked."""
    if isinstance(conversation, Rejected):
        raise conversation
    answer = conversation.get("expected_answer", "")
    *messages, reply = conversation["messages"]
    if not answer.strip():
        raise Rejected("no_expected_answer", "a question needs an expected_answer")
    if "tools" in conversation or any("tool_calls" in message for message in [*messages, reply]):
        raise Rejected("needs_tools", "a question with tools or a tool call cannot be asked: evaluation shows no tools")
    for place, message in enumerate(messages):
        if message["role"] == "user":
            messages[place] = message | {"content": without_switch(message["content"]).strip()}
    return Question(messages=messages, expected_answer=answer, set=name)


# --- shares ----------------------------------------------------------------------------------------------------------


class Planned(TypedDict):
    """What one source is to give."""

    share: float | None
    """Of the mix; None where rows are taken as they come."""
    quota: int | None
    """The same in `unit_of(data)`."""
    validation: int
    """Rows held out."""


def unit_of(data: Data) -> Unit:
    """What the plan is counted in: `data.unit`, or examples where `#N` counts stand in place of fractions."""
    counted = any(s.fraction is None and split_count(s)[1] for s in data.sources)
    return "examples" if counted else data.unit


def plan(data: Data) -> dict[str, Planned]:
    """What each source is to give. Every source that takes part holds out at least one row."""
    counts = [split_count(s)[1] for s in data.sources]
    # where neither fractions nor counts are complete, rows are taken as they come
    weights: list[Any] = [1] * len(counts)
    for known in ([s.fraction for s in data.sources], counts):
        if None not in known:
            weights = known
            break
    planned = {}
    for source, weight, count in zip(data.sources, weights, counts, strict=True):
        share = source.fraction
        quota = count
        if share is not None:
            quota = round(share * data.budget) if data.budget else None
        elif weights is counts:
            share = weight / sum(weights)
        least = 1 if weight and data.validation_size else 0
        held = round(data.validation_size * weight / sum(weights))
        planned[source.name] = Planned(share=share, quota=quota, validation=max(least, held))
    return planned


def balance(draws: list[Draw], data: Data) -> str | None:
    """Where sources are exhausted, reduce the whole mix and keep its shares; returns the source that limits it."""
    shares = {draw: draw.source.fraction for draw in draws if draw.source.fraction is not None}
    if not shares:
        return None
    # The total at which each exhausted source would have its share; the smallest is what all of them can give
    short = {draw: draw.amount / share for draw, share in shares.items() if draw.wants(hold_out=False)}
    limiting = min(short, key=short.__getitem__, default=None)
    # without a budget every source is exhausted at the end
    total = short[limiting] if limiting else float(data.budget or 0)
    for draw, share in shares.items():
        draw.train = trim(draw.train, share * total, data.unit)
    return limiting.source.name if limiting else None


def trim(rows: list[Row], target: float, unit: str) -> list[Row]:
    """The first rows, in drawn order, whose sum is nearest to `target`, but at least one."""
    # the row that crosses the target stays only where the sum is nearer with it
    sums = np.cumsum([row.size(unit) for row in rows])
    return rows[: int(np.abs(sums - target).argmin()) + 1]


def check_shares(report: MixReport, data: Data) -> None:
    """Raises ToolkitError where a source's share of the mix is not what the recipe asks for."""
    if data.sources[0].fraction is None:
        return  # counts are the mix: what a source lacks of its own is in the report
    unit, limit = report["unit"], report["limited_by"]
    for name, share in report["planned"].items():
        achieved = report["achieved"][unit].get(name, 0)
        if abs(achieved - share) > TOLERANCE:
            fix = f"Add rows to {limit}, which is exhausted, or lower its fraction" if limit else "Raise data.budget"
            raise ToolkitError(
                f"data.sources: {name}: planned {share:.1%} of {unit}, achieved {achieved:.1%}: "
                f"a mix of {report['total'][unit]:,} {unit} is too small for rows of this length. {fix}"
            )


# --- mix.json --------------------------------------------------------------------------------------------------------


def size_of(rows: list[Row], unit: Unit) -> int:
    """Rows counted in a unit."""
    return sum(row.size(unit) for row in rows)


def shares_of(rows: list[Row], by: str = "source") -> dict[Unit, Shares]:
    """Share of each source (or mode) among rows, in all three units."""
    shares = {}
    for unit in UNITS:
        sums: Counter[str] = Counter()
        for row in rows:
            sums[getattr(row, by)] += row.size(unit)
        shares[unit] = {name: n / sums.total() for name, n in sorted(sums.items())}
    return shares


def mix_report(
    recipe: Recipe,
    draws: list[Draw],
    rows: list[Row],
    planned: dict[str, Planned],
    limited_by: str | None,
) -> MixReport:
    """What mix.json holds, apart from fingerprints and warnings."""
    unit = unit_of(recipe.data)
    # from the compiled rows, not from the plan: a share that is reported is one that trains
    achieved = shares_of(rows)
    shares = {name: row["share"] for name, row in planned.items() if row["share"] is not None}
    return MixReport(
        unit=unit,
        budget=recipe.data.budget,
        planned=shares or achieved[unit],
        achieved=achieved,
        achieved_modes=shares_of(rows, by="mode"),
        total={u: size_of(rows, u) for u in UNITS},
        limited_by=limited_by,
        lengths=completion_lengths(rows),
        sources={d.source.name: source_report(d) for d in draws},
        max_seq_length=recipe.model.max_seq_length,
        # filled in by the caller
        fingerprints={},
        slow_tokenizer=None,
        warnings=[],
    )


def source_report(draw: Draw) -> SourceReport:
    """What mix.json holds of one source."""
    rows = draw.train
    not_read: Any = {"row": {}, "turn": {}}
    for key, n in draw.not_read.most_common():
        place, _, name = key.partition(" ")
        not_read[place][name] = n
    return SourceReport(
        mode=draw.source.mode,
        modes=dict(Counter(row.mode for row in rows)),
        rows_asked=draw.count,
        rows_seen=draw.seen,
        rows_kept=len(rows),
        rows_repeated=len(rows) - len(set(rows)),
        rows_held_out=len(draw.validation),
        dropped=draw.dropped,
        not_read=not_read,
        looks_like=dict(draw.looks_like),
        tokens=size_of(rows, "tokens"),
        supervised_tokens=size_of(rows, "supervised_tokens"),
        lengths=completion_lengths(rows),
    )


def completion_lengths(rows: list[Row]) -> dict[str, CompletionLengths]:
    """{mode: lengths of the completions in tokens}, which say how long a reply of that mode may become."""
    lengths = {}
    for mode in sorted({row.mode for row in rows}):
        sizes = [len(row.completion) for row in rows if row.mode == mode]
        lengths[mode] = CompletionLengths(completion_p90=int(np.percentile(sizes, 90)), completion_max=max(sizes))
    return lengths
