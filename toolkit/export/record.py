"""export.json: what an export has written, by checksum, for one set of inputs; and the mark of a failed one.

record = Record(run, inputs); record.make(run / "merged" / "config.json", content)
"""

import json
from collections.abc import Callable
from pathlib import Path

from toolkit.files import complete, describe, read_if_there, write_json, write_text
from toolkit.records import JsonObject

FAILED = "EXPORT_FAILED.txt"
Content = bytes | Callable[[Path], object]
"""A file's content, or a function that writes it to a path."""


class Record:
    """What an export has written. A file whose recorded checksum and inputs still match is kept, so that a repeated export
    writes only what is missing."""

    def __init__(self, run: Path, inputs: JsonObject):
        self.run = run
        self.inputs = inputs
        old = read_if_there(run / "export.json") or {"inputs": inputs, "files": {}}
        self.files: dict[str, JsonObject] = old["files"]
        if old["inputs"] != inputs:  # another adapter, base or scale: every old file is stale
            uncertify(run)
            for name in self.files:
                (run / name).unlink(missing_ok=True)
            self.files = {}

    def make(self, path: Path, content: Content) -> bool:
        """Write a content, or let `content(partial)` write, unless the file is there already; True if it was written."""
        name = path.relative_to(self.run).as_posix()
        kept = path.is_file() and self.files.get(name) == describe(path)
        if kept and (callable(content) or path.read_bytes() == content):
            return False
        # from here on the folder is not what a certificate was about
        uncertify(self.run)
        with complete(path) as partial:
            if callable(content):
                content(partial)
            else:
                partial.write_bytes(content)
        self.files[name] = describe(path)
        write_json(self.run / "export.json", {"inputs": self.inputs, "files": self.files})
        return True


def uncertify(run: Path) -> None:
    """Withdraw a certificate: the files are about to change, or to be looked at again."""
    for name in ("certificate.json", "certificate.md"):
        (run / name).unlink(missing_ok=True)
    write_text(run / FAILED, "Not verified yet: the export or its verification was interrupted.\n")


def written_files(run: Path) -> list[Path]:
    """The GGUF files that `export` wrote and that are still there, whatever else is beside them; the folder may have been
    renamed since. All there are where it left no record."""
    record = read_if_there(run / "export.json")
    written = [run / name for name in record["files"]] if record else sorted((run / "gguf").glob("*"))
    return [path for path in written if path.suffix == ".gguf" and path.is_file()]


def as_json(value: JsonObject) -> bytes:
    """A settings file's content, as transformers lays it out."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
