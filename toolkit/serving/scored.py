"""Evaluate what other engines answer: an OpenAI-compatible server, or the file that ships, by the questions of a run.

result = evaluate_file("pocket", "q8_0")

Scoring is evaluation's own. Every reply is kept as it comes: after a cut connection the same command asks what is missing.
"""

import functools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit import recipe as recipes
from toolkit import run as runs
from toolkit.data import mix
from toolkit.data.render import Chat, load_chat
from toolkit.evaluation.generate import Messages, Reply, split_reply
from toolkit.evaluation.measure import score
from toolkit.evaluation.plan import Plan, sized
from toolkit.evaluation.questions import EvaluationSet, fingerprint, questions_of, reply_limits, select
from toolkit.evaluation.reply_store import ReplyStore
from toolkit.export.llama import Engine, launch
from toolkit.family import THINK_CLOSE, THINK_OPEN
from toolkit.files import ToolkitError, outputs, read_json, sha256, write_json
from toolkit.records import Evaluation
from toolkit.serving.client import Answer, chat_body, served_names
from toolkit.serving.engine import SLOTS, Files, converted, exported, modes_of_run, sampling_by_mode
from toolkit.training.model import checkpoint_file, run_folder
from toolkit.view.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

CLIENTS = 8
"""Requests at once to a server of another process; one in this process has SLOTS."""


@dataclass(frozen=True)
class Model:
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
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reply(
        self, conversations: Sequence[Messages], mode: str, adapter: bool, progress: Progress, *, max_new_tokens: int
    ) -> list[Reply]:  # fmt: skip
        """A reply to each conversation. Raises ToolkitError where the server does not answer; what it answered is kept."""
        model = self.tuned if adapter else self.base
        sampling = model.engine.sampling[mode]
        identity = [model.identity, model.name, conversations, mode, max_new_tokens, self.seed, sampling]
        store = ReplyStore(outputs() / ".served_replies" / f"{fingerprint(identity)}.jsonl")
        replies = store.read()
        progress.skip(len(replies))
        missing = [place for place in range(len(conversations)) if place not in replies]

        def ask(place: int) -> None:
            messages: Any = conversations[place]
            body = chat_body(model.engine, model.name, mode, messages, max_new_tokens) | {"seed": self.seed + place}
            reply = self.read(completion(model.engine, body), mode)
            with self.lock:
                replies[place] = reply
                store.add({place: reply})
                progress.advance(1)

        pool = ThreadPoolExecutor(self.clients)
        try:
            for future in as_completed([pool.submit(ask, place) for place in missing]):
                future.result()
        finally:  # those that run are waited for and kept, the others are not begun
            pool.shutdown(cancel_futures=True)
        return [replies[place] for place in range(len(conversations))]

    def read(self, answer: Answer, mode: str) -> Reply:
        """A reply taken apart as one of the model in memory is; servers give its reasoning apart or between tags."""
        text = answer.content
        if answer.reasoning:
            closing = "" if answer.is_cut and not answer.content else THINK_CLOSE
            text = f"{THINK_OPEN}\n{answer.reasoning}\n{closing}\n\n{answer.content}"
        elif mode == "thinking" and self.chat.kind == "thinking_only" and not text.startswith(THINK_OPEN):
            text = THINK_OPEN + text  # its prompt opened the block
        reasoning, content, opened, closed = split_reply(text)
        thought, answered = (len(ids) for ids in self.chat.encode([reasoning, content]))
        return Reply(reasoning, content, text, thought, answered, opened, closed, not answer.is_cut)


def completion(engine: Engine, body: dict[str, object]) -> Answer:
    """The answer to one request, whole: a stream that ends early could pass as a reply. Raises ToolkitError."""
    answer = engine.call("/v1/chat/completions", body)
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        # llama.cpp and vLLM call it so, newer vLLM by the second name
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
        return Answer(reasoning, message.get("content") or "", is_cut=choice["finish_reason"] == "length")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ToolkitError(f"{engine.url}: not a chat completion: {str(answer)[:200]}") from error


def evaluate_url(
    run: str | Path, url: str, base_model: str, tuned_model: str, *, key: str | None = None,
    level: str | None = None, console: "Console | None" = None,
) -> Evaluation:  # fmt: skip
    """Score base and tuned as a server answers for them; written as eval-served.json. Raises ToolkitError."""
    folder = run_folder(run).resolve()
    recipe = recipes.load(folder / "recipe.yaml")
    engine = Engine(url.rstrip("/").removesuffix("/v1"), key)
    check_models(engine, [base_model, tuned_model])
    config = checkpoint_file(recipe.model, "config.json") | checkpoint_file(recipe.model, "generation_config.json")
    # a run trained again under its name must not get the old replies
    adapter = sha256(folder / "adapter" / "adapter_model.safetensors")
    base, tuned = (Model(engine, name, f"{url} {adapter}") for name in (base_model, tuned_model))
    return evaluate_models(folder, base, tuned, config, CLIENTS, "served", level, console)


