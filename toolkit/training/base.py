"""Whether a base is still the one that a run was trained on: checksums of the weights in a local folder.

check_base(recipe.model, manifest["model"]["files"]); base_checksums(Path("models/my-qwen3"))
"""

from pathlib import Path

from toolkit.files import POCKET, ToolkitError, find, outputs, read_if_whole, sha256, write_json
from toolkit.recipe import Model

# The file that PEFT keeps an adapter's weights in.
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What decides the numbers a base computes; tokenizer and template lie in the run's adapter/ too.
WEIGHTS = ("*.safetensors", "*.bin", "*.index.json", "config.json")


# {file: SHA-256}.
Checksums = dict[str, str]


def base_folder(name: str) -> Path | None:
    """The folder of a model by its name in a recipe; None for a Hub name, which its revision identifies."""
    return POCKET if name == "pocket" else find(name)


def base_checksums(folder: Path) -> Checksums:
    """{file: SHA-256} of the weights in a model's folder. Each file is read once, and again only after it was written."""
    cache_file = outputs() / ".checksums.json"
    cache = read_if_whole(cache_file)
    checksums = {}
    for file in sorted(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        status = file.stat()
        # the time of change cannot be set by hand, as that of modification can
        key = f"{file.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
        if key not in cache:
            cache[key] = sha256(file)
            write_json(cache_file, cache)
        checksums[file.name] = cache[key]
    return checksums


def recorded_checksums(section: Model) -> Checksums:
    """What a manifest keeps of a recipe's base: its checksums; {} for a Hub name."""
    folder = base_folder(section.model_name)
    return base_checksums(folder) if folder else {}


def check_base(section: Model, recorded: Checksums) -> None:
    """Compare a recipe's base with the checksums in a run's manifest. Raises ToolkitError naming a file that changed.

    A run without checksums (of a Hub model, or made before they were kept) is taken as it is."""
    now = recorded_checksums(section)
    if not recorded or not now:
        return
    changed = sorted(name for name in recorded.keys() | now.keys() if recorded.get(name) != now.get(name))
    if changed:
        raise ToolkitError(
            f"{section.model_name}: {changed[0]}: not the file that this run was trained on (its SHA-256 differs from "
            "manifest.json). Put the old file back, or train anew on this base under another name"
        )
