"""A user's mask keeps what it marks; one that cannot be of the slide is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from histostream.wsi.errors import SlideError
from histostream.wsi.geometry import Box
from histostream.wsi.slides.resolution import SlideView
from histostream.wsi.tiling import user_mask
from histostream.wsi.tiling.area import AnalysedArea
from histostream.wsi.tiling.user_mask import read_mask
from tests.wsi.slides.test_resolution import ArraySlide

VIEW = SlideView(ArraySlide(np.zeros((400, 600, 3), np.uint8)), 0, 2.0, 0.5)  # 300 x 200 px


def analysed(path: Path, view: SlideView = VIEW) -> NDArray[np.bool_]:
    mask = read_mask(path, view)
    labels = np.zeros((view.height, view.width), np.uint8)
    AnalysedArea.of(view, mask.masks, mask.regions).leave_out(Box(0, 0, view.width, view.height), labels)
    kept: NDArray[np.bool_] = labels == 0
    return kept


HALF = np.zeros((40, 60), np.uint8)
HALF[:, 30:] = 3


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff"])
@pytest.mark.parametrize(
    "pixels",
    [
        HALF,
        HALF > 0,
        HALF.astype(np.uint16) * 256,
        np.dstack([0 * HALF, HALF, 0 * HALF]),
        np.dstack([HALF, HALF, HALF, 0 * HALF + 255]),
    ],
    ids=["labels", "bits", "16 bits", "colours", "opaque"],
)
def test_images_of_any_kind_keep_what_is_not_0(tmp_path: Path, pixels: NDArray[np.generic], suffix: str) -> None:
    path = tmp_path / f"mask{suffix}"
    Image.fromarray(pixels).save(path)
    expected = np.zeros((200, 300), bool)
    expected[:, 150:] = True
    np.testing.assert_array_equal(analysed(path), expected)


def test_a_palette_is_no_value(tmp_path: Path) -> None:
    image = Image.fromarray(HALF).convert("P")
    image.putpalette([255, 255, 255] * 4)  # all are shown white
    image.save(tmp_path / "mask.png")
    assert analysed(tmp_path / "mask.png").mean() == 0.5


def test_masks_of_any_size_with_the_proportions_of_the_slide_are_taken(tmp_path: Path) -> None:
    for width, height in [(3, 2), (151, 100), (299, 200), (600, 400), (1201, 801)]:
        tifffile.imwrite(tmp_path / "mask.tif", np.ones((height, width), np.uint8))
        assert analysed(tmp_path / "mask.tif").all()


def feature(x: int, name: str | None) -> dict[str, object]:
    square = [[x, 0], [x + 99, 0], [x + 99, 399], [x, 399], [x, 0]]
    properties = {} if name is None else {"classification": {"name": name}}
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [square]},
        "properties": properties,
    }


def columns(path: Path) -> list[int]:
    """Return which of the six columns of 100 px of level 0 are analysed, by their middle."""
    return np.flatnonzero(analysed(path)[100, 25::50]).tolist()


@pytest.mark.parametrize("name", ["Ignore*", "pen", "Fold", "blur", "Artefact", "artifact", "out of focus", "my own*"])
def test_polygons_of_what_is_wrong_with_a_slide_are_left_out(tmp_path: Path, name: str) -> None:
    path = tmp_path / "mask.geojson"
    path.write_text(json.dumps([feature(100, name), feature(300, name)]))
    assert columns(path) == [0, 2, 4, 5]
    path.write_text(json.dumps([feature(100, "Tumor"), feature(200, None), feature(200, name)]))
    assert columns(path) == [1]


def refused(path: Path, message: str) -> None:
    with pytest.raises(SlideError, match=message):
        read_mask(path, VIEW)


def test_masks_that_cannot_be_of_the_slide_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mask.png"
    refused(path, r"mask\.png: there is no such file; check")
    path.write_bytes(b"\x89PNG and no more")
    refused(path, r"mask\.png: cannot be read as a mask \(cannot identify image file '.*'\); save it as PNG")
    path.write_bytes(b"%!PS-Adobe")  # for which Pillow would start a program
    refused(path, r"mask\.png: cannot be read as a mask")
    Image.fromarray(np.ones((60, 40), np.uint8)).save(path)  # turned
    refused(path, r"mask\.png: it has 40 x 60 px, .* proportions of the slide .* \(300 x 200 px\)")
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(path)
    refused(path, r"mask\.png: all of it is 0")
    monkeypatch.setattr(user_mask, "MAX_PX", 1000)
    refused(path, r"mask\.png: 60 x 40 px are too many")


def test_geojson_that_keeps_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mask.geojson"
    path.write_text(json.dumps([feature(100, "tissue"), feature(100, "Ignore*")]))
    inside = read_mask(path, VIEW)  # the outlines alone are left
    assert len(inside.regions) == 2
    square = [[-9, -9], [700, -9], [700, 500], [-9, 500], [-9, -9]]
    everything = feature(0, "pen") | {"geometry": {"type": "Polygon", "coordinates": [square]}}
    path.write_text(json.dumps([everything]))
    refused(path, r"mask\.geojson: its excluded polygons cover all")
    path.write_text(json.dumps([feature(5000, "tissue")]))
    refused(path, r"mask\.geojson: no polygon lies on the slide")
    path.write_text("[" * 100_000)
    refused(path, r"mask\.geojson: (nested too deeply|not valid)")
