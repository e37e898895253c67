"""Will it fit? A forecast of a run's memory from the model's shape alone: nothing is loaded and no GPU is needed.

from toolkit import recipe; from toolkit.machine import fit; fit.forecast(recipe.load("pocket"), vram=fit.usable_vram(8)).fits(fit.usable_vram(8))

Sizes are bytes on the GPU. Each formula's source is in the comment beside it. RAM and disk are not forecast.
"""

import contextlib
import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from toolkit.family import FAMILIES, family_of
from toolkit.files import ToolkitError, find, first_line, read_json
from toolkit.machine.doctor import CONTEXT, GIB
from toolkit.recipe import REPLY_LIMIT, Lora, Recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FRAGMENTATION = 0.012  # of everything else; two published measurements: 0.9% and 1.3% above the sum of the parts
# Limits in tokens that suggestions and the table try.
ROWS = (32768, 16384, 8192, 4096, 2048, 1024, 512)
# Tokens of a question, as a forecast takes it.
PROMPT = 512
EIGHT_BIT = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
QWEN3 = FAMILIES[0].recommended


class Matrix(NamedTuple):
    """Equal linear layers: `copies` of inputs x outputs, one per decoder layer."""

    name: str
    inputs: int
    outputs: int
    copies: int

    @property
    def parameters(self) -> int:
        """Of one copy."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Shape:
    """What of a model's architecture decides its memory."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_dim: int
    """Width of a layer's queries: heads x head_dim."""
    kv_dim: int
    vocab_size: int
    intermediate_size: int
    parameters: int
    matrices: tuple[Matrix, ...]
    kept: int = 0
    """Linear parameters that a dynamic 4-bit checkpoint keeps in 16-bit."""
    name: str = ""
    delta_layers: int = 0
    """Of num_hidden_layers those that keep no keys and values."""
    state_bytes: int = 0
    """What they keep of a sequence instead."""

    @property
    def linear_parameters(self) -> int:
        """Parameters in the decoder's linear layers: what 4-bit loading quantizes."""
        return sum(m.parameters * m.copies for m in self.matrices)


FACTS = read_json(Path(__file__).parent / "fit_shapes.json")
# Size of a Qwen3 → its shape, for planning without the Hub; tests compute them again from transformers' own models.
SHIPPED = msgspec.convert(FACTS["shapes"], dict[str, Shape])
# The same of Qwen3.5's text models.
SHIPPED_35 = msgspec.convert(FACTS["qwen3.5"], dict[str, Shape])
POCKET_SHAPE = dataclasses.replace(msgspec.convert(FACTS["pocket"], Shape), name="pocket")
# Share of a card's memory that `auto` leaves free: a display, fragments and longer replies take some of it.
SPARE = 0.1


def shape(name: str) -> Shape:
    """The shape of a Hub name, a Qwen3 size (`4B`), `pocket`, or a local folder or config.json. Raises ToolkitError.

    A known Qwen3 needs no network; another Hub model's config.json is downloaded (a few kB).
    """
    # counting a model needs torch and transformers, which take seconds to import
    if name == "pocket":
        return POCKET_SHAPE
    local = find(name)
    if local is None and (known := shipped(name)):
        return known
    try:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(str(local or name))
    except Exception as error:  # the Hub's client and transformers raise many kinds for a missing or unknown config
        raise ToolkitError(
            f"model_name: {name!r}: its config.json cannot be read ({first_line(error)}). Known without "
            f"the Hub are Qwen3-{', Qwen3-'.join(SHIPPED)}; else give the local folder that holds its config.json"
        ) from error
    return shape_of(config, name)


