"""Write result files and their tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from histostream.wsi.errors import OutputError
from histostream.wsi.files import json_text, remove, temporary_name, writing


def write_together(out: Path, files: Mapping[str, str | Callable[[Path], None]]) -> list[Path]:
    """Write files into a folder under temporary names, and rename them once the last is complete.

    Parameters
    ----------
    out
        The folder; it is created if it is missing.
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
        if final.is_dir():  # renaming would fail after some files
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


def write_result(out: Path, result: Mapping[str, Any]) -> None:
    """Write a result file as JSON."""
    write_together(out.parent, {out.name: json_text(result)})


def table_lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def three_digits(value: float) -> str:
    """Return a number with three significant digits and no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def machine_line(hardware: Mapping[str, Any]) -> str:
    """Return the GPUs and the processor of a result in one line."""
    gpus = [gpu["name"] for gpu in hardware["gpus"]]
    return ", ".join([*gpus, f"{hardware['cpu']}, {hardware['cores']} cores"])
