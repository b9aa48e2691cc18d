"""Reading images and label images for training, with an error for every file that cannot be used."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from histostream.training.data import DataError
from histostream.wsi.errors import reason

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".npy")
TIFF_SUFFIXES = (".tif", ".tiff")
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601
MAX_CHANNELS = 64  # more are another order of the axes
PILLOW_PHOTOMETRICS = (3, 5, 6, 8, 9, 10)  # palette, CMYK, YCbCr and the kinds of Lab: Pillow makes RGB of them
ALPHA = (1, 2)  # of TIFF's tag ExtraSamples

Transparent = tuple[int, int, int] | Literal["channel"]


@dataclass(frozen=True, slots=True)
class Reading:
    """What has to be said about image files before they can be read as 8-bit images.

    Attributes
    ----------
    intensity
        Values of images with more than 8 bits that become 0 and 255; None: such images are refused.
    transparent
        Colour that transparent pixels get, or "channel": alpha is data, the last channel; None: images
        with transparent pixels are refused.
    place
        Where these are said, for messages; "" where they cannot be.
    """

    intensity: tuple[float, float] | None = None
    transparent: Transparent | None = None
    place: str = ""


@dataclass(frozen=True, slots=True)
class _Decoded:
    """The pixels of a file, as they are in it.

    Attributes
    ----------
    pixels
        (H, W, C); of an image with a palette (H, W, 1), the indices.
    alpha
        (H, W) uint8; None: the file has none.
    palette
        (256, 3) uint8; None: the file has none.
    lossy
        Name of the coding, where it changes values; else "".
    """

    pixels: NDArray[np.generic]
    alpha: NDArray[np.uint8] | None = None
    palette: NDArray[np.uint8] | None = None
    lossy: str = ""


def read_image(path: Path, reading: Reading | None = None) -> NDArray[np.uint8]:
    """Read an image as (H, W, C) uint8: RGB, grey with one channel, or of several channels.

    Raises
    ------
    DataError
        If it is no image, has several pages, is too large to be read as a whole, or has more than 8 bits
        or transparent pixels, of which ``reading`` says nothing.
    """
    reading = reading or Reading()
    decoded = _decode(path)
    pixels = decoded.pixels if decoded.palette is None else decoded.palette[decoded.pixels[..., 0]]
    return _without_alpha(path, _eight_bit(path, pixels, reading), decoded.alpha, reading)


def read_labels(path: Path) -> NDArray[np.integer]:
    """Read a label image, (H, W) of whole numbers as they are in the file.

    Raises
    ------
    DataError
        If it cannot be read, or has more than one channel or no whole numbers.
    """
    raw = read_coded_labels(path)[0]
    if raw.ndim != 2:
        raise DataError(f"{path}: {raw.shape[2]} channels; a label image has a single one: save it with one")
    return raw


def read_coded_labels(
    path: Path, *, place: str = "", lossy: bool = False
) -> tuple[NDArray[np.integer], NDArray[np.uint8] | None]:
    """Read a label image whose classes are numbers, or colours.

    Parameters
    ----------
    path
        The file.
    place
        Where a threshold can be said, for messages.
    lossy
        Whether a lossy format will do, as for a threshold.

    Returns
    -------
    labels
        (H, W) of whole numbers as they are in the file, or (H, W, 3) uint8 of colours.
    palette
        (256, 3) uint8, the colours of numbers that are indices; else None.

    Raises
    ------
    DataError
        If it cannot be read, is of a lossy format, is transparent anywhere, or has neither whole numbers
        nor colours.
    """
    decoded = _decode(path)
    if decoded.lossy and not lossy:
        own = f"; or, for a mask of two classes, add threshold = 128 to {place}" if place else ""
        raise DataError(
            f"{path}: {decoded.lossy} changes values, and a label must not change: export the labels again as PNG{own}"
        )
    if decoded.alpha is not None and decoded.alpha.min() < 255:
        raise DataError(f"{path}: a label image with transparent pixels; save it without an alpha channel")
    raw: NDArray[Any] = decoded.pixels
    if raw.dtype.kind == "f" and np.isfinite(raw).all() and (raw == np.rint(raw)).all():
        raw = raw.astype(np.int64)
    if raw.dtype.kind not in "biu":
        raise DataError(f"{path}: labels are {raw.dtype}; save them as whole numbers (PNG)")
    if raw.dtype == bool:
        raw = raw.astype(np.uint8)
    if raw.shape[2] == 1:
        return raw[..., 0], decoded.palette
    if raw.shape[2] != 3 or raw.dtype != np.uint8:
        raise DataError(f"{path}: {raw.shape[2]} channels of {raw.dtype}; a label image has one, or 8-bit colours")
    return raw, None


def open_image(path: Path) -> ImageFile.ImageFile:
    """Open an image with Pillow; its pixels are not read yet.

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
        raise _too_large(path, error) from error
    except (OSError, ValueError, SyntaxError) as error:
        raise _unreadable(path, error) from error
    if pages > 1:
        image.close()
        raise DataError(f"{path}: {pages} images in one file; save each as a file of its own")
    return image