def shipped(name: str) -> Shape | None:
    """The shape of a Qwen3 by size or Hub name, or of a Qwen3.5 by that, from the facts that ship with the package."""
    match = re.search(r"Qwen(3|3\.5)-(?:Coder-)?(\d[\d.]*B)(?=$|-)", name, re.IGNORECASE)
    version, size = match.groups() if match else ("3", name)
    shapes = SHIPPED if version == "3" else SHIPPED_35
    known = shapes.get(size.upper())
    if known is None:
        return None
    # Unsloth's own checkpoints keep some layers in 16-bit, plain bnb-4bit ones none
    plain = re.search("(?<!-unsloth)-bnb-4bit$", name, re.IGNORECASE)
    return dataclasses.replace(known, name=name, kept=0 if plain else known.kept)


def shape_of(config: "PretrainedConfig", name: str = "") -> Shape:
    """The shape of a transformers config, e.g. a loaded model's: its modules are built without memory and counted.

    Raises ToolkitError for an architecture that transformers does not know, without attention heads, or with experts.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from toolkit.evaluation.decode import delta_layers, state_bytes

    text = config.get_text_config()
    name = name or config.name_or_path
    try:
        # modules without memory: a 32B is counted in a second
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(text)
            full_model = model
            if text is not config and not family_of(config.model_type).text_only:
                # of a model that sees, the rest is loaded beside it in 16-bit
                with contextlib.suppress(ImportError):
                    full_model = AutoModelForImageTextToText.from_config(config)
        heads = text.num_attention_heads
        # Qwen2 leaves it out, as it follows from the others
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        sizes = {
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": heads,
            "q_dim": heads * head_dim,
            "kv_dim": (getattr(text, "num_key_value_heads", None) or heads) * head_dim,
            "vocab_size": text.vocab_size,
            "intermediate_size": text.intermediate_size,
        }
    except (ValueError, AttributeError, KeyError, TypeError, ImportError) as error:
        raise ToolkitError(f"{name}: memory needs not known: {error}") from error
    if any(".experts." in path for path, _ in model.named_parameters()):
        raise ToolkitError(f"{name}: memory needs not known: a mixture of experts")
    # modules, or what is around them, that a quantized checkpoint leaves in 16-bit
    quantization = config.to_dict().get("quantization_config") or {}
    skips = [re.sub(r"^((language_)?model[.])+", "", s) for s in quantization.get("llm_int8_skip_modules") or ()]
    linear = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and re.search(r"\.\d+\.", path):  # inside a decoder layer
            name_in_layer = path.rpartition(".")[2]
            linear[path] = Matrix(name_in_layer, module.in_features, module.out_features, 1)
    return Shape(
        **sizes,
        parameters=sum(p.numel() for p in full_model.parameters()),
        matrices=tuple(matrix._replace(copies=n) for matrix, n in Counter(linear.values()).items()),
        kept=sum(m.parameters for path, m in linear.items() if any(f".{skip}." in f".{path}." for skip in skips)),
        name=name,
        delta_layers=delta_layers(text),
        state_bytes=state_bytes(text),
    )


def lora_tensors(model: Shape, r: int, target_modules: Sequence[str]) -> list[int]:
    """Elements of every LoRA tensor: A (r x inputs) and B (outputs x r) of each target in each layer."""
    tensors = []
    for matrix in model.matrices:
        if matrix.name in target_modules:
            tensors += [r * matrix.inputs, r * matrix.outputs] * matrix.copies
    return tensors


@dataclass(frozen=True)
class Settings:
    """What of a run decides its memory; names as in the recipe."""

    longest: int = 4096
    """Tokens of the longest row that trains: the compiled mix knows it, max_seq_length bounds it."""
    per_device_train_batch_size: int = 2
    gradient_accumulation_steps: int = 4
    per_device_eval_batch_size: int = 2
    longest_validation: int = 4096
    max_new_tokens: int = 1024
    r: int = 16
    target_modules: tuple[str, ...] = Lora.target_modules
    optim: str = "adamw_8bit"
    load_in_4bit: bool = True
    use_gradient_checkpointing: str | bool = "unsloth"


# What memory holds: LoRA with its gradients and optimizer states, activations with dequantized weights, logits with the
# loss.
PARTS = ("weights", "LoRA", "activations", "logits", "KV cache", "other")


class Moment(NamedTuple):
    """Bytes that a phase needs at some moment, beside weights and LoRA."""

    activations: float = 0
    logits: float = 0
    cache: float = 0


def phases(plan: Settings, model: Shape) -> dict[str, dict[str, int]]:
    """Phase → part → bytes at that phase's worst moment. Merging needs none: it runs in RAM."""
    # always there, whatever the phase
    weights = weight_bytes(plan, model)
    tensors = lora_tensors(model, plan.r, plan.target_modules)
    # in float32 (unsloth_zoo/training_utils.py), as its gradients are until the optimizer's step
    lora = 4 * sum(tensors)
    kept = lora + optimizer_bytes(tensors, plan.optim)
    # two 16-bit copies of the largest module and its float32 absmax (unsloth/kernels/utils.py, fast_lora.py)
    largest = max((matrix.parameters for matrix in model.matrices), default=0)
    dequantized = largest * (2 * 2 + 4 / 64) if plan.load_in_4bit else 0
    moments = {
        "load": (lora, [Moment()]),
        "training": (lora + kept, _training(plan, model, dequantized)),
        "validation": (kept, _validation(plan, model, dequantized)),
        "evaluation": (lora, _evaluation(plan, model, dequantized)),
    }
    bytes_of = {}
    for phase, (adapter, needed) in moments.items():
        sizes = [weights, adapter, *max(needed, key=sum)]
        sizes.append(CONTEXT + FRAGMENTATION * sum(sizes))
        bytes_of[phase] = dict(zip(PARTS, map(math.ceil, sizes), strict=True))
    return bytes_of


