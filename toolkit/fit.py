"""Will it fit? A forecast of a run's memory from the model's shape alone: nothing is loaded and no GPU is needed.

from toolkit import fit, recipe; fit.show(fit.forecast(recipe.load("pocket"), vram=fit.usable_vram(8)), fit.usable_vram(8))

Sizes are bytes on the GPU unless said otherwise. Each formula's source is in the comment beside it.
"""

import bisect
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from toolkit.family import FAMILIES
from toolkit.files import POCKET, ToolkitError, find
from toolkit.recipe import Lora, Recipe

GIB = 1024**3
CONTEXT = int(
    0.4 * GIB
)  # CUDA's own, beside what torch reserves; at most 0.23 GiB was left for it on a published T4 run
FRAGMENTATION = 0.012  # of everything else; two published measurements: 0.9% and 1.3% above the sum of the parts
PROCESS_RAM = 3 * GIB  # Python with torch, its CUDA libraries and Unsloth imported: an allowance
EIGHT_BIT = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
GGUF_BITS = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q6_k": 6.57, "q5_k_m": 5.7, "q4_k_m": 4.9, "q4_0": 4.6}
SHIPPED = json.loads((Path(__file__).parent / "fit_shapes.json").read_text(encoding="utf-8"))["shapes"]
"""Size of a Qwen3 → its `Shape`, for planning without the Hub; tests compute them again from transformers' own models."""
QWEN3 = FAMILIES[0].recommended


# --- shapes ----------------------------------------------------------------------------------------------------------


class Matrix(NamedTuple):
    """Equal linear layers: `copies` modules (one per decoder layer), each of `experts` matrices of inputs x outputs."""

    name: str
    inputs: int
    outputs: int
    experts: int
    copies: int

    @property
    def module(self) -> int:
        """Parameters of one module."""
        return self.inputs * self.outputs * self.experts


@dataclass(frozen=True)
class Shape:
    """What of a model's architecture decides its memory."""

    name: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_dim: int
    """Width of a layer's queries: heads x head_dim."""
    kv_dim: int
    vocab_size: int
    mlp_width: int
    """Elements a token holds inside an MLP: gate, up and their product; experts also copy their inputs and outputs."""
    parameters: int
    matrices: tuple[Matrix, ...]
    kept: int = 0
    """Linear parameters that a dynamic 4-bit checkpoint keeps in 16-bit."""

    @property
    def linear_parameters(self) -> int:
        """Parameters in the decoder's linear layers: what 4-bit loading quantizes."""
        return sum(m.module * m.copies for m in self.matrices)


def shape(name: str) -> Shape:
    """The shape of a Hub name, a Qwen3 size (`4B`), `pocket`, or a local folder or config.json. Raises ToolkitError.

    A known Qwen3 needs no network; another Hub model's config.json is downloaded (a few kB).
    """
    local = POCKET if name == "pocket" else find(name)
    if local is None and (known := shipped(name)):
        return known
    try:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(str(local or name))
    except Exception as error:  # the Hub's client and transformers raise many kinds for a missing or unknown config
        raise ToolkitError(
            f"model_name: {name!r}: its memory needs are not known, as its config.json cannot be read "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}). Known without the Hub are "
            f"Qwen3-{', Qwen3-'.join(SHIPPED)}; for another model give the local folder that holds its config.json"
        ) from error
    return shape_of(config, name)


def shipped(name: str) -> Shape | None:
    """The shape of a Qwen3 by size or Hub name, from the facts that ship with the package."""
    sizes = "|".join(re.escape(size) for size in sorted(SHIPPED, key=len, reverse=True))
    match = re.fullmatch(f"({sizes})", name) or re.search(rf"Qwen3-(?:Coder-)?({sizes})(?=$|-)", name, re.IGNORECASE)
    if match is None:
        return None
    facts = SHIPPED[match[1].upper()]
    is_plain = name.lower().endswith("-bnb-4bit") and not name.lower().endswith("-unsloth-bnb-4bit")
    return Shape(
        name,
        **facts | {"matrices": tuple(Matrix(*m) for m in facts["matrices"]), "kept": 0 if is_plain else facts["kept"]},
    )


