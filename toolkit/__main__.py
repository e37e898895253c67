"""The command line: each verb is a function with its arguments beside it.

python -m toolkit --help     (then `python -m toolkit train hybrid train.max_steps=10`)
"""

import argparse
import functools
import itertools
import os
import re
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
    args = argparse.Namespace(verb=words[0])
    debug = bool(os.environ.get("TOOLKIT_DEBUG"))
    try:
        _catch_signals()
        if words[0] not in VERBS and not words[0].startswith("-"):
            raise ToolkitError(f"{words[0]}: no such verb{did_you_mean(words[0], VERBS)}")
        words, overrides = take_overrides(words)
        parser().parse_args(words, args)
        args.overrides = [*getattr(args, "overrides", ()), *overrides]
        if args.verb not in ("setup", "doctor"):
            from toolkit import doctor

            doctor.use_largest_card(print)
        return VERBS[args.verb][0](args) or 0
    except KeyboardInterrupt as stop:
        print("interrupted: finished steps are kept; run the same command again to resume", file=sys.stderr)
        return 128 + (stop.args[0] if isinstance(stop, Stopped) else signal.SIGINT)
    except BrokenPipeError:  # the reader of a pipe left (`… | head`); Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # the last resort: whatever a library raises becomes a line that helps, and a log
        if debug:
            raise
        known = isinstance(error, ToolkitError)
        print(f"error: {error}" if known else _unexpected(error, args), file=sys.stderr)
        return 2 if known else 1


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
    overrides = [word for before, word in itertools.pairwise(words) if OVERRIDE.match(word) and before not in takes_one]
    return [word for word in words if word not in overrides], overrides


def _catch_signals() -> None:
    """SIGTERM and SIGHUP raise Stopped from now on; one that is ignored (nohup) stays ignored."""

    def stop(number, _frame):
        raise Stopped(number)

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, stop)


def _unexpected(error: Exception, args: argparse.Namespace) -> str:
    """Append the traceback to the run's log and return what to tell the reader."""
    run = outputs() / str(getattr(args, "name", None) or getattr(args, "run", ""))
    log = run / "run.log" if (run / "recipe.yaml").is_file() else outputs() / "toolkit.log"
    written = [Path(note[5:]) for note in vars(error).get("__notes__", []) if note.startswith("log: ")]
    try:
        log = written[0] if written else log  # `run.train` writes its run's log itself
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as file:
            print(time.strftime("%Y-%m-%d %H:%M:%S"), *sys.argv, file=file)
            if not written:
                traceback.print_exception(error, file=file)
        where = f"the traceback is in {log}"
    except OSError:  # the disk may be what failed
        where = "set TOOLKIT_DEBUG=1 to see the traceback"
    return (
        f"error: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}\n"
        f"This is a bug, or a library that failed: {where}. Run the same command again to resume."
    )


def console():
    from toolkit.run import default_console

    return default_console()


def _recipe(args):
    """The recipe of a `[RECIPE] [key=value …]` command line; prints which one, and why, when none was named."""
    from toolkit import recipe

    path = args.recipe
    if path is None:
        from toolkit.run import default_recipe

        path, why = default_recipe()
        console().print(f"{path} ({why})")
    loaded = recipe.load(path, args.overrides)
    args.name = loaded.name
    return loaded


def _folder(run: str) -> Path:
    """A run's folder by its path, else by its name under outputs/."""
    return Path(run) if Path(run).is_dir() else outputs() / run


RECIPE = (
    arg("recipe", nargs="?", help="a YAML file or a name in data_recipes/; default: hybrid on a GPU, else pocket"),
    arg("overrides", nargs="*", metavar="key=value", help="e.g. train.max_steps=10 data.reasoning=0.5"),
)
DETAILS = arg("--details", action="store_true", help="show every metric")
FRESH = arg("--fresh", action="store_true", help="start anew; an old run is moved aside")
RUN = arg("run", type=Path, help="a run's folder, or its name under outputs/")
WEIGHTS = (
    arg("--from", dest="source", choices=("adapter", "merged-gguf"), default="adapter",
        help="default: the adapter beside its base; merged-gguf is the file that `export` wrote"),
    arg("--quant", help="of the base, default q8_0; with merged-gguf which file, default the most exact small one"),
    arg("--context", type=int, default=8192, metavar="N", help="tokens of prompt and reply together; default 8192"),
)  # fmt: skip


@verb()
def setup(args):  # noqa: ARG001 - every verb takes its arguments
    """Install requirements.txt into this Python."""
    from toolkit import install

    install.setup()
    from toolkit import doctor

    doctor.show([*doctor.compiler(), *doctor.gpu(doctor.look())], console())


