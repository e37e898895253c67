"""Will it fit? Memory of a run before it is run, from the model's shape alone: arithmetic, no download, no GPU.

    fit.show(fit.forecast(recipe), fit.card(8))     # also fit.suggestions(…), fit.choose_model(…), fit.table()

Sizes are bytes. `fit.WHY` holds every part's formula and source.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from toolkit.files import ToolkitError
from toolkit.fit import gauge
from toolkit.fit.memory import CONTEXT, EIGHT_BIT, GIB, WHY, Settings, disk, parts, ram
from toolkit.fit.shapes import DENSE, SIZES, Facts, facts, parameters
from toolkit.recipe import Recipe

__all__ = [
    "CONTEXT", "DENSE", "GIB", "SIZES", "WHY", "Facts", "Forecast", "Settings", "Suggestion", "card", "choose_model",
    "compare", "facts", "figure", "forecast", "generation_batch", "model_name", "parts", "settings", "show", "show_table",
    "suggestions", "table",
]  # fmt: skip

CARD_SHARE = 0.98
KNOBS = {
    "optim": "train.optim",
    "use_gradient_checkpointing": "lora.use_gradient_checkpointing",
    "load_in_4bit": "model.load_in_4bit",
    "longest": "model.max_seq_length",
    "r": "lora.r",
    "model": "model.model_name",
    "per_device_train_batch_size": "train.per_device_train_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "per_device_eval_batch_size": "train.per_device_eval_batch_size",
}
"""What a suggestion may change, as overrides of a recipe."""
COSTS = {
    "optim": "hardly any",
    "use_gradient_checkpointing": "slower steps",
    "load_in_4bit": "a slightly weaker base",
}
BATCHES = ("per_device_train_batch_size", "per_device_eval_batch_size", "generation_batch")


@dataclass(frozen=True)
class Forecast:
    """Phase (load, training, evaluation, generation) → part → bytes on the GPU; RAM and disk by use."""

    facts: Facts
    settings: Settings
    phases: dict[str, dict[str, int]]
    ram: dict[str, int]
    disk: dict[str, int]

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def worst(self) -> str:
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        return self.total(self.worst)

    def fits(self, vram: int) -> bool:
        return self.peak <= vram

    def reserved(self, phase: str = "training") -> int:
        """What torch.cuda.max_memory_reserved() should say after `phase`: loading included, no CUDA context."""
        return max(self.total("load"), self.total(phase)) - CONTEXT


@dataclass(frozen=True)
class Suggestion:
    """A change that makes a run fit, what it costs, and the overrides that make it (`toolkit train RECIPE …`)."""

    change: str
    cost: str
    overrides: tuple[str, ...]
    forecast: Forecast


def card(gigabytes: float) -> int:
    """Bytes torch reports on a card sold as so many GB: 98% of as many GiB.

    An A100 sold as 40 shows 39.56, an H100 as 80 shows 79.3; cards with ECC show less (T4: 14.74 of 16, L4: 22.2 of 24),
    so where there is a card, pass its own `torch.cuda.get_device_properties(0).total_memory` instead.
    """
    return int(gigabytes * CARD_SHARE * GIB)


def settings(recipe: Recipe, longest: int | None = None) -> Settings:
    """The memory settings of a recipe; `longest` row as the compiled mix measured it, else max_seq_length."""
    row = longest or recipe.model.max_seq_length
    own = {field.name for field in dataclasses.fields(Settings)}
    extra = {key: value for key, value in recipe.lora.extra.items() if key == "use_gradient_checkpointing"}
    return Settings(
        **{key: value for key, value in recipe.train.items() if key in own} | extra,
        longest=row,
        longest_validation=row,
        r=recipe.lora.r,
        target_modules=tuple(recipe.lora.target_modules),
        load_in_4bit=recipe.model.load_in_4bit,
        max_new_tokens=recipe.evaluate.max_new_tokens,
        quantization_method=tuple(recipe.export.quantization_method),
    )


def forecast(run: Recipe | Settings, model: Facts | str | None = None, *, longest: int | None = None) -> Forecast:
    """Forecast a recipe, or settings with a model; `longest` overrides the longest row. Raises ToolkitError."""
    plan = run if isinstance(run, Settings) else settings(run)
    if longest:
        plan = dataclasses.replace(plan, longest=longest, longest_validation=longest)
    if model is None and isinstance(run, Recipe):
        model = run.model.model_name
    if model in (None, "auto"):
        raise ToolkitError(
            "a forecast needs a model: a name, a local folder, or fit.choose_model(vram, recipe) for auto"
        )
    found = model if isinstance(model, Facts) else facts(model)
    return Forecast(found, plan, parts(plan, found), ram(plan, found), disk(plan, found))


def compare(forecast: Forecast, measured_bytes: int, phase: str = "training") -> dict:
    """A forecast against torch.cuda.max_memory_reserved(): `error` is relative, positive where it forecast too much."""
    expected = forecast.reserved(phase)
    return {"phase": phase, "forecast": expected, "measured": measured_bytes, "error": expected / measured_bytes - 1}


def _with(f: Forecast, **changes) -> Forecast:
    return forecast(dataclasses.replace(f.settings, **changes), f.facts)


# --- decisions -------------------------------------------------------------------------------------------------------


def generation_batch(f: Forecast, vram: int) -> int:
    """The planned generation batch, halved until generation fits; at least 1."""
    batch = f.settings.generation_batch
    while batch > 1 and _with(f, generation_batch=batch).total("generation") > vram:
        batch //= 2
    return batch


def suggestions(f: Forecast, vram: int, lengths: Sequence[int] = ()) -> list[Suggestion]:
    """The smallest changes that make a run fit, cheapest first; `lengths` of the rows prices a shorter limit.

    Empty when it fits already, or when not even the smallest Qwen3 would.
    """
    if f.fits(vram):
        return []
    for cheap in _cheap(f):
        found = [_suggest(f, vram, change) for change in cheap]
        if fitting := [suggestion for suggestion in found if suggestion.forecast.fits(vram)]:
            return fitting
    found = [_suggest(f, vram, cheap[-1] | change, cost) for change, cost in _costly(f, vram, cheap[-1], lengths)]
    return [suggestion for suggestion in found if suggestion.forecast.fits(vram)]


def _cheap(f: Forecast) -> Iterator[list[dict]]:
    """Changes that leave the result (nearly) as it is: none but smaller batches, then each alone, then all."""
    s, changes = f.settings, {}
    if s.optim not in EIGHT_BIT:
        changes["optim"] = "adamw_8bit"
    if s.use_gradient_checkpointing != "unsloth":
        changes["use_gradient_checkpointing"] = "unsloth"
    if not s.load_in_4bit:
        changes["load_in_4bit"] = True
    yield [{}]
    yield [{key: value} for key, value in changes.items()]
    yield [changes]


def _costly(f: Forecast, vram: int, cheap: dict, lengths: Sequence[int]) -> Iterator[tuple[dict, str]]:
    """Single changes that cost something, on top of the cheap ones and batches of one; the smaller model last."""
    least = _changed(f, cheap | dict.fromkeys(BATCHES, 1))
    if row := _longest_that_fits(least, vram):
        lost = f"{sum(n > row for n in lengths) / len(lengths):.1%} of the rows" if lengths else "longer rows"
        yield {"longest": row}, f"{lost} drop out"
    for r in (f.settings.r // 2**k for k in range(1, f.settings.r.bit_length())):
        if _with(least, r=r).fits(vram):
            yield {"r": r}, "a smaller adapter learns less"
            break
    for name in _names(least.settings):
        if parameters(facts(name)) < parameters(f.facts) and forecast(least.settings, name).fits(vram):
            yield {"model": name}, "a weaker model"
            break


def _changed(f: Forecast, change: dict) -> Forecast:
    values = {key: value for key, value in change.items() if key != "model"}
    if "longest" in change:  # max_seq_length bounds validation rows too
        values["longest_validation"] = min(change["longest"], f.settings.longest_validation)
    return forecast(dataclasses.replace(f.settings, **values), change.get("model", f.facts))


def _suggest(f: Forecast, vram: int, change: dict, cost: str = "") -> Suggestion:
    """The change with batches no smaller than it needs, spelled as overrides of a recipe."""
    found = _smaller_batches(_changed(f, change), vram)
    before, after = dataclasses.asdict(f.settings), dataclasses.asdict(found.settings)
    batches = {key: after[key] for key in after if key in KNOBS and key not in change and before[key] != after[key]}
    values = change | batches
    texts = [f"{KNOBS[key].split('.')[-1]}={value}" for key, value in values.items()]
    if after["generation_batch"] < before["generation_batch"]:
        texts.append(f"generation batch {after['generation_batch']}")
    overrides = tuple(f"{KNOBS[key]}={str(value).lower() if value is True else value}" for key, value in values.items())
    price = [COSTS[key] for key in change if key in COSTS] + ([cost] if cost else [])
    return Suggestion(", ".join(texts), ", ".join(price) or "slower; the result stays the same", overrides, found)


def _smaller_batches(f: Forecast, vram: int) -> Forecast:
    """Batches halved where their phase does not fit, the effective batch kept."""
    effective = f.settings.per_device_train_batch_size * f.settings.gradient_accumulation_steps
    for phase, knob in zip(("training", "evaluation"), BATCHES, strict=False):
        while f.total(phase) > vram and (size := dataclasses.asdict(f.settings)[knob]) > 1:
            f = _with(f, **{knob: size // 2})
    steps = math.ceil(effective / f.settings.per_device_train_batch_size)
    return _with(f, gradient_accumulation_steps=steps, generation_batch=generation_batch(f, vram))


def _longest_that_fits(f: Forecast, vram: int) -> int:
    """Largest multiple of 256 tokens below the present limit that fits; 0 if none does."""
    steps = range(1, math.ceil(f.settings.longest / 256))
    return 256 * bisect.bisect_left(steps, 1, key=lambda n: not _changed(f, {"longest": 256 * n}).fits(vram))


def model_name(size: str, load_in_4bit: bool = True) -> str:
    """Hub name of a size; in 4-bit Unsloth's dynamic quant, one for each dense size (unsloth/models/mapper.py)."""
    return f"unsloth/Qwen3-{size}" + ("-unsloth-bnb-4bit" if load_in_4bit else "")


