"""Check the sdist and the wheel in dist/: their files, their metadata, and the links of their page on an index.

`make dist` runs it, in the environment of requirements-dist.txt.
"""

import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

from packaging.metadata import Metadata
from readme_renderer import markdown

ROOT = Path(__file__).parents[1]


def main() -> None:
    (wheel,), (sdist,) = (ROOT / "dist").glob("*.whl"), (ROOT / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if ".dist-info/" not in name}
        (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Metadata.from_email(archive.read(path))

    check_sdist(in_sdist)
    check_wheel(in_wheel, in_sdist)
    check_metadata(metadata)
    check_links(metadata, in_sdist)
    print(f"{sdist.name}: {len(in_sdist)} files. {wheel.name}: {len(in_wheel)} files.")
    if ".example/" in (repository := repository_of(metadata)):
        print(f"Not to be uploaded: {repository} in pyproject.toml stands for an address to come.")


def check_sdist(names: set[str]) -> None:
    """The sdist has the files that git tracks; in an unpacked sdist there is no git to ask."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        tracked = {*listed.stdout.splitlines(), "PKG-INFO"}
        assert not tracked - names, f"the sdist lacks {sorted(tracked - names)}"
        assert not names - tracked, f"git does not track {sorted(names - tracked)}"


def check_wheel(names: set[str], in_sdist: set[str]) -> None:
    package = {name for name in in_sdist if name.startswith("torchrunx_ray/")}
    assert names == package, f"package and wheel differ by {sorted(names ^ package)}"
    assert "torchrunx_ray/py.typed" in names


def check_metadata(metadata: Metadata) -> None:
    needed = {need.name for need in metadata.requires_dist or () if need.marker is None}
    assert needed == {"torch", "ray", "cloudpickle", "tyro"}, f"README has others than {needed}"
    assert metadata.license_expression, "no license"
    for name in metadata.classifiers or ():
        assert not name.startswith("License ::"), f"said by the license expression: {name}"
    for label, url in (metadata.project_urls or {}).items():
        assert url.startswith(repository_of(metadata)), f"{label} is elsewhere: {url}"
    changes = (ROOT / "CHANGELOG.md").read_text()
    heading = rf"^## {re.escape(str(metadata.version))}( |$)"
    assert re.search(heading, changes, re.M), f"CHANGELOG.md has no heading {metadata.version}"


def check_links(metadata: Metadata, in_sdist: set[str]) -> None:
    """Every link and picture leads out, and those into the repository lead to a file or folder of it."""
    page = markdown.render(metadata.description or "")
    assert page is not None
    here = rf"{re.escape(repository_of(metadata))}/(blob|raw)/v{metadata.version}/(?P<path>[^#]+)"
    places = {*in_sdist, *(str(up) for name in in_sdist for up in Path(name).parents)}
    assert "<img" in page
    for link in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert link.startswith(("https://", "#")), f"leads nowhere on an index: {link}"
        inside = re.fullmatch(here + r"(#.*)?", link)
        assert inside is None or inside["path"].rstrip("/") in places, f"no such file: {link}"


def repository_of(metadata: Metadata) -> str:
    return (metadata.project_urls or {})["Repository"]


if __name__ == "__main__":
    main()
