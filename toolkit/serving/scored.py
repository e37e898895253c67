"""Evaluate what other engines answer: an OpenAI-compatible server, or the file that ships, by the questions of a run.

result = evaluate_file("pocket", "q8_0")

Scoring is evaluation's own. Every reply is kept as it comes: after a cut connection the same command asks what is missing.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from toolkit import recipe as recipes
from toolkit.data import mix
from toolkit.data.render import Chat
from toolkit.evaluation.generate import Reply, split_reply
from toolkit.evaluation.measure import score, scored
from toolkit.evaluation.plan import Plan, sized
from toolkit.evaluation.questions import EvaluationSet, fingerprint, questions_of, reply_limits, select
from toolkit.export.llama import Engine, Sampling, launch
from toolkit.family import THINK_CLOSE, THINK_OPEN
from toolkit.files import ToolkitError, outputs, read_json, read_jsonl, sha256, write_json
from toolkit.records import Evaluation, Messages
from toolkit.serving.client import answer_all, open_engine
from toolkit.serving.engine import SLOTS, Files, chat_of, converted, exported, modes_of_run, sampling_by_mode
from toolkit.training.model import run_folder
from toolkit.view.progress import Progress, default_console, working

CLIENTS = 8
"""Requests at once to a server of another process; one in this process has SLOTS."""


class Model(NamedTuple):
    """One of the two models as a server knows it."""

    engine: Engine
    name: str
    identity: str
    """What its replies are kept under: another file or server is another model."""


@dataclass
class ServedRun:
    """Base and tuned behind an API, asked as a LoadedRun is."""

    base: Model
    tuned: Model
    modes: tuple[str, ...]
    chat: Chat
    """The run's template and tokenizer, by which tokens are counted."""
    clients: int
    seed: int = 3407

    def reply(
        self, conversations: Sequence[Messages], mode: str, adapter: bool, progress: Progress, *, max_new_tokens: int
    ) -> list[Reply]:
        """A reply to each conversation. Raises ToolkitError where the server does not answer; what it answered is kept."""
        engine, name, identity = self.tuned if adapter else self.base
        common = {"mode": mode, "run": name, "seed": self.seed, "max_new_tokens": max_new_tokens}
        requests = [{"row": place, "messages": [*messages], **common} for place, messages in enumerate(conversations)]
        file = outputs() / ".served_replies" / f"{fingerprint([identity, engine.sampling[mode], requests])}.jsonl"
        # a question that the server refuses would be missing in one model and not in the other
        if refused := answer_all(requests, file, lambda: engine, self.clients, progress):
            raise ToolkitError(f"{engine.url}: {refused[0]}")
        return [self.read(line) for line in read_jsonl(file)] if requests else []

    def read(self, line: dict[str, Any]) -> Reply:
        """A reply taken apart as one of the model in memory is; servers give its reasoning apart or between tags."""
        reasoning, text = line["reasoning"], line["answer"]
        if reasoning:
            is_open = not text and not line["finished"]
            text = f"{THINK_OPEN}\n{reasoning}\n{'' if is_open else THINK_CLOSE}\n\n{text}"
        elif line["mode"] == "thinking" and self.chat.kind == "thinking_only" and not text.startswith(THINK_OPEN):
            text = THINK_OPEN + text  # its prompt opened the block
        reasoning, content, opened, closed = split_reply(text)
        thought, answered = (len(ids) for ids in self.chat.encode([reasoning, content]))
        return Reply(reasoning, content, text, thought, answered, opened, closed, line["finished"])


