"""The command line: each verb is a function with its arguments beside it.

python -m toolkit --help     (then `python -m toolkit train hybrid train.max_steps=10`)
"""

import argparse
import contextlib
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit.files import ToolkitError, command_line, did_you_mean, finite, outputs
from toolkit.machine import command

if TYPE_CHECKING:
    from rich.console import Console

    from toolkit.recipe import Recipe

Argument = tuple[tuple[str, ...], dict[str, Any]]
VERBS: dict[str, tuple[Callable[..., Any], tuple[Argument, ...]]] = {}
"""Verb → (function, its `arg`s), in the order in which `--help` lists them."""
OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
SOURCE_KEYS = re.compile(r"data\.sources\.\d+\.")


class Outcome(NamedTuple):
    """What a verb returns that can answer with --json."""

    value: Mapping[str, Any]
    code: int = 0


def arg(*flags: str, **options: Any) -> Argument:
    """One argument of a verb: what argparse's `add_argument` takes."""
    return flags, options


def verb(name: str, *arguments: Argument) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function a verb: `name` on the command line, its docstring as help, `arguments` as its options."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        VERBS[name] = function, arguments
        return function

    return register


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit code: 0, 1 (a check failed or a bug), 2 (an error with its fix), 128 + signal."""
    words = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    options = argparse.Namespace()  # filled as far as parsing comes
    # `datasets` would draw a bar of its own for each parquet file
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    return command.exit_code(lambda: run_verb(words, options), lambda: str(getattr(options, "run", "")))


def run_verb(words: list[str], options: argparse.Namespace) -> int:
    """Parse a command line into `options` and run its verb."""
    # argparse's own message would list the verbs, but not the nearest one
    if words[0] not in VERBS and not words[0].startswith("-"):
        raise ToolkitError(f"{words[0]}: no such verb{did_you_mean(words[0], VERBS)}")
    words, overrides = take_overrides(words)
    values = vars(parser().parse_args(words, options))
    name = values.pop("verb")
    as_json = values.pop("json", False)
    if values.pop("trust_remote_code", False):
        from toolkit import recipe

        recipe.allow_remote_code()
        # written into the run, whose other verbs then ask for the flag again
        overrides.append("model.trust_remote_code=true")
    if "overrides" in values:
        values["overrides"] += overrides
    # under --json what people read goes to stderr, and stdout holds the answer alone
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        outcome = VERBS[name][0](**values)
    if as_json:
        print(json.dumps(finite(outcome.value), ensure_ascii=False, default=str))
    return outcome.code if isinstance(outcome, Outcome) else outcome or 0


def parser() -> argparse.ArgumentParser:
    """The command line; building it imports nothing heavy."""
    top = argparse.ArgumentParser(
        prog="python -m toolkit", description="Fine-tune a chat model on one GPU, and know what it did to the model."
    )
    verbs = top.add_subparsers(dest="verb", metavar="VERB")
    for name, (function, arguments) in VERBS.items():
        text = function.__doc__ or ""
        sub = verbs.add_parser(name, help=text.partition("\n")[0], description=text)
        for flags, options in arguments:
            sub.add_argument(*flags, **options)
    return top


def take_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """(other words, overrides): takes `key=value` words out, so that no option with several values swallows them."""
    if words[0] not in VERBS or OVERRIDES not in VERBS[words[0]][1]:
        return words, []
    return [w for w in words if not OVERRIDE.match(w)], [w for w in words if OVERRIDE.match(w)]


def console() -> "Console":
    """Where a verb prints what people read."""
    from toolkit.view.progress import default_console

    return default_console()


def say(text: str) -> None:
    """Print a line, or several, as they are."""
    console().print(text, markup=False)


def _recipe(path: str | None, overrides: list[str]) -> "Recipe":
    """The recipe of a `[RECIPE] [key=value …]` command line; prints which one, and why, when none was named."""
    from toolkit import recipe

    if path is None:
        from toolkit.machine.doctor import default_recipe

        path, why = default_recipe()
        say(f"{path} ({why})")
    return recipe.load(path, overrides)


def _folder(run: str) -> Path:
    """A run's folder by its path, else by its name under outputs/, finished or not. Raises ToolkitError."""
    from toolkit.training import model

    folder = Path(run) if Path(run).is_dir() else outputs() / run
    return folder if folder.is_dir() else model.run_folder(run)  # which says that there is none


