"""Proof that the exported files are the run: the same tokens, the same template, the same probabilities.

certificate = verify("outputs/hybrid"); certificate["passed"], certificate["checks"]
"""

import dataclasses
import math
import time
from collections.abc import Collection
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich.console import Console

from toolkit.evaluation.generate import closing_token
from toolkit.export.checkpoint import Checkpoint, text_settings
from toolkit.export.contents import gguf_errors, merged_errors
from toolkit.export.gguf import header, header_differences, plan_tensors
from toolkit.export.llama import launch
from toolkit.export.merge import Merged, check_run, check_weights, inputs_of, open_merged, settings_files, shards
from toolkit.export.ollama import modelfile
from toolkit.export.parity import Tokens, divergence, file_divergence, log_probs, probe_sequences, served_differences
from toolkit.export.record import FAILED, uncertify, written_files
from toolkit.export.templates import filled
from toolkit.files import ToolkitError, describe, finite, lock, read_if_there, read_json, write_json, write_text
from toolkit.records import JsonObject
from toolkit.training.model import damaged
from toolkit.view.progress import Progress, working

Certificate = JsonObject
"""The content of certificate.json."""
KL_MEAN = 1e-4
KL_MAX = 1e-3
"""Sound exports were measured at 3.7e-6 for a merge and 1.6e-7 to 4.3e-6 (largest 1.0e-4) for an F16 file."""
NO_OP = 1e-6
"""Mean KL below which an adapter changes nothing."""
LIMITS = {
    "f16": {"mean KL": KL_MEAN, "largest KL": KL_MAX, "share with another top token": 0.01},
    "bf16": {"mean KL": 1e-3},
    "q8_0": {"mean KL": 4e-2},
    "q6_k": {"mean KL": 0.1},
    "q5_k_m": {"mean KL": 0.25},
    "q4_k_m": {"mean KL": 0.5},
}
"""Beyond these a file is not the model any more, by its type (data_recipes/measured/export_limits.json)."""
LOWER_BOUND = (
    "KL of a GGUF is taken over llama.cpp's 512 most likely tokens and one bucket for all others: a lower bound of the "
    "KL over the whole vocabulary. KL of merged weights is over the whole vocabulary."
)
BESIDE_TEXT = ("model.visual.", "mtp.")
"""How weights begin that the text model lacks, of its sight and of a head that drafts tokens: kept as the base has them."""
CHANGES_NOTHING = "the adapter changes nothing"
VERSIONS = ("torch", "transformers", "gguf", "xllamacpp")
DOCUMENTS = (
    "*.md *.png *.pdf README* LICENSE* NOTICE* USE_POLICY* .gitattributes .gitignore .DS_Store .cache/* .git/*".split()
)
"""What no program reads that loads a model."""


