"""A model of four channels on a slide of four channels, from the file to the label map."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from histostream.runtime.crf.options import CrfOptions
from histostream.runtime.crf.params import CrfError, CrfParams
from histostream.runtime.options import Options
from histostream.runtime.slide_run import segment_slide
from histostream.wsi.errors import SlideError
from histostream.wsi.outputs.label_rows import ClassInfo
from tests.runtime.conftest import CARD, IdentityEngine, random_pixels, write_slide
from tests.runtime.host_device import HostDevice, HostDeviceEngine

NAMES = ("T1", "T1c", "T2", "FLAIR")
FOUR = replace(CARD, channels=4, channel_names=NAMES, classes=tuple(ClassInfo(n, (9, 9, 9)) for n in NAMES))


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (217, 301, 4), np.uint8)
    path = tmp_path / "four.tif"
    resolution: dict[str, Any] = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, pixels, tile=(64, 64), photometric="minisblack", planarconfig="contig", **resolution)
    return path


@pytest.mark.parametrize("on_device", [False, True])
def test_labels_are_those_of_the_four_channels(slide: Path, tmp_path: Path, on_device: bool) -> None:
    engine = HostDeviceEngine(IdentityEngine(FOUR), HostDevice(0)) if on_device else IdentityEngine(FOUR)
    result = segment_slide(slide, engine, tmp_path / "out", Options(overlap_px=16))
    labels = np.asarray(tifffile.imread(result.folder / "labels.tif", level=0))
    np.testing.assert_array_equal(labels, tifffile.imread(slide).argmax(axis=2))
    pixels, _, _ = result.region(0, 0, 301, 217)
    np.testing.assert_array_equal(pixels, tifffile.imread(slide)[..., :3])


def test_a_slide_with_other_channels_is_refused_by_their_names(slide: Path, tmp_path: Path) -> None:
    rgb = write_slide(tmp_path / "rgb.tif", random_pixels(90, 70))
    with pytest.raises(SlideError, match=r"3 channels, the model takes 4 channels \(T1, T1c, T2, FLAIR\)"):
        segment_slide(rgb, IdentityEngine(FOUR), tmp_path / "out", Options())
    with pytest.raises(SlideError, match="it has 4 channels, which are not colours"):
        segment_slide(slide, IdentityEngine(CARD), tmp_path / "out", Options())


def test_a_crf_needs_colours(slide: Path, tmp_path: Path) -> None:
    options = Options(crf=CrfOptions(CrfParams()))
    with pytest.raises(CrfError, match="this model takes T1, T1c, T2, FLAIR; leave --crf out"):
        segment_slide(slide, IdentityEngine(FOUR), tmp_path / "out", options)