def whole(text: str, least: int = 1) -> int:
    """An argument's type: a whole number that is not below `least`. Raises what argparse shows as the option's error."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number >= {least}, found {text!r}")
    return int(text)


OVERRIDES = arg("overrides", nargs="*", metavar="key=value", help="e.g. train.max_steps=10 data.reasoning=0.5")
REMOTE = arg("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
RECIPE = (
    arg("recipe", nargs="?", help="a YAML file or a name in data_recipes/; default: hybrid on a GPU, else pocket"),
    OVERRIDES,
    REMOTE,
)
JSON = arg("--json", action="store_true", help="one JSON object on stdout, messages on stderr")
DETAILS = arg("--details", action="store_true", help="show every metric")
FRESH = arg("--fresh", action="store_true", help="start anew: an old run is moved aside, a mix compiled again")
RUN = (arg("run", type=Path, help="a run's folder, or its name under outputs/"), REMOTE)
WEIGHTS = (
    arg("--from", dest="source", choices=("adapter", "merged-gguf"), default="adapter",
        help="default: the adapter beside its base; merged-gguf is the file that `export` wrote"),
    arg("--quant", help="of the base, default q8_0; with merged-gguf which file, default the most exact small one"),
    arg("--context", type=whole, default=8192, metavar="N", help="tokens of prompt and reply together; default 8192"),
)  # fmt: skip
SCALE = arg(
    "--scale", type=float, default=1.0, metavar="S", help="how much of the adapter: 0 is the base, default 1 the run"
)
SERVER = (
    arg("--url", help="a server that `serve` started; default: an engine in this process"),
    arg("--api-key", dest="key", help="of that server"),
)


@verb("setup")
def install_packages() -> None:
    """Install requirements.txt into this Python."""
    from toolkit.machine import install

    install.setup()
    from toolkit.machine import doctor

    doctor.show([*doctor.kernels(), *doctor.gpu(doctor.look())])


@verb(
    "doctor",
    arg("--gpu", action="store_true", help="try the CUDA path on random weights (three minutes, 4 GB); writes doctor.json"),
    arg("--cpu-rehearsal", action="store_true", help="the same steps on the CPU, where there is no card"),
)  # fmt: skip
def diagnose(gpu: bool, cpu_rehearsal: bool) -> int:
    """Say what is installed, what will run, and the fix for what will not."""
    from toolkit.machine import doctor

    if gpu or cpu_rehearsal:
        from toolkit.machine import gpu_check

        return gpu_check.check(console(), rehearsal=cpu_rehearsal)
    try:
        doctor.show(doctor.examine())
    except ModuleNotFoundError as error:  # of a package that others need, and that is not looked for by name
        print(
            f"! toolkit     {error.name} missing: nothing else can be examined\n              → python -m toolkit setup"
        )
        return 1
    return 1 if doctor.missing_packages() else 0


@verb(
    "mix",
    *RECIPE,
    FRESH,
    arg("--dry-run", action="store_true", help="only the plan"),
    arg("--show", type=whole, default=0, metavar="N", help="print N rows per source, supervised tokens coloured"),
    JSON,
)
def show_mix(recipe: str | None, overrides: list[str], fresh: bool, dry_run: bool, show: int) -> Outcome:
    """Compile a recipe's mix and show it: plan, achieved shares, drops, lengths."""
    from toolkit import run
    from toolkit.data import mix, render
    from toolkit.machine import choose
    from toolkit.view import labels, tables
    from toolkit.view.progress import working

    out = console()
    loaded = _recipe(recipe, overrides)
    if dry_run:
        planned = mix.plan(loaded.data)
        out.print(tables.plan_table(planned))
        return Outcome({"unit": loaded.data.unit, "budget": loaded.data.budget, "sources": planned})
    loaded = run.resolve(loaded, out)
    # what the reader would type next, with the changes of this command
    next_command = command_line(["python", "-m", "toolkit", "train", recipe or loaded.name, *overrides])
    mixed = run.compile_mix(loaded, out, fresh=fresh, next_command=next_command)
    with working(out, "measuring the speed of this machine"):
        choose.say_hours(loaded, mixed, out.print)
    if show:
        chat = render.load_chat(loaded.model.model_name, loaded.model.revision)
        out.print(labels.coloured(mixed, chat, show))
    out.print(f"mix.json and quarantine.jsonl: {mixed.folder}")
    return Outcome({**mixed.report, "folder": str(mixed.folder)})