# ----------------------------------------------------------------------------- files


def _decode(path: Path) -> _Decoded:
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return _Decoded(_npy(path))
    if suffix in TIFF_SUFFIXES and (pixels := _many_channels(path)) is not None:
        return _Decoded(pixels)
    image = open_image(path)
    if ";16" in str(image.tile) and image.format == "PNG" and image.mode != "I;16":
        image.close()
        return _deep_png(path)  # Pillow would read its colours as 8 bits
    if image.mode.startswith("I;16"):
        return _Decoded(np.asarray(_loaded(path, image)).astype(np.uint16)[..., None])
    image = _loaded(path, image)
    lossy = _lossy(path, image)
    if image.mode == "P" and "transparency" not in image.info:
        palette = np.zeros((256, 3), np.uint8)
        colors = np.asarray(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
        palette[: len(colors)] = colors
        return _Decoded(np.asarray(image)[..., None], palette=palette, lossy=lossy)
    if image.mode in ("1", "L", "I", "F") and "transparency" not in image.info:
        return _Decoded(np.asarray(image)[..., None], lossy=lossy)
    if image.mode in ("LA", "La") or (image.mode in ("1", "L") and "transparency" in image.info):
        both = np.asarray(image.convert("LA"))
        return _Decoded(both[..., :1], both[..., 1], lossy=lossy)
    if image.mode in ("RGBA", "RGBa", "PA") or "transparency" in image.info:
        four = np.asarray(image.convert("RGBA"))
        return _Decoded(four[..., :3], four[..., 3], lossy=lossy)
    return _Decoded(np.asarray(image.convert("RGB")), lossy=lossy)


def _npy(path: Path) -> NDArray[np.generic]:
    """Read (H, W) or (H, W, C) of numbers that NumPy saved; nothing is unpickled."""
    try:
        pixels = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, TypeError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(pixels, np.ndarray) or pixels.dtype.kind not in "biuf" or not pixels.size:
        raise DataError(f"{path}: no array of numbers; save (H, W) or (H, W, C) with numpy.save")
    return _with_channels(path, pixels, "numpy.save")


def _with_channels(path: Path, pixels: NDArray[np.generic], how: str) -> NDArray[np.generic]:
    """Return (H, W, C) of (H, W) or (H, W, C); the channels of (C, H, W) look like the width."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] > MAX_CHANNELS:
        raise DataError(f"{path}: an array of {pixels.shape}; save it as (H, W) or (H, W, C) with {how}")
    return pixels


def _many_channels(path: Path) -> NDArray[np.generic] | None:
    """Read a TIFF that Pillow does not read as it is, (H, W, C): of several channels, or more than 8 bits.

    None: a TIFF that Pillow reads, or no TIFF at all.
    """
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            page, series = tiff.pages.first, tiff.series
            if len(series) == 1 and _suits_pillow(page, len(tiff.pages)):
                return None
            axes = "".join(a for a, n in zip(series[0].axes, series[0].shape, strict=True) if n > 1 or a in "YX")
            shape = [n for a, n in zip(series[0].axes, series[0].shape, strict=True) if n > 1 or a in "YX"]
            if len(series) > 1 or axes not in ("YX", "YXS", "YXC", "CYX", "SYX"):
                count = len(tiff.pages)
                raise DataError(
                    f"{path}: {count} images in one file; save each as a file of its own, or, if they are the channels "
                    "of one image, save that as an array (H, W, C) with numpy.save"
                )
            if series[0].size > (Image.MAX_IMAGE_PIXELS or series[0].size) * MAX_CHANNELS:
                raise _too_large(path, f"{shape}")
            pixels: NDArray[np.generic] = series[0].asarray().reshape(shape)
    except tifffile.TiffFileError:
        return None
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:  # of damaged files
        if isinstance(error, DataError):
            raise
        raise _unreadable(path, error) from error
    return _with_channels(path, np.moveaxis(pixels, 0, -1) if axes in ("CYX", "SYX") else pixels, "numpy.save")


def _suits_pillow(page: object, pages: int) -> bool:
    bits = np.max(getattr(page, "bitspersample", 8))
    samples, photometric = getattr(page, "samplesperpixel", 1), int(getattr(page, "photometric", 1))
    extra = tuple(int(e) for e in getattr(page, "extrasamples", ()))
    if pages > 1 or bits > 8:
        return False
    if photometric in PILLOW_PHOTOMETRICS:
        return True
    return samples == (1 if photometric < 2 else 3) or (len(extra) == 1 and extra[0] in ALPHA)


def _deep_png(path: Path) -> _Decoded:
    import imagecodecs

    try:
        pixels = imagecodecs.png_decode(path.read_bytes())
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreadable(path, error) from error
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    pixels = pixels.reshape(*pixels.shape[:2], channels)
    if channels in (2, 4):
        return _Decoded(pixels[..., :-1], (pixels[..., -1] >> 8).astype(np.uint8))
    return _Decoded(pixels)


def _lossy(path: Path, image: Image.Image) -> str:
    """Return the name of the file's coding where it changes values."""
    kind, compression = getattr(image, "format", None), str(image.info.get("compression", ""))
    if kind in ("JPEG", "MPO") or "jpeg" in compression:
        return "JPEG"
    if kind == "WEBP" and b"VP8L" not in path.read_bytes()[:64]:
        return "lossy WebP"
    return ""


def _loaded(path: Path, image: ImageFile.ImageFile) -> ImageFile.ImageFile:
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        image.close()
        raise _unreadable(path, error) from error
    return image


def _unreadable(path: Path, error: BaseException) -> DataError:
    if path.is_file() and path.stat().st_size == 0:
        return DataError(f"{path}: the file is empty; copy it again")
    return DataError(f"{path}: cannot be read as an image ({reason(error)}); save it again, or remove it")


def _too_large(path: Path, cause: object) -> DataError:
    return DataError(
        f"{path}: too large to be read as a whole ({cause}); cut it into parts, or train from it as a slide"
    )


# ----------------------------------------------------------------------------- pixels


def _eight_bit(path: Path, pixels: NDArray[np.generic], reading: Reading) -> NDArray[np.uint8]:
    """Bring values to 0..255: 8-bit ones stay, others are scaled linearly, cut off at both ends."""
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype == np.uint8:
        return pixels.astype(np.uint8, copy=False)
    values = pixels.astype(np.float64)
    if not np.isfinite(values).all():
        raise DataError(f"{path}: values that are no numbers (nan or infinite); replace them")
    if reading.intensity is None:
        low, high = values.min(), values.max()
        text = f"{path}: more than 8 bits per channel ({pixels.dtype}, {low:g} to {high:g})"
        if not reading.place:
            raise DataError(f"{text}; convert it to 8 bit")
        likely = _likely_range(pixels.dtype, low, high)
        raise DataError(
            f"{text}: add the values of black and white to {reading.place}, as intensity = {likely}; "
            "or convert it to 8 bit"
        )
    black, white = reading.intensity
    return np.clip((values - black) / (white - black) * 255 + 0.5, 0, 255).astype(np.uint8)


def _likely_range(dtype: np.dtype[np.generic], low: float, high: float) -> list[float]:
    """Return the range that values are of, by what cameras give: so many bits, or 0 to 1."""
    if dtype.kind == "f":
        return [min(0.0, float(np.floor(low))), max(1.0, float(np.ceil(high)))]
    bits = next(bits for bits in (8, 10, 12, 14, 16, 32, 64) if high < 1 << bits)
    return [min(0, int(low)), (1 << bits) - 1]


def _without_alpha(
    path: Path, pixels: NDArray[np.uint8], alpha: NDArray[np.uint8] | None, reading: Reading
) -> NDArray[np.uint8]:
    if alpha is None:
        return pixels
    if reading.transparent == "channel":
        return np.concatenate([pixels, alpha[..., None]], axis=2)
    share = (alpha < 255).mean()
    if not share:
        return pixels
    if reading.transparent is None:
        text = f"{path}: {100 * share:.3g} % of its pixels are transparent, and what lies under them cannot be seen"
        own = f"add the colour they are to have to {reading.place}, as transparent = [255, 255, 255]"
        raise DataError(
            f'{text}: {own}; or transparent = "channel", to train on alpha as a channel of its own'
            if reading.place
            else f"{text}; save it without an alpha channel"
        )
    under = np.asarray(reading.transparent, np.float64)
    if pixels.shape[2] == 1:
        under = np.asarray([under @ LUMA])
    cover = alpha[..., None] / 255
    return (pixels * cover + under * (1 - cover) + 0.5).astype(np.uint8)
