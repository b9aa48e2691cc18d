"""The pages of the documentation and their blocks of code, as the tests read them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPOSITORY

PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
FENCE = re.compile(r"^(?P<fence>`{3,})(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=fence)$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")
# The line before a block that no test of the pages runs, with the reason.
NOT_RUN = re.compile(r"^<!-- not run: .+ -->\n\Z", re.MULTILINE)
PROGRAMS = ("histo-infer", "histo-train", "histo-export", "histo-bench", "make", "pip", "python", "ssh", "benchmarks/")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, its text, and the line of the page where the text starts."""

    info: str
    text: str
    line: int
    not_run: bool

    @property
    def commands(self) -> list[list[str]]:
        """The command lines of the block, split into words; comments and continuation lines are resolved."""
        if self.info not in ("", "sh"):
            return []
        lines = self.text.replace("\\\n", " ").splitlines()
        words = [shlex.split(line, comments=True) for line in lines if line.startswith(PROGRAMS)]
        return [line for line in words if line]


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        before = text[: found.start()]
        marked = NOT_RUN.search(before[before.rfind("\n", 0, -1) + 1 :]) is not None
        yield Block(found["info"], found["text"], text.count("\n", 0, found.start("text")), marked)


def prose(page: Path) -> str:
    """Return the text of a page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))