def _names(s: Settings) -> list[str]:
    return [model_name(size, s.load_in_4bit) for size in reversed(DENSE)]


def choose_model(vram: int, run: Recipe | Settings | None = None, *, longest: int | None = None) -> str:
    """`model_name: auto`: the largest dense Qwen3 whose every phase fits; only the generation batch may shrink.

    Raises ToolkitError when none does, with the changes that would help.
    """
    plan = settings(run) if isinstance(run, Recipe) else run or Settings()
    for name in _names(plan):
        found = forecast(plan, name, longest=longest)
        if _with(found, generation_batch=generation_batch(found, vram)).fits(vram):
            return name
    hints = [" ".join(hint.overrides) for hint in suggestions(found, vram)]
    advice = f"{name} fits with {hints[0]}" if hints else "no single change helps: take a larger card or a Colab GPU"
    raise ToolkitError(f"model.model_name: auto: no Qwen3 fits {vram / GIB:.1f} GiB with these settings; {advice}")


@functools.cache
def _room(size: str, vram: int, plan: Settings) -> tuple[int, int]:
    def fits(batch: int, row: int) -> bool:
        batches = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": 1, "generation_batch": 1}
        changed = dataclasses.replace(plan, **batches, longest=row, longest_validation=row)
        return forecast(changed, model_name(size, plan.load_in_4bit)).fits(vram)

    batches = [batch for batch in (1, 2, 4, 8, 16, 32) if fits(batch, 2048)]
    rows = [row for row in (512, 1024, 2048, 4096, 8192, 16384, 32768) if fits(1, row)]
    return max(batches, default=0), max(rows, default=0)


def table(plan: Settings | None = None, cards: Sequence[float] = (6, 8, 12, 16, 24)) -> dict[str, dict[float, tuple]]:
    """Size → card in GB → (largest batch of 2,048-token rows, longest row at batch 1); (0, 0) where nothing fits."""
    return {size: {gb: _room(size, card(gb), plan or Settings()) for gb in cards} for size in SIZES}


# --- pictures --------------------------------------------------------------------------------------------------------


def show(f: Forecast, vram: int, lengths: Sequence[int] = ()) -> None:
    """Print every phase as a stacked bar against the card, the parts of the worst one, and what would make it fit."""
    lines = [f"{s.change}: {s.cost} → {s.forecast.peak / GIB:.1f} GiB" for s in suggestions(f, vram, lengths)]
    gauge.show(f.facts.name, f.phases, vram, ram=f.ram, disk=f.disk, advice=lines)


def show_table(plan: Settings | None = None) -> None:
    """Print `table()`."""
    gauge.show_table(table(plan))


def figure(f: Forecast, vram: int):
    """The stacked bars of `show` as a matplotlib figure."""
    return gauge.figure(f.facts.name, f.phases, vram)