def weight_bytes(plan: Settings, model: Shape) -> float:
    """The base: 4-bit matrices and 16-bit embeddings, untied lm_head, norms, routers; or everything in 16-bit."""
    if not plan.load_in_4bit:
        return 2 * model.parameters
    return nf4_bytes(model) + 2 * (model.parameters - model.linear_parameters + model.kept)


def nf4_bytes(model: Shape) -> float:
    """NF4 with double quantization: QLoRA, arXiv:2305.14314, section 3; bitsandbytes' QuantState."""
    n = model.linear_parameters - model.kept
    # a byte per block of 64, a float32 per 256 of those
    absmax = n / 64 + 4 * n / (64 * 256)
    # each module has tables of its own
    tables = 1092 * sum(matrix.copies for matrix in model.matrices)
    return n / 2 + absmax + tables


def optimizer_bytes(tensors: Sequence[int], optim: str) -> int:
    """Adam's two states. 8-bit: a byte and 1/64 byte of absmax each, in float32 for tensors below 4,096 elements, and never
    below the largest of those (bitsandbytes/optim/optimizer.py); other optimizers: two float32."""
    if optim not in EIGHT_BIT:
        return 8 * sum(tensors)
    total = 0
    for n in tensors:
        eight_bit = max(2 * n + 8 * math.ceil(n / 256), 32768)
        total += eight_bit if n >= 4096 else 8 * n
    return total


def _training(plan: Settings, model: Shape, dequantized: float) -> list[Moment]:
    """Two moments: the loss, and the backward pass of one layer's MLP."""
    tokens = plan.per_device_train_batch_size * plan.longest
    inputs = _layer_inputs(plan, model, tokens)
    hidden_states = 3 * 2 * tokens * model.hidden_size
    # 16-bit activations of the layer in hand, and float32 attention statistics (unsloth/kernels/fast_lora.py)
    widths = 8 * model.hidden_size + 3 * (model.q_dim + model.kv_dim + model.intermediate_size)
    layer = tokens * (2 * widths + 4 * model.num_attention_heads)
    at_loss = Moment(inputs + hidden_states + dequantized / 2, loss_bytes(model, tokens))
    return [at_loss, Moment(inputs + layer + dequantized)]


