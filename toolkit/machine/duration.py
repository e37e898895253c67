"""How long will it take? A forecast of a run's hours from the model's shape, the mix's tokens and a card's speed.

from toolkit import recipe; from toolkit.machine import duration, fit, speed
run = recipe.load("hybrid"); duration.forecast(run, fit.shape("4B"), duration.planned_work(run), speed.of_card("RTX 3060")).text()

Every number is calculated until a run was timed; the run's manifest then holds both.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.evaluation.plan import minutes_for
from toolkit.machine.fit import Shape
from toolkit.machine.speed import Speed, operations
from toolkit.recipe import Recipe
from toolkit.records import TimeComparison

# Seconds in which a host launches one layer's kernels of a micro-batch, forward and backward: 0.25 to 0.4 s for
# Qwen3-4B's 36 layers (Unsloth's own measurement, padding_choice.py). Short rows take at least this.
LAUNCH = 0.009
# Seconds of an evaluation without replies.
FAST_EVALUATION = 60
# Seconds that `model_name: auto` may plan for: one evening.
EVENING = 4 * 3600
# Median and sigma of log-normal lengths in tokens: reasoning rows of OpenMathReasoning, chat rows of FineTome.
LENGTHS = {"thinking": (2500, 0.73), "non_thinking": (250, 0.75)}
# Tokens of a row that are prompt and template.
PROMPT = 120


@dataclass(frozen=True)
class Work:
    """What a run computes."""

    tokens: float
    """That pass through the model in training, all epochs; padding counts where there is any."""
    micro_batches: float
    validation_tokens: float
    """All validations together."""
    mean_length: float = 1024.0
    """Of a row."""
    recomputes: bool = True
    """The backward pass computes every layer again (gradient checkpointing)."""


@dataclass(frozen=True)
class Duration:
    """Seconds of each part of a run."""

    training: float
    validation: float
    evaluation: float
    speed: Speed

    @property
    def total(self) -> float:
        return self.training + self.validation + self.evaluation

    def text(self) -> str:
        """One line: `training 1 h 20 min, validation 5 min, evaluation 27 min (calculated for RTX 3060)`."""
        words = ", ".join(
            f"{part} {words_of(getattr(self, part))}" for part in ("training", "validation", "evaluation")
        )
        source = "from a speed measured on" if self.speed.is_measured else "for"
        return f"{words} (calculated {source} {self.speed.name})"


def words_of(seconds: float) -> str:
    """`8 s`, `12 min`, `3 h 5 min`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


# --- formulas --------------------------------------------------------------------------------------------------------


def training_seconds(shape: Shape, work: Work, speed: Speed) -> float:
    """Seconds of all training steps: by the operations, or on a card by the launches where rows are short."""
    per_token = operations(shape, work.mean_length, work.recomputes)
    computing = work.tokens * per_token / speed.training
    if not speed.bandwidth:
        return computing
    # a host launches a card's kernels one by one
    launching = work.micro_batches * shape.num_hidden_layers * LAUNCH
    return max(computing, launching)


def evaluation_seconds(recipe: Recipe, training: float) -> float:
    """Seconds that scoring base against tuned is planned for: the number of questions follows from it."""
    section = recipe.evaluate
    if section.level == "fast" and not section.minutes:
        return FAST_EVALUATION
    return 60 * (section.minutes or minutes_for(section.level, training))


def forecast(recipe: Recipe, shape: Shape, work: Work, speed: Speed) -> Duration:
    """The three parts of a run."""
    training = training_seconds(shape, work, speed)
    validation = work.validation_tokens * operations(shape, work.mean_length, trains=False) / speed.training
    return Duration(training, validation, evaluation_seconds(recipe, training + validation), speed)