def evaluate_url(
    run: str | Path,
    url: str,
    base_model: str,
    tuned_model: str,
    *,
    key: str | None = None,
    level: str | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Score base and tuned as a server answers for them; written as eval-served.json. Raises ToolkitError."""
    folder = run_folder(run).resolve()
    engine = open_engine(folder, url=url, key=key, names=(base_model, tuned_model))
    # a run trained again under its name must not get the old replies
    identity = f"{url} {sha256(folder / 'adapter' / 'adapter_model.safetensors')}"
    models = Model(engine, base_model, identity), Model(engine, tuned_model, identity)
    return evaluate_models(folder, *models, CLIENTS, "served", replies_asked(folder, level), console)


def evaluate_file(
    run: str | Path, quant: str, *, level: str | None = None, console: Console | None = None
) -> Evaluation:
    """Score the exported file against the base's file of the same quantization, by llama.cpp; written as
    eval-QUANT.json, with how many of the adapter's right answers the file keeps. Raises ToolkitError."""
    folder = run_folder(run).resolve()
    console = console or default_console()
    say = partial(console.print, markup=False)
    quant = quant.lower()
    with working(console, "starting llama.cpp"):
        tuned = exported(folder, quant, say)
        base = converted([folder], quant, say)
        questions = replies_asked(folder, level)
        sampling = sampling_by_mode(folder, base.config)
        models = local_model(folder, base, questions, sampling), local_model(folder, tuned, questions, sampling)
    result = evaluate_models(folder, *models, SLOTS, quant, questions, console)
    say(kept_line(folder, result, quant))
    return result


def local_model(folder: Path, files: Files, questions: EvaluationSet, sampling: Sampling) -> Model:
    """A file behind llama.cpp's server in this process, with room for the longest reply."""
    longest = max(map(questions.plan.limit, sampling))
    # room for a prompt as long as the longest reply; the model's own end comes first
    context = min(files.config["max_position_embeddings"], 2 * longest + 1024)
    template = chat_of(folder).template_text or ""
    engine = launch(files.weights, context=context, slots=SLOTS, sampling=sampling, template=template)
    return Model(engine, files.weights.stem, sha256(files.weights))


def evaluate_models(
    folder: Path,
    base: Model,
    tuned: Model,
    clients: int,
    name: str,
    questions: EvaluationSet,
    console: Console | None,
) -> Evaluation:
    """Ask both models, print the verdict and write it beside eval.json."""
    console = console or default_console()
    subject = ServedRun(base, tuned, modes_of_run(folder), chat_of(folder), clients)
    try:
        result = score(subject, questions, console, fast=False)
    except ToolkitError as error:
        error.add_note("replies that came are kept: the same command asks only what is missing")
        raise
    write_json(folder / f"eval-{name}.json", result)
    lines = [*result["verdict"], f"scores: {folder / f'eval-{name}.json'}"]
    console.print("\n".join(lines), markup=False)
    return result


def replies_asked(folder: Path, level: str | None) -> EvaluationSet:
    """The questions, limits and samples of the run's own evaluation, so that both can be paired; those of its recipe where
    there is none, or where another level is named."""
    recipe = recipes.load(folder / "recipe.yaml")
    manifest: Any = read_json(folder / "manifest.json")
    mixed = mix.of_run(recipe, manifest)
    level = level or recipe.evaluate.level
    size = sized(level, manifest.get("steps"))
    # as `evaluate` plans without a measured speed: the level's questions, the mix's lengths
    limits = reply_limits(mixed)
    if recipe.evaluate.max_new_tokens:
        limits = dict.fromkeys(limits, recipe.evaluate.max_new_tokens)
    earlier = read_json(folder / "eval.json") if scored(folder) else {}
    if earlier.get("level") == level and earlier["budget"]["questions"]:
        budget = earlier["budget"]
        size = replace(size, questions=budget["questions"], samples=budget["samples"])
        limits = budget["limits"]
    reasoning, chat = questions_of(recipe, mixed)
    return select(level, None, reasoning, chat, plan=Plan(size, limits))


def kept_line(folder: Path, result: Evaluation, name: str) -> str:
    """`q4_k_m keeps 68 of the adapter's 70 right answers, and has 3 right that it had wrong`, all modes together."""
    adapter: Any = read_json(folder / "eval.json") if scored(folder) else {}
    if adapter.get("fingerprints", {}).get("questions") != result["fingerprints"]["questions"]:
        return f"the adapter was not asked the same: `python -m toolkit evaluate {folder.name}` first pairs both"
    pairs = Counter(zip(right_answers(adapter), right_answers(result), strict=True))
    kept = pairs[True, True]
    had = kept + pairs[True, False]
    gained = pairs[False, True]
    return f"{name} keeps {kept} of the adapter's {had} right answers, and has {gained} right that it had wrong"


def right_answers(result: Evaluation) -> Iterator[bool | None]:
    """Whether each question was right in most samples, by mode and kind; None where none counted."""
    for mode in result["modes"]:
        scores = result["per_question"][mode]["tuned"]
        for metric in ("accuracy", "accuracy/chat"):
            for right, count in zip(*scores.get(metric, ([], [])), strict=True):
                yield 2 * right > count if count else None