class Verification:
    """A run, what its export says it wrote, and all that the checks need, read once.

    `checks` are gates; `notes` are what is measured or could not be run, and decide nothing."""

    def __init__(self, run: Path):
        self.run = run
        self.record = read_json(run / "export.json")
        inputs = self.record["inputs"]
        self.merged = open_merged(run, inputs["onto"], scale=inputs.get("scale", 1.0), local_only=True)
        self.stored = Checkpoint(run / "merged")
        """The merged folder as it is on the disk."""
        self.own = Tokens(run / "adapter")
        """The run's tokenizer, from its adapter folder."""
        self.sequences = probe_sequences(self.own)
        self.checks: list[JsonObject] = []
        self.notes: list[JsonObject] = []

    def gate(self, name: str, value: float, limit: float = 0, rule: str = "at most") -> None:
        """A value that decides."""
        passed = bool(value <= limit if rule == "at most" else value >= limit)
        # JSON has no NaN; a value that is none has failed
        check = {"name": name, "passed": passed, "value": finite(float(value)), "limit": limit, "rule": rule}
        self.checks.append(check)

    def count(self, name: str, items: Collection[str]) -> None:
        """A gate on names of which there must be none; the first are said."""
        self.gate(f"{name}: {', '.join(sorted(items)[:5])}" if items else name, len(items))

    def note(self, name: str, value: float | None, text: str) -> None:
        """A value that decides nothing."""
        self.notes.append({"name": name, "value": value, "note": text})

    # which files are there

    def check_files(self, certified: JsonObject) -> JsonObject:
        """Gate what was changed since it was written, trained or certified; returns the checksums of what was written."""
        recorded = self.record["files"]
        # only what export wrote: other files are judged by where they lie
        now = {name: describe(self.run / name) for name in recorded if (self.run / name).is_file()}
        inputs = inputs_of(self.run, self.merged)
        before = {"base_files": {}} | self.record["inputs"]
        compared = (
            ("files changed or missing since they were written", now, recorded),
            ("files changed since their certificate", now, certified),
            ("adapter files changed since the export", inputs["adapter"], before["adapter"]),
            ("base files changed since the export", inputs["base_files"], before["base_files"]),
        )
        for name, found, known in compared:
            self.gate(name, sum(found.get(file) != checksum for file, checksum in known.items()))
        return now

    def check_folders(self) -> None:
        """Every file of merged/ and gguf/: expected and as expected, a document, or one that some program may read with the
        model."""
        contents = settings_files(self.merged, self.run / "adapter")
        settings = {f"merged/{name}": content for name, content in contents.items()}
        written = {f"gguf/{path.name}" for path in written_files(self.run)}
        if written:
            settings["gguf/Modelfile"] = modelfile(self.run, self.merged, self.own.tokenizer)
        written |= {f"merged/{name}" for name in shards(self.merged).filename_to_tensors}
        paths = [path for folder in ("merged", "gguf") for path in (self.run / folder).rglob("*")]
        there = {path.relative_to(self.run).as_posix() for path in paths if not path.is_dir() or path.is_symlink()}
        different = [
            name for name, content in settings.items() if name not in there or (self.run / name).read_bytes() != content
        ]
        self.count("settings files that are missing, or differ from the base's and the run's", different)
        foreign = []
        for name in sorted(there - written - settings.keys()):
            # other GGUF files are read only by their own name, but for projectors, which LM Studio loads by themselves
            if fnmatch(name, "gguf/*.gguf") and "mmproj" not in name:
                self.note(f"{Path(name).name}: not checked", None, "`export` did not write it")
            elif not any(fnmatch(name.partition("/")[2], pattern) for pattern in DOCUMENTS):
                foreign.append(name)
        self.count("files that do not belong there", foreign)

    # merged weights

    def check_merged(self) -> np.ndarray | None:
        """The merged folder against base + adapter, with a negative control; returns its log-probabilities, where it has any."""
        merged = self.merged
        facts = Tokens(self.run / "merged").facts()
        different = [name for name, fact in self.own.facts().items() if facts[name] != fact]
        self.count("merged: facts of the tokenizer that differ from the run's", different)
        # merged a second time and compared number by number: probabilities alone would miss a row of a rare word
        errors = merged_errors(self.stored, merged)
        self.gate("merged: tensors missing, unknown or of another type", errors.missing)
        self.gate("merged: worst tensor, error in units of what rounding allows", errors.tensor, 1)
        self.gate("merged: worst row of a tensor, in the same units", errors.row, 1)
        # transformers reads the folder anew, as it was written to the disk
        questions = [(merged, "adapter"), (merged, "base"), (self.stored, "merged")]
        if read_json(self.run / "manifest.json")["model"].get("load_in_4bit") and not merged.base.four_bit:
            questions.append((self.in_4_bit(), "adapter"))
        if beside := sum(name.startswith(BESIDE_TEXT) for name in merged.weights):
            note = "vision and draft head, the base's own; no picture was tried"
            self.note("weights beside the text model", beside, note)
        try:
            check_weights(self.stored)
            tuned, base, reference, *trained = log_probs(questions, self.sequences)
        except ToolkitError as error:
            self.gate(f"merged: cannot be loaded ({error})", 1)
            return None
        self.check_probabilities(tuned, base, reference)
        if trained:
            note = "mean KL of the merged weights from the 4-bit model that was trained: of QLoRA, not of this export"
            self.note("QLoRA gap", float(divergence(trained[0], reference).mean()), note)
        return reference

    def check_probabilities(self, tuned: np.ndarray, base: np.ndarray, reference: np.ndarray) -> None:
        """The merged weights against the run, and the bare base, which must not pass for them."""
        effect = float(divergence(tuned, base).mean())
        distance = float(divergence(tuned, reference).mean())
        name = "merged against base + adapter (mean KL)"
        if effect < NO_OP:
            self.gate(name, distance, NO_OP)
            self.note(CHANGES_NOTHING, effect, "mean KL of the run from its base: these files equal both")
            return
        limit = merge_limit(effect)
        self.gate(name, distance, limit)
        # the negative control: a gate that the bare base passes would prove nothing
        control = "control: the base without the adapter fails that gate (mean KL)"
        self.gate(control, effect, max(NO_OP, math.nextafter(limit, 1)), "at least")

    def in_4_bit(self) -> Merged:
        """The run on the 4-bit weights it was trained on; where they are not on this machine, made from the 16-bit ones."""
        try:
            return open_merged(self.run, "4bit", scale=self.merged.adapter.scale, local_only=True)
        except ToolkitError:
            return Merged(dataclasses.replace(self.merged.base, four_bit=True), self.merged.adapter)

    # GGUF files

    def check_gguf(self, path: Path, reference: np.ndarray | None) -> None:
        """Everything about one GGUF file. One that cannot be read has failed, and the others are still looked at."""
        from psutil import virtual_memory

        try:
            self.check_contents(path)
            # a file that does not fit is read and compared, but not served: the machine would swap for hours
            size = path.stat().st_size
            free = virtual_memory().available
            if reference is None:
                self.note(f"{path.name}: not served", None, "there is nothing to compare it with")
            elif size > free:
                needs = f"needs {size / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"
                self.note(f"{path.name}: not served", None, needs)
            else:
                self.check_served(path, reference)
        except (ToolkitError, ValueError, OSError) as error:  # what broken bytes make the readers raise
            self.gate(f"{path.name}: could not be read ({type(error).__name__}: {str(error)[:150]})", 1)

    def check_contents(self, path: Path) -> None:
        """Every byte of the header and every tensor, against the base's config.json and the run's tokenizer."""
        name, quant, _ = path.name.rsplit(".", 2)  # the folder may have been renamed since
        # the values as they lie in merged/, the settings as base and run have them
        plan = plan_tensors(self.stored, quant)
        writer = header(self.merged, self.run / "adapter", quant, name)
        differing, size = header_differences(writer, plan, path)
        self.count(f"{path.name}: header values that differ", differing)
        if differing:
            return  # what the tensors are is not known
        errors = gguf_errors(path, size, plan)
        self.gate(f"{path.name}: worst tensor, error in units of what its type allows", errors.tensor, 1)
        self.gate(f"{path.name}: worst row of a tensor, in the same units", errors.row, 1)

    def check_served(self, path: Path, reference: np.ndarray) -> None:
        """The header may say what it likes: only a running file shows how it tokenizes, stops and predicts."""
        engine = launch(path, slots=len(self.sequences))
        texts, renderings = served_differences(engine, self.own)
        self.gate(f"{path.name}: texts tokenized differently", texts)
        self.gate(f"{path.name}: templates rendered differently", renderings)
        # the end-of-turn token is made certain: a file that lists another one to stop at talks on
        certain = [[closing_token(self.own.tokenizer), 1000.0]]
        body = {"prompt": self.own.encode("Hello"), "n_predict": 8, "logit_bias": certain}
        talks_on = engine.call("/completion", body)["stop_type"] != "eos"
        self.gate(f"{path.name}: end-of-turn tokens that do not end generation", talks_on)
        measured = file_divergence(engine, reference, self.sequences, self.own.encode("a")[0])
        for key, limit in LIMITS[path.name.split(".")[-2]].items():
            self.gate(f"{path.name}: against merged ({key})", measured[key], limit)


