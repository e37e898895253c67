"""Will it fit? Memory of a run before it is run, from the model's shape alone: arithmetic, no download, no GPU.

    fit.show(fit.forecast(recipe), fit.card(8))     # also fit.suggestions(…), fit.choose_model(…), fit.table()

Every part's formula and source stands in fit_facts.json, here `WHY`. Sizes are bytes throughout.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from toolkit import gauge
from toolkit.recipe import Lora, Recipe, ToolkitError
from toolkit.shapes import (
    DATA,
    DENSE,
    SIZES,
    Facts,
    facts,
    lora_tensors,
    matrices,
    nf4_bytes,
    other_parameters,
    parameters,
)

WHY: dict[str, str] = DATA["why"]
GIB = 1024**3
CARD_SHARE = 0.98
CONTEXT = int(0.4 * GIB)
ROUNDING = 0.012
PROCESS = 3 * GIB
"""RAM of Python with torch, its CUDA libraries and Unsloth imported: an allowance."""
EIGHT_BIT = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
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
GGUF_BITS = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q6_k": 6.57, "q5_k_m": 5.7, "q4_k_m": 4.9, "q4_0": 4.6}


@dataclass(frozen=True)
class Settings:
    """What of a run decides its memory; names as in the recipe."""

    longest: int = 4096
    """Tokens of the longest row that trains: the compiled mix knows it, max_seq_length bounds it."""
    per_device_train_batch_size: int = 2
    gradient_accumulation_steps: int = 4
    per_device_eval_batch_size: int = 2
    longest_validation: int = 4096
    generation_batch: int = 32
    prompt_tokens: int = 512
    max_new_tokens: int = 1024
    r: int = 16
    target_modules: tuple[str, ...] = Lora.target_modules
    optim: str = "adamw_8bit"
    load_in_4bit: bool = True
    use_gradient_checkpointing: str | bool = "unsloth"
    bytes_per_logit: int = 0
    """0: Unsloth's fused loss. Otherwise all logits exist: 2 in 16-bit, 14 in an eager loss without Unsloth."""
    converted_at_load: bool = False
    """True on cards without bf16 (T4 and older): the checkpoint is turned into fp16 on the card."""
    quantization_method: tuple[str, ...] = ("q8_0",)


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


# --- parts -----------------------------------------------------------------------------------------------------------


def _weights(s: Settings, m: Facts) -> dict[str, float]:
    lora = {"LoRA": 4 * sum(lora_tensors(m, s.r, s.target_modules))}
    if not s.load_in_4bit:
        return {"4-bit weights": 0, "16-bit modules": 2 * parameters(m)} | lora
    return {"4-bit weights": nf4_bytes(m), "16-bit modules": 2 * (other_parameters(m) + m.kept)} | lora


def _optimizer(tensors: list[int], optim: str) -> int:
    """8-bit states, never below the 32,768 bytes of the largest tensor that stays in 32-bit; other optimizers: 2 x 32-bit."""
    if optim not in EIGHT_BIT:
        return 8 * sum(tensors)
    return sum(max(2 * n + 8 * math.ceil(n / 256), 32768) if n >= 4096 else 8 * n for n in tensors)


def _dequantized(s: Settings, m: Facts) -> float:
    largest = max(math.prod(shape) for shape in matrices(m).values())
    return largest * (2 * 2 + 4 / 64) if s.load_in_4bit else 0


def _mlp(m: Facts) -> int:
    """Elements a token holds inside the MLP: gate, up and their product; experts also copy their inputs and outputs."""
    routed = m.num_experts_per_tok
    return routed * (3 * m.intermediate_size + 2 * m.hidden_size) if routed else 3 * m.intermediate_size


def _layer_inputs(s: Settings, m: Facts, tokens: int) -> float:
    """What stays on the card of every layer between forward and backward."""
    one, layers = 2 * tokens * m.hidden_size, m.num_hidden_layers
    if (
        s.use_gradient_checkpointing == "unsloth"
    ):  # up to 2 MiB nothing is offloaded; then two buffers and the last layer
        return min(layers * one, max(3 * one, layers * 2 * 1024**2))
    if s.use_gradient_checkpointing:
        return layers * one
    return 2 * tokens * layers * (6 * m.hidden_size + 3 * m.q_dim + 3 * m.kv_dim + _mlp(m))


