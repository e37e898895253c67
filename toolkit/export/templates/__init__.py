"""The pages an export writes for people and for Ollama, as Jinja templates: certificate.md and Modelfile.

page = filled("certificate.md", certificate)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def filled(name: str, values: Mapping[str, Any]) -> str:
    """A file of this folder with its values."""
    import jinja2

    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=folder, keep_trailing_newline=True, trim_blocks=True)
    return environment.get_template(name).render(values)
