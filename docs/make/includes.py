"""Pages that are files of the root: a line `--8<-- "FILE"` stands for the file. A hook of mkdocs."""

import os
import re
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
_INCLUDED = re.compile(r'^--8<-- "([^"]+)"$', re.MULTILINE)


def with_included(text: str, page: str) -> str:
    """The text of `page`, a path below docs/, with files in it whose links lead from the page."""

    def included(found: re.Match[str]) -> str:
        folder = os.path.relpath(".", Path(page).parent)
        return (REPOSITORY / found[1]).read_text(encoding="utf-8").replace("](docs/", f"]({folder}/")

    return _INCLUDED.sub(included, text)


def on_page_markdown(markdown: str, *, page: Any, **kwargs: Any) -> str:
    """Called by mkdocs for each page."""
    return with_included(markdown, page.file.src_uri)