def merge_limit(effect: float) -> float:
    """Mean KL allowed between merged weights and base + adapter, when the adapter moves the base by a mean KL of `effect`.

    Storing the sum of base and adapter in bf16 moves the model as well. Merges in which every tensor was exact gave 1.3e-4
    at an effect of 0.089 (SmolLM2-135M, data_recipes/measured/smollm2.json in commit 42613c1) and 1.7e-4 to 4.2e-4 at 7.5e-4
    to 2.5e-3 (two steps on tiny models, tests/families/test_families.py). So a quarter of the effect is allowed, never more than
    KL_MAX, and never so much that the bare base would pass.
    """
    return min(max(KL_MEAN, effect / 4), KL_MAX, effect / 2)


def verify(run: str | Path, *, console: Console | None = None) -> Certificate:
    """Check an export and write certificate.json and certificate.md into the run folder; returns the certificate.

    EXPORT_FAILED.txt stands beside the files from the first moment and goes when every gate has passed. Raises ToolkitError
    where there is no export to check, when its adapter or base is no longer on this machine, or when a weights file cannot
    be read."""
    run = Path(run)
    console = console or Console()
    began = time.monotonic()
    if not (run / "export.json").is_file():
        raise ToolkitError(f"{run}: holds no export; `python -m toolkit export {run}` makes one and verifies it")
    with lock(run, "verify"):
        # read before it is withdrawn: what was certified must still be there
        certified = read_if_there(run / "certificate.json").get("files", {})
        uncertify(run)
        check_run(run)
        with working(console, "checking the files"):
            checking = Verification(run)
            files = checking.check_files(certified)
            checking.check_folders()
        ggufs = sorted(written_files(run))
        with Progress(console, "verifying", total=2 + len(ggufs)) as progress:
            reference = checking.check_merged()
            progress.advance(2)
            for path in ggufs:
                checking.check_gguf(path, reference)
                progress.advance(1)
        config = checking.merged.config
        certificate = {
            "passed": all(check["passed"] for check in checking.checks),
            "checks": checking.checks,
            "reports": checking.notes,
            "files": files,
            "inputs": checking.record["inputs"],
            "model": {
                "model_type": config["model_type"],
                "max_position_embeddings": text_settings(config)["max_position_embeddings"],
            },
            "positions": sum(map(len, checking.sequences)),
            "kl": LOWER_BOUND,
            "seconds": round(time.monotonic() - began, 1),
            "versions": {name: version(name) for name in VERSIONS},
        }
        _write(run, certificate)
    return certificate


