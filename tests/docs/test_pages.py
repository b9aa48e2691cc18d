"""The pages build without a warning: links and anchors exist, and every page is led to."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.full

DOCS = REPOSITORY / "docs"
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
COMING = {"rasters", "viewer", "reports", "notebook"}  # guides that a checkout may not have yet
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the pages as HTML, without the reference: `make docs` builds that too, in minutes."""
    pytest.importorskip("sphinx", reason="Sphinx is of the extra docs")
    out = tmp_path_factory.mktemp("docs")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-n",
        "-q",
        "-b",
        "html",
        "-t",
        "pages",
        "-d",
        str(out / "trees"),
        str(DOCS),
        str(out / "html"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / "html"


def test_every_page_is_built(built: Path) -> None:
    for page in DOCS.glob("*.md"):
        assert page.stem == "api" or (built / f"{page.stem}.html").is_file(), page


def test_the_navigation_names_pages() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\{toctree(-of-pages-there)?\}\n(.*?)^```$", index, re.M | re.S)
    named = {name for _, block in blocks for name in re.findall(r"^[\w-]+$", block, re.M)}
    assert {page.stem for page in DOCS.glob("*.md")} <= named | {"index"}
    assert named <= {page.stem for page in DOCS.iterdir()} | COMING


@pytest.mark.parametrize("page", [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md"))], ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    """Where no Sphinx follows them too: on a git host, and from the README."""
    for link in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme == "https", link
            assert "." in parts.netloc, link
        elif parts.path:
            assert (page.parent / parts.path).exists(), link
