"""Time a cold start; on a GPU, speed and memory of three ways to train, beside the forecasts: `make bench`, `python -m tests.tools.bench`."""

import argparse
import sys

import torch

from tests.tools.bench import BRIEFLY, TOY, cards, speed, start
from toolkit.files import ToolkitError, outputs
from toolkit.run import default_console


def main() -> None:
    """Measure what the command line asks for and print its table. Raises ToolkitError where a GPU is needed and missing."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.bench", description=__doc__)
    parser.add_argument("recipe", nargs="?", help="default: pocket for a start, hybrid on a GPU")
    parser.add_argument("--measure", choices=("start", "speed", "cards"), help="default: speed on a GPU, else start")
    sizes = ["0.6B", "1.7B", "4B", "8B", "14B", "32B"]
    parser.add_argument("--sizes", nargs="+", choices=sizes, default=sizes[:-1], help="of Qwen3; random weights")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--toy", action="store_true", help="a toy model for three steps: the path, on a CPU too")
    parser.add_argument("--record", action="store_true", help="keep it in data_recipes/measured/")
    args, out = parser.parse_args(), default_console()
    what = args.measure or ("speed" if torch.cuda.is_available() else "start")
    if what == "start":
        measured = start.measure(args.recipe or "data_recipes/pocket.yaml", args.repeats)
        out.print(start.table(measured, start.recorded()))
        if args.record:
            start.keep(measured)
        return
    if not torch.cuda.is_available() and not args.toy:
        raise ToolkitError(f"--measure {what} needs a CUDA card; without one: python -m tests.tools.bench")
    module, count = (speed, args.repeats) if what == "speed" else (cards, cards.CARDS[:1] if args.toy else cards.CARDS)
    sizes, plan = ([TOY], BRIEFLY) if args.toy else (args.sizes, {})
    file = module.RECORD if args.record and not args.toy else outputs() / module.RECORD.name
    record = module.measure(args.recipe or "data_recipes/hybrid.yaml", sizes, count, file, out.print, **plan)
    out.print(module.markdown(record) + f"\n\nraw results: {file}", markup=False)


if __name__ == "__main__":
    try:
        main()
    except ToolkitError as error:
        sys.exit(f"error: {error}")
