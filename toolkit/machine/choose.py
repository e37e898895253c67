"""The model that a machine trains where a recipe says `auto`, the memory it can use, and the hours that a run takes.

name, why = auto_model(recipes.load("hybrid", ["model.model_name=auto"]))
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from toolkit.files import Say, ToolkitError, read_json, write_json
from toolkit.machine import duration, fit
from toolkit.machine.duration import Duration
from toolkit.machine.install import has_driver
from toolkit.machine.speed import Speed, here, measured_card, of_card, operations
from toolkit.recipe import Recipe
from toolkit.records import JsonObject, MemoryComparison
from toolkit.training.model import on_cuda

# GB of the card that is planned for where none is here and none was named.
PLANNED_FOR = 8

# Operations that a slow processor computes in less than a minute.
A_MINUTE = 2e11


def auto_model(recipe: Recipe) -> tuple[str, str]:
    """(model, why) for `model_name: auto`: the largest Qwen3 that this card trains, or `pocket` without one."""
    if not on_cuda():
        return "pocket", "no CUDA card for a larger one"
    # what is free now, since a display or another program may hold some of the card
    return largest_model(recipe, fit.usable_vram(), measured_card())


def largest_model(recipe: Recipe, vram: int, speed: Speed | None) -> tuple[str, str]:
    """(model, why): the largest Qwen3 that fits with room to spare and, where a speed is known, takes one evening.

    Raises ToolkitError when none fits."""
    why = f"the largest Qwen3 that fits {vram / fit.GIB:.1f} GiB with a tenth to spare"
    work = duration.planned_work(recipe)
    if speed is None or work is None:
        return fit.choose_model(vram, recipe), why

    name = fit.choose_model(
        vram, recipe, lambda shape: duration.forecast(recipe, shape, work, speed).total <= duration.EVENING
    )
    return name, f"{why} and is calculated to take {duration.EVENING // 3600} hours or less on {speed.name}"


def planned_for(gigabytes: float, card: str | None, say: Say) -> tuple[int, Speed | None]:
    """(usable bytes, speed) of a card by its size or name, else of the one here, else of one of 8 GB. Raises ToolkitError."""
    if card:
        named = of_card(card)
        return fit.usable_vram(gigabytes or named.gigabytes), named
    is_here = not gigabytes and has_card()
    return usable(gigabytes, say), measured_card() if is_here else None


def usable(gigabytes: float, say: Say) -> int:
    """Usable bytes of a card sold as so many GB; at 0 of the card here, or of one of 8 GB where there is none."""
    if not gigabytes and not has_card():
        say(f"planned for a card of {PLANNED_FOR} GB, as none is here")
        gigabytes = PLANNED_FOR
    return fit.usable_vram(gigabytes)


def has_card() -> bool:
    """Whether torch can use a card here; torch is imported only where there is a driver."""
    return has_driver() and on_cuda()


def show(recipe: Recipe, gigabytes: float, card: str | None, console: Any) -> JsonObject:
    """Print whether a recipe fits a card, what would make it fit, and how long it takes; returns the same as values.

    Raises ToolkitError."""
    vram, speed = planned_for(gigabytes, card, console.print)
    if recipe.model.model_name == "auto":
        name, why = largest_model(recipe, vram, speed)
        console.print(f"model: {name} ({why})")
        recipe = replace(recipe, model=replace(recipe.model, model_name=name))
    # the forecast as asked for; the printout says what `train` makes of it
    planned = fit.forecast(recipe, vram=vram)
    fit.show(planned, vram, console)
    trained = planned.as_trained(vram)
    answer: JsonObject = {
        "model": trained.shape.name,
        "fits": trained.fits(vram),
        "peak_bytes": trained.peak,
        "vram_bytes": vram,
        "phases": trained.phases,
        "seconds": None,
    }
    work = duration.planned_work(recipe)
    if speed is None:
        console.print('time: name a card for its hours, e.g. --card "RTX 3060"')
    elif work is None:
        console.print("time: not known before the mix is compiled, as no data.budget bounds it: python -m toolkit mix")
    else:
        forecast = duration.forecast(recipe, planned.shape, work, speed)
        console.print(f"time: {forecast.text()}")
        answer["seconds"] = forecast.total
    return answer


def hours_of_mix(recipe: Recipe, lengths: Sequence[int], validation_lengths: Sequence[int]) -> Duration | None:
    """How long a compiled mix trains on this machine, whose speed is measured for two seconds; None for less than a minute.

    Raises ToolkitError for a model whose shape is not known."""
    # a card trains without padding and computes layers again, a CPU the other way round
    work = duration.work_of(recipe, lengths, validation_lengths, on_card=has_card())
    shape = fit.shape(recipe.model.model_name)
    # measuring would take longer than what is forecast
    if work.tokens * operations(shape, work.mean_length) < A_MINUTE:
        return None
    # runs of a sweep differ by a few tokens, and are measured once
    length = 16 * max(1, round(work.mean_length / 16))
    return duration.forecast(recipe, shape, work, here(shape, recipe.train["per_device_train_batch_size"], length))


def say_hours(recipe: Recipe, mixed: Any, say: Say) -> Duration | None:
    """Say how long a run of a compiled mix will take; None where that is not known, and why is said."""
    lengths = [len(row.ids) for row in mixed.train]
    held_out = [len(row.ids) for row in mixed.validation]
    try:
        planned = hours_of_mix(recipe, lengths, held_out)
    except ToolkitError as error:
        say(f"no forecast of hours: {error}")
        return None
    say(f"time: {planned.text() if planned else 'training takes less than a minute'}")
    return planned


def record_hours(folder: Path, planned: Duration) -> None:
    """Write a forecast beside what the run took into its manifest."""
    manifest = read_json(folder / "manifest.json")
    manifest["time"] = duration.compare(planned, manifest["train_seconds"], manifest["evaluation_seconds"])
    write_json(folder / "manifest.json", manifest)


def compared_memory(recipe: Recipe, mixed: Any, model: Any, peak: int) -> MemoryComparison | None:
    """The forecast for a recipe with the rows of its mix, beside the bytes reserved at the peak; None off CUDA, or for a
    model that `fit` does not know, which never stops a run."""
    if model.device.type != "cuda":
        return None
    longest = max(len(row.ids) for row in mixed.train)
    try:
        return fit.compare(fit.forecast(recipe, model.config, longest=longest), peak)
    except ToolkitError:
        return None