@verb(
    "init",
    arg("data", nargs="+", help="data files or folders; rows.csv#500 takes 500 rows"),
    OVERRIDES,
    arg("--model", default="auto", help="a Hub name, a folder, pocket or auto (default)"),
    arg("--name", help="of the run; default: the first file's"),
)
def start_recipe(data: list[str], overrides: list[str], model: str, name: str | None) -> None:
    """Write a recipe for your data files: format and columns are guessed, said and written down."""
    from toolkit.data import guess

    for word in overrides:
        if not SOURCE_KEYS.match(word):
            raise ToolkitError(f"{word}: `init` takes keys of data.sources only: change others in the file it writes")
    file = guess.start(data, model, name, overrides, say)
    say(f"written: {file}\nnext:    python -m toolkit train {file}")


@verb("train", *RECIPE, FRESH, DETAILS)
def train_run(recipe: str | None, overrides: list[str], **options: Any) -> None:
    """Fine-tune by a recipe, or on a data file; an unfinished run resumes, a finished one is left alone."""
    from toolkit import run
    from toolkit.data import guess

    if recipe and guess.is_data(recipe):
        of_sources = [word for word in overrides if SOURCE_KEYS.match(word)]
        recipe = str(guess.start([recipe], "auto", None, of_sources, say))
    run.train(_recipe(recipe, overrides), console(), **options)


@verb(
    "evaluate",
    *RUN,
    arg("--level", choices=("fast", "quick", "full"), help="default: the recipe's"),
    arg("--minutes", type=float, help="time for replies; default: a third of the training's, at least 3"),
    arg("--file", metavar="QUANT", help="score the exported file by llama.cpp: q4_k_m, q8_0 …"),
    arg("--url", help="ask an OpenAI-compatible server instead: vLLM, llama.cpp, `serve`"),
    arg("--base-model", default="base", help="the base's name there; default: base"),
    arg("--tuned-model", help="the run's name there; default: the run's"),
    arg("--api-key", dest="key", help="of that server"),
    DETAILS,
    JSON,
)
def evaluate_run(
    run: Path, level: str | None, file: str | None, url: str | None, base_model: str, tuned_model: str | None,
    key: str | None, **options: Any,
) -> Outcome:  # fmt: skip
    """Score a run against its own base, in every mode it has, with intervals."""
    from toolkit.run import evaluate
    from toolkit.serving import scored

    if file:
        return Outcome(scored.evaluate_file(run, file, level=level, console=console()))
    if url:
        models = base_model, tuned_model or Path(run).resolve().name
        return Outcome(scored.evaluate_url(run, url, *models, key=key, level=level, console=console()))
    return Outcome(evaluate(run, console(), level=level, **options))


@verb(
    "fit",
    arg("recipe", nargs="?", default="hybrid", help="default: hybrid"),
    OVERRIDES,
    REMOTE,
    arg("--model", help="instead of the recipe's, e.g. unsloth/Qwen3-8B-unsloth-bnb-4bit"),
    arg("--vram", type=float, default=0, metavar="GB", help="a card's size; default: the one here, else 8"),
    arg("--card", metavar="NAME", help='a card by its name, for hours too: "RTX 3060", T4 …'),
    JSON,
)
def forecast_memory(recipe: str, overrides: list[str], model: str | None, vram: float, card: str | None) -> Outcome:
    """Say what a run will need in memory and hours, before it is run, and what would make it fit."""
    from toolkit.machine import choose

    chosen = [f"model.model_name={model}"] if model else []
    return Outcome(choose.show(_recipe(recipe, [*chosen, *overrides]), vram, card, console()))


