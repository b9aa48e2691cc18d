from __future__ import annotations

from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import tifffile

from histostream.wsi.errors import HistoError, SlideError
from histostream.wsi.registry import Registry
from histostream.wsi.slides import reader

READER = """
from histostream.wsi.slides.reader import DeclinedError, open_slide

ORDER = 1
SUFFIXES = (".wrapped",)


def open_reader(path):
    if path.suffix not in SUFFIXES:
        raise DeclinedError("not wrapped")
    return open_slide(path.with_suffix(".tif"), reader="tiff")
"""


def test_modules_of_a_folder_are_found_by_their_names() -> None:
    registry = Registry("histostream.wsi.slides.sources", "histostream.none")
    assert registry.names == ["cloud", "disk", "web"]
    assert registry.load("disk").SCHEMES == ()
    with pytest.raises(KeyError):
        registry.load("base64")


def test_another_package_adds_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried in its order, and folders are searched for its files."""
    (tmp_path / "other_package.py").write_text(READER)
    monkeypatch.syspath_prepend(tmp_path)
    added = metadata.EntryPoint("wrapped", "other_package", "histostream.readers")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [added] if group == added.group else [])
    monkeypatch.setattr(reader, "READERS", Registry("histostream.wsi.slides.readers", "histostream.readers"))
    reader.slide_suffixes.cache_clear()
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((64, 64, 3), np.uint8), tile=(64, 64), photometric="rgb")
    (tmp_path / "a.wrapped").touch()
    with pytest.raises(SlideError, match="empty"):
        reader.open_slide(tmp_path / "a.wrapped")
    (tmp_path / "a.wrapped").write_text("see a.tif")
    try:
        assert {".wrapped", ".svs"} <= reader.slide_suffixes()
    finally:
        reader.slide_suffixes.cache_clear()
    with reader.open_slide(tmp_path / "a.wrapped") as opened:
        assert opened.path == tmp_path / "a.tif"
    with pytest.raises(SlideError, match="one of large_image, tiff, wrapped"):
        reader.open_slide(tmp_path / "a.tif", reader="none")


def test_a_broken_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = metadata.EntryPoint("broken", "no_such_package", "histostream.readers")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [broken])
    with pytest.raises(HistoError, match=r"histostream\.readers broken: no_such_package cannot be loaded"):
        Registry("histostream.wsi.slides.readers", "histostream.readers").load_all()