def shape_of(config, name: str = "") -> Shape:
    """The shape of a transformers config, e.g. a loaded model's: its modules are built without memory and counted.

    Raises ToolkitError for an architecture that transformers does not know or that has no attention heads.
    """
    import torch
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(text)
        heads = text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        experts = getattr(text, "num_experts_per_tok", None) or 0
        inner = getattr(text, "moe_intermediate_size" if experts else "intermediate_size", None) or 4 * text.hidden_size
        modules = list(_linear_modules(model))
        return Shape(
            name or config.name_or_path,
            hidden_size=text.hidden_size,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=heads,
            q_dim=heads * head_dim,
            kv_dim=(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
            vocab_size=text.vocab_size,
            mlp_width=experts * (3 * inner + 2 * text.hidden_size) if experts else 3 * inner,
            parameters=sum(p.numel() for p in model.parameters()),
            matrices=tuple(Matrix(*m, copies) for m, copies in _count(m for _, m in modules).items()),
            kept=sum(math.prod(m[1:]) for path, m in modules if _is_kept(config, path)),
        )
    except (ValueError, AttributeError, KeyError, TypeError, ImportError) as error:
        raise ToolkitError(f"{name or config.name_or_path}: memory needs not known: {error}") from error


def _linear_modules(model) -> Iterator[tuple[str, tuple[str, int, int, int]]]:
    """(path, (name, inputs, outputs, experts)) of every linear layer inside a numbered decoder layer."""
    import torch

    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and re.search(r"\.\d+\.", path):
            yield path, (path.rpartition(".")[2], module.in_features, module.out_features, 1)
    for path, weight in model.named_parameters():
        if ".experts." in path and weight.dim() == 3:  # transformers 5 keeps a layer's experts in one tensor
            experts, outputs, inputs = weight.shape
            yield path, (path.rpartition(".")[2], inputs, outputs, experts)


def _count(matrices) -> dict:
    found: dict = {}
    for matrix in matrices:
        found[matrix] = found.get(matrix, 0) + 1
    return found


def _is_kept(config, path: str) -> bool:
    """Whether a quantized checkpoint's config names a module, or one around it, as left in 16-bit."""
    quantization = getattr(config, "quantization_config", None) or {}
    skips = (quantization if isinstance(quantization, dict) else quantization.to_dict()).get(
        "llm_int8_skip_modules"
    ) or ()
    return any(f".{re.sub(r'^((language_)?model[.])+', '', skip)}." in f".{path}." for skip in skips)


def lora_tensors(model: Shape, r: int, target_modules: Sequence[str]) -> list[int]:
    """Elements of every LoRA tensor: A (r x inputs) and B (outputs x r) of each target in each layer."""
    asked = set(target_modules) | ({"gate_up_proj"} if {"gate_proj", "up_proj"} & set(target_modules) else set())
    targets = [m for m in model.matrices if m.name in asked]
    return [r * side * m.experts for m in targets for side in (m.inputs, m.outputs) for _ in range(m.copies)]


# --- formulas --------------------------------------------------------------------------------------------------------


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
    """True for transformers 4 on cards without bf16 (T4): the checkpoint was turned into fp16 on the card."""
    quantization_method: tuple[str, ...] = ("q8_0",)


def phases(s: Settings, m: Shape) -> dict[str, dict[str, int]]:
    """Phase → part → bytes at that phase's worst moment. Merging needs none: it runs in RAM."""
    weights, tensors = weight_bytes(s, m), lora_tensors(m, s.r, s.target_modules)
    # A bf16 checkpoint on a card without bf16 is converted on the card: once the largest 16-bit tensor, beyond the room
    # that LoRA takes afterwards; the freed block stays behind as fragmentation.
    converted = 2 * m.vocab_size * m.hidden_size if s.converted_at_load else 0
    optimizer = weights | {"optimizer": optimizer_bytes(tensors, s.optim)}
    gradients = {"gradients": 4 * sum(tensors)}  # float32, alive until the optimizer's step
    return {
        "load": _with_overheads(weights | {"load buffer": max(0, converted - weights["LoRA"])}),
        "training": _with_overheads(optimizer | gradients | _training(s, m), converted),
        "validation": _with_overheads(optimizer | _validation(s, m), converted),
        "generation": _with_overheads(optimizer | _generation(s, m), converted),
        "evaluation": _with_overheads(weights | _evaluation(s, m), converted),
    }


def weight_bytes(s: Settings, m: Shape) -> dict[str, float]:
    """{"4-bit weights", "16-bit modules", "LoRA"}: LoRA stays in float32 (unsloth_zoo/training_utils.py)."""
    lora = {"LoRA": 4 * sum(lora_tensors(m, s.r, s.target_modules))}
    if not s.load_in_4bit:
        return {"4-bit weights": 0, "16-bit modules": 2 * m.parameters} | lora
    other = m.parameters - m.linear_parameters  # embeddings, an untied lm_head, norms, routers
    return {"4-bit weights": nf4_bytes(m), "16-bit modules": 2 * (other + m.kept)} | lora


def nf4_bytes(m: Shape) -> float:
    """NF4 with double quantization: QLoRA, arXiv:2305.14314, section 3; bitsandbytes' QuantState."""
    n = m.linear_parameters - m.kept
    absmax = n / 64 + 4 * n / (64 * 256)  # a byte per block of 64, a float32 per 256 of those
    return n / 2 + absmax + 1092 * sum(matrix.copies for matrix in m.matrices)  # tables of each module


def optimizer_bytes(tensors: Sequence[int], optim: str) -> int:
    """Adam's two states. 8-bit: a byte and 1/64 byte of absmax each, in float32 for tensors below 4,096 elements, and never
    below the largest of those (bitsandbytes/optim/optimizer.py); other optimizers: two float32."""
    if optim not in EIGHT_BIT:
        return 8 * sum(tensors)
    return sum(max(2 * n + 8 * math.ceil(n / 256), 32768) if n >= 4096 else 8 * n for n in tensors)


def _dequantized(s: Settings, m: Shape) -> float:
    """Two 16-bit copies of the largest quantized module and its float32 absmax (unsloth/kernels/utils.py, fast_lora.py)."""
    return max((matrix.module for matrix in m.matrices), default=0) * (2 * 2 + 4 / 64) if s.load_in_4bit else 0


def _training(s: Settings, m: Shape) -> dict[str, float]:
    """The larger of two moments: the loss, where logits exist, or the backward pass of one layer's MLP."""
    tokens = s.per_device_train_batch_size * s.longest
    inputs, dequantized = _layer_inputs(s, m, tokens), _dequantized(s, m)
    # 16-bit activations of the layer in hand, and float32 attention statistics (unsloth/kernels/fast_lora.py)
    layer = (
        2 * tokens * (8 * m.hidden_size + 3 * m.q_dim + 3 * m.kv_dim + m.mlp_width) + 4 * tokens * m.num_attention_heads
    )
    return _larger(
        {
            "activations": inputs + 6 * tokens * m.hidden_size,  # three hidden states
            "logits and loss": loss_bytes(s, m, tokens),
            "dequantized weights": dequantized / 2,
        },
        {"activations": inputs + layer, "logits and loss": 0, "dequantized weights": dequantized},
    )


def _layer_inputs(s: Settings, m: Shape, tokens: int) -> float:
    """What stays on the card of every layer between forward and backward (unsloth_zoo/gradient_checkpointing.py)."""
    one, layers = 2 * tokens * m.hidden_size, m.num_hidden_layers
    if s.use_gradient_checkpointing == "unsloth":  # offloads inputs above 2 MiB: two buffers and the last layer remain
        return min(layers * one, max(3 * one, layers * 2 * 1024**2))
    if s.use_gradient_checkpointing:
        return layers * one
    return 2 * tokens * layers * (6 * m.hidden_size + 3 * m.q_dim + 3 * m.kv_dim + m.mlp_width)


def loss_bytes(s: Settings, m: Shape, tokens: int) -> float:
    """The loss and the gradient of the hidden states (unsloth_zoo/fused_losses/fused_linear.py)."""
    hidden_gradient = 2 * tokens * m.hidden_size
    if s.bytes_per_logit:
        return tokens * m.vocab_size * s.bytes_per_logit + hidden_gradient
    tile = min(tokens, 4096)
    # rows x vocabulary at a time, in float32: at least 512 rows, at most 4,096 or 2 GiB; or a tile of 16,384 columns
    chunk = min(max(min(tokens, 512) * m.vocab_size, tokens * m.hidden_size), 4096 * m.vocab_size, GIB // 2)
    return 4 * max(chunk, tile * 16384) + 4 * tile * m.hidden_size + hidden_gradient


def _forward(m: Shape, batch: int, length: int) -> float:
    """One layer without gradients; a padded batch also carries a mask and its keys and values once per query head."""
    per_token = 5 * m.hidden_size + 5 * m.q_dim + 3 * m.kv_dim + m.mlp_width
    return 2 * batch * length * per_token + 3 * batch * length**2


def _validation(s: Settings, m: Shape) -> dict[str, float]:
    """The validation loss while training: like the training step, without the backward pass."""
    tokens = s.per_device_eval_batch_size * s.longest_validation
    layer = _forward(m, s.per_device_eval_batch_size, s.longest_validation)
    at_loss = {"activations": 6 * tokens * m.hidden_size, "logits and loss": loss_bytes(s, m, tokens)}
    return _larger(at_loss, {"activations": layer, "logits and loss": 0}) | {"dequantized weights": _dequantized(s, m)}


def _generation(s: Settings, m: Shape) -> dict[str, float]:
    """Replies to prompts. The prefill's key-value cache lives on while the decoding buffers, which grow in steps of 512
    tokens, fill (unsloth/models/_decode_graphs.py)."""
    cached = s.generation_batch * (2 * s.prompt_tokens + max(s.max_new_tokens, 512))
    return {
        "activations": _forward(m, s.generation_batch, s.prompt_tokens),
        "dequantized weights": _dequantized(s, m),
        "logits and loss": 26 * s.generation_batch * m.vocab_size,  # 16-bit and float32 copies of sampling and sorting
        "KV cache": 4 * m.num_hidden_layers * m.kv_dim * cached,
    }


def _evaluation(s: Settings, m: Shape) -> dict[str, float]:
    """Base against tuned after training, the optimizer gone: the least it needs. It takes its rows one at a time and 128
    positions at once where memory is short (evaluate/subject.py): two sets of logits in float32 and five intermediates."""
    return {
        "activations": _forward(m, 1, s.longest_validation),
        "dequantized weights": _dequantized(s, m),
        "logits and loss": 28 * min(128, s.longest_validation) * m.vocab_size,
    }


def _larger(*moments: dict[str, float]) -> dict[str, float]:
    return max(moments, key=lambda moment: sum(moment.values()))


def _with_overheads(parts: dict[str, float], left_behind: float = 0) -> dict[str, int]:
    whole = {name: math.ceil(size) for name, size in parts.items()}
    whole["fragmentation"] = math.ceil(FRAGMENTATION * sum(whole.values()) + left_behind)
    return whole | {"CUDA context": CONTEXT}


def ram_bytes(s: Settings, m: Shape) -> dict[str, int]:
    """RAM: training offloads every layer's input; merging holds the model in 16-bit and one matrix twice in float32."""
    tokens = s.per_device_train_batch_size * s.longest * (s.use_gradient_checkpointing == "unsloth")
    largest = max((matrix.inputs * matrix.outputs for matrix in m.matrices), default=0)
    training = PROCESS_RAM + 2 * tokens * m.hidden_size * m.num_hidden_layers
    return {"training": training, "merge": PROCESS_RAM + 2 * m.parameters + 8 * largest}


def disk_bytes(s: Settings, m: Shape) -> dict[str, int]:
    """Disk: the download and the adapter, and for export the 16-bit download, the merged model and each GGUF."""
    weights = weight_bytes(s, m)
    ggufs = {f"gguf {q}": math.ceil(m.parameters * GGUF_BITS.get(q, 16) / 8) for q in s.quantization_method}
    base = {"base": math.ceil(weights["4-bit weights"] + weights["16-bit modules"]), "adapter": weights["LoRA"]}
    return base | {"base in 16-bit": 2 * m.parameters, "merged": 2 * m.parameters} | ggufs


# --- the forecast ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forecast:
    """Phase (load, training, validation, generation, evaluation) → part → bytes on the GPU; RAM and disk by use."""

    shape: Shape
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

    def changed(self, **settings) -> "Forecast":
        """The forecast with other settings."""
        return forecast(dataclasses.replace(self.settings, **settings), self.shape)


def settings(recipe: Recipe, longest: int | None = None) -> Settings:
    """The memory settings of a recipe; `longest` row as the compiled mix measured it, else max_seq_length."""
    row = longest or recipe.model.max_seq_length
    own = {field.name for field in dataclasses.fields(Settings)}
    given = {key: value for key, value in (recipe.train | recipe.lora.extra).items() if key in own}
    return Settings(
        **given,
        longest=row,
        longest_validation=row,
        r=recipe.lora.r,
        target_modules=recipe.lora.target_modules,
        load_in_4bit=recipe.model.load_in_4bit,
        max_new_tokens=recipe.evaluate.max_new_tokens,
        quantization_method=recipe.export.quantization_method,
    )


def forecast(run: Recipe | Settings, model=None, *, longest: int | None = None, vram: int | None = None) -> Forecast:
    """Forecast a recipe, or settings with a model: a name, a Shape, or the config of a loaded model (the best source).

    `longest` is the longest row in tokens. With `vram`, `auto` becomes the model that would be chosen for that card and
    replies are generated in batches that fit, as `train` does. Raises ToolkitError for a model that is not known.
    """
    plan = run if isinstance(run, Settings) else settings(run)
    if longest:
        plan = dataclasses.replace(plan, longest=longest, longest_validation=longest)
    name = model or (run.model.model_name if isinstance(run, Recipe) else None)
    if name == "auto" and vram:
        name = choose_model(vram, plan)
    if name in (None, "auto"):
        raise ToolkitError(
            "a forecast needs a model: a name, a local folder, or for auto the memory of a card (--vram)"
        )
    found = name if isinstance(name, Shape) else shape(name) if isinstance(name, str) else shape_of(name)
    made = Forecast(found, plan, phases(plan, found), ram_bytes(plan, found), disk_bytes(plan, found))
    return made.changed(generation_batch=generation_batch(made, vram)) if vram else made


def forecast_or_none(
    run: Recipe | Settings, model=None, *, say: Callable[[str], object] = str, **options
) -> Forecast | None:
    """`forecast` for the middle of a run, which nothing unknown may stop: None instead of an error, `say` gets the reason."""
    try:
        return forecast(run, model, **options)
    except ToolkitError as error:
        say(f"no memory forecast: {error}")
        return None


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
        return int(0.98 * gigabytes * GIB)
    import torch

    if not torch.cuda.is_available():
        raise ToolkitError("no CUDA card here: name the memory of the card to plan for, e.g. --vram 8")
    free, total = torch.cuda.mem_get_info()  # a display or another process may hold the rest
    return min(total, free + torch.cuda.memory_reserved())


# --- decisions -------------------------------------------------------------------------------------------------------


def generation_batch(planned: Forecast, vram: int) -> int:
    """The planned generation batch, halved until generation fits; at least 1."""
    batch = planned.settings.generation_batch
    while batch > 1 and planned.changed(generation_batch=batch).total("generation") > vram:
        batch //= 2
    return batch


def as_trained(planned: Forecast, vram: int) -> Forecast:
    """What `train` makes of a plan by itself: smaller batches of the same effective size where memory runs out."""
    s = planned.settings
    effective = s.per_device_train_batch_size * s.gradient_accumulation_steps
    for batch in (n for n in range(s.per_device_train_batch_size, 0, -1) if effective % n == 0):
        found = planned.changed(per_device_train_batch_size=batch, gradient_accumulation_steps=effective // batch)
        if found.total("training") <= vram:
            break
    return found.changed(generation_batch=generation_batch(found, vram))


def choose_model(vram: int, run: Recipe | Settings | None = None, *, longest: int | None = None) -> str:
    """`model_name: auto`: the largest dense Qwen3 whose every phase fits; only the generation batch may shrink.

    Raises ToolkitError when none does, with the changes that would help.
    """
    plan = settings(run) if isinstance(run, Recipe) else run or Settings()
    for name in reversed(_names(plan)):
        found = forecast(plan, shipped(name), longest=longest, vram=vram)
        if found.fits(vram):
            return name
    hints = [" ".join(hint.overrides) for hint in suggestions(found, vram)]
    advice = f"{name} fits with {hints[0]}" if hints else "no single change helps: take a larger card or a Colab GPU"
    raise ToolkitError(f"model.model_name: auto: no Qwen3 fits {vram / GIB:.1f} GiB with these settings; {advice}")


def _names(s: Settings) -> list[str]:
    return [name if s.load_in_4bit else name.removesuffix("-unsloth-bnb-4bit") for name in QWEN3]


@dataclass(frozen=True)
class Suggestion:
    """A change that makes a run fit: the overrides that make it (`toolkit train RECIPE …`) and what it costs."""

    overrides: tuple[str, ...]
    cost: str
    forecast: Forecast


def suggestions(planned: Forecast, vram: int, lengths: Sequence[int] = ()) -> list[Suggestion]:
    """The changes that make a run fit, cheapest first; `lengths` of the rows prices a shorter limit.

    Empty where `train` makes it fit by itself, and where not even the smallest Qwen3 would.
    """
    if _fits(planned, {}, vram):
        return []
    free = _free_changes(planned.settings)
    values, costs = {key: value for key, (value, _) in free.items()}, ", ".join(cost for _, cost in free.values())
    if _fits(planned, values, vram):
        return [_suggestion(planned, vram, values, costs)]
    rest = _changed(planned, values)
    changes = [_shorter_rows(rest, vram, lengths), _smaller_model(rest, vram)]
    return [_suggestion(planned, vram, values | change, cost) for change, cost in changes if change]


def _free_changes(s: Settings) -> dict[str, tuple]:
    """Setting → (value, cost) of changes that leave the result (nearly) as it is."""
    changes = {
        "per_device_eval_batch_size": (1, "slower validation"),
        "use_gradient_checkpointing": ("unsloth", "slower steps"),
        "load_in_4bit": (True, "a slightly weaker base"),
    }
    if s.optim not in EIGHT_BIT:
        changes["optim"] = "adamw_8bit", "hardly anything"
    current = dataclasses.asdict(s)
    return {key: change for key, change in changes.items() if current[key] != change[0]}


def _shorter_rows(planned: Forecast, vram: int, lengths: Sequence[int]) -> tuple[dict, str]:
    """The largest multiple of 256 tokens below the present limit that fits."""
    steps = range(1, math.ceil(planned.settings.longest / 256))
    row = 256 * bisect.bisect_left(steps, 1, key=lambda n: not _fits(planned, {"longest": 256 * n}, vram))
    lost = f"{sum(n > row for n in lengths) / len(lengths):.1%} of the rows are" if lengths else "longer rows are"
    return ({"longest": row}, f"{lost} dropped") if row else ({}, "")


def _smaller_model(planned: Forecast, vram: int) -> tuple[dict, str]:
    for name in reversed(_names(planned.settings)):
        if shipped(name).parameters < planned.shape.parameters and _fits(planned, {"model": name}, vram):
            return {"model": name}, "a weaker model"
    return {}, ""


def _changed(planned: Forecast, change: dict) -> Forecast:
    values = {key: value for key, value in change.items() if key != "model"}
    if "longest" in change:  # max_seq_length bounds validation rows too
        values["longest_validation"] = min(change["longest"], planned.settings.longest_validation)
    model = shipped(change["model"]) if "model" in change else planned.shape
    return forecast(dataclasses.replace(planned.settings, **values), model)


def _fits(planned: Forecast, change: dict, vram: int) -> bool:
    return as_trained(_changed(planned, change), vram).fits(vram)


def _suggestion(planned: Forecast, vram: int, change: dict, cost: str) -> Suggestion:
    keys = {"longest": "model.max_seq_length", "model": "model.model_name", "load_in_4bit": "model.load_in_4bit",
            "r": "lora.r", "use_gradient_checkpointing": "lora.use_gradient_checkpointing"}  # fmt: skip
    words = {key: "true" if value is True else value for key, value in change.items()}
    overrides = tuple(f"{keys.get(key, f'train.{key}')}={value}" for key, value in words.items())
    return Suggestion(overrides, cost, as_trained(_changed(planned, change), vram))


def table(plan: Settings | None = None, cards: Sequence[float] = (6, 8, 12, 16, 24)) -> dict[str, dict[float, tuple]]:
    """Size → card in GB → (largest batch of 2,048-token rows, longest row at batch 1); (0, 0) where nothing fits."""

    def room(model: Shape, vram: int) -> tuple[int, int]:
        def fits(batch: int, row: int) -> bool:
            batches = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": 1, "generation_batch": 1}
            changed = dataclasses.replace(plan or Settings(), **batches, longest=row, longest_validation=row)
            return forecast(changed, model).fits(vram)

        batches = [batch for batch in (1, 2, 4, 8, 16, 32) if fits(batch, 2048)]
        rows = [row for row in (512, 1024, 2048, 4096, 8192, 16384, 32768) if fits(1, row)]
        return max(batches, default=0), max(rows, default=0)

    return {size: {gb: room(shipped(size), usable_vram(gb)) for gb in cards} for size in SHIPPED}


# --- what people see -------------------------------------------------------------------------------------------------

COLUMNS = {
    "weights": ("4-bit weights", "16-bit modules", "load buffer"),
    "LoRA": ("LoRA", "gradients", "optimizer"),
    "activations": ("activations", "dequantized weights"),
    "logits": ("logits and loss",),
    "KV cache": ("KV cache",),
    "other": ("fragmentation", "CUDA context"),
}


def show(planned: Forecast, vram: int, lengths: Sequence[int] = (), console=None) -> None:
    """Print the verdict, every phase in GiB, RAM and disk, and what would make it fit."""
    from rich.console import Console
    from rich.table import Table

    out = console or Console(highlight=False)
    found = as_trained(planned, vram)
    verdict = "fits" if found.fits(vram) else "does not fit"
    out.print(f"{found.shape.name} {verdict}: {found.peak / GIB:.1f} GiB in {found.worst}, of {vram / GIB:.1f} GiB")
    shown = Table("phase", *COLUMNS, "total", "fits", box=None, padding=(0, 1))
    for phase, parts in found.phases.items():
        sizes = [sum(parts.get(part, 0) for part in column) for column in COLUMNS.values()]
        cells = [f"{size / GIB:.2f}" if size else "" for size in [*sizes, found.total(phase)]]
        shown.add_row(phase, *cells, "yes" if found.total(phase) <= vram else "[bold red]no")
    out.print(shown)
    for name, uses in (("RAM", found.ram), ("disk", found.disk)):
        out.print(f"{name}: " + ", ".join(f"{use} {size / GIB:.1f} GiB" for use, size in uses.items()))
    before, after = planned.settings.per_device_train_batch_size, found.settings.per_device_train_batch_size
    if after < before:
        out.print(f"train lowers the batch from {before} to {after} rows by itself and accumulates gradients instead")
    for offer in suggestions(planned, vram, lengths):
        out.print(f"it fits with {' '.join(offer.overrides)} ({offer.forecast.peak / GIB:.1f} GiB; cost: {offer.cost})")


def show_table(plan: Settings | None = None, console=None) -> None:
    """Print `table()`: what trains on which card."""
    from rich.console import Console
    from rich.table import Table

    def cell(batch: int, row: int) -> str:
        if not row:
            return "no"
        alone = f"1×{row // 1024}k" if row >= 1024 else f"1×{row}"
        return f"{batch}×2k\n{alone}" if batch else alone

    rooms = table(plan)
    title = "What trains on which card: batch × longest row in tokens"
    shown = Table("Qwen3", *(f"{gb:g} GB" for gb in next(iter(rooms.values()))), title=title, title_justify="left")
    for size, row in rooms.items():
        shown.add_row(size, *(cell(*room) for room in row.values()))
    (console or Console()).print(shown)
