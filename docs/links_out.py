"""A hook of mkdocs: pages link to files beside docs/, which are no part of the site."""

import re
from pathlib import Path
from typing import Any

_OUT_OF_DOCS = re.compile(r"\[([^\]]*)\]\(\.\./([^)#]*)[^)]*\)")
_ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, *, page: Any, **_: object) -> str:
    """The text of such a link, without the link; a file that is not there ends the build."""

    def text(link: re.Match[str]) -> str:
        if not (_ROOT / link[2]).exists():
            raise SystemExit(f"{page.file.src_path}: there is no {link[2]}")
        return link[1]

    return _OUT_OF_DOCS.sub(text, markdown)
