"""Claims of files: what is sane passes, whatever the format; hostile ones are in tests/robustness."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from histostream.wsi.errors import SlideError
from histostream.wsi.slides.image_header import check_claim, check_plain_image, declared_size
from histostream.wsi.slides.tiff_check import check_tiff
from tests.robustness.hostile.edit import Tiff
from tests.robustness.hostile.seeds import seed_images, seed_slides

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", seed_slides())
def test_sane_files_pass(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.tif").write_bytes(seed_slides()[kind])
    check_tiff(tmp_path / "a.tif")


def test_real_slides_pass(wsi_slides: Path) -> None:
    for path in wsi_slides.rglob("*"):
        if path.is_file():
            check_tiff(path)


def with_sub_directories(path: Path) -> Tiff:
    with tifffile.TiffWriter(path) as file:
        file.write(PIXELS, tile=(16, 16), photometric="rgb", subifds=2)
        for step in (2, 4):
            file.write(PIXELS[::step, ::step], tile=(16, 16), photometric="rgb", subfiletype=1)
    return Tiff(path.read_bytes())


def test_directories_below_another_may_be_listed_and_linked(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    file = with_sub_directories(path)
    check_tiff(path)
    listed = file.find(330)
    first, second = (file.get(listed.place + 4 * i, 4) for i in range(2))
    file.put(first + 2 + 12 * file.get(first, 2), 4, second)
    path.write_bytes(file.data)
    check_tiff(path)


def test_sizes_in_directories_below_another_are_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    file = with_sub_directories(path)
    at = file.get(file.find(330).place, 4) + 2
    width = next(at + 12 * i for i in range(20) if file.get(at + 12 * i, 2) == 256)
    file.put(width + 8, 2, 60_000)
    path.write_bytes(file.data)
    with pytest.raises(SlideError, match="tiles lists"):
        check_tiff(path)


def test_the_size_that_an_image_claims_is_read_without_decoding_it() -> None:
    assert declared_size(bytes(imagecodecs.jpeg_encode(PIXELS))) == (56, 40)
    for codec in ("J2K", "JP2"):
        assert declared_size(bytes(imagecodecs.jpeg2k_encode(PIXELS, codecformat=codec))) == (
            56,
            40,
        )
    assert declared_size(zlib.compress(PIXELS.tobytes())) is None
    assert declared_size(b"") is None
    assert declared_size(b"\xff\xd8\xff\xc0") is None


def test_a_progressive_jpeg_of_an_encoder_is_no_claim() -> None:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "JPEG", progressive=True)
    check_claim(file.getvalue(), PIXELS.size // 3)
    with pytest.raises(ValueError, match="56 x 40 px"):
        check_claim(file.getvalue(), PIXELS.size // 3 - 1)


def test_images_of_one_colour_are_held_by_few_bytes(tmp_path: Path) -> None:
    # The smallest files that encoders make: the bounds must not refuse them.
    blank = Image.new("1", (9000, 9000))
    for name, image in {
        "a.png": blank,
        "b.gif": blank,
        "c.jpg": blank.convert("L"),
        "d.tga": blank.convert("L"),
        "e.bmp": blank,
    }.items():
        options: dict[str, Any] = {"quality": 1, "optimize": True} if name == "c.jpg" else {}
        image.save(tmp_path / name, **options)
        check_plain_image(tmp_path / name)


@pytest.mark.parametrize("extension", ["eps", "dds", "sgi", "pcx", "ico"])
def test_formats_that_are_none_for_slides_are_named(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"a.{extension}"
    path.write_bytes(seed_images()[extension])
    with pytest.raises(SlideError, match="is no format for slides; save it as PNG or TIFF"):
        check_plain_image(path)
