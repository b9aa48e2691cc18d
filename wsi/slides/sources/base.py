"""The contract of a source, how a URL finds its source, and names of slides and their files."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast
from urllib.parse import unquote

from histostream.wsi.errors import SlideError
from histostream.wsi.registry import Registry

MAX_INDEX_BYTES = 1 << 20  # a .vms or .vmu is a few kB of text

_SOURCES = Registry(
    "histostream.wsi.slides.sources", "histostream.sources", "source of slides", SlideError, hidden=("base",)
)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")  # two characters or more: C:// is a drive
_VALUE = re.compile(r"^\w+ *= *([^\r\n]+?)\s*$", re.MULTILINE)  # of a line "Key=value" in a .vms


class TransientError(SlideError):
    """A source failed in a way that may be over in a moment."""


@dataclass(frozen=True, slots=True)
class SlidePart:
    """One of the files that make a slide; most slides are a single one.

    Attributes
    ----------
    address
        Path or URL to read it from.
    name
        Path below the slide's folder, with ``/``.
    bytes
        Size that the source announces.
    modified
        Local: modification time in ns since 1970. Remote: ETag, or time of modification.
    """

    address: str
    name: str
    bytes: int
    modified: str


class Source(Protocol):
    """Where slides are read from: the members of a module in ``wsi/slides/sources``.

    Attributes
    ----------
    SCHEMES
        Schemes of the URLs that it takes, in lower case.
    """

    SCHEMES: tuple[str, ...]

    def find_parts(self, source: str) -> list[SlidePart]:
        """List the files of a slide: the slide's own first, then those that belong to it.

        Raises
        ------
        SlideError
            If there is no such slide, it may not be read, or its size is not known.
        """
        ...

    def read_part(self, part: SlidePart, chunk_bytes: int) -> Generator[bytes]:
        """Yield the content of one file that `find_parts` listed.

        Raises
        ------
        SlideError
            If it cannot be read or was replaced; `TransientError` if another attempt may help.
        """
        ...

    def list_files(self, url: str) -> list[str]:
        """List the URLs of the files below a folder (``.../``), or that match a pattern, sorted.

        Raises
        ------
        SlideError
            If this kind of source has no listings, or the folder cannot be listed.
        """
        ...


def source_of(slide: str) -> Source:
    """Return the source of a slide, given its path or URL.

    Raises
    ------
    SlideError
        If no source has the URL's scheme.
    """
    match = _SCHEME.match(slide)
    if match is None:
        return cast(Source, _SOURCES.load("disk"))
    by_scheme = {scheme: module for module in _SOURCES.load_all().values() for scheme in module.SCHEMES}
    if match[1].lower() not in by_scheme:
        known = ", ".join(f"{scheme}://" for scheme in by_scheme)
        raise SlideError(f"{slide}: no such kind of source; use a local path or one of {known}")
    return cast(Source, by_scheme[match[1].lower()])


def is_remote(source: str) -> bool:
    """Whether a source is a URL rather than a local path."""
    return _SCHEME.match(source) is not None


def redact_url(source: str) -> str:
    """Return a source without secrets: a web URL loses its query (a signature) and its login."""
    return re.sub(r"//[^/]*@", "//", re.split(r"[?#]", source)[0]) if _is_web(source) else source


def file_name(source: str) -> str:
    """Return the last component of a path or URL.

    Raises
    ------
    SlideError
        If the last component of a URL is not a plain name (`is_plain_name`), or its scheme is unknown.
    """
    if not is_remote(source):
        return Path(source).name or Path(source).resolve().name  # of "." and ".."
    source_of(source)
    if _is_web(source):
        host_and_path = re.split(r"[?#]", source)[0].partition("://")[2]
        name = unquote(host_and_path.partition("/")[2].rpartition("/")[2])
    else:
        name = source.rstrip("/").rpartition("/")[2]
    if not is_plain_name(name):
        raise SlideError(f"{redact_url(source)}: its last part {name!r} is not a plain file name; rename it there")
    return name


def is_plain_name(name: str) -> bool:
    """Whether a name can be that of a file or folder: not hidden, no separators, no control characters."""
    odd = any(c in "/\\" or unicodedata.category(c) in {"Cc", "Cs"} for c in name)
    return bool(name.strip()) and not name.startswith(".") and not odd


def named_files(index: bytes) -> set[str]:
    """Return the values after the ``=`` signs of a .vms or .vmu file; file names are among them."""
    return set(_VALUE.findall(index[:MAX_INDEX_BYTES].decode("utf-8", errors="replace")))


def _is_web(source: str) -> bool:
    return source.lower().startswith(("http://", "https://"))