@verb(
    "sweep",
    arg("recipe", nargs="?", default="data_recipes/sweep_pocket.yaml", help="default: sweep_pocket"),
    OVERRIDES,
    REMOTE,
    arg("--reasoning", "--shares", dest="shares", nargs="+", type=float, metavar="SHARE", help="default: 0 0.25 0.5 0.75 1"),
    arg("--of", default="reasoning", metavar="SOURCE", help="whose share; default: all thinking sources together"),
    arg("--over", nargs="+", default=(), metavar=("KEY", "VALUE"), help="instead of shares: values of a recipe key"),
    arg("--probe", action="store_true", help="train shares of 0.1 and 0.9 alone; predict those between by sums of both, and choose ratio and scale"),
    arg("--seeds", type=whole, help="trainings of each, seeds counted up from data.seed; default: 3 where a run is short, else 1"),
)  # fmt: skip
def sweep_shares(recipe: str, overrides: list[str], shares: list[float] | None, probe: bool, **options: Any) -> None:
    """Train every share (or value) at one budget, compare, recommend; the same command resumes it."""
    from toolkit.comparison import probe as probes
    from toolkit.comparison import sweep

    if not probe:
        sweep.sweep(recipe, overrides, shares=shares or sweep.RATIOS, console=console(), **options)
    elif shares or options.pop("over"):
        raise ToolkitError("--probe trains 10% and 90%: leave out --reasoning and --over")
    else:
        probes.probe(recipe, overrides, console=console(), **options)


@verb(
    "compare",
    arg("runs", nargs="*", help="run folders or names; without any, every scored run"),
    arg(
        "--out", type=Path, metavar="FOLDER", help="write page, picture and numbers there; log to wandb if the runs did"
    ),
    JSON,
)
def compare_runs(runs: list[str], out: Path | None) -> Outcome:
    """Several runs: one table, one picture, one recommendation."""
    from toolkit.comparison import decide, report

    # runs without an evaluation have nothing to compare
    folders = [_folder(run) for run in runs] or sorted(p.parent for p in outputs().glob("*/eval.json"))
    comparison = decide.compare(folders)
    report.conclude(comparison, console(), out)
    return Outcome(report.as_json(comparison))


@verb(
    "dial",
    arg("runs", nargs="+", metavar="run", help="a finished run; several: one recipe with other seeds, averaged"),
    arg("--scales", nargs="+", type=float, metavar="S", help="0 (base) to 2; default: 0.25 to 1.25, more at the bend"),
    arg("--out", type=Path, metavar="FOLDER", help="where picture and numbers go; default: a folder in the run's"),
    JSON,
)
def dial_runs(runs: list[str], scales: list[float] | None, out: Path | None) -> Outcome:
    """How much of a trained adapter to keep: score it at several scales, without training, and recommend one."""
    from toolkit.comparison import dial, report

    comparison = dial.dial(runs, scales=scales, console=console(), out=out)
    return Outcome(report.as_json(comparison))


@verb(
    "blend",
    arg("runs", nargs="+", metavar="run", help="finished runs of one base"),
    arg(
        "--weights",
        nargs="+",
        type=float,
        required=True,
        metavar="W",
        help="one for each run, 0 to 2; 1: as it was trained",
    ),
    arg("--name", help="of the sum; default: the runs' names and weights"),
    REMOTE,
)
def blend_runs(runs: list[str], weights: list[float], name: str | None) -> None:
    """Add trained adapters in any ratio, without training: the exact sum of what they changed, as a run of its own."""
    from toolkit.comparison.blend import blend

    blend(runs, weights, name=name, console=console())


@verb(
    "replay",
    *RECIPE,
    arg("--prompts", metavar="FILE", help="rows to answer; default: the recipe's own that it does not train on"),
    arg("--count", type=whole, default=100, help="rows to keep, half of them in each mode"),
)
def write_replay(recipe: str | None, overrides: list[str], **options: Any) -> None:
    """Write the base model's own verified answers as a source that keeps what training would make it forget."""
    from data_recipes import replay

    replay.replay(_recipe(recipe, overrides), console=console(), **options)


@verb(
    "export",
    *RUN,
    arg("--to", nargs="+", choices=("merged", "gguf"), default=["merged", "gguf"]),
    arg("--quant", nargs="+", metavar="Q", help="f16 bf16 q8_0 q4_k_m …; default: the recipe's"),
    arg("--onto", choices=("16bit", "4bit"), default="16bit", help="the base that is merged into"),
    SCALE,
)
def export_run(run: Path, to: list[str], quant: list[str] | None, **options: Any) -> None:
    """Write merged weights and GGUF files and prove that they are the run: certificate.json."""
    from toolkit import export, recipe
    from toolkit.training import model

    if quant and "gguf" not in to:
        raise ToolkitError("--quant is for GGUF files, which --to leaves out: add gguf to --to, or leave out --quant")
    folder = model.run_folder(run)
    # a folder of export_model has none
    has_recipe = (folder / "recipe.yaml").is_file()
    section = recipe.of_run(folder).export if has_recipe else recipe.Export()
    quants = quant or section.quantization_method
    export.export(folder, quants if "gguf" in to else (), console=console(), **options)


