"""A run beside the one that it continued (`model.adapter`), on the same held-out rows and probes; no reply is generated.

add_earlier(result, (model, tokenizer), Path("outputs/second"), validation, Console())
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from toolkit.evaluation.fast import fast_evidence
from toolkit.evaluation.questions import select
from toolkit.evaluation.score import Mark
from toolkit.evaluation.subject import LoadedRun
from toolkit.evaluation.table import summarize
from toolkit.evaluation.words import SHOWN, own_row_findings
from toolkit.files import outputs, read_json, sha256
from toolkit.recipe import adapter_folder
from toolkit.records import Earlier, Evaluation, HeldOutRow
from toolkit.training.base import ADAPTER_WEIGHTS
from toolkit.training.parent import load_weights
from toolkit.view.progress import Progress


def add_earlier(
    result: Evaluation, loaded: tuple[Any, Any], folder: Path, validation: Sequence[HeldOutRow], console: Console
) -> None:
    """Add `earlier` to the evaluation of a run that continued another, and lines about it to the verdict.

    The earlier adapter is read where it lies; where it is gone or changed, that is said and nothing is added."""
    manifest = read_json(folder / "manifest.json")
    parent = manifest.get("adapter_of")
    if not parent:
        return
    run = parent["run"]
    there = adapter_folder(run)
    if not there or sha256(there / ADAPTER_WEIGHTS) != parent["sha256"]:
        console.print(f"· {run}, which this run continued, is gone or changed: scored beside the base alone")
        return
    subject = LoadedRun(*loaded, cache=outputs() / ".base_replies", seed=result["seed"])
    eval_set = select("fast", manifest.get("steps"), validation=validation)
    marks: list[Mark] = []
    with Progress(console, f"beside {run}", 2 * len(subject.modes) * len(eval_set.probes)) as progress:
        # the earlier run stands where the base does in an evaluation; this one comes last, and stays loaded
        for adapter, place in ((there, "base"), (folder / "adapter", "tuned")):
            load_weights(subject.model, adapter)
            found = fast_evidence(subject, eval_set, progress)
            marks += [mark._replace(model=place) for mark in found if mark.model == "tuned"]
    scores = summarize(marks, subject.seed)
    result["earlier"] = {"run": run, "earlier": scores["base"], "difference": scores["difference"]}
    # the last line is the conclusion
    result["verdict"][-1:-1] = earlier_lines(result["earlier"])


def earlier_lines(earlier: Earlier) -> list[str]:
    """`beside ONE: your held-out replies, sums (thinking): 1.3 times likelier (certain)`, and how much farther from the base."""
    lines = [finding.line for finding in own_row_findings(cast(Evaluation, earlier))][:SHOWN]
    if kl := earlier["difference"]["forgetting"].get("kl"):
        lines.append(f"{kl['value'] or 0:+.3f} nats per token from the base")
    return [f"beside {earlier['run']}: {line}" for line in lines]
