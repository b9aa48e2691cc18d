"""Result files, all of them whole, or none of them there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from histostream.wsi.errors import OutputError
from histostream.wsi.files import remove, temporary_name, writing


def write_together(out: Path, files: Mapping[str, str | Callable[[Path], None]]) -> list[Path]:
    """Write files into a folder: each beside its name, and renamed when the last is whole.

    Parameters
    ----------
    out
        The folder; it is made where it is missing.
    files
        By name: the text, or a function that writes to the path that it is given.

    Raises
    ------
    OutputError
        If one cannot be written; then none is.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    pairs = [(temporary_name(out / name), out / name) for name in files]
    for _, final in pairs:
        if final.is_dir():  # renaming would fail in the middle
            raise OutputError(f"cannot write {final}: a folder is in the way; move it")
    try:
        for (temporary, final), content in zip(pairs, files.values(), strict=True):
            with writing(final):
                if isinstance(content, str):
                    temporary.write_text(content, encoding="utf-8")
                else:
                    content(temporary)
        for temporary, final in pairs:
            with writing(final):
                temporary.replace(final)
    finally:
        remove(temporary for temporary, _ in pairs)
    return [final for _, final in pairs]