def check_models(engine: Engine, names: Sequence[str]) -> None:
    """Raises ToolkitError for a name that is not served."""
    served = served_names(engine)
    if missing := [name for name in names if name not in served]:
        raise ToolkitError(
            f"{engine.url}: does not serve {', '.join(missing)}; it serves {', '.join(served)}: name them with --base-model "
            "and --tuned-model"
        )


def evaluate_file(
    run: str | Path, quant: str, *, level: str | None = None, console: "Console | None" = None
) -> Evaluation:
    """Score the exported file against the base's file of the same quantization, by llama.cpp; written as
    eval-QUANT.json, with how many of the adapter's right answers the file keeps. Raises ToolkitError."""
    folder = run_folder(run).resolve()
    console = console or runs.default_console()
    say = functools.partial(console.print, markup=False)
    tuned = exported(folder, quant, say)
    base = converted([folder], quant.lower(), say)
    limits = replies_asked(folder, level).plan.limits
    limit = max(limits.values())
    models = local_model(folder, base, limit), local_model(folder, tuned, limit)
    result = evaluate_models(folder, *models, base.config, SLOTS, quant.lower(), level, console)
    for line in kept_lines(folder, result, quant.lower()):
        console.print(line, markup=False)
    return result


def local_model(folder: Path, files: Files, limit: int) -> Model:
    """A file behind llama.cpp's server in this process, with room for the longest reply."""
    chat = load_chat(str(folder / "adapter"))
    context = min(files.config["max_position_embeddings"], 2 * limit + 1024)
    engine = launch(files.weights, context=context, slots=SLOTS, template=chat.template_text or "")
    return Model(engine, files.weights.stem, sha256(files.weights))


def evaluate_models(
    folder: Path, base: Model, tuned: Model, config: dict, clients: int, name: str, level: str | None,
    console: "Console | None",
) -> Evaluation:  # fmt: skip
    """Ask both models what the run was asked, print the verdict and write it beside eval.json."""
    console = console or runs.default_console()
    chat = load_chat(str(folder / "adapter"))
    base.engine.sampling = tuned.engine.sampling = sampling_by_mode(folder, config)
    subject = ServedRun(base, tuned, modes_of_run(folder), chat, clients)
    try:
        result = score(subject, replies_asked(folder, level), console, fast=False)
    except ToolkitError as error:
        error.add_note("replies that came are kept: the same command asks only what is missing")
        raise
    write_json(folder / f"eval-{name}.json", result)
    for line in result["verdict"]:
        console.print(line, markup=False)
    console.print(f"scores: {folder / f'eval-{name}.json'}", markup=False)
    return result


def replies_asked(folder: Path, level: str | None) -> EvaluationSet:
    """The questions, limits and samples of the run's own evaluation, so that both can be paired; those of its recipe where
    there is none, or where another level is named."""
    recipe = recipes.load(folder / "recipe.yaml")
    manifest: Any = read_json(folder / "manifest.json")
    mixed = mix.of_run(recipe, manifest)
    earlier = read_json(folder / "eval.json") if runs.scored(folder) else None
    level = level or recipe.evaluate.level
    size = sized(level, manifest.get("steps"))
    limits = reply_limits(mixed)
    if recipe.evaluate.max_new_tokens:
        limits = dict.fromkeys(limits, recipe.evaluate.max_new_tokens)
    if earlier and earlier["level"] == level and earlier["budget"]["questions"]:
        budget = earlier["budget"]
        # what the adapter was asked, so that both can be paired
        size = replace(size, questions=budget["questions"], samples=budget["samples"])
        limits = budget["limits"]
    reasoning, chat = questions_of(recipe, mixed)
    return select(level, None, reasoning, chat, plan=Plan(size, limits))


def kept_lines(folder: Path, result: Evaluation, name: str) -> list[str]:
    """`q4_k_m keeps 68 of the adapter's 70 right answers, and has 3 right that it had wrong`, by mode."""
    adapter: Any = read_json(folder / "eval.json") if runs.scored(folder) else None
    if not adapter or adapter["fingerprints"]["questions"] != result["fingerprints"]["questions"]:
        return [f"the adapter was not asked the same: `python -m toolkit evaluate {folder.name}` first pairs both"]
    kept = had = gained = 0
    for mode in result["modes"]:
        for metric in ("accuracy", "accuracy/chat"):
            for before, after in zip(*(right_of(r, mode, metric) for r in (adapter, result)), strict=False):
                if before is None or after is None:
                    continue
                had += before
                kept += before and after
                gained += after and not before
    return [f"{name} keeps {kept} of the adapter's {had} right answers, and has {gained} right that it had wrong"]


def right_of(result: Evaluation, mode: str, metric: str) -> list[bool | None]:
    """Whether each question was right in most samples; None where none counted."""
    sums, counts = result["per_question"].get(mode, {}).get("tuned", {}).get(metric, ([], []))
    return [2 * right > n if n else None for right, n in zip(sums, counts, strict=True)]
