"""A memory forecast drawn against a card: stacked bars in the terminal and as a figure.

gauge.show("Qwen3-4B", {"training": {"weights": 3 << 30, "LoRA": 1 << 28}}, vram=8 << 30)
"""

GIB = 1024**3
WIDTH = 44
COLOURS = {
    "4-bit weights": "#4c72b0",
    "16-bit modules": "#8fa9d3",
    "load buffer": "#c44e52",
    "LoRA": "#dd8452",
    "gradients": "#eeb68f",
    "optimizer": "#f5d5bd",
    "activations": "#55a868",
    "dequantized weights": "#a1d0ab",
    "logits and loss": "#8172b3",
    "KV cache": "#da8bc3",
    "fragmentation": "#937860",
    "CUDA context": "#8c8c8c",
}


def _colour(part: str) -> str:
    return COLOURS.get(part, "#ccb974")


def bar(parts: dict[str, int], vram: int, scale: int):
    """One stacked bar: every part in its colour, `│` where the card ends; `scale` bytes fill the width."""
    from rich.text import Text

    text, edge, total, drawn = Text(), round(WIDTH * vram / scale), 0, 0
    for part, size in parts.items():
        total += size
        end = round(WIDTH * total / scale)
        text.append("█" * (end - drawn), style=_colour(part))
        drawn = end
    text.append(" " * (max(edge + 1, WIDTH + 1) - drawn))
    return text[:edge] + Text("│", style="bold red") + text[edge:]


def show(
    title: str,
    phases: dict[str, dict[str, int]],
    vram: int,
    *,
    ram: dict[str, int] | None = None,
    disk: dict[str, int] | None = None,
    advice: list[str] | None = None,
) -> None:
    """Print the bars, the parts of the worst phase, RAM, disk, and what would make it fit."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    scale = max(vram, *(sum(parts.values()) for parts in phases.values()))
    table = Table(title=f"{title} on {vram / GIB:.1f} GiB", title_justify="left", box=None, padding=(0, 1))
    for column in ("phase", "GPU memory", "GiB", "fits"):
        table.add_column(column, justify="right" if column == "GiB" else "left", no_wrap=True)
    for phase, parts in phases.items():
        total = sum(parts.values())
        table.add_row(phase, bar(parts, vram, scale), f"{total / GIB:.2f}", "yes" if total <= vram else "[bold red]no")
    console.print(table)
    console.print(_legend(max(phases.items(), key=lambda item: sum(item[1].values()))))
    for name, sizes in (("RAM", ram), ("disk", disk)):
        if sizes:
            console.print(f"{name}: " + ", ".join(f"{use} {size / GIB:.1f} GiB" for use, size in sizes.items()))
    for line in advice or []:
        console.print(f"  • {line}", highlight=False)


def _legend(worst: tuple[str, dict[str, int]]):
    from rich.text import Text

    phase, parts = worst
    text = Text(f"{phase}: ")
    for part, size in parts.items():
        if size:
            text.append("█ ", style=_colour(part)).append(f"{part} {size / GIB:.2f}  ")
    return text


def cell(room: tuple[int, int]) -> str:
    """`4×2k` over `1×8k`: batch of 2,048-token rows and the longest row alone; `no` when nothing fits."""
    batch, row = room
    if not row:
        return "no"
    alone = f"1×{row // 1024}k" if row >= 1024 else f"1×{row}"
    return f"{batch}×2k\n{alone}" if batch else alone


def show_table(rooms: dict[str, dict[float, tuple[int, int]]]) -> None:
    """Print sizes against cards."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="What trains on which card: batch × longest row in tokens", title_justify="left")
    table.add_column("Qwen3")
    for gigabytes in next(iter(rooms.values())):
        table.add_column(f"{gigabytes:g} GB")
    for size, row in rooms.items():
        table.add_row(size, *(cell(room) for room in row.values()))
    Console().print(table)


def figure(title: str, phases: dict[str, dict[str, int]], vram: int):
    """The same bars as a matplotlib figure, the card as a red line."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8, 0.6 + 0.5 * len(phases)), layout="constrained")
    axes = drawn.subplots()
    ends = dict.fromkeys(phases, 0.0)
    for part in dict.fromkeys(part for parts in phases.values() for part in parts):
        sizes = [parts.get(part, 0) / GIB for parts in phases.values()]
        axes.barh(list(phases), sizes, left=list(ends.values()), color=_colour(part), label=part)
        ends = {phase: end + size for (phase, end), size in zip(ends.items(), sizes, strict=True)}
    axes.axvline(vram / GIB, color="red")
    axes.invert_yaxis()
    axes.set_xlabel("GiB")
    axes.set_title(f"{title} on {vram / GIB:.1f} GiB", loc="left")
    drawn.legend(loc="outside right upper", fontsize="small")
    return drawn