@verb(
    arg("--gpu", action="store_true", help="try the CUDA path on random weights (three minutes, 4 GB); writes doctor.json"),
    arg("--cpu-rehearsal", action="store_true", help="the same steps on the CPU, where there is no card"),
)  # fmt: skip
def doctor(args):
    """Say what is installed, what will run, and the fix for what will not."""
    from toolkit import doctor

    if args.gpu or args.cpu_rehearsal:
        from toolkit import gpu_check

        doctor.use_largest_card(print)
        return gpu_check.check(console(), rehearsal=args.cpu_rehearsal)
    doctor.show(doctor.examine(), console())
    return 0


@verb(
    *RECIPE,
    FRESH,
    arg("--dry-run", action="store_true", help="only the plan"),
    arg("--show", type=int, default=0, metavar="N", help="print N rows per source, supervised tokens coloured"),
)
def mix(args):
    """Compile a recipe's mix and show it: plan, achieved shares, drops, lengths."""
    from toolkit import files, mix, render, run, show

    out = console()
    recipe = run.resolve(_recipe(args), out)
    if args.dry_run:
        out.print(show.plan_table(mix.plan(recipe.data)))
        return
    words = ["python -m toolkit train", args.recipe or recipe.name, *args.overrides]
    mixed = run.compile_mix(recipe, out, fresh=args.fresh, next_command=" ".join(words))
    if args.show:
        chat = render.load_chat(recipe.model.model_name, recipe.model.revision)
        out.print(*show.terminal(mixed, chat, args.show), sep="\n")
    with files.lock(mixed.folder, "mix", wait=True), files.complete(mixed.folder / "mix.png") as partial:
        show.mix_figure(mixed).savefig(partial, dpi=120, format="png")
    out.print(f"mix.json, mix.png and quarantine.jsonl: {mixed.folder}")


@verb(*RECIPE, FRESH, DETAILS)
def train(args):
    """Fine-tune by a recipe; an unfinished run resumes, a finished one is left alone."""
    from toolkit import doctor, run

    doctor.show([*doctor.compiler()], console())  # what would fail at the first step on a GPU
    run.train(_recipe(args), console(), fresh=args.fresh, details=args.details)


@verb(RUN, arg("--level", choices=("quick", "full"), help="default: the recipe's"), DETAILS)
def evaluate(args):
    """Score a run against its own base, in every mode it has, with intervals."""
    from toolkit import run

    run.evaluate(args.run, console(), level=args.level, details=args.details)


@verb(
    arg("recipe", nargs="?", default="hybrid", help="default: hybrid"),
    RECIPE[1],
    arg("--model", help="instead of the recipe's, e.g. unsloth/Qwen3-8B-unsloth-bnb-4bit"),
    arg("--vram", type=float, default=0, metavar="GB", help="a card's size; default: the one here, else 8"),
    arg("--table", action="store_true", help="every Qwen3 on cards of 6 to 24 GB"),
)
def fit(args):
    """Say what a run will need in memory, before it is run, and what would make it fit."""
    from toolkit import fit, notebook

    if args.table:
        fit.show_table(console())
        return
    vram = notebook.vram(args.vram)
    fit.show(fit.forecast(_recipe(args), args.model, vram=vram), vram, console())


@verb(
    arg("recipe", nargs="?", default="data_recipes/sweep_pocket.yaml", help="default: sweep_pocket"),
    RECIPE[1],
    arg("--reasoning", "--shares", dest="shares", nargs="+", type=float, metavar="SHARE", help="default: 0 0.25 0.5 0.75 1"),
    arg("--of", default="reasoning", metavar="SOURCE", help="whose share; default: all thinking sources together"),
    arg("--seeds", type=int, default=1, help="runs per share, seeds counted up from data.seed"),
)  # fmt: skip
def sweep(args):
    """Train every reasoning share at one budget, compare, recommend; the same command resumes it."""
    from toolkit import sweep

    shares = args.shares or sweep.RATIOS
    sweep.sweep(args.recipe, args.overrides, shares=shares, of=args.of, seeds=args.seeds, console=console())


@verb(
    arg("runs", nargs="*", type=_folder, help="run folders or names; without any, every scored run"),
    arg("--out", type=Path, help="where table, picture and page go; default: outputs/comparison"),
)
def compare(args):
    """Several runs: one table, one picture, one recommendation."""
    from toolkit import compare, report

    found = args.runs or sorted(p.parent for p in outputs().glob("*/eval.json"))
    report.conclude(compare.compare(found), args.out or outputs() / "comparison", console())


@verb(arg("first", type=_folder, help="a run's folder, or its name under outputs/"), arg("second", type=_folder))
def diff(args):
    """Two runs: in words, what differed between them and what it did to the scores."""
    from toolkit import compare

    console().print("\n".join(compare.difference_report(args.first, args.second)), markup=False)


@verb(RUN)
def reproduce(args):
    """Train a run again from its folder alone, and say whether it is equal; exit 1 when it is not."""
    from toolkit.reproduce import reproduce

    lines = reproduce(args.run, console())
    console().print("\n".join(lines), markup=False)
    return 0 if lines[0].startswith("equal") else 1


