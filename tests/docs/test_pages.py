"""The pages build without a warning, links and anchors exist, and the navigation has every page."""

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
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the pages as HTML, without the API reference, which `make docs` builds in minutes."""
    pytest.importorskip("sphinx", reason="Sphinx comes with the extra docs")
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
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```$", index, re.M | re.S)
    named = [name for tree in trees for name in re.findall(r"^[\w-]+$", tree, re.M)]
    pages = [page.stem for kind in ("*.md", "*.ipynb") for page in DOCS.glob(kind) if page.stem != "index"]
    assert sorted(named) == sorted(pages)


@pytest.mark.parametrize("page", [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md"))], ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    """Links work on a git host too, and from the README, which Sphinx does not build."""
    for link in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme == "https", link
            assert "." in parts.netloc, link
        elif parts.path:
            assert (page.parent / parts.path).exists(), link
