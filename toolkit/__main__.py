"""`python -m toolkit VERB …`, one short function a verb; `python -m toolkit VERB --help` says what each takes."""

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Errors meant for people are printed without a traceback; their exit code is 2."""
    args = parser().parse_args(argv)
    if args.verb is None:
        parser().print_help()
        return 0
    if args.verb == "setup":
        from toolkit.install import setup

        return setup() or 0
    from toolkit.files import ToolkitError

    try:
        return VERBS[args.verb][0](args) or 0
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept; the same command goes on from there", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The command line; building it imports nothing but argparse."""
    top = argparse.ArgumentParser(
        prog="python -m toolkit", description="Fine-tune Qwen3 on one GPU; keep both its modes."
    )
    verbs = top.add_subparsers(dest="verb", metavar="VERB")
    for name, (function, arguments) in VERBS.items():
        verb = verbs.add_parser(name, help=function.__doc__.splitlines()[0], description=function.__doc__)
        for flags, options in arguments:
            verb.add_argument(*flags, **options)
    return top


def console():
    from toolkit.run import default_console

    return default_console()


def _recipe(args):
    """The recipe an `[RECIPE] [key=value …]` command line means, and a word about why when none was named."""
    from toolkit import recipe

    words = ([args.recipe] if args.recipe else []) + args.overrides
    path = words.pop(0) if words and "=" not in words[0] else None
    if path is None:
        from toolkit.doctor import default_recipe

        path, why = default_recipe()
        console().print(f"{path} ({why})")
    return recipe.load(path, words)


def setup(args):
    """Install requirements.txt into this Python."""


def doctor(args):  # noqa: ARG001 - every verb takes its arguments
    """Say what is installed, what will run, and the fix for what will not."""
    from toolkit.doctor import examine

    out = console()
    findings = list(examine())
    for finding in findings:
        mark = "[yellow]![/]" if finding.fix else "[green]✓[/]"
        out.print(
            f"{mark} {finding.what:<11} {finding.state}" + (f"\n              → {finding.fix}" if finding.fix else "")
        )


def mix(args):
    """Compile a recipe's mix and show it: plan, achieved shares, drops, lengths."""
    from toolkit import mix, render, run, show

    out = console()
    recipe = run.resolve(_recipe(args), out)
    out.print(show.plan_table(mix.plan(recipe.data), recipe.data.unit))
    if args.dry_run:
        return
    mixed = run.compile_mix(recipe, out, fresh=args.fresh)
    if args.show:
        for part in show.terminal(mixed, render.load_chat(recipe.model.model_name, recipe.model.revision), args.show):
            out.print(part)
    picture = mixed.folder / "mix.png"
    if args.fresh or not picture.is_file():
        show.figure(mixed).savefig(picture, dpi=120)
    out.print(f"mix.json, mix.png and quarantine.jsonl: {mixed.folder}")


def train(args):
    """Fine-tune by a recipe; an unfinished run goes on, a finished one is left alone."""
    from toolkit import run

    run.train(_recipe(args), console(), fresh=args.fresh)


def evaluate(args):
    """Score a run against its own base, in both modes, with intervals."""
    from toolkit import run

    run.evaluate(args.run, console(), level=args.level)


def fit(args):
    """Say what a run will need in memory, before it is run, and what would make it fit."""
    from toolkit import fit, recipe

    vram = fit.card(args.vram) if args.vram else _memory_here()
    if args.table:
        fit.show_table()
        return
    found = _recipe(args) if args.recipe or not args.model else recipe.load("data_recipes/hybrid.yaml")
    name = args.model or found.model.model_name
    name = fit.choose_model(vram, found) if name == "auto" else name
    longest, lengths = _lengths(found) if args.measure else (None, ())
    fit.show(fit.forecast(fit.settings(found, longest), name), vram, lengths)


def _memory_here() -> int:
    """This machine's GPU memory in bytes, or an 8 GB card's where there is none."""
    import torch

    from toolkit import fit

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    console().print("no CUDA card here: an 8 GB card is assumed (--vram)")
    return fit.card(8)


