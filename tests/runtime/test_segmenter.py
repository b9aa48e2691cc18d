"""The notebook's way in: the same results as the command's, to compute with and to look at."""

from __future__ import annotations

import html.parser
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from histostream.runtime import Options, ResultError, Segmenter, SlideResult, segment_slide
from histostream.runtime.bundle.card import Scores
from histostream.runtime.cli import main
from histostream.runtime.engines.base import Engine
from histostream.wsi.errors import HistoError, SlideError
from histostream.wsi.records import to_json
from tests.runtime.conftest import CARD, IdentityEngine, as_shares, identity_engine, random_pixels, write_slide

mpl.use("agg")
ALL = Options(tissue=False, overlap_px=16, blend="crop", probabilities=True)
PIXELS = random_pixels(700, 500)
LABELS = PIXELS.argmax(axis=2)


@dataclass
class Slow(IdentityEngine):
    """Takes its time over each batch."""

    def infer(self, tiles: NDArray[np.uint8]) -> Scores:
        time.sleep(0.02)
        return super().infer(tiles)


class Tags(html.parser.HTMLParser):
    """Counts tags."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] += 1


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_slide(tmp_path / "slide.tif", PIXELS)


@pytest.fixture
def engine() -> IdentityEngine:
    return identity_engine()


@pytest.fixture
def segmenter(engine: IdentityEngine) -> Iterator[Segmenter]:
    with Segmenter(lambda: engine) as segmenter:
        yield segmenter


@pytest.fixture
def result(segmenter: Segmenter, slide: Path, tmp_path: Path) -> SlideResult:
    return segmenter.run(slide, tmp_path / "out", ALL)


def test_labels_scores_and_areas_are_those_of_the_slide(result: SlideResult, slide: Path) -> None:
    assert (result.labels[:] == LABELS).all()
    assert result.probabilities is not None
    assert (result.probabilities[100:140, 600:] == as_shares(PIXELS[100:140, 600:])).all()
    for label, name in enumerate(("red", "green", "blue")):
        share = (label == LABELS).mean()
        assert result.shares[name] == pytest.approx(share)
        assert result.areas[name] == pytest.approx(share * 700 * 500 * (result.mpp / 1000) ** 2)
    assert result.classes == CARD.classes
    assert set(result.files) >= {"labels.tif", "probabilities.tif", "summary.json"}
    assert all(path.is_file() for path in result.files.values())
    again = segment_slide(slide, identity_engine(), result.folder.parent / "again", ALL)
    assert again.files.keys() == result.files.keys()
    assert again.probabilities is not None


def test_it_is_read_again_as_it_was(result: SlideResult) -> None:
    again = SlideResult.read(result.folder)
    assert (again.summary, again.areas, again.run) == (result.summary, result.areas, result.run)
    with again.open_slide() as slide:
        assert (slide.read(0, 0, 0, 700, 500) == PIXELS).all()


def test_a_result_that_is_there_is_not_computed_again(
    segmenter: Segmenter, engine: IdentityEngine, slide: Path, tmp_path: Path, result: SlideResult
) -> None:
    tiles = engine.tiles
    assert segmenter.run(str(slide), tmp_path / "out", ALL).run == result.run
    assert engine.tiles == tiles
    segmenter.run(slide, tmp_path / "out", ALL, restart=True)
    assert engine.tiles == 2 * tiles


def test_it_is_the_result_of_the_command(
    tiny_bundle: Path, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = CliRunner().invoke(main, [str(slide), "--model", str(tiny_bundle), "--out", str(tmp_path), "--no-tissue"])
    assert said.exit_code == 0, said.output
    theirs = SlideResult.read(tmp_path / "slide")

    def refuse(*_: object) -> Engine:
        raise AssertionError("computed again")

    with Segmenter.load(tiny_bundle) as segmenter:
        assert "ground, gland, nucleus" in repr(segmenter)
        monkeypatch.setattr(type(segmenter._worker.engine), "infer", refuse)
        assert segmenter.run(slide, tmp_path, Options(tissue=False)).run == theirs.run


def test_an_image_in_memory_is_segmented(segmenter: Segmenter) -> None:
    assert (segmenter.segment(PIXELS, blend="crop") == LABELS).all()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell starts what runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_keeps_what_is_finished(slide: Path, tmp_path: Path) -> None:
    engine = Slow(identity_engine().card)
    seen: list[int] = []

    def interrupt(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with Segmenter(lambda: engine) as segmenter:
        with pytest.raises(KeyboardInterrupt):
            segmenter.run(slide, tmp_path / "out", ALL, report=interrupt)
        assert not list(tmp_path.glob("out/slide/run.json"))
        found = segmenter.run(slide, tmp_path / "out", ALL)
    assert to_json(found.run)["resumed"]["runs"] == 2
    assert (found.labels[:] == LABELS).all()
    assert not [t for t in threading.enumerate() if t.name.startswith(("slide_", "device_"))]


@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_region_shows_each_place_with_its_label(segmenter: Segmenter, tmp_path: Path, step: int) -> None:
    coarse = np.kron(random_pixels(90, 70), np.ones((8, 8, 1), np.uint8))
    slide = write_slide(tmp_path / "coarse.tif", coarse)
    result = segmenter.run(slide, tmp_path / "out", ALL)
    pixels, labels, found = result.region(8, 16, 320, 240, longest_px=320 // step)
    assert found == step
    assert pixels.shape == (240 // step, 320 // step, 3)
    assert (pixels.argmax(axis=2) == labels).all()
    assert (labels == coarse[16:256:step, 8:328:step].argmax(axis=2)).all()


def test_a_plot_paints_the_classes_where_they_are(segmenter: Segmenter, tmp_path: Path) -> None:
    pixels = np.full((200, 300, 3), 10, np.uint8)
    pixels[..., 0] = 100
    pixels[50:100, 200:250] = (10, 10, 100)
    slide = write_slide(tmp_path / "square.tif", pixels)
    result = segmenter.run(slide, tmp_path / "out", ALL)
    axes = result.plot(opacity=1)
    (image,) = axes.images
    shown = np.asarray(image.get_array())
    assert (shown[50:100, 200:250] == (0, 0, 255)).all()
    assert (shown == (0, 0, 255)).all(axis=2).sum() == 50 * 50
    assert tuple(image.get_extent()) == (0, 150, 100, 0)  # um
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text().split()[0] for text in legend.get_texts()] == ["red", "green", "blue"]


def test_a_plot_goes_on_without_a_slide_that_is_gone(
    result: SlideResult, slide: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slide.unlink()
    with pytest.raises(SlideError, match=r"slide\.tif is not there; name the folder"):
        result.open_slide()
    result.plot(100, 100, 50, 50)
    assert "without it" in caplog.text


def test_a_slide_that_moved_is_opened_where_it_is(result: SlideResult, slide: Path, tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    slide.rename(tmp_path / "archive" / slide.name)
    with result.open_slide(tmp_path / "archive") as opened:
        assert (opened.read(0, 0, 0, 700, 500) == PIXELS).all()


def test_another_slide_in_its_place_is_refused(result: SlideResult, slide: Path) -> None:
    write_slide(slide, random_pixels(700, 500, seed=1))
    with pytest.raises(SlideError, match=r"has another size|was changed since"):
        result.open_slide()


def test_a_notebook_shows_the_overview_and_no_markup_of_names(result: SlideResult) -> None:
    first, *others = result.summary.classes
    classes = (replace(first, name="<script>alert(1)</script>"), *others)
    summary = replace(result.summary, classes=classes)
    reader = Tags()
    reader.feed(SlideResult(result.folder, summary, result.run)._repr_html_())
    assert reader.count["img"] == 1
    assert reader.count["tr"] == 3
    assert not reader.count["script"]


def test_what_is_no_result_is_refused(tmp_path: Path, result: SlideResult) -> None:
    with pytest.raises(ResultError, match="no finished result"):
        SlideResult.read(tmp_path)
    for text in ("{", "{}", '{"classes": 3}', "[]"):
        (result.folder / "summary.json").write_text(text)
        with pytest.raises(ResultError, match="no summary of classes"):
            SlideResult.read(result.folder)


def test_what_cannot_be_segmented_is_said_in_a_line(segmenter: Segmenter, tmp_path: Path) -> None:
    (tmp_path / "text.tif").write_text("none")
    for name, said in {"none.svs": "none.svs", "text.tif": "text.tif"}.items():
        with pytest.raises(ResultError, match=said) as found:
            segmenter.run(tmp_path / name, tmp_path / "out")
        assert "Traceback" not in str(found.value)
    for i in range(2):
        write_slide(tmp_path / f"slides{i}.tif", PIXELS)
    with pytest.raises(HistoError, match="run them one by one"):
        segmenter.run(f"{tmp_path}/slides*.tif", tmp_path / "out")


@pytest.mark.parametrize("place", [(0, 0, 701, 9), (-1, 0, 9, 9), (700, 0, None, None), (0, 0, 0, 9)])
def test_places_off_the_slide_are_refused(result: SlideResult, place: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="does not lie on a label map of 700x500 px"):
        result.region(*place)
