"""docs/time_and_memory.md, from the formulas of `toolkit.machine`: `make docs` writes it."""

from toolkit import recipe
from toolkit.files import ToolkitError
from toolkit.machine import choose, duration, fit, speed

CARDS = (
    "RTX 4060",
    "RTX 3060",
    "RTX 4070",
    "T4",
    "RTX 4060 Ti",
    "RTX 4080",
    "L4",
    "RTX 3090",
    "RTX 4090",
    "RTX 5090",
    "A100",
)
MODELS = ("0.6B", "1.7B", "4B", "8B", "14B", "32B")
INTRODUCTION = """# Hours and memory by card and model

**Everything on this page is calculated; nothing was measured on a card.** It is written by `make docs`
from the formulas in `toolkit/machine/` and the default recipe (`data_recipes/hybrid.yaml`: {tokens:,.0f} tokens in rows of up to
{longest:,}, scored {validations} times on {held_out} held-out rows). For another recipe: `python -m toolkit fit RECIPE --card "RTX 3060"`. A run
measures the card it is on for two seconds, says its hours before it trains, and keeps them in `manifest.json` beside what it
took (`time`), as it keeps memory (`fit`).

- Operations: 2 per weight and token forward, 2 for the gradient of the input, and 2 to compute each layer again; the head
  forward and backward; attention over half a row. LoRA needs no gradient of the frozen weights.
- A training step reaches {share:.0%} of a card's rate in large 16-bit products, a share taken from one published run: Qwen3-14B on a T4, 2,476 s for 240
  rows of about 1,530 tokens (calculated: {published:,.0f} s).
- Short rows take at least the launches of their kernels: {launch:.0f} ms a layer and micro-batch.
- Replies: each token reads all 4-bit weights once, more than a few rows together read them dequantized, plus the key-value cache.
- Evaluation is planned for a third of training and validation, at least three minutes; its number of questions follows.
- Memory: the formulas and their sources stand in `toolkit/machine/fit.py`.
"""
HOURS = """
## Training, validation and evaluation of the default recipe

“–”: does not fit. *Italic*: fits, but with less than a tenth of the memory to spare, or takes more than {evening} hours: `auto` takes a smaller
model. **Bold**: what `model_name: auto` takes.

"""
MEMORY = """
## Peak memory of the default recipe, in GiB

"""
REPLIES = """
## Tokens a second of replies, for a batch of 8 rows of 2,000 tokens

An upper bound: without CUDA graphs the launches of about 85 operations a layer can take longer.

"""


def row(cells: list[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |\n"


def header(first: str, names: tuple[str, ...]) -> str:
    """The two lines that begin a Markdown table."""
    return row([first, *names]) + row(["---", *(["--:"] * len(names))])


def hours_cell(plan: recipe.Recipe, model: str, known: speed.Speed, auto: str) -> str:
    """Total hours of a model on a card, marked as the page says."""
    vram = fit.usable_vram(known.gigabytes)
    planned = fit.forecast(plan, fit.shape(model)).as_trained(vram)
    if not planned.fits(vram):
        return "–"
    total = duration.forecast(plan, planned.shape, duration.planned_work(plan), known)
    text = duration.words_of(total.total)
    if f"-{model}-" in auto:
        return f"**{text}**"
    is_tight = planned.peak > (1 - fit.SPARE) * vram or total.total > duration.EVENING
    return f"*{text}*" if is_tight else text


def hours_table(plan: recipe.Recipe) -> str:
    """Hours by card and model."""
    text = header("card", MODELS)
    for name in CARDS:
        known = speed.of_card(name)
        try:
            auto, _ = choose.largest_model(plan, fit.usable_vram(known.gigabytes), known)
        except ToolkitError:
            auto = ""
        cells = [hours_cell(plan, model, known, auto) for model in MODELS]
        text += row([f"{name}, {known.gigabytes:g} GB", *cells])
    return text


def memory_table(plan: recipe.Recipe) -> str:
    """Peak of each phase by model."""
    text = header("phase", MODELS)
    forecasts = [fit.forecast(plan, fit.shape(model)) for model in MODELS]
    for phase in forecasts[0].phases:
        text += row([phase, *(f"{found.total(phase) / fit.GIB:.1f}" for found in forecasts)])
    return text


def reply_seconds(
    shape: fit.Shape, known: speed.Speed, rows: int, prompt: int, new_tokens: int, gemv_rows: int = 1
) -> float:
    """Seconds in which a batch of replies is generated on a card: each token reads all weights and the key-value cache.

    Up to `gemv_rows` rows read the 4-bit weights; more dequantize them for every token (unsloth/kernels/utils.py)."""
    four_bit = 0.516 * shape.linear_parameters
    weights = four_bit if rows <= gemv_rows else four_bit + 4 * shape.linear_parameters
    cache = rows * 4 * shape.num_hidden_layers * shape.kv_dim * (prompt + new_tokens / 2)
    return new_tokens * (weights + cache + 2 * shape.vocab_size * shape.hidden_size) / known.bandwidth


def replies_table() -> str:
    """Tokens a second by card and model."""
    text = header("card", MODELS)
    for name in CARDS:
        known = speed.of_card(name)
        cells = []
        for model in MODELS:
            seconds = reply_seconds(fit.shape(model), known, rows=8, prompt=250, new_tokens=2000)
            room = fit.usable_vram(known.gigabytes) > fit.forecast(fit.Settings(max_new_tokens=8 * 2000), model).total(
                "evaluation"
            )
            cells.append(f"{8 * 2000 / seconds:,.0f}" if room else "–")
        text += row([name, *cells])
    return text


def page() -> str:
    """The whole page."""
    plan = recipe.load("hybrid")
    work = duration.planned_work(plan)
    rows = duration.Work(1.2 * 240 * 1530, 0, 0, mean_length=1530)
    published = duration.training_seconds(fit.shape("14B"), rows, speed.of_card("T4"))
    text = INTRODUCTION.format(
        tokens=round(work.tokens, -4), longest=plan.model.max_seq_length, held_out=plan.data.validation_size,
        validations=duration.validations(plan, 100, 1), share=speed.TRAINING_SHARE, published=published,
        launch=1000 * duration.LAUNCH,
    )  # fmt: skip
    text += HOURS.format(evening=duration.EVENING // 3600) + hours_table(plan)
    return text + MEMORY + memory_table(plan) + REPLIES + replies_table()