@verb(
    *RECIPE,
    arg("--prompts", metavar="FILE", help="rows to answer; default: the recipe's own that it does not train on"),
    arg("--count", type=int, default=100, help="rows to keep, half of them in each mode"),
)
def replay(args):
    """Write the base model's own verified answers as a source that keeps what training would make it forget."""
    from toolkit import replay

    replay.replay(_recipe(args), prompts=args.prompts, count=args.count, console=console())


@verb(
    RUN,
    arg("--to", nargs="+", choices=("merged", "gguf"), default=["merged", "gguf"]),
    arg("--quant", nargs="+", metavar="Q", help="f16 bf16 q8_0 q4_k_m …; default: the recipe's"),
    arg("--onto", choices=("16bit", "4bit"), default="16bit", help="the base that is merged into"),
    arg("--push", metavar="REPO", help="list what would go to the Hub, with the model card"),
    arg("--really-push", action="store_true", help="with --push: upload it"),
    arg("--details", action="store_true", help="every check of the certificate"),
)
def export(args):
    """Write merged weights and GGUF files and prove that they are the run: certificate.json."""
    from toolkit import export, model, recipe

    folder = model.run_folder(args.run)
    quants = args.quant or recipe.load(folder / "recipe.yaml").export.quantization_method
    say = functools.partial(console().print, markup=False)
    export.export(folder, quants if "gguf" in args.to else (), args.onto, say=say, details=args.details)
    if args.push:
        export.push(folder, args.push, dry_run=not args.really_push, say=say)


@verb(RUN)
def verify(args):
    """Check an export against its run again; exit 1 when a gate fails."""
    from toolkit import model
    from toolkit.export import certificate

    return 0 if certificate.verify(model.run_folder(args.run), say=console().print)["passed"] else 1


@verb(
    RUN,
    *WEIGHTS,
    arg("--no-think", action="store_true", help="begin in non-thinking mode"),
    arg("--max-new-tokens", type=int, default=2048, metavar="N", help="of one reply; default 2048"),
    arg("--url", help="a server that `serve` started; default: an engine in this process"),
    arg("--api-key", dest="key", help="of that server"),
)
def chat(args):
    """Talk to a run in the terminal, in every mode it has, and to its base."""
    from toolkit.serve.chat import chat

    mode = "non_thinking" if args.no_think else None
    options = {} if args.url else {name: getattr(args, name) for name in ("source", "quant", "context")}
    chat(args.run, mode=mode, max_tokens=args.max_new_tokens, url=args.url, key=args.key, **options)


@verb(
    arg("runs", nargs="+", metavar="run", help="folders or names; several: runs of one base"),
    *WEIGHTS,
    arg("--base", action="store_true", help="serve the base alone, for tools that cannot ask for it in a request"),
    arg("--check", dest="checked", action="store_true", help="first measure that run and base are served as they are"),
    arg("--engine", choices=("llama.cpp", "vllm"), default="llama.cpp", help="vllm: for GPUs; prints its command"),
    arg("--host", default="127.0.0.1", help="another needs an API key"),
    arg("--port", type=int, default=8000),
    arg("--api-key", dest="key", help="what requests must bring; made when --host is not this machine"),
)
def serve(args):
    """OpenAI-compatible API and a chat page on 127.0.0.1; run and base from one copy of the weights."""
    from toolkit.serve import serve

    names = ("engine", "source", "quant", "context", "base", "host", "port", "key", "checked")
    serve(args.runs, say=console().print, **{name: getattr(args, name) for name in names})


@verb(
    RUN,
    arg("prompts", type=Path, help=".txt (one a line), .jsonl, .json, .csv or .parquet"),
    arg("replies", type=Path, help="a .jsonl, new or to be continued"),
    arg("--mode", choices=("both", "thinking", "non_thinking"), default="both"),
    arg("--max-new-tokens", type=int, default=1024, metavar="N"),
    arg("--batch-size", type=int, default=16, metavar="N"),
    arg("--seed", type=int, default=3407),
)
def generate(args):
    """Answer a file of prompts in one mode or both; the same command resumes it."""
    from rich.progress import Progress

    from toolkit.serve.batch import answer_file

    options = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size, "seed": args.seed}
    with Progress(console=console()) as bar:
        task = bar.add_task("answering", total=None)
        counts = answer_file(args.run, args.prompts, args.replies, args.mode, **options,
                             progress=lambda done, total: bar.update(task, completed=done, total=total))  # fmt: skip
    for reason in counts["rejected"][:3]:
        console().print(f"left out: {reason}", style="yellow", markup=False)
    console().print(f"{counts['prompts']} prompts, {len(counts['rejected'])} rows left out; {args.replies}: "
                    f"{counts['answered']} replies, {counts['there']} from before, {counts['unfinished']} cut short")  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
