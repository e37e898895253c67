"""The command line: each verb is a function with its arguments beside it.

python -m toolkit --help     (then `python -m toolkit train hybrid train.max_steps=10`)
"""

import argparse
import functools
import itertools
import os
import re
import shlex
import signal
import sys
import time
import traceback
from pathlib import Path

from toolkit.files import ToolkitError, did_you_mean, outputs, safe_output

VERBS: dict[str, tuple] = {}
"""Verb → (function, its `arg`s), in the order in which `--help` lists them."""
OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP: handled like Ctrl-C, so that every `finally` runs. `args[0]` is the signal's number."""


def arg(*flags: str, **options) -> tuple[tuple[str, ...], dict]:
    """One argument of a verb: what argparse's `add_argument` takes."""
    return flags, options


def verb(*arguments):
    """Make a function a verb: its name on the command line, its docstring as help, `arguments` as its options."""

    def register(function):
        VERBS[function.__name__] = function, arguments
        return function

    return register


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit code: 0, 1 (a check failed or a bug), 2 (an error with its fix), 128 + signal."""
    safe_output()
    words = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    args = argparse.Namespace()  # filled as far as parsing comes
    try:
        _catch_signals()
        # argparse's own message would list the verbs, but not the nearest one
        if words[0] not in VERBS and not words[0].startswith("-"):
            raise ToolkitError(f"{words[0]}: no such verb{did_you_mean(words[0], VERBS)}")
        words, overrides = take_overrides(words)
        options = vars(parser().parse_args(words, args))
        if "overrides" in options:
            options["overrides"] += overrides
        verb = options.pop("verb")
        if verb not in ("setup", "doctor"):
            from toolkit.machine import doctor

            # before torch is imported, which numbers the cards once
            doctor.use_largest_card(print)
        return VERBS[verb][0](**options) or 0
    except KeyboardInterrupt as stop:
        print("interrupted: finished steps are kept; run the same command again to resume", file=sys.stderr)
        return 128 + (stop.args[0] if isinstance(stop, Stopped) else signal.SIGINT)
    except BrokenPipeError:  # the reader of a pipe left (`… | head`); Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ToolkitError as error:
        if os.environ.get("TOOLKIT_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # the last resort: whatever a library raises becomes a line that helps, and a log
        if os.environ.get("TOOLKIT_DEBUG"):
            raise
        reason = (str(error).strip() or "no message").splitlines()[0]
        print(f"error: {type(error).__name__}: {reason}\nThis is a bug, or a library that failed: "
              f"{_traceback_of(error, str(getattr(args, 'run', '')))}. Run the same command again to resume.",
              file=sys.stderr)  # fmt: skip
        return 1


def parser() -> argparse.ArgumentParser:
    """The command line; building it imports nothing heavy."""
    top = argparse.ArgumentParser(
        prog="python -m toolkit", description="Fine-tune a chat model on one GPU, and know what it did to the model."
    )
    verbs = top.add_subparsers(dest="verb", metavar="VERB")
    for name, (function, arguments) in VERBS.items():
        sub = verbs.add_parser(name, help=function.__doc__.splitlines()[0], description=function.__doc__)
        for flags, options in arguments:
            sub.add_argument(*flags, **options)
    return top


def take_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """(other words, overrides): takes `key=value` words out, so that no option with several values swallows them.

    A word after an option with exactly one value is that value (`--prompts a=b.jsonl`).
    """
    known = {flags[0]: options for flags, options in VERBS[words[0]][1]} if words[0] in VERBS else {}
    if "overrides" not in known:
        return words, []
    takes_one = {
        flag for flag, options in known.items() if flag.startswith("-") and not {"nargs", "action"} & options.keys()
    }
    kept, overrides = words[:1], []
    for before, word in itertools.pairwise(words):
        (overrides if OVERRIDE.match(word) and before not in takes_one else kept).append(word)
    return kept, overrides


def _catch_signals() -> None:
    """SIGTERM and SIGHUP raise Stopped from now on; one that is ignored (nohup) stays ignored."""

    def stop(number, _frame):
        raise Stopped(number)

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, stop)


def _traceback_of(error: Exception, run: str) -> str:
    """Say where an error's traceback is: in the log that `run.train` wrote, else it is added to the run's here."""
    for note in getattr(error, "__notes__", ()):
        if note.startswith("log: "):
            return f"the traceback is in {note.removeprefix('log: ')}"
    log = outputs() / run / "run.log" if (outputs() / run / "recipe.yaml").is_file() else outputs() / "toolkit.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as file:
            print(time.strftime("%Y-%m-%d %H:%M:%S"), *sys.argv, file=file)
            traceback.print_exception(error, file=file)
    except OSError:  # the disk may be what failed
        return "set TOOLKIT_DEBUG=1 to see the traceback"
    return f"the traceback is in {log}"


def console():
    from toolkit.run import default_console

    return default_console()


def _recipe(path: str | None, overrides: list[str]):
    """The recipe of a `[RECIPE] [key=value …]` command line; prints which one, and why, when none was named."""
    from toolkit import recipe

    if path is None:
        from toolkit.machine.doctor import default_recipe

        path, why = default_recipe()
        console().print(f"{path} ({why})")
    return recipe.load(path, overrides)


def _folder(run: str) -> Path:
    """A run's folder by its path, else by its name under outputs/, finished or not. Raises ToolkitError."""
    from toolkit.training import model

    found = Path(run) if Path(run).is_dir() else outputs() / run
    return found if found.is_dir() else model.run_folder(run)  # which says that there is none