# --- what is said ----------------------------------------------------------------------------------------------------


def failures(certificate: Certificate) -> list[str]:
    """Names of the gates that did not pass."""
    return [check["name"] for check in certificate["checks"] if not check["passed"]]


def upload_commands(run: Path) -> list[str]:
    """The commands that put an export on the Hub.

    Raises ToolkitError where no certificate has passed, or a file is not as it was certified."""
    again = f"python -m toolkit export {run}"
    certificate = read_if_there(run / "certificate.json")
    if not certificate.get("passed"):
        raise ToolkitError(f"{run}: no certificate has passed: {again}")
    if name := damaged(run, {name: file["sha256"] for name, file in certificate["files"].items()}):
        raise ToolkitError(f"{run / name}: missing or changed since its certificate: {again} writes it again")
    repo = f"USER/{run.resolve().name}"
    commands = [f"hf upload {repo} {run / 'merged'} ."]
    if "gguf/Modelfile" in certificate["files"]:
        commands.append(f"hf upload {repo} {run / 'gguf'} gguf")
    return commands


def changes_nothing(certificate: Certificate) -> bool:
    """Whether the run behind an export is its base."""
    return any(note["name"] == CHANGES_NOTHING for note in certificate["reports"])


def _write(run: Path, certificate: Certificate) -> None:
    failed = failures(certificate)
    if failed:
        first = "Verification failed: the exported files do not match the run. Do not use or share them. Failed:"
        write_text(run / FAILED, "\n".join([first, *failed]) + "\n")
    page = filled("certificate.md", certificate | {"changes_nothing": changes_nothing(certificate)})
    write_text(run / "certificate.md", page)
    write_json(run / "certificate.json", certificate)
    if not failed:
        (run / FAILED).unlink()
