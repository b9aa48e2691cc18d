from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from histostream.wsi.errors import SlideError
from histostream.wsi.slides.channels import open_channels
from histostream.wsi.slides.reader import open_slide

NAMES = ("T1", "T1c", "T2", "FLAIR")


def image(channels: int = 4, height: int = 150, width: int = 220) -> NDArray[np.uint8]:
    return np.random.default_rng(channels).integers(0, 256, (height, width, channels), np.uint8)


def write(path: Path, pixels: NDArray[np.uint8], kind: str) -> Path:
    """Write (H, W, C) as one of the kinds of files that microscopes and libraries write."""
    planes = np.moveaxis(pixels, -1, 0)
    if kind == "interleaved tiles":
        tifffile.imwrite(path, pixels, tile=(64, 64), photometric="minisblack", planarconfig="contig")
    elif kind == "interleaved strips":
        tifffile.imwrite(path, pixels, rowsperstrip=16, photometric="minisblack", planarconfig="contig")
    elif kind == "deflate":
        tifffile.imwrite(
            path, pixels, tile=(64, 64), planarconfig="contig", photometric="minisblack", compression="deflate"
        )
    elif kind == "OME planes":
        metadata: dict[str, Any] = {"axes": "CYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
        metadata["Channel"] = {"Name": list(NAMES)}
        tifffile.imwrite(path, planes, ome=True, tile=(64, 64), photometric="minisblack", metadata=metadata)
    else:
        with tifffile.TiffWriter(path, ome=True) as file:  # a pyramid of planes
            metadata = {"axes": "CYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
            file.write(planes, tile=(64, 64), photometric="minisblack", subifds=1, metadata=metadata)
            file.write(planes[:, ::2, ::2], tile=(64, 64), photometric="minisblack", subfiletype=1)
    return path


KINDS = ["interleaved tiles", "interleaved strips", "deflate", "OME planes", "OME pyramid"]


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_of_all_channels_come_back_in_their_order(tmp_path: Path, kind: str) -> None:
    pixels = image()
    with open_channels(write(tmp_path / "image.ome.tif", pixels, kind), NAMES) as slide:
        assert slide.channels == 4
        np.testing.assert_array_equal(slide.read(0, 0, 0, 220, 150), pixels)
        np.testing.assert_array_equal(slide.read(0, 37, 61, 101, 80), pixels[61:141, 37:138])
        assert slide.mpp == (0.5 if "OME" in kind else None)
        if kind == "OME pyramid":
            np.testing.assert_array_equal(slide.read(1, 0, 0, 110, 75), pixels[::2, ::2])


@pytest.mark.parametrize("channels", [2, 5, 17])
def test_any_number_of_channels_is_read(tmp_path: Path, channels: int) -> None:
    pixels = image(channels)
    names = tuple(f"c{i}" for i in range(channels))
    with open_channels(write(tmp_path / "image.tif", pixels, "interleaved tiles"), names) as slide:
        np.testing.assert_array_equal(slide.read(0, 0, 0, 220, 150), pixels)


def test_another_number_of_channels_is_refused_by_their_names(tmp_path: Path) -> None:
    path = write(tmp_path / "image.ome.tif", image(), "OME planes")
    with pytest.raises(SlideError, match=r"4 channels \(T1, T1c, T2, FLAIR\), the model takes 2 .*\(DAPI, FITC\)"):
        open_channels(path, ("DAPI", "FITC"))


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_channels_are_not_taken_for_colours_and_transparency(tmp_path: Path, channels: int) -> None:
    path = write(tmp_path / "image.tif", image(channels), "interleaved strips")
    with pytest.raises(SlideError, match=f"it has {channels} channels, which are not colours"):
        open_slide(path)


def test_grey_with_alpha_is_grey(tmp_path: Path) -> None:
    pixels = image(2)
    pixels[..., 1] = 255
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack", planarconfig="contig", extrasamples=[2])
    with open_slide(tmp_path / "a.tif") as slide:
        np.testing.assert_array_equal(slide.read(0, 0, 0, 220, 150), pixels[..., :1])


def test_rgb_images_other_types_and_other_files_are_refused_with_what_to_do(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "rgb.tif", image(3), photometric="rgb", tile=(64, 64))
    with pytest.raises(SlideError, match="it has 3 channels, the model takes 4 channels"):
        open_channels(tmp_path / "rgb.tif", NAMES)
    tifffile.imwrite(tmp_path / "deep.tif", image().astype(np.uint16), photometric="minisblack", planarconfig="contig")
    with pytest.raises(SlideError, match=r"uint16, the model takes 8 bits; scale each channel to 0\.\.255"):
        open_channels(tmp_path / "deep.tif", NAMES)
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    with pytest.raises(SlideError, match="read from TIFF and OME-TIFF only"):
        open_channels(tmp_path / "image.png", NAMES)
    stack = np.zeros((3, 4, 64, 64), np.uint8)
    tifffile.imwrite(tmp_path / "stack.ome.tif", stack, ome=True, metadata={"axes": "ZCYX"})
    with pytest.raises(SlideError, match="its axes are ZCYX"):
        open_channels(tmp_path / "stack.ome.tif", NAMES)
