"""Reading images and label images for training, with an error for every file that cannot be used."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from histostream.training.data import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read an image as (H, W, 3) uint8 RGB, or (H, W, 1) where it is grey.

    Raises
    ------
    DataError
        If it is no image, has more than one page or more than 8 bits, or is too large to be read
        as a whole.
    """
    image = open_image(path)
    if image.mode.startswith(("I", "F")) or ";16" in str(image.tile):
        image.close()
        raise DataError(f"{path}: more than 8 bits per channel; convert it to 8 bit")
    pixels = _loaded(path, image)
    if pixels.mode in ("L", "1"):
        return np.asarray(pixels.convert("L"))[..., None]
    return np.asarray(pixels.convert("RGB"))


def read_labels(path: Path) -> NDArray[np.integer]:
    """Read a label image, (H, W) of whole numbers as they are in the file.

    Raises
    ------
    DataError
        If it cannot be read, or has more than one channel or no whole numbers.
    """
    raw = np.asarray(_loaded(path, open_image(path)))
    if raw.ndim != 2:
        raise DataError(f"{path}: {raw.shape[2]} channels; a label image has a single one: save it with one")
    if raw.dtype.kind not in "biu":
        raise DataError(f"{path}: labels are {raw.dtype}; save them as whole numbers (PNG)")
    return raw.astype(np.uint8) if raw.dtype == bool else raw


def open_image(path: Path) -> ImageFile.ImageFile:
    """Open an image; its pixels are not read yet.

    Raises
    ------
    DataError
        If it is no image, holds more than one, or is larger than Pillow takes.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
            pages = getattr(image, "n_frames", 1)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path}: too large to be read as a whole ({error}); cut it into parts, or train from it as a slide"
        ) from error
    except (OSError, ValueError, SyntaxError) as error:
        if path.is_file() and path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty; copy it again") from error
        raise DataError(f"{path}: cannot be read as an image ({error}); save it again, or remove it") from error
    if pages > 1:
        image.close()
        raise DataError(f"{path}: {pages} images in one file; save each as a file of its own")
    return image


def _loaded(path: Path, image: ImageFile.ImageFile) -> ImageFile.ImageFile:
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        image.close()
        raise DataError(f"{path}: cannot be read as an image ({error}); save it again, or remove it") from error
    return image