def whole(text: str, least: int = 1) -> int:
    """An argument's type: a whole number that is not below `least`. Raises what argparse shows as the option's error."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number >= {least}, found {text!r}")
    return int(text)


RECIPE = (
    arg("recipe", nargs="?", help="a YAML file or a name in data_recipes/; default: hybrid on a GPU, else pocket"),
    arg("overrides", nargs="*", metavar="key=value", help="e.g. train.max_steps=10 data.reasoning=0.5"),
)
DETAILS = arg("--details", action="store_true", help="show every metric")
FRESH = arg("--fresh", action="store_true", help="start anew: an old run is moved aside, a mix compiled again")
RUN = arg("run", type=Path, help="a run's folder, or its name under outputs/")
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


@verb()
def setup():
    """Install requirements.txt into this Python."""
    from toolkit.machine import install

    install.setup()
    from toolkit.machine import doctor

    doctor.show([*doctor.compiler(), *doctor.gpu(doctor.look())], console())


@verb(
    arg("--gpu", action="store_true", help="try the CUDA path on random weights (three minutes, 4 GB); writes doctor.json"),
    arg("--cpu-rehearsal", action="store_true", help="the same steps on the CPU, where there is no card"),
)  # fmt: skip
def doctor(gpu, cpu_rehearsal):
    """Say what is installed, what will run, and the fix for what will not."""
    from toolkit.machine import doctor

    if gpu or cpu_rehearsal:
        from toolkit.machine import gpu_check

        doctor.use_largest_card(print)
        return gpu_check.check(console(), rehearsal=cpu_rehearsal)
    doctor.show(doctor.examine(), console())
    return 0


@verb(
    *RECIPE,
    FRESH,
    arg("--dry-run", action="store_true", help="only the plan"),
    arg("--show", type=whole, default=0, metavar="N", help="print N rows per source, supervised tokens coloured"),
)
def mix(recipe, overrides, fresh, dry_run, show):
    """Compile a recipe's mix and show it: plan, achieved shares, drops, lengths."""
    from toolkit import run
    from toolkit.data import mix, render
    from toolkit.machine import choose
    from toolkit.view import labels, tables

    out, loaded = console(), _recipe(recipe, overrides)
    if dry_run:
        out.print(tables.plan_table(mix.plan(loaded.data)))
        return
    loaded = run.resolve(loaded, out)
    # what the reader would type next, with the changes of this command
    words = ["python", "-m", "toolkit", "train", recipe or loaded.name, *overrides]
    mixed = run.compile_mix(loaded, out, fresh=fresh, next_command=shlex.join(words))
    choose.say_hours(loaded, mixed, out.print)
    if show:
        chat = render.load_chat(loaded.model.model_name, loaded.model.revision)
        out.print(labels.coloured(mixed, chat, show))
    out.print(f"mix.json and quarantine.jsonl: {mixed.folder}")