def compare(planned: Duration, training: float, validation: float) -> TimeComparison:
    """A forecast against what a run took; `error` is relative, positive where it forecast too much."""
    expected = planned.training + planned.validation
    taken = training + validation
    return {
        "forecast": round(expected, 1),
        "measured": round(taken, 1),
        "speed": planned.speed.name,
        "error": expected / taken - 1 if taken else None,
    }


# --- what a run computes ---------------------------------------------------------------------------------------------


def work_of(recipe: Recipe, lengths: Sequence[int], validation_lengths: Sequence[int], *, on_card: bool) -> Work:
    """From a compiled mix: the tokens of its rows. On a CPU rows are padded to the longest of their batch."""
    if on_card:
        return counted(recipe, len(lengths), sum(lengths), sum(validation_lengths))
    tokens = padded_tokens(lengths, recipe.train["per_device_train_batch_size"])
    held_out = padded_tokens(validation_lengths, recipe.train["per_device_eval_batch_size"])
    return counted(recipe, len(lengths), tokens, held_out, recomputes=False)


def padded_tokens(lengths: Sequence[int], rows: int) -> int:
    """Tokens of batches in this order, padding included: rows come in random order, so this is one draw of it."""
    batches = [lengths[start : start + rows] for start in range(0, len(lengths), rows)]
    return sum(len(batch) * max(batch) for batch in batches)


def counted(recipe: Recipe, rows: float, tokens: float, validation_tokens: float, recomputes: bool = True) -> Work:
    """The work of all steps: epochs or max_steps of so many rows, and its validations."""
    accumulation = recipe.train["gradient_accumulation_steps"]
    steps_an_epoch = max(1, math.ceil(rows / (recipe.train["per_device_train_batch_size"] * accumulation)))
    steps = recipe.train["max_steps"]
    if steps <= 0:
        steps = steps_an_epoch * recipe.train["num_train_epochs"]
    epochs = steps / steps_an_epoch
    # each validation scores all held-out rows
    held_out = validations(recipe, steps, epochs) * validation_tokens
    return Work(epochs * tokens, steps * accumulation, held_out, tokens / max(1, rows), recomputes)


def validations(recipe: Recipe, steps: float, epochs: float) -> int:
    """How often the held-out rows are scored while a run trains."""
    strategy = recipe.train["eval_strategy"]
    every = recipe.train["eval_steps"]
    if strategy == "no":
        return 0
    if strategy == "epoch":
        return math.ceil(epochs)
    # a fraction is one of all steps
    every = max(1, math.ceil(every * steps)) if every < 1 else every
    return int(steps // every)


def planned_work(recipe: Recipe) -> Work | None:
    """Before the mix is compiled, from its budget and usual lengths; None where only the data decide its size."""
    data = recipe.data
    if not data.budget or not all(source.fraction is not None for source in data.sources):
        return None
    rows = tokens = held_out = 0.0
    for source in data.sources:
        # rows of a source are as long as such rows usually are: nothing of it was read yet
        length = usual_length(source.mode, recipe.model.max_seq_length)
        size = {"examples": 1.0, "tokens": length}.get(data.unit, max(1.0, length - PROMPT))
        share = source.fraction or 0.0
        rows += share * data.budget / size
        tokens += share * data.budget / size * length
        held_out += share * data.validation_size * length
    return counted(recipe, rows, tokens, held_out)


def usual_length(mode: str, longest: int) -> float:
    """Mean tokens of a row of a mode, where longer rows than `longest` are dropped: a log-normal cut off there."""
    median, sigma = LENGTHS["non_thinking" if mode == "non_thinking" else "thinking"]
    cut = (math.log(max(2, longest - PROMPT)) - math.log(median)) / sigma
    # a log-normal's mean, and what of it lies below the cut (both as twice a share of the rows)
    mean = median * math.exp(sigma**2 / 2)
    below = math.erf((cut - sigma) / math.sqrt(2)) + 1
    kept = math.erf(cut / math.sqrt(2)) + 1
    return PROMPT + mean * below / max(kept, 1e-9)