def _lengths(recipe):
    """Longest row and all row lengths of the compiled mix."""
    from toolkit import mix

    lengths = [len(row.ids) for row in mix.compile_mix(recipe).train]
    return max(lengths), lengths


def export(args):
    """Write merged weights and GGUF files and prove that they are the run: certificate.json."""
    from toolkit import export, model, recipe

    folder = model.run_folder(args.run)
    quants = args.quant or recipe.load(folder / "recipe.yaml").export.quantization_method
    gguf = "gguf" in args.to
    export.export(
        folder, args.to, quants if gguf else (), ollama=args.ollama and gguf, onto=args.onto, say=console().print
    )
    if args.push:
        export.push(folder, args.push, dry_run=not args.really_push, say=console().print)


def verify(args):
    """Check an export against its run again; exit 1 when a gate fails."""
    from toolkit import model
    from toolkit.export import certificate

    return 0 if certificate.verify(model.run_folder(args.run), say=console().print)["passed"] else 1


def compare(args):
    """Several runs: one table, one picture, one recommendation."""
    from toolkit import compare, report
    from toolkit.files import outputs

    found = args.runs or sorted(p.parent for p in outputs().glob("*/eval.json"))
    comparison = compare.compare([p if p.is_dir() else outputs() / p for p in found])
    report.conclude(comparison, args.out or outputs() / "comparison", console())


def bench(args):
    """Time a cold start; on a GPU, speed and memory of three ways to train, beside the forecasts."""
    import torch

    from toolkit.bench import cards, speed, start
    from toolkit.files import ToolkitError, outputs

    out, what = console(), args.measure or ("speed" if torch.cuda.is_available() else "start")
    if what == "start":
        measured = start.measure(args.recipe or "data_recipes/pocket.yaml", args.repeats)
        out.print(start.table(measured, start.recorded()))
        if args.record:
            start.keep(measured)
        return
    if not torch.cuda.is_available():
        raise ToolkitError(f"bench --measure {what} needs a CUDA card; without one: `python -m toolkit bench`")
    module, count = (speed, args.repeats) if what == "speed" else (cards, cards.CARDS)
    file = module.RECORD if args.record else outputs() / module.RECORD.name
    record = module.measure(args.recipe or "data_recipes/hybrid.yaml", args.sizes, count, file, out.print)
    out.print(module.markdown(record) + f"\n\nraw results: {file}", markup=False)


def chat(args):
    """Talk to a run in the terminal: both modes, adapter on or off."""
    from toolkit.serve.chat import chat

    chat(args.run, source=args.source, quant=args.quant, thinking=not args.no_think, max_tokens=args.max_new_tokens)


def serve(args):
    """OpenAI-compatible API and a chat page, on 127.0.0.1; several runs share their base."""
    from toolkit import serve

    limits = serve.Limits(args.max_new_tokens, args.timeout, args.queue)
    options = {"host": args.host, "port": args.port, "token": args.token}
    serve.serve(args.runs, source=args.source, quant=args.quant, limits=limits, say=print, **options)


def generate(args):
    """Answer a file of prompts in one mode or both; run again, it goes on where it stopped."""
    from rich.progress import Progress

    from toolkit.serve.batch import answer_file

    options = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size, "seed": args.seed}
    with Progress(console=console()) as bar:
        task = bar.add_task("answering", total=None)
        counts = answer_file(args.run, args.prompts, args.replies, args.mode, **options,
                             progress=lambda done, total: bar.update(task, completed=done, total=total))  # fmt: skip
    console().print(
        f"{counts['prompts']} prompts: {counts['answered']} replies written to {args.replies}, {counts['there']} were there, "
        f"{counts['unfinished']} cut at --max-new-tokens {args.max_new_tokens}"
    )