def _loss(s: Settings, m: Facts, tokens: int) -> float:
    hidden_gradient = 2 * tokens * m.hidden_size
    if s.bytes_per_logit:
        return tokens * m.vocab_size * s.bytes_per_logit + hidden_gradient
    tile = min(tokens, 4096)
    chunk = min(max(min(tokens, 512) * m.vocab_size, tokens * m.hidden_size), 4096 * m.vocab_size, GIB // 2)
    return 4 * max(chunk, tile * 16384) + 4 * tile * m.hidden_size + hidden_gradient


def _worse(*moments: dict[str, float]) -> dict[str, float]:
    return max(moments, key=lambda moment: sum(moment.values()))


def _training(s: Settings, m: Facts) -> dict[str, float]:
    """The worse of two moments: the loss, where logits exist, or the backward of one layer's MLP."""
    tokens = s.per_device_train_batch_size * s.longest
    inputs, dequantized = _layer_inputs(s, m, tokens), _dequantized(s, m)
    layer = 2 * tokens * (8 * m.hidden_size + 3 * m.q_dim + 3 * m.kv_dim + _mlp(m)) + 4 * tokens * m.num_attention_heads
    at_loss = {"activations": inputs + 6 * tokens * m.hidden_size, "logits and loss": _loss(s, m, tokens)}
    return _worse(
        at_loss | {"dequantized weights": dequantized / 2},
        {"activations": inputs + layer, "logits and loss": 0, "dequantized weights": dequantized},
    )


def _forward(m: Facts, batch: int, length: int) -> float:
    """One layer without gradients; a padded batch also carries a mask and its keys and values once per query head."""
    per_token = 5 * m.hidden_size + 5 * m.q_dim + 3 * m.kv_dim + _mlp(m)
    return 2 * batch * length * per_token + 3 * batch * length**2


def _evaluation(s: Settings, m: Facts) -> dict[str, float]:
    tokens = s.per_device_eval_batch_size * s.longest_validation
    layer = _forward(m, s.per_device_eval_batch_size, s.longest_validation)
    at_loss = {"activations": 6 * tokens * m.hidden_size, "logits and loss": _loss(s, m, tokens)}
    return _worse(at_loss, {"activations": layer, "logits and loss": 0}) | {"dequantized weights": _dequantized(s, m)}


def _generation(s: Settings, m: Facts) -> dict[str, float]:
    cached = s.generation_batch * (2 * s.prompt_tokens + max(s.max_new_tokens, 512))
    return {
        "activations": _forward(m, s.generation_batch, s.prompt_tokens),
        "dequantized weights": _dequantized(s, m),
        "logits and loss": 26 * s.generation_batch * m.vocab_size,
        "KV cache": 4 * m.num_hidden_layers * m.kv_dim * cached,
    }


def _closed(parts: dict[str, float], left_behind: float = 0) -> dict[str, int]:
    whole = {name: math.ceil(size) for name, size in parts.items()}
    whole["fragmentation"] = math.ceil(ROUNDING * sum(whole.values()) + left_behind)
    return whole | {"CUDA context": CONTEXT}


def parts(s: Settings, m: Facts) -> dict[str, dict[str, int]]:
    """Phase → part → bytes on the GPU at that phase's worst moment. Merging needs none: it runs in RAM."""
    weights, tensors = _weights(s, m), lora_tensors(m, s.r, s.target_modules)
    converted = 2 * m.vocab_size * m.hidden_size if s.converted_at_load else 0
    optimizer = {"optimizer": _optimizer(tensors, s.optim)}
    gradients = {"gradients": 4 * sum(tensors)}
    return {
        "load": _closed(weights | {"load buffer": max(0, converted - weights["LoRA"])}),
        "training": _closed(weights | gradients | optimizer | _training(s, m), converted),
        "evaluation": _closed(weights | optimizer | _evaluation(s, m), converted),
        "generation": _closed(weights | optimizer | _generation(s, m), converted),
    }


def ram(s: Settings, m: Facts) -> dict[str, int]:
    """Training offloads every layer's input; merging holds the model in 16-bit and one matrix twice in float32."""
    tokens = s.per_device_train_batch_size * s.longest * (s.use_gradient_checkpointing == "unsloth")
    largest = max(inputs * outputs for inputs, outputs, _ in matrices(m).values())
    training = PROCESS + 2 * tokens * m.hidden_size * m.num_hidden_layers
    return {"training": training, "merge": PROCESS + 2 * parameters(m) + 8 * largest}


def disk(s: Settings, m: Facts) -> dict[str, int]:
    """The download, the adapter, and for export the 16-bit download, the merged model and each GGUF."""
    weights = _weights(s, m)
    ggufs = {f"gguf {q}": math.ceil(parameters(m) * GGUF_BITS.get(q, 16) / 8) for q in s.quantization_method}
    base = {"base": math.ceil(weights["4-bit weights"] + weights["16-bit modules"]), "adapter": weights["LoRA"]}
    return base | {"base in 16-bit": 2 * parameters(m), "merged": 2 * parameters(m)} | ggufs


# --- forecasts -------------------------------------------------------------------------------------------------------


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
    better = {"optim": "adamw_8bit", "use_gradient_checkpointing": "unsloth", "load_in_4bit": True}
    fine = {"optim": f.settings.optim in EIGHT_BIT}
    changes = {k: v for k, v in better.items() if dataclasses.asdict(f.settings)[k] != v and not fine.get(k)}
    yield [{}]
    yield [{key: value} for key, value in changes.items()]
    yield [changes]


def _costly(f: Forecast, vram: int, cheap: dict, lengths: Sequence[int]) -> Iterator[tuple[dict, str]]:
    """Single changes that cost something, on top of the cheap ones and batches of one; the smaller model last."""
    least = _smaller_batches(_changed(f, cheap), vram)
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
    values = {key: value for key, value in change.items() if key not in ("model", "longest")}
    plan = dataclasses.replace(f.settings, **values)
    return forecast(plan, change.get("model", f.facts), longest=change.get("longest"))


def _suggest(f: Forecast, vram: int, change: dict, cost: str = "") -> Suggestion:
    """The change with batches no smaller than it needs, spelled as overrides of a recipe."""
    found = _smaller_batches(_changed(f, change), vram)
    before, after = dataclasses.asdict(f.settings), dataclasses.asdict(found.settings)
    batches = {key: after[key] for key in after if key in KNOBS and key not in change and before[key] != after[key]}
    values = change | batches
    texts = [f"{KNOBS[key].split('.')[-1]}={value}" for key, value in values.items()]
    texts += (
        [f"generation batch {after['generation_batch']}"]
        if after["generation_batch"] < before["generation_batch"]
        else []
    )
    overrides = tuple(f"{KNOBS[key]}={str(value).lower() if value is True else value}" for key, value in values.items())
    return Suggestion(", ".join(texts), cost or "slower; the result stays the same", overrides, found)


def _smaller_batches(f: Forecast, vram: int) -> Forecast:
    """Batches halved where their phase does not fit, the effective batch kept."""
    effective = f.settings.per_device_train_batch_size * f.settings.gradient_accumulation_steps
    for phase, knob in ("training", "per_device_train_batch_size"), ("evaluation", "per_device_eval_batch_size"):
        while f.total(phase) > vram and (size := dataclasses.asdict(f.settings)[knob]) > 1:
            f = _with(f, **{knob: size // 2})
    steps = math.ceil(effective / f.settings.per_device_train_batch_size)
    return _with(f, gradient_accumulation_steps=steps, generation_batch=generation_batch(f, vram))


def _longest_that_fits(f: Forecast, vram: int) -> int:
    """Largest multiple of 256 tokens below the present limit that fits; 0 if none does."""
    steps = range(1, math.ceil(f.settings.longest / 256))
    return 256 * bisect.bisect_left(
        steps, 1, key=lambda n: not forecast(f.settings, f.facts, longest=256 * n).fits(vram)
    )


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