@verb("verify", *RUN, JSON)
def verify_export(run: Path) -> Outcome:
    """Check an export against its run again; exit 1 when a gate fails."""
    from toolkit.export import certificate
    from toolkit.training import model

    checked = certificate.verify(model.run_folder(run), console=console())
    failed = "; ".join(certificate.failures(checked))
    verdict = f"FAILED: {failed}" if failed else f"verified: {len(checked['checks'])} checks passed"
    console().print(f"{verdict}\nevery check: {model.run_folder(run) / 'certificate.md'}", markup=False)
    return Outcome(checked, 1 if failed else 0)


@verb(
    "chat",
    *RUN,
    *WEIGHTS,
    arg("--no-think", action="store_true", help="begin in non-thinking mode"),
    arg("--max-new-tokens", dest="max_tokens", type=whole, default=2048, metavar="N", help="of a reply; default 2048"),
    SCALE,
    *SERVER,
)
def chat_with_run(
    run: Path, no_think: bool, url: str | None, source: str, quant: str | None, context: int, **options: Any
) -> None:
    """Talk to a run in the terminal, in every mode it has, and to its base."""
    from toolkit.serving.chat import chat

    # a server has chosen its weights and context already
    engine: dict[str, Any] = {} if url else {"source": source, "quant": quant, "context": context}
    chat(run, mode="non_thinking" if no_think else None, url=url, **engine, **options)


@verb(
    "serve",
    arg("runs", nargs="+", metavar="run", help="folders or names; several: runs of one base"),
    *WEIGHTS,
    SCALE,
    arg("--host", default="127.0.0.1", help="another needs an API key"),
    arg("--port", type=int, default=8000),
    arg("--api-key", dest="key", help="what requests must bring; made when --host is not this machine"),
    REMOTE,
)
def serve_runs(runs: list[str], **options: Any) -> None:
    """OpenAI-compatible API and a chat page on 127.0.0.1; run and base from one copy of the weights."""
    from toolkit.serving import serve

    serve(runs, say=console().print, **options)


@verb(
    "generate",
    *RUN,
    arg("prompts", type=Path, help=".txt (one a line), .jsonl, .json, .csv or .parquet"),
    arg("replies", type=Path, help="a .jsonl, new or to be continued"),
    arg("--mode", choices=("both", "thinking", "non_thinking"), default="both"),
    arg("--max-new-tokens", type=whole, default=1024, metavar="N"),
    arg("--seed", type=functools.partial(whole, least=0), default=3407),
    SCALE,
    *SERVER,
)
def answer_prompts(run: Path, prompts: Path, replies: Path, **options: Any) -> None:
    """Answer a file of prompts in one mode or both; the same command resumes it."""
    from toolkit.files import read_jsonl
    from toolkit.serving.batch import answer_file

    rejected = answer_file(run, prompts, replies, **options, console=console())
    # three show what is wrong; the count is in the line below
    for reason in rejected[:3]:
        console().print(f"left out: {reason}", style="yellow", markup=False)
    lines = read_jsonl(replies) if replies.is_file() else []
    cut = sum(not line["finished"] for line in lines)
    console().print(f"{replies}: {len(lines)} replies, {cut} cut short; {len(rejected)} left out", markup=False)


@verb("report", arg("run", help="a run's or a sweep's folder, or its name under outputs/"), REMOTE)
def write_report(run: str) -> None:
    """Write the page of a run or a sweep, report.html, again and open it in the browser."""
    import webbrowser

    from toolkit.comparison import sweep
    from toolkit.training import model
    from toolkit.view import page

    folder = _folder(run)
    is_sweep = (folder / "sweep.json").is_file()
    file = sweep.rebuild(folder) if is_sweep else page.write(model.run_folder(folder))
    console().print(f"{file}", markup=False)
    if sys.stdout.isatty():  # not where a script asked for it
        webbrowser.open(file.resolve().as_uri())


@verb("list", JSON)
def list_runs_and_recipes() -> Outcome:
    """The runs and sweeps in the outputs folder with their state, and the recipes that ship."""

    from toolkit.view import listing

    there = listing.contents()
    say("\n".join(listing.lines(there)))
    return Outcome(there)


if __name__ == "__main__":
    raise SystemExit(main())