@verb(*RECIPE, FRESH, DETAILS)
def train(recipe, overrides, **options):
    """Fine-tune by a recipe; an unfinished run resumes, a finished one is left alone."""
    from toolkit import run
    from toolkit.machine import doctor

    doctor.show([*doctor.compiler()], console())  # what would fail at the first step on a GPU
    run.train(_recipe(recipe, overrides), console(), **options)


@verb(
    RUN,
    arg("--level", choices=("fast", "quick", "full"), help="default: the recipe's"),
    arg("--minutes", type=float, help="time for replies; default: a third of the training's, at least 3"),
    DETAILS,
)
def evaluate(run, **options):
    """Score a run against its own base, in every mode it has, with intervals."""
    from toolkit.run import evaluate

    evaluate(run, console(), **options)


@verb(
    arg("recipe", nargs="?", default="hybrid", help="default: hybrid"),
    RECIPE[1],
    arg("--model", help="instead of the recipe's, e.g. unsloth/Qwen3-8B-unsloth-bnb-4bit"),
    arg("--vram", type=float, default=0, metavar="GB", help="a card's size; default: the one here, else 8"),
    arg("--card", metavar="NAME", help='a card by its name, for hours too: "RTX 3060", T4 …'),
    arg("--table", action="store_true", help="every Qwen3 on cards of 6 to 24 GB"),
)
def fit(recipe, overrides, model, vram, card, table):
    """Say what a run will need in memory and hours, before it is run, and what would make it fit."""
    from toolkit.machine import choose, fit

    if table:
        fit.show_table(console())
        return
    chosen = [f"model.model_name={model}"] if model else []
    choose.show(_recipe(recipe, [*chosen, *overrides]), vram, card, console())


@verb(
    arg("recipe", nargs="?", default="data_recipes/sweep_pocket.yaml", help="default: sweep_pocket"),
    RECIPE[1],
    arg("--reasoning", "--shares", dest="shares", nargs="+", type=float, metavar="SHARE", help="default: 0 0.25 0.5 0.75 1"),
    arg("--of", default="reasoning", metavar="SOURCE", help="whose share; default: all thinking sources together"),
    arg("--seeds", type=whole, default=1, help="runs per share, seeds counted up from data.seed"),
)  # fmt: skip
def sweep(recipe, overrides, shares, **options):
    """Train every reasoning share at one budget, compare, recommend; the same command resumes it."""
    from toolkit.comparison import sweep

    sweep.sweep(recipe, overrides, shares=shares or sweep.RATIOS, console=console(), **options)


@verb(
    arg("runs", nargs="*", help="run folders or names; without any, every scored run"),
    arg("--out", type=Path, help="where table, picture and page go; default: outputs/comparison"),
)
def compare(runs, out):
    """Several runs: one table, one picture, one recommendation."""
    from toolkit.comparison import decide as compare
    from toolkit.comparison import report

    # runs without an evaluation have nothing to compare
    found = [_folder(run) for run in runs] or sorted(p.parent for p in outputs().glob("*/eval.json"))
    report.conclude(compare.compare(found), out or outputs() / "comparison", console())


@verb(arg("first", help="a run's folder, or its name under outputs/"), arg("second"))
def diff(first, second):
    """Two runs: in words, what differed between them and what it did to the scores."""
    from toolkit.comparison import decide as compare

    console().print("\n".join(compare.difference_report(_folder(first), _folder(second))), markup=False)


@verb(RUN)
def reproduce(run):
    """Train a run again from its folder alone, and say whether it is equal; exit 1 when it is not."""
    from toolkit.comparison.reproduce import reproduce

    lines = reproduce(run, console())
    console().print("\n".join(lines), markup=False)
    return 0 if lines[0].startswith("equal") else 1


@verb(
    *RECIPE,
    arg("--prompts", metavar="FILE", help="rows to answer; default: the recipe's own that it does not train on"),
    arg("--count", type=whole, default=100, help="rows to keep, half of them in each mode"),
)
def replay(recipe, overrides, **options):
    """Write the base model's own verified answers as a source that keeps what training would make it forget."""
    from data_recipes import replay

    replay.replay(_recipe(recipe, overrides), console=console(), **options)


