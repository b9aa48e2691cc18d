"""Only tissue is analysed, pixel by pixel, and a slide without any is reported as such."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import openslide
import pytest
import shapely
import tifffile
from numpy.typing import NDArray
from PIL import Image

from histostream.runtime import layout, slide_run
from histostream.runtime.bundle.card import Scores
from histostream.runtime.options import OptionError, Options
from histostream.runtime.slide_run import segment_slide
from histostream.wsi.errors import SlideError
from histostream.wsi.outputs.label_rows import NOT_ANALYSED
from histostream.wsi.slides.reader import SlideReader, open_slide
from histostream.wsi.tiling.cells import dilated, eroded
from tests.runtime.conftest import (
    CARD,
    IdentityEngine,
    PlaceDependentEngine,
    identity_engine,
    random_pixels,
    write_slide,
)
from tests.runtime.test_cli import infer
from tests.runtime.test_damage import damage, write_compressed

TISSUE = Options(overlap_px=16, probabilities=True)
WIDTH, HEIGHT = 900, 700  # at 0.5 um


def with_tissue(seed: int = 0) -> NDArray[np.uint8]:
    """Return glass with an oval of tissue and a speck, at 0.5 um."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    rng = np.random.default_rng(seed)
    pixels = np.full((HEIGHT, WIDTH, 3), (243, 242, 240), np.int16)
    pixels[((x - 420) / 260) ** 2 + ((y - 330) / 190) ** 2 < 1] = (205, 140, 180)
    pixels[640:660, 820:840] = (205, 140, 180)  # 10 um
    noisy: NDArray[np.int64] = pixels + rng.integers(-5, 6, pixels.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_slide(tmp_path / "slide.tif", with_tissue())


def labels_of(folder: Path) -> NDArray[np.uint8]:
    labels: NDArray[np.uint8] = tifffile.imread(folder / "labels.tif", level=0)
    return labels


def test_labels_are_of_the_tissue_and_its_margin_alone(slide: Path, tmp_path: Path) -> None:
    result = segment_slide(slide, identity_engine(), tmp_path / "out", TISSUE)
    labels = labels_of(result.folder)
    analysed = labels != NOT_ANALYSED
    y, x = np.mgrid[:HEIGHT, :WIDTH]

    def oval(margin_px: float) -> NDArray[np.bool_]:
        inside = ((x - 420) / (260 + margin_px)) ** 2 + ((y - 330) / (190 + margin_px)) ** 2 < 1
        return np.asarray(inside)

    assert analysed[oval(0)].all()
    # A margin of 16 um at the corners of a square, and a pixel and a half of 8 um.
    assert not analysed[~oval((16 * np.sqrt(2) + 12) / 0.5)].any()
    scores = tifffile.imread(result.folder / "probabilities.tif", level=0)
    assert (scores[~analysed] == 0).all()
    assert scores[analysed].any(axis=1).all()
    assert result.summary.analysed_mm2 == pytest.approx(analysed.sum() * 0.25e-6, rel=1e-6)
    assert sum(result.shares.values()) == pytest.approx(1)
    area = json.loads((result.folder / "run.json").read_text())["area"]
    assert area["mask_mpp"] == pytest.approx(8, rel=0.02)
    assert area["margin_um"] == pytest.approx(16, rel=0.02)
    assert area["tissue_mm2"] == pytest.approx(result.summary.analysed_mm2, rel=0.01)


def test_the_outline_is_that_of_the_labels(slide: Path, tmp_path: Path) -> None:
    """Here level 0 is the model's resolution, so that both have the same pixels."""
    result = segment_slide(slide, identity_engine(), tmp_path / "out", replace(TISSUE, rasters=("tissue-mask",)))
    collection = json.loads((result.folder / "tissue.geojson").read_text())
    assert "tissue.geojson" in result.files
    assert collection["type"] == "FeatureCollection"
    shapes = [shapely.geometry.shape(feature["geometry"]) for feature in collection["features"]]
    assert shapely.is_valid(shapes).all()
    assert {feature["properties"]["classification"]["name"] for feature in collection["features"]} == {"Tissue"}
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    inside = shapely.contains_xy(shapely.union_all(shapes), x + 0.5, y + 0.5)
    analysed = labels_of(result.folder) != NOT_ANALYSED
    np.testing.assert_array_equal(inside, analysed)
    raster = tifffile.imread(result.folder / "tissue.tif", level=0)
    np.testing.assert_array_equal(raster, analysed * np.uint8(255))


def test_holes_of_the_tissue_are_holes_of_the_outline(tmp_path: Path) -> None:
    pixels = with_tissue()
    pixels[200:460, 290:550] = pixels[:260, :260]  # a lumen of 130 um
    slide = write_slide(tmp_path / "slide.tif", pixels)
    result = segment_slide(slide, identity_engine(), tmp_path / "out", TISSUE)
    (feature,) = json.loads((result.folder / "tissue.geojson").read_text())["features"]
    assert len(feature["geometry"]["coordinates"]) == 2
    assert not shapely.geometry.shape(feature["geometry"]).contains(shapely.Point(420, 330))
    assert labels_of(result.folder)[330, 420] == NOT_ANALYSED


def test_the_area_does_not_depend_on_batch_bands_or_an_interruption(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = segment_slide(slide, PlaceDependentEngine(), tmp_path / "whole", TISSUE)
    expected = labels_of(whole.folder)
    scores = tifffile.imread(whole.folder / "probabilities.tif", level=0)

    class Failing(PlaceDependentEngine):
        def infer(self, tiles: NDArray[np.uint8]) -> Scores:
            if self.tiles > 40:
                raise SlideError("planted")
            return super().infer(tiles)

    monkeypatch.setattr(slide_run, "plan_bands", lambda *_, **__: [(0, 512), (512, WIDTH)])
    options = replace(TISSUE, batch=1)
    with pytest.raises(SlideError, match="planted"):
        segment_slide(slide, Failing(), tmp_path / "other", options)
    other = segment_slide(slide, PlaceDependentEngine(), tmp_path / "other", options)
    assert other.run.resumed is not None
    np.testing.assert_array_equal(labels_of(other.folder), expected)
    np.testing.assert_array_equal(tifffile.imread(other.folder / "probabilities.tif", level=0), scores)
    assert other.summary == whole.summary


def test_with_no_tissue_glass_is_analysed_too(slide: Path, tmp_path: Path) -> None:
    result = segment_slide(slide, identity_engine(), tmp_path / "out", replace(TISSUE, tissue=False))
    np.testing.assert_array_equal(labels_of(result.folder), with_tissue().argmax(axis=2))
    outline = json.loads((result.folder / "tissue.geojson").read_text())
    (ring,) = outline["features"][0]["geometry"]["coordinates"]
    assert shapely.Polygon(ring).equals(shapely.box(0, 0, WIDTH, HEIGHT))


# ---- slides from the field


def crop(wsi_slides: Path, x: int, y: int, side: int) -> NDArray[np.uint8]:
    with openslide.OpenSlide(wsi_slides / "CMU-1-Small-Region.svs") as opened:
        return np.asarray(opened.read_region((x, y), 0, (side, side)).convert("RGB"))


def write_jpeg(path: Path, pixels: NDArray[np.uint8]) -> Path:
    resolution = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
    args = {"compressionargs": {"level": 95}, "photometric": "rgb", "tile": (256, 256)}
    tifffile.imwrite(path, pixels, compression="jpeg", **args, **resolution)  # type: ignore[arg-type]
    return path


def grey(pixels: NDArray[np.uint8]) -> None:
    pixels[(pixels == 0).all(axis=2)] = 128


def frame(pixels: NDArray[np.uint8]) -> None:
    pixels[...] = np.where(np.pad(np.ones((500, 500, 1), bool), ((325, 199), (375, 149), (0, 0))), pixels, 0)


def strip(pixels: NDArray[np.uint8]) -> None:
    pixels[:, 740:840] = 0


@pytest.mark.parametrize(
    "change", [lambda pixels: None, grey, frame, strip], ids=["half-black", "grey", "frame", "strip"]
)
def test_areas_that_were_not_scanned_are_not_analysed(
    wsi_slides: Path, tmp_path: Path, change: Callable[[NDArray[np.uint8]], None]
) -> None:
    pixels = np.zeros((1024, 1024, 3), np.uint8)
    pixels[200:950, 250:1000] = 243
    pixels[400:784, 450:834] = crop(wsi_slides, 900, 1000, 384)
    scanned = np.full_like(pixels, 243)
    scanned[400:784, 450:834] = pixels[400:784, 450:834]
    options = replace(TISSUE, probabilities=False)
    truth = segment_slide(write_jpeg(tmp_path / "all.tif", scanned), identity_engine(256), tmp_path / "out", options)
    change(pixels)
    filled = dilated(eroded((pixels == pixels[0, 0]).all(axis=2)), 1)  # without single pixels of tissue
    slide = write_jpeg(tmp_path / "field.tif", pixels)
    result = segment_slide(slide, identity_engine(256), tmp_path / "out", options)
    analysed, expected = (labels_of(r.folder) != NOT_ANALYSED for r in (result, truth))
    assert not (analysed & filled).any()
    assert not (analysed & ~expected).any()
    beside = dilated(filled, 64)  # 32 um
    assert analysed[expected & ~beside].mean() > 0.999
    assert result.run.area is not None
    assert result.run.area.unscanned_mm2 == pytest.approx(filled.mean() * result.summary.slide_mm2, rel=0.1)


def test_a_single_patch_is_analysed(wsi_slides: Path, tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "patch.tif", crop(wsi_slides, 900, 1100, 256))
    result = segment_slide(slide, identity_engine(), tmp_path / "out", TISSUE)
    assert result.run.no_tissue is None
    assert result.summary.analysed_mm2 == pytest.approx((256 * 0.5e-3) ** 2, rel=0.02)


# ---- blocks that the file does not hold


def without_blocks(monkeypatch: pytest.MonkeyPatch, absent: NDArray[np.bool_]) -> None:
    """Have every slide lack some blocks, which are read as white."""

    def opened(path: Path, *_: object) -> SlideReader:
        reader = open_slide(path)
        decode = reader._decode  # type: ignore[attr-defined]

        def white(level: int, row: int, column: int) -> NDArray[np.uint8]:
            pixels: NDArray[np.uint8] = decode(level, row, column)
            return np.full_like(pixels, 255) if absent[row, column] else pixels

        reader._decode = white  # type: ignore[attr-defined]
        reader.missing = (absent,)
        return reader

    monkeypatch.setattr(slide_run, "open_for_model", opened)


@pytest.mark.parametrize("tissue", [True, False])
@pytest.mark.parametrize("mpp", [0.5, 0.8])
def test_absent_blocks_are_not_analysed_and_no_damage(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tissue: bool, mpp: float
) -> None:
    engine = IdentityEngine(replace(CARD, mpp=mpp))
    options = replace(TISSUE, tissue=tissue, overlap_px=0)
    full = labels_of(segment_slide(slide, engine, tmp_path / "full", replace(options, tissue=False)).folder)
    absent = np.zeros((11, 15), bool)
    absent[3:5, 4] = absent[10, 14] = absent[6, 7] = True
    without_blocks(monkeypatch, absent)
    result = segment_slide(slide, engine, tmp_path / "out", options)
    labels = labels_of(result.folder)
    scale, gone = mpp / 0.5, np.zeros(labels.shape, bool)
    for row, column in np.argwhere(absent):
        rows = slice(int(64 * row / scale), int(np.ceil(64 * (row + 1) / scale)))
        gone[rows, int(64 * column / scale) : int(np.ceil(64 * (column + 1) / scale))] = True
    assert (labels[gone] == NOT_ANALYSED).all()
    if not tissue:
        np.testing.assert_array_equal(labels[~gone], full[~gone])
    record = json.loads((result.folder / "run.json").read_text())
    assert record["damaged"] == []
    assert record["area"]["absent_mm2"] == pytest.approx(absent.mean() * result.summary.slide_mm2, rel=1e-3)


def test_a_file_without_any_block_has_nothing_to_analyse(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_blocks(monkeypatch, np.ones((11, 15), bool))
    engine = identity_engine()
    result = segment_slide(slide, engine, tmp_path / "out", replace(TISSUE, tissue=False))
    assert engine.tiles == 0
    assert "holds no pixels" in (result.run.no_tissue or "")


# ---- blocks that cannot be decoded


@pytest.mark.parametrize("tissue", [True, False])
def test_no_result_is_published_where_no_block_can_be_decoded(tmp_path: Path, tissue: bool) -> None:
    path = write_compressed(tmp_path / "slide.tif", random_pixels(180, 150))
    damage(path, range(9))
    with pytest.raises(SlideError, match=r"slide\.tif: none of the 9 blocks of level 0 .* copy or scan it again"):
        segment_slide(path, identity_engine(), tmp_path / "out", replace(TISSUE, tissue=tissue))
    assert not (tmp_path / "out").exists()  # nor a journal that a repaired slide would stumble over


def test_the_blocks_that_matter_are_those_of_the_analysed_area(tmp_path: Path) -> None:
    """All blocks with tissue are damaged, and those of glass are not."""
    pixels = np.full((320, 320, 3), 243, np.uint8)
    pixels[128:192, 128:192] = random_pixels(64, 64) // 2
    path = write_compressed(tmp_path / "slide.tif", pixels)
    damage(path, [12])
    roi = tmp_path / "roi.geojson"
    square = [[130, 130], [190, 130], [190, 190], [130, 190], [130, 130]]
    roi.write_text(json.dumps({"type": "Polygon", "coordinates": [square]}))
    options = Options(tissue=False, overlap_px=0, roi=roi)
    with pytest.raises(SlideError, match="none of the 1 blocks"):
        segment_slide(path, identity_engine(), tmp_path / "out", options)
    result = segment_slide(path, identity_engine(), tmp_path / "out", replace(options, roi=None))
    assert len(result.run.damaged or ()) == 1


# ---- masks of users, artefacts


def test_a_users_mask_is_joined_with_the_tissue(slide: Path, tmp_path: Path) -> None:
    whole = labels_of(segment_slide(slide, identity_engine(), tmp_path / "whole", TISSUE).folder)
    mask = np.zeros((HEIGHT // 7, WIDTH // 7), np.uint8)
    mask[:, : mask.shape[1] // 2] = 1
    Image.fromarray(mask).save(tmp_path / "mask.png")
    result = segment_slide(slide, identity_engine(), tmp_path / "out", replace(TISSUE, mask=tmp_path / "mask.png"))
    labels = labels_of(result.folder)
    left = (np.arange(WIDTH) + 0.5) * mask.shape[1] / WIDTH < mask.shape[1] // 2
    np.testing.assert_array_equal(labels, np.where(left, whole, NOT_ANALYSED))


@pytest.mark.parametrize("kind", ["mask", "roi"])
def test_a_mask_that_leaves_no_tissue_is_refused_before_any_work(slide: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "given.geojson"
    square = [[700, 0], [899, 0], [899, 90], [700, 90], [700, 0]]  # glass
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [square]}))
    engine = identity_engine()
    options = replace(TISSUE, roi=path) if kind == "roi" else replace(TISSUE, mask=path)
    with pytest.raises(SlideError, match=r"given\.geojson: no tissue in.*pass --no-tissue"):
        segment_slide(slide, engine, tmp_path / "out", options)
    assert engine.tiles == 0
    assert not (tmp_path / "out").exists()
    result = segment_slide(slide, engine, tmp_path / "out", replace(options, tissue=False))  # as it advises
    assert (labels_of(result.folder) != NOT_ANALYSED).sum() == pytest.approx(200 * 91, rel=0.02)


def test_a_bad_mask_is_refused_before_the_slide_is_read(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(np.ones((9, 100), np.uint8)).save(tmp_path / "mask.png")
    monkeypatch.setattr(layout, "thumbnail", lambda *_: pytest.fail("the slide was read"))
    with pytest.raises(SlideError, match=r"mask\.png: it has 100 x 9 px"):
        segment_slide(slide, identity_engine(), tmp_path / "out", replace(TISSUE, mask=tmp_path / "mask.png"))


def test_ink_is_left_out_if_it_is_asked_for_and_its_area_recorded(tmp_path: Path) -> None:
    pixels = with_tissue()
    pixels[100:340, 300:540] = pixels[100:340, 300:540] * (0.15, 0.5, 0.3)  # 120 um
    slide = write_slide(tmp_path / "slide.tif", pixels)
    kept = segment_slide(slide, identity_engine(), tmp_path / "kept", TISSUE)
    assert (labels_of(kept.folder)[150:300, 320:520] != NOT_ANALYSED).all()
    result = segment_slide(slide, identity_engine(), tmp_path / "out", replace(TISSUE, artefacts=True))
    assert (labels_of(result.folder)[100:340, 300:540] == NOT_ANALYSED).all()
    assert result.run.area is not None
    assert result.run.area.pen_mm2 == pytest.approx(0.120**2, rel=0.9)
    assert result.run.area.blurred_mm2 is not None
    picture = np.asarray(Image.open(result.folder / "overview.png").convert("RGB"))
    assert (picture[150:300, 320:520] == (255, 128, 0)).all(axis=2).mean() > 0.2  # hatched
    with pytest.raises(OptionError, match="--artefacts and --no-tissue"):
        Options(artefacts=True, tissue=False)


# ---- the status "no tissue"


def test_a_slide_without_tissue_has_a_status_and_a_reason_everywhere(
    slide: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    glass = write_slide(tmp_path / "glass.tif", np.full((300, 200, 3), 243, np.uint8))
    out = tmp_path / "out"
    arguments = (glass, slide, "--model", tiny_bundle, "--out", out, "--threads", "1")
    done = infer(*arguments)
    assert done.returncode == 4, done.stderr
    (message,) = [line for line in done.stderr.splitlines() if "glass.tif" in line]
    assert "no tissue was found" in message
    assert "--no-tissue" in message
    assert "2 slides: 1 done, 1 without tissue" in done.stdout
    lines = {line["name"]: line for line in csv.DictReader((out / "cohort.csv").read_text().splitlines())}
    assert lines["slide"]["status"] == "done"
    assert lines["glass"]["status"] == "no tissue"
    assert "--no-tissue" in lines["glass"]["reason"]
    assert "--no-tissue" in json.loads((out / "glass" / "run.json").read_text())["no_tissue"]
    assert "no_tissue" not in json.loads((out / "slide" / "run.json").read_text())
    page = (out / "report.html").read_text()
    attention = page[page.index("Needs attention") :].partition("</section>")[0]
    assert "no tissue" in attention
    assert "slide" not in attention.replace('<th scope="col">Slide', "")
    assert "Nothing was analysed: no tissue was found" in (out / "glass" / "report.html").read_text()

    again = infer(*arguments, "--log-json")
    assert again.returncode == 4
    events = [json.loads(line) for line in again.stderr.splitlines()]
    (event,) = [event for event in events if event["event"] == "slide" and event["slide"] == "glass.tif"]
    assert event["level"] == "warning"
    assert event["status"] == "no tissue"
    assert event["message"].startswith("done before; no tissue was found")
