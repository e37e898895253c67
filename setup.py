"""What pyproject.toml cannot say: the dependencies, which requirements.txt pins, and that file inside the package."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

REQUIREMENTS = Path(__file__).parent / "requirements.txt"
TORCH = "torch>=2.4,<2.15"  # Unsloth's range: a torch that works already, as on Colab, stays
EXTRAS = {"notebooks": "notebooks", "checks": "dev"}  # heading in requirements.txt: extra


def sections() -> dict[str, str]:
    """{heading: its paragraph}; a heading is the first line after an empty one."""
    paragraphs = REQUIREMENTS.read_text(encoding="utf-8").split("\n\n")
    return {paragraph.splitlines()[0].removeprefix("# "): paragraph for paragraph in paragraphs}


def pins(paragraph: str) -> list[str]:
    """The pins of a section, comments left out, with a range instead of the pin for torch."""
    lines = [line.split("#")[0].strip() for line in paragraph.splitlines()]
    return [TORCH if line.startswith("torch==") else line for line in lines if line]


class BuildWithRequirements(build_py):
    """Puts requirements.txt, but for the extras, into the package: `setup` of an installed copy reads it."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            needed = [paragraph.strip() for heading, paragraph in sections().items() if heading not in EXTRAS]
            target = Path(self.build_lib) / "toolkit" / "requirements.txt"
            target.write_text("\n\n".join(needed) + "\n", encoding="utf-8")


setup(
    install_requires=[pin for heading, text in sections().items() if heading not in EXTRAS for pin in pins(text)],
    extras_require={extra: pins(sections()[heading]) for heading, extra in EXTRAS.items()},
    cmdclass={"build_py": BuildWithRequirements},
)