@verb(
    RUN,
    arg("--to", nargs="+", choices=("merged", "gguf"), default=["merged", "gguf"]),
    arg("--quant", nargs="+", metavar="Q", help="f16 bf16 q8_0 q4_k_m …; default: the recipe's"),
    arg("--onto", choices=("16bit", "4bit"), default="16bit", help="the base that is merged into"),
    arg("--push", metavar="REPO", help="list what would go to the Hub, with the model card"),
    arg("--really-push", action="store_true", help="with --push: upload it"),
    arg("--details", action="store_true", help="every check of the certificate"),
)
def export(run, to, quant, push, really_push, **options):
    """Write merged weights and GGUF files and prove that they are the run: certificate.json."""
    from toolkit import export, recipe
    from toolkit.training import model

    if quant and "gguf" not in to:
        raise ToolkitError("--quant is for GGUF files, which --to leaves out: add gguf to --to, or leave out --quant")
    if really_push and not push:
        raise ToolkitError("--really-push: to which repository? Add --push REPO")
    folder, say = model.run_folder(run), functools.partial(console().print, markup=False)
    own = folder / "recipe.yaml"
    quants = quant or (recipe.load(own).export if own.is_file() else recipe.Export()).quantization_method
    export.export(folder, quants if "gguf" in to else (), say=say, **options)
    if push:
        export.push(folder, push, dry_run=not really_push, say=say)


@verb(RUN)
def verify(run):
    """Check an export against its run again; exit 1 when a gate fails."""
    from toolkit.export import certificate
    from toolkit.training import model

    found = certificate.verify(model.run_folder(run), say=console().print)
    failed = "; ".join(certificate.failures(found))
    console().print(f"FAILED: {failed}" if failed else f"verified: {len(found['checks'])} checks passed", markup=False)
    return 1 if failed else 0


@verb(
    RUN,
    *WEIGHTS,
    arg("--no-think", action="store_true", help="begin in non-thinking mode"),
    arg("--max-new-tokens", dest="max_tokens", type=whole, default=2048, metavar="N", help="of a reply; default 2048"),
    SCALE,
    *SERVER,
)
def chat(run, no_think, url, source, quant, context, **options):
    """Talk to a run in the terminal, in every mode it has, and to its base."""
    from toolkit.serving.chat import chat

    # a server has chosen its weights and context already
    engine = {} if url else {"source": source, "quant": quant, "context": context}
    chat(run, mode="non_thinking" if no_think else None, url=url, **engine, **options)


@verb(
    arg("runs", nargs="+", metavar="run", help="folders or names; several: runs of one base"),
    *WEIGHTS,
    SCALE,
    arg("--base", action="store_true", help="serve the base alone, for tools that cannot ask for it in a request"),
    arg("--check", dest="checked", action="store_true", help="first measure that run and base are served as they are"),
    arg("--host", default="127.0.0.1", help="another needs an API key"),
    arg("--port", type=int, default=8000),
    arg("--api-key", dest="key", help="what requests must bring; made when --host is not this machine"),
)
def serve(runs, **options):
    """OpenAI-compatible API and a chat page on 127.0.0.1; run and base from one copy of the weights."""
    from toolkit.serving import serve

    serve(runs, say=console().print, **options)


@verb(
    RUN,
    arg("prompts", type=Path, help=".txt (one a line), .jsonl, .json, .csv or .parquet"),
    arg("replies", type=Path, help="a .jsonl, new or to be continued"),
    arg("--mode", choices=("both", "thinking", "non_thinking"), default="both"),
    arg("--max-new-tokens", type=whole, default=1024, metavar="N"),
    arg("--seed", type=functools.partial(whole, least=0), default=3407),
    SCALE,
    *SERVER,
)
def generate(run, prompts, replies, **options):
    """Answer a file of prompts in one mode or both; the same command resumes it."""
    from rich.progress import Progress

    from toolkit.serving.batch import answer_file

    with Progress(console=console()) as bar:
        task = bar.add_task("answering", total=None)
        counts = answer_file(run, prompts, replies, **options,
                             progress=lambda done, total: bar.update(task, completed=done, total=total))  # fmt: skip
    # three show what is wrong; the count is in the line below
    for reason in counts.rejected[:3]:
        console().print(f"left out: {reason}", style="yellow", markup=False)
    console().print(f"{counts.prompts} prompts, {len(counts.rejected)} left out; {replies}: "
                    f"{counts.answered} replies, {counts.there} from before, {counts.unfinished} cut short")  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
