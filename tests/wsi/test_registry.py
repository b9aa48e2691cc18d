from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import tifffile

from histostream.wsi.errors import SlideError
from histostream.wsi.registry import Registry, entry_points
from histostream.wsi.slides import reader


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Forget the entry points of a test."""
    yield
    entry_points.cache_clear()
    reader.slide_suffixes.cache_clear()


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
    registry = Registry("histostream.wsi.slides.sources", "histostream.none", "source", SlideError, hidden=("base",))
    assert registry.names() == ["cloud", "disk", "web"]
    assert registry.load("disk").SCHEMES == ()
    with pytest.raises(SlideError, match="no source is called 'dusk': did you mean 'disk'"):
        registry.load("dusk")


def test_another_package_adds_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried in its order, and folders are searched for its files."""
    (tmp_path / "other_package.py").write_text(READER)
    monkeypatch.syspath_prepend(tmp_path)
    added = metadata.EntryPoint("wrapped", "other_package", "histostream.readers")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [added] if group == added.group else [])
    entry_points.cache_clear()
    reader.slide_suffixes.cache_clear()
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((64, 64, 3), np.uint8), tile=(64, 64), photometric="rgb")
    (tmp_path / "a.wrapped").touch()
    with pytest.raises(SlideError, match="empty"):
        reader.open_slide(tmp_path / "a.wrapped")
    (tmp_path / "a.wrapped").write_text("see a.tif")
    assert {".wrapped", ".svs"} <= reader.slide_suffixes()
    with reader.open_slide(tmp_path / "a.wrapped") as opened:
        assert opened.path == tmp_path / "a.tif"
    with pytest.raises(SlideError, match="known: large_image, openslide, tiff, wrapped"):
        reader.open_slide(tmp_path / "a.tif", reader="none")


def test_a_broken_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points.cache_clear()
    broken = metadata.EntryPoint("broken", "no_such_package", "histostream.readers")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [broken])
    with pytest.raises(SlideError, match=r"'broken' of another package cannot be loaded .*no_such_package"):
        reader.READERS.load_all()
