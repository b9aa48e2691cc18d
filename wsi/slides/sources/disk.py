"""Slides on a local or mounted disk."""

from __future__ import annotations

import stat
from collections.abc import Generator, Iterator
from pathlib import Path

from histostream.wsi.errors import HistoError, SlideError, unreadable
from histostream.wsi.slides.dicom_series import is_dicom, series_files
from histostream.wsi.slides.sources.base import MAX_INDEX_BYTES, SlidePart, file_name, named_files

SCHEMES: tuple[str, ...] = ()  # local paths have none


def find_parts(source: str) -> list[SlidePart]:
    """List the files of a slide: the slide's own first, then those that belong to it."""
    path = Path(source)
    try:
        parts = [_part(file, path) for file in _files(path)]
    except (FileNotFoundError, NotADirectoryError):
        raise SlideError(f"{source}: there is no such file; check the path") from None
    except HistoError:
        raise
    except OSError as error:
        raise unreadable(source, error) from error
    if not parts:
        raise SlideError(f"{source}: a folder without files; name a slide")
    return parts


def read_part(part: SlidePart, chunk_bytes: int) -> Generator[bytes]:
    """Yield the content of one of the files that `find_parts` listed."""
    try:
        with Path(part.address).open("rb", buffering=0) as file:
            while chunk := file.read(chunk_bytes):
                yield chunk
    except OSError as error:
        raise unreadable(part.address, error) from error


def list_files(url: str) -> list[str]:
    """List nothing: only URLs are listed by their source."""
    raise SlideError(f"{url}: not the URL of a bucket; name a slide")


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from sorted(f for f in path.iterdir() if f.is_file() and f.name[0] != ".")
        return
    if not stat.S_ISREG(path.stat().st_mode):
        raise SlideError(f"{path}: a pipe or device, not a file; name a slide file")
    yield path
    suffix = path.suffix.lower()
    if suffix == ".mrxs" and path.with_suffix("").is_dir():
        yield from sorted(file for file in path.with_suffix("").rglob("*") if file.is_file())
    if is_dicom(path):
        yield from (file for file in series_files(path) if file != path)
    elif suffix == ".dcm":  # without the preamble: which files are of its series is not known
        yield from sorted(f for f in path.parent.glob("[!.]*.dcm") if f.is_file() and f != path)
    if suffix in {".vms", ".vmu"}:
        with path.open("rb") as file:
            names = named_files(file.read(MAX_INDEX_BYTES)) - {path.name}
        beside = {file.name for file in path.parent.iterdir() if file.is_file()}
        yield from (path.with_name(name) for name in sorted(names & beside))


def _part(file: Path, slide: Path) -> SlidePart:
    info = file.stat()
    name = file.relative_to(slide if slide.is_dir() else slide.parent).as_posix()
    if slide.is_dir():
        name = f"{file_name(str(slide))}/{name}"
    return SlidePart(str(file), name, info.st_size, str(info.st_mtime_ns))
