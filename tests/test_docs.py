"""Code blocks of docs/ run, links lead somewhere, and the tables of what others have are whole."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import torchrunx_ray as trx

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
WITH_LINKS = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]

_FENCE = re.compile(r"^(?P<indent> *)```(?P<kind>\w*)\n(?P<code>.*?)^ *```$", re.M | re.S)
_SETUP = re.compile(r"^<!-- run first\n(?P<code>.*?)^-->$", re.M | re.S)
_REASON = re.compile(r"<!-- not run: (?P<reason>\S.*) -->\s*$")
_ELSEWHERE = re.compile(r"<!-- run by (?P<test>\S+) -->\s*$")


def script_of(page: str) -> str:
    """The page's blocks of Python, one after the other; `<!-- run first` holds what readers know.

    Left out are those with a reason.
    """
    found = [*_SETUP.finditer(page), *_FENCE.finditer(page)]
    blocks = [
        match["code"]
        for match in sorted(found, key=lambda match: match.start())
        if match.re is _SETUP or (match["kind"] == "python" and not _left_out(match, page))
    ]
    return "\n".join(blocks)


def _left_out(block: "re.Match[str]", page: str) -> bool:
    return bool(_REASON.search(page[: block.start()]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if script_of(page.read_text())], ids=lambda page: page.name
)
def test_blocks_of_a_page_run_one_after_the_other(joined: None, page: Path, tmp_path: Path) -> None:
    (tmp_path / "page.py").write_text(script_of(page.read_text()))
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "page.py"],
        cwd=tmp_path,
        env={**os.environ, "TORCHRUNX_LOG_DIR": str(tmp_path / "logs")},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_block_is_left_out_for_a_reason_only() -> None:
    page = "<!-- run first\na = 1\n-->\n```python\nb = a\n```\n{}```python\nfalse(\n```\n"

    assert script_of(page.format("<!-- not run: needs a GPU -->\n")) == "a = 1\n\nb = a\n"
    for other in ("", "<!-- not run: -->\n", "<!-- skip -->\n"):
        assert "false(" in script_of(page.format(other))


def shell_blocks() -> list[tuple[str, str, str]]:
    """With their page, and the page's text before them."""
    pages = [(page.name, page.read_text()) for page in WITH_LINKS]
    return [
        (name, text[: block.start()], block["code"])
        for name, text in pages
        for block in _FENCE.finditer(text)
        if block["kind"] in ("bash", "sh", "sbatch")
    ]


@pytest.mark.parametrize(
    ("page", "before", "code"), shell_blocks(), ids=[name for name, *_ in shell_blocks()]
)
def test_shell_blocks_are_run_by_a_test_or_say_why_not(page: str, before: str, code: str) -> None:
    if (elsewhere := _ELSEWHERE.search(before)) is not None:
        assert page in (ROOT / elsewhere["test"]).read_text()
    else:
        assert _REASON.search(before) is not None
    done = subprocess.run(["bash", "-n"], input=code, capture_output=True, text=True, check=False)

    assert not done.stderr
    for module in re.findall(r"\bpython\d? -m (torchrunx_ray\S*)", code):
        assert Path(ROOT, *module.split(".")).with_suffix(".py").exists(), module
    for target in re.findall(r"^make (\S+)", code, re.M):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
    for script in re.findall(r"\bpython\d? ((?:examples|benchmarks)/\S+)", code):
        assert (ROOT / script).exists(), script


_LINK = re.compile(r"\]\((?!https?:)(?P<path>[^)#\s]*)(?:#(?P<anchor>[^)\s]+))?\)")


@pytest.mark.parametrize("page", WITH_LINKS, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    """As a code host reads them; `make docs` looks at them as the site has them."""
    text = _FENCE.sub("", page.read_text())
    for link in _LINK.finditer(text):
        target = page.parent / link["path"] if link["path"] else page
        assert target.exists(), link[0]
        if link["anchor"]:
            assert link["anchor"] in anchors(target.read_text()), link[0]


def anchors(page: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_site() -> None:
    nav = (ROOT / "mkdocs.yml").read_text()

    assert [
        page.name for page in PAGES if not re.search(rf"^ *- .*: {page.name}$", nav, re.M)
    ] == []


def test_every_public_name_is_in_the_reference() -> None:
    reference = set(re.findall(r"^::: torchrunx_ray\.\S*?(\w+)$", page_text("api.md"), re.M))

    assert set(trx.__all__) - {"__version__"} <= reference


def test_every_option_of_torchrun_has_its_row() -> None:
    page = page_text("torchrun.md")
    options = [
        option
        for action in get_args_parser()._actions
        for option in action.option_strings
        if option.startswith("--") and "_" not in option and option != "--help"
    ]

    assert len(options) > 25
    assert [option for option in options if f"`{option}" not in page] == []


def test_options_that_the_tables_name_are_there() -> None:
    fields = trx.Launcher.__dataclass_fields__
    for page in ("torchrun.md", "from_ray_train.md"):
        ours = [row.split("|")[2] for row in page_text(page).splitlines() if row.startswith("| `")]
        named = {name for cell in ours for name in re.findall(r"`(\w+)=", cell)}
        assert named - fields.keys() <= {"OMP_NUM_THREADS"}, page


def page_text(name: str) -> str:
    return (ROOT / "docs" / name).read_text()