def sweep(args):
    """Train every reasoning share at one budget, compare, recommend; the same command goes on where it stopped."""
    from toolkit import sweep

    words = ([args.recipe] if args.recipe else []) + args.overrides
    path = words.pop(0) if words and "=" not in words[0] else "data_recipes/sweep_pocket.yaml"
    reasoning = args.reasoning if args.reasoning is not None else [] if args.set else sweep.RATIOS
    sweep.sweep(
        path, words, reasoning=reasoning, seeds=args.seeds, settings=args.set, only=args.only, console=console()
    )


def replay(args):
    """Write the base model's own verified answers as a source that keeps what training would make it forget."""
    from toolkit import replay

    replay.replay(_recipe(args), prompts=args.prompts, count=args.count, out=args.out, console=console())


def notebooks(args):
    """Execute the notebooks and write their outputs, all at once."""
    from toolkit import execute

    execute.execute(execute.notebooks(args.names), console().print)


RECIPE = [
    (("recipe",), {"nargs": "?", "help": "a YAML file; without one, hybrid on a GPU with a Hub, else pocket"}),
    (("overrides",), {"nargs": "*", "metavar": "key=value", "help": "e.g. train.max_steps=10 data.reasoning=0.5"}),
    (("--fresh",), {"action": "store_true", "help": "compile or train anew; an old run is moved aside"}),
]
RUN = [(("run",), {"type": Path, "help": "a run's folder, or its name under outputs/"})]
WEIGHTS = [
    (("--quant",), {"help": "which GGUF; default: the first there of q8_0, f16, bf16, q6_k, q5_k_m, q4_k_m"}),
    (("--max-new-tokens",), {"type": int, "default": 2048, "metavar": "N", "help": "of one reply; default 2048"}),
]
SOURCES = {"dest": "source", "choices": ("adapter", "merged", "gguf")}
VERBS = {
    "setup": (setup, []),
    "doctor": (doctor, []),
    "mix": (
        mix,
        [
            *RECIPE,
            (("--dry-run",), {"action": "store_true", "help": "only the plan"}),
            (
                ("--show",),
                {
                    "type": int,
                    "default": 0,
                    "metavar": "N",
                    "help": "print N rows per source, supervised tokens coloured",
                },
            ),
        ],
    ),
    "train": (train, RECIPE),
    "fit": (
        fit,
        [
            *RECIPE[:2],
            (
                ("--model",),
                {"help": "forecast this model instead of the recipe's, e.g. unsloth/Qwen3-8B-unsloth-bnb-4bit"},
            ),
            (("--vram",), {"type": float, "metavar": "GB", "help": "the card, e.g. 8; default: the one here"}),
            (("--measure",), {"action": "store_true", "help": "compile the mix and take its longest row"}),
            (("--table",), {"action": "store_true", "help": "every Qwen3 on cards of 6 to 24 GB"}),
        ],
    ),
    "compare": (
        compare,
        [
            (("runs",), {"nargs": "*", "type": Path, "help": "run folders or names; without any, every scored run"}),
            (("--out",), {"type": Path, "help": "where table, picture and page go; default: outputs/comparison"}),
        ],
    ),
    "export": (
        export,
        [
            *RUN,
            (("--to",), {"nargs": "+", "choices": ("merged", "gguf"), "default": ["merged", "gguf"]}),
            (("--quant",), {"nargs": "+", "metavar": "Q", "help": "f16 bf16 q8_0 q4_k_m …; default: the recipe's"}),
            (("--onto",), {"choices": ("16bit", "4bit"), "default": "16bit", "help": "the base that is merged into"}),
            (("--no-ollama",), {"dest": "ollama", "action": "store_false", "help": "write no Modelfile"}),
            (("--push",), {"metavar": "REPO", "help": "list what would go to the Hub, with the model card"}),
            (("--really-push",), {"action": "store_true", "help": "with --push: upload it"}),
        ],
    ),
    "verify": (verify, RUN),
    "chat": (
        chat,
        [
            *RUN,
            (("--from",), SOURCES | {"help": "default: the certified GGUF on a CPU, else the adapter"}),
            *WEIGHTS,
            (("--no-think",), {"action": "store_true", "help": "begin in non-thinking mode"}),
        ],
    ),
    "serve": (
        serve,
        [
            (("runs",), {"nargs": "+", "metavar": "run", "help": "folders or names; several: adapters of one base"}),
            (
                ("--from",),
                SOURCES | {"default": "adapter", "help": "default: adapter, which can also answer as the base"},
            ),
            *WEIGHTS,
            (("--host",), {"default": "127.0.0.1", "help": "another needs a token"}),
            (("--port",), {"type": int, "default": 8000}),
            (("--token",), {"help": "what requests must bring; made and printed when --host is not this machine"}),
            (
                ("--timeout",),
                {"type": float, "default": 300, "metavar": "SECONDS", "help": "of one request; default 300"},
            ),
            (
                ("--queue",),
                {"type": int, "default": 64, "metavar": "N", "help": "requests that may wait; beyond, 429; default 64"},
            ),
        ],
    ),
    "generate": (
        generate,
        [
            *RUN,
            (("prompts",), {"type": Path, "help": ".txt (one a line), .jsonl, .json, .csv or .parquet"}),
            (("replies",), {"type": Path, "help": "a .jsonl, new or to be gone on with"}),
            (("--mode",), {"choices": ("both", "thinking", "non_thinking"), "default": "both"}),
            (("--max-new-tokens",), {"type": int, "default": 1024, "metavar": "N"}),
            (("--batch-size",), {"type": int, "default": 16, "metavar": "N"}),
            (("--seed",), {"type": int, "default": 3407}),
        ],
    ),
    "sweep": (
        sweep,
        [
            *RECIPE[:2],
            (
                ("--reasoning",),
                {
                    "nargs": "*",
                    "type": float,
                    "metavar": "SHARE",
                    "help": "default: 0 0.25 0.5 0.75 1; with --set alone, the recipe's own",
                },
            ),
            (("--seeds",), {"type": int, "default": 1, "help": "runs per setting, seeds counted up from data.seed"}),
            (
                ("--set",),
                {
                    "nargs": "+",
                    "default": [],
                    "metavar": "key=a,b",
                    "help": "any other key, e.g. train.learning_rate=1e-4,2e-4",
                },
            ),
            (
                ("--only",),
                {
                    "nargs": "+",
                    "default": [],
                    "metavar": "key=value",
                    "help": "just the run with these values (wandb's agents)",
                },
            ),
        ],
    ),
    "replay": (
        replay,
        [
            *RECIPE[:2],
            (
                ("--prompts",),
                {"metavar": "FILE", "help": "rows to answer; default: the recipe's own that it does not train on"},
            ),
            (("--count",), {"type": int, "default": 100, "help": "rows to keep, half of them in each mode"}),
            (("--out",), {"metavar": "FILE", "help": "default: outputs/<name>-replay.jsonl"}),
        ],
    ),
    "notebooks": (notebooks, [(("names",), {"nargs": "*", "metavar": "NAME", "help": "e.g. 00 03; without one, all"})]),
    "bench": (
        bench,
        [
            (("recipe",), {"nargs": "?", "help": "default: pocket for a start, hybrid on a GPU"}),
            (
                ("--measure",),
                {
                    "choices": ("start", "speed", "cards"),
                    "help": "a cold start, speed beside other ways, or forecasts under capped memory; default: by machine",
                },
            ),
            (
                ("--sizes",),
                {
                    "nargs": "+",
                    "choices": ("0.6B", "1.7B", "4B", "8B", "14B", "32B"),
                    "default": ["0.6B", "1.7B", "4B", "8B", "14B"],
                    "help": "of Qwen3, for speed and cards; random weights, no download",
                },
            ),
            (("--repeats",), {"type": int, "default": 3}),
            (("--record",), {"action": "store_true", "help": "keep it in data_recipes/measured/"}),
        ],
    ),
    "evaluate": (evaluate, [*RUN, (("--level",), {"choices": ("quick", "full"), "help": "default: the recipe's"})]),
}

if __name__ == "__main__":
    raise SystemExit(main())
