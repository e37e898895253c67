"""A run's checkpoints: which are whole, which one training resumes from, which one becomes the adapter.

checkpoint = last_checkpoint(Path("outputs/pocket"), print)
"""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from toolkit.files import Say, ToolkitError, read_if_whole, read_json
from toolkit.recipe import Evaluate
from toolkit.records import MetricLine
from toolkit.training.model import damaged

CHECKSUMS = "checksums.json"
# Key of metrics.jsonl: how far the model is from its base, in nats per token.
KL = "eval_forgetting_kl"
# What `evaluate.keep_best_by` says → key of metrics.jsonl.
VALUES = {"loss": "eval_loss", "kl": KL, "accuracy": "eval_token_accuracy"}


def all_checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted((folder / "checkpoints").glob("checkpoint-*"), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def fault(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used: a file is not as its checksums.json, written last, says, or torch refuses to load it;
    None where it can."""
    import torch
    from transformers.trainer_pt_utils import safe_globals

    checksums = read_if_whole(checkpoint / CHECKSUMS)
    if not checksums or damaged(checkpoint, checksums):
        return "is incomplete or damaged"
    # optimizer, scheduler, gradient scaler and random states
    for file in sorted(checkpoint.glob("*.pt*")):
        try:
            # as transformers loads them: a pickle that would run code is refused
            with safe_globals():
                torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a pickle raises what it likes
            return f"cannot be loaded ({file.name}: {type(error).__name__})"
    return None


def last_checkpoint(folder: Path, say: Say) -> Path | None:
    """The newest checkpoint that can be used; one that cannot is removed, and said so."""
    for checkpoint in reversed(all_checkpoints(folder)):
        reason = fault(checkpoint)
        if reason is None:
            say(f"resuming from {checkpoint.relative_to(folder)}")
            return checkpoint
        say(f"{checkpoint.relative_to(folder)} {reason} and is removed")
        shutil.rmtree(checkpoint)
    return None


def ended(checkpoint: Path) -> bool:
    """Whether training ended at this checkpoint: at the last step, or stopped early."""
    state = read_json(checkpoint / "trainer_state.json")
    stopped = state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]
    return stopped or state["global_step"] >= state["max_steps"]


def rank(line: MetricLine, section: Evaluate) -> tuple[bool, float]:
    """How good a line of metrics.jsonl with a validation is by a recipe's `evaluate:`; the lowest is the best.

    Within the limit of forgetting by `keep_best_by`; beyond it the one that forgot least."""
    distance = line.get(KL, 0.0)
    if distance > (section.forgetting_limit or math.inf):
        return True, distance
    value = line.get(VALUES[section.keep_best_by], math.inf)
    return False, -value if section.keep_best_by == "accuracy" else value


def evaluations(history: Sequence[MetricLine]) -> list[MetricLine]:
    """The lines of a trainer's log history that end an evaluation of all validation rows."""
    return [line for line in history if "eval_loss" in line]


def best_step(history: Sequence[MetricLine], section: Evaluate) -> int | None:
    """The step that a run keeps; None without any evaluation."""
    lines = evaluations(history)
    return min(lines, key=lambda line: rank(line, section))["step"] if lines else None


def best_checkpoint(folder: Path, history: Sequence[MetricLine], section: Evaluate, say: Say) -> Path:
    """Of the whole checkpoints, the one to keep; without any evaluation, the newest."""
    ranks = {line["step"]: rank(line, section) for line in evaluations(history)}
    newest_first = all_checkpoints(folder)[::-1]
    for checkpoint in sorted(newest_first, key=lambda path: ranks.get(step_of(path), (True, math.inf))):
        if fault(checkpoint) is None:
            is_beyond, distance = ranks.get(step_of(checkpoint), (False, 0.0))
            if is_beyond:
                say(
                    f"· warning: step {step_of(checkpoint)} is kept, the nearest to the base, with a KL of {distance:.2f}: no "
                    f"evaluation is within evaluate.forgetting_limit={section.forgetting_limit:g}. Evaluate earlier "
                    "(train.eval_steps=0.05), or lower train.learning_rate"
                )
            return checkpoint
        say(f"{checkpoint.relative_to(folder)} is damaged: the next best checkpoint is used")
    raise ToolkitError(f"{folder}: no whole checkpoint left: train again with --fresh")
