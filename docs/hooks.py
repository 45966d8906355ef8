"""What mkdocs calls while it builds the site: the pictures are added, and docstrings' Sphinx roles taken away."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

_DOCS = Path(__file__).resolve().parent
_ROLE = re.compile(r":(?:class|func|meth|mod):(?=<code>)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pictures, and the one that examples/dorefa_digits.py has drawn."""
    sys.path.insert(0, str(_DOCS))
    import pictures

    drawn = {**pictures.drawn(), "dorefa_digits.png": (_DOCS.parent / "examples" / "dorefa_digits.png").read_bytes()}
    for name, content in drawn.items():
        files.append(File.generated(config, f"pictures/{name}", content=content))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Takes `:func:` and its like from the text of docstrings, which are Markdown here."""
    return _ROLE.sub("", html)