def _layer_inputs(plan: Settings, model: Shape, tokens: int) -> float:
    """What stays on the card of every layer between forward and backward (unsloth_zoo/gradient_checkpointing.py)."""
    one = 2 * tokens * model.hidden_size
    layers = model.num_hidden_layers
    if (
        plan.use_gradient_checkpointing == "unsloth"
    ):  # offloads inputs above 2 MiB: two buffers and the last layer remain
        return min(layers * one, max(3 * one, layers * 2 * 1024**2))
    if plan.use_gradient_checkpointing:
        return layers * one
    return 2 * tokens * layers * (6 * model.hidden_size + 3 * (model.q_dim + model.kv_dim + model.intermediate_size))


def loss_bytes(model: Shape, tokens: int) -> float:
    """The loss and the gradient of the hidden states (unsloth_zoo/fused_losses/fused_linear.py)."""
    # at most so many rows of hidden states are in float32 at once
    tile = min(tokens, 4096)
    # rows x vocabulary at a time, in float32: at least 512 rows, at most 4,096 or 2 GiB; or a tile of 16,384 columns
    wanted = max(min(tokens, 512) * model.vocab_size, tokens * model.hidden_size)
    chunk = min(wanted, 4096 * model.vocab_size, GIB // 2)
    return 4 * max(chunk, tile * 16384) + (4 * tile + 2 * tokens) * model.hidden_size


def _forward(model: Shape, batch: int, length: int) -> float:
    """One layer without gradients; a padded batch also carries a mask and its keys and values once per query head."""
    per_token = 5 * (model.hidden_size + model.q_dim) + 3 * (model.kv_dim + model.intermediate_size)
    mask = 3 * batch * length**2
    return 2 * batch * length * per_token + mask


def _validation(plan: Settings, model: Shape, dequantized: float) -> list[Moment]:
    """The validation loss while training: like the training step, without the backward pass."""
    tokens = plan.per_device_eval_batch_size * plan.longest_validation
    layer = _forward(model, plan.per_device_eval_batch_size, plan.longest_validation)
    at_loss = Moment(6 * tokens * model.hidden_size + dequantized, loss_bytes(model, tokens))
    return [at_loss, Moment(layer + dequantized)]


def _evaluation(plan: Settings, model: Shape, dequantized: float) -> list[Moment]:
    """Base against tuned after training, the optimizer gone. Batches adapt to the memory that is free (generate.py,
    evaluate/subject.py), so one row must fit: its score, 128 positions at once, with two sets of logits in float32 and
    five intermediates; and its reply. There the prefill's key-value cache lives on while the decoding buffers, which grow
    in steps of 512 tokens, fill (unsloth/models/_decode_graphs.py)."""
    positions = min(128, plan.longest_validation)
    scored = Moment(dequantized + _forward(model, 1, plan.longest_validation), 28 * positions * model.vocab_size)
    logits = 26 * model.vocab_size  # 16-bit and float32 copies of sampling and sorting
    # keys and values in 16-bit: two times two bytes
    with_cache = model.num_hidden_layers - model.delta_layers
    cache = 4 * with_cache * model.kv_dim * (2 * PROMPT + max(plan.max_new_tokens, 512)) + model.state_bytes
    return [scored, Moment(dequantized + _forward(model, 1, PROMPT), logits, cache)]


@dataclass(frozen=True)
class Forecast:
    """Phase (load, training, validation, evaluation) → part → bytes on the GPU."""

    shape: Shape
    settings: Settings
    phases: dict[str, dict[str, int]]

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

    def changed(self, **settings: Any) -> "Forecast":
        """The forecast with other settings."""
        return forecast(dataclasses.replace(self.settings, **settings), self.shape)

    def as_trained(self, vram: int) -> "Forecast":
        """What `train` makes of it by itself: smaller batches of the same effective size where memory runs out."""
        rows = self.settings.per_device_train_batch_size
        effective = rows * self.settings.gradient_accumulation_steps
        smaller = self
        for batch in (n for n in range(rows, 0, -1) if effective % n == 0):
            smaller = self.changed(per_device_train_batch_size=batch, gradient_accumulation_steps=effective // batch)
            if smaller.total("training") <= vram:
                break
        return smaller


def settings(recipe: Recipe, longest: int | None = None) -> Settings:
    """The memory settings of a recipe; `longest` row as the compiled mix measured it, else max_seq_length."""
    if modules := recipe.lora.trained_whole:
        raise ToolkitError(
            f"lora: {', '.join(modules)}: the memory of modules that are trained as a whole is not forecast"
        )
    row = longest or recipe.model.max_seq_length
    names = {field.name for field in dataclasses.fields(Settings)}
    known = {key: value for key, value in (recipe.train | recipe.lora.extra).items() if key in names}
    if recipe.model.max_seq_length < 512:  # Unsloth then checkpoints without offloading (models/_utils.py)
        known["use_gradient_checkpointing"] = bool(known.get("use_gradient_checkpointing", True))
    return Settings(
        **known,
        longest=row,
        longest_validation=row,
        r=recipe.lora.r,
        target_modules=recipe.lora.target_modules,
        load_in_4bit=recipe.model.load_in_4bit,
        max_new_tokens=recipe.evaluate.max_new_tokens or REPLY_LIMIT,
    )


def forecast(
    run: Recipe | Settings,
    model: "str | Shape | PretrainedConfig | None" = None,
    *,
    longest: int | None = None,
    vram: int | None = None,
) -> Forecast:
    """Forecast a recipe, or settings with a model: a name, a Shape, or the config of a loaded model (the best source).

    `longest` is a recipe's longest row in tokens; `auto` becomes the model that would be chosen for a card of `vram` bytes.
    Raises ToolkitError for a model that is not known.
    """
    plan = run if isinstance(run, Settings) else settings(run, longest)
    name = model or (run.model.model_name if isinstance(run, Recipe) else "auto")
    if name == "auto":
        if not vram:
            raise ToolkitError("a forecast needs a model: a name, a local folder, or for auto a card's memory (--vram)")
        name = choose_model(vram, plan)
    if isinstance(name, str):
        name = shape(name)
    known = name if isinstance(name, Shape) else shape_of(name)
    return Forecast(known, plan, phases(plan, known))


def compare(planned: Forecast, measured_bytes: int, phase: str = "training") -> dict:
    """A forecast against torch.cuda.max_memory_reserved(): `error` is relative, positive where it forecast too much."""
    expected = planned.reserved(phase)
    return {"phase": phase, "forecast": expected, "measured": measured_bytes, "error": expected / measured_bytes - 1}


def usable_vram(gigabytes: float = 0) -> int:
    """Bytes a run can have on a card sold as so many GB; at 0 on the card here, without what others hold of it.

    torch sees 98% of as many GiB: an A100 sold as 40 shows 39.56, an H100 as 80 shows 79.3. Cards with ECC show less (T4:
    14.74 of 16, L4: 22.2 of 24). Raises ToolkitError where there is no card.
    """
    if gigabytes:
        if not 0 < gigabytes < 10_000:  # NaN too
            raise ToolkitError(f"--vram {gigabytes:g}: expected the size of a card in GB, e.g. 8")
        return int(0.98 * gigabytes * GIB)
    import torch

    if not torch.cuda.is_available():
        raise ToolkitError("no CUDA card here: name the memory of the card to plan for, e.g. --vram 8")
    # a display or another process may hold the rest; what this process reserved is its own to use again
    free, total = torch.cuda.mem_get_info()
    return min(total, free + torch.cuda.memory_reserved())


def choose_model(
    vram: int, run: Recipe | Settings | None = None, is_quick: Callable[[Shape], bool] = lambda _: True
) -> str:
    """`model_name: auto`: the largest dense Qwen3 whose every phase fits with the batch asked for, a tenth of the memory to
    spare, and that `is_quick` accepts; the smallest where it accepts none.

    Raises ToolkitError when none fits, with the changes that would help."""
    plan = settings(run) if isinstance(run, Recipe) else run or Settings()
    # 16-bit training starts from the checkpoint that is not quantized
    names = [name if plan.load_in_4bit else name.removesuffix("-unsloth-bnb-4bit") for name in QWEN3]
    fitting = [name for name in names if forecast(plan, name).fits(int((1 - SPARE) * vram))]
    if fitting:
        return next((name for name in reversed(fitting) if is_quick(shape(name))), fitting[0])
    offers = suggestions(forecast(plan, names[0]), int((1 - SPARE) * vram))
    advice = "no single change helps: take a larger card or a Colab GPU"
    if offers:
        advice = f"{names[0]} fits with {' '.join(offers[0][0])}"
    raise ToolkitError(f"model.model_name: auto: no Qwen3 fits {vram / GIB:.1f} GiB with these settings; {advice}")


# Keys and values that leave the result nearly as it is and need less memory.
CHEAPER: tuple[tuple[str, str, Any], ...] = (
    ("train", "per_device_eval_batch_size", 1),
    ("model", "load_in_4bit", True),
    ("train", "optim", "adamw_8bit"),
)
# Overrides, and the forecast with them.
Offer = tuple[list[str], Forecast]


def suggestions(planned: Forecast, vram: int) -> list[Offer]:
    """What makes a run fit: nothing where `train` does it by itself; else what CHEAPER changes, and with it the longest rows
    and the largest Qwen3: of each kind the first that fits."""
    if planned.as_trained(vram).fits(vram):
        return []
    words = []
    cheaper = planned
    for section, key, value in CHEAPER:
        if getattr(planned.settings, key) != value:
            words.append(f"{section}.{key}={str(value).lower()}")
            cheaper = cheaper.changed(**{key: value})
    alone = [(words, cheaper)] if words else []
    shorter = [
        ([*words, f"model.max_seq_length={n}"], cheaper.changed(longest=n, longest_validation=n))
        for n in ROWS
        if n < cheaper.settings.longest
    ]
    smaller = [
        ([*words, f"model.model_name={name}"], forecast(cheaper.settings, name))
        for name in reversed(QWEN3)
        if shape(name).parameters < planned.shape.parameters
    ]
    offers: list[Offer] = []
    for kind in (alone, shorter, smaller):
        # `train` lowers the batch by itself, so a change only has to do the rest
        as_trained = [(overrides, offer.as_trained(vram)) for overrides, offer in kind]
        offers += [offer for offer in as_trained if offer[1].fits(vram)][:1]
    return offers


def show(planned: Forecast, vram: int, console: Any) -> None:
    """Print the verdict, every phase in GiB, and what would make it fit."""
    from toolkit.view.tables import rich_table

    trained = planned.as_trained(vram)
    verdict = "fits" if trained.fits(vram) else "does not fit"
    peak = f"{trained.peak / GIB:.1f} GiB in {trained.worst}"
    console.print(f"{trained.shape.name} {verdict}: {peak}, of {vram / GIB:.1f} GiB")
    rows = []
    for phase, parts in trained.phases.items():
        sizes = {**parts, "total": trained.total(phase)}
        rows.append({"phase": phase, **{name: f"{size / GIB:.2f}" for name, size in sizes.items()}})
    console.print(rich_table(rows))
    before, after = (forecast.settings.per_device_train_batch_size for forecast in (planned, trained))
    if after < before:
        console.print(
            f"train lowers the batch from {before} to {after} rows by itself and accumulates gradients instead"
        )
    for overrides, offer in suggestions(planned, vram):
        console.print(f"it fits with {' '.join(overrides)}: {offer.peak / GIB:.1f} GiB")
