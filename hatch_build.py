"""A hook of hatchling: the README as a package index shows it, with links that lead to the repository."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

# Fences match first, so that code stays as it is.
_LINK = re.compile(r"^```.*?^```|\]\((?!https?:|#)(?P<path>[^)\s]+)\)", re.M | re.S)
_PICTURES = (".svg", ".png")


class CustomMetadataHook(MetadataHookInterface):
    """Set the readme; relative links become absolute ones, at the tag of this version."""

    def update(self, metadata: dict[str, Any]) -> None:
        repository, tag = metadata["urls"]["Repository"], "v" + metadata["version"]

        def absolute(link: re.Match[str]) -> str:
            if (path := link["path"]) is None:
                return link[0]
            kind = "raw" if path.endswith(_PICTURES) else "blob"
            return f"]({repository}/{kind}/{tag}/{path})"

        text = _LINK.sub(absolute, Path(self.root, "README.md").read_text(encoding="utf-8"))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
