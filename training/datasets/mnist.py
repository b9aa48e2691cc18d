"""Cluttered MNIST: one digit among scraps of digits, generated from the four MNIST files.

The presence images P hold one digit on a ground of noise and ``clutter`` scraps of 10 x 10 pixels
of other digits; the absence images A the ground and the scraps alone. The rules are those of the
authors' code (github.com/veugene/genseg). The same options give the same images everywhere.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histostream.training.data import DataError, DataSet, StoredPicture, StoredSample
from histostream.training.datasets._files import check_option

CLASSES = (("background", (0, 0, 0)), ("digit", (255, 200, 60)))
DIGIT_PX, SCRAP_PX = 28, 10
NOISE = 0.01  # standard deviation of the ground, where a digit's ink is 1
INK = 0.5  # a pixel above it is digit
LABELLED_DIGIT = 9  # the only one with masks where not all images have one
HELD_BACK = 500  # of the 60,000: the digits of the validation images
VALIDATION = 500  # images
IDX_UINT8 = 0x08  # third byte of an idx file; the fourth is the number of axes

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Variant:
    """Side of an image, and scraps in it."""

    side_px: int
    clutter: int


VARIANTS = {"simple": Variant(48, 8), "hard": Variant(48, 24), "large": Variant(128, 80)}


def read(
    path: Path,
    *,
    variant: str = "simple",
    count: int = 2000,
    seed: int = 0,
    labelled: float = 1.0,
    test: int = 1000,
) -> DataSet:
    """Generate the images; pools "presence" and "absence" are the P and A images of training.

    Parameters
    ----------
    path
        Folder of the four MNIST files, packed with gzip or not.
    variant
        "simple" (48 px, 8 scraps), "hard" (48 px, 24) or "large" (128 px, 80).
    count
        P images to train on, and A images.
    seed
        Another seed is other images.
    labelled
        Share of the P images that have a mask. Below 1 they are all images of the digit 9, as in
        the paper (0.01), and so at most a tenth.
    test
        Images of the test part, of other digits, as far as there are so many; 10000 in the paper.

    Raises
    ------
    DataError
        If an option does not fit, or a file is missing or damaged.
    """
    check_option("variant", variant, tuple(VARIANTS))
    if seed < 0 or test < 1:
        raise DataError(f"seed={seed}, test={test}: use 0 or more, and 1 or more")
    size = VARIANTS[variant]
    digits, names = _read_fold(path, "train")
    if not 1 <= count <= len(digits) - HELD_BACK:
        raise DataError(f"count={count}: use 1 to {len(digits) - HELD_BACK}")
    order = np.random.default_rng((seed, 0)).permutation(len(digits))
    train, held_back = order[HELD_BACK:], order[:HELD_BACK]
    tests = _read_fold(path, "t10k")[0]
    present = _presence("p", digits, train[:count], digits[train], size, (seed, 1))
    absent = _absence(digits[train], count, size, (seed, 2))
    return DataSet(
        "mnist",
        CLASSES,
        None,
        train=_labelled(present, names[train[:count]], labelled),
        validation=_presence("v", digits, held_back[:VALIDATION], digits[held_back], size, (seed, 3)),
        test=_presence("t", tests, np.arange(min(test, len(tests))), tests, size, (seed, 4)),
        pools={
            "presence": tuple(StoredPicture(s.name, s.group, s.image) for s in present),
            "absence": absent,
        },
    )


def _labelled(samples: tuple[StoredSample, ...], digit: NDArray[np.uint8], share: float) -> tuple[StoredSample, ...]:
    """Keep the samples that have a mask."""
    if not 0 < share <= 1:
        raise DataError(f"labelled={share}: use a share above 0, up to 1")
    if share == 1:
        return samples
    allowed, wanted = np.flatnonzero(digit == LABELLED_DIGIT), max(1, round(share * len(samples)))
    if wanted > len(allowed):
        raise DataError(
            f"labelled={share}: that is {wanted} images of the digit {LABELLED_DIGIT}, there are "
            f"{len(allowed)}; use less, or 1 for masks of all digits"
        )
    return tuple(samples[i] for i in allowed[:wanted])


# ----------------------------------------------------------------------------- images


def _presence(
    prefix: str,
    digits: Pixels,
    chosen: NDArray[np.int64],
    fold: Pixels,
    size: Variant,
    seed: tuple[int, int],
) -> tuple[StoredSample, ...]:
    rng = np.random.default_rng(seed)
    canvas = _ground(len(chosen), size, rng)
    ink = np.zeros(canvas.shape, np.float32)
    ink[_squares(len(chosen), size.side_px - DIGIT_PX, DIGIT_PX, rng)] = digits[chosen].astype(np.float32) / 255
    canvas = _scattered(np.where(ink > 0, ink, canvas), fold, size, rng)
    labels = (ink > INK).astype(np.uint8)
    return tuple(
        StoredSample(name, name, image, truth)
        for name, image, truth in zip(_names(prefix, canvas), _uint8(canvas), labels, strict=True)
    )


def _absence(fold: Pixels, count: int, size: Variant, seed: tuple[int, int]) -> tuple[StoredPicture, ...]:
    rng = np.random.default_rng(seed)
    canvas = _scattered(_ground(count, size, rng), fold, size, rng)
    named = zip(_names("a", canvas), _uint8(canvas), strict=True)
    return tuple(StoredPicture(name, name, image) for name, image in named)


def _ground(count: int, size: Variant, rng: np.random.Generator) -> NDArray[np.float32]:
    shape = (count, size.side_px, size.side_px)
    return NOISE * rng.standard_normal(shape, np.float32)


def _scattered(
    canvas: NDArray[np.float32], fold: Pixels, size: Variant, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Lay scraps of digits of a fold on images (N, H, W), one on each at a time."""
    count = len(canvas)
    for _ in range(size.clutter):
        source = fold[rng.integers(len(fold), size=count)]
        scrap = source[_squares(count, DIGIT_PX - SCRAP_PX, SCRAP_PX, rng)].astype(np.float32) / 255
        square = _squares(count, size.side_px - SCRAP_PX, SCRAP_PX, rng)
        under = canvas[square]
        # The authors' rule: the brighter where the sum is above 1, else the scrap's ink on top.
        over = np.where(scrap > 0, scrap, under)
        canvas[square] = np.where(scrap + under > 1, np.maximum(scrap, under), over)
    return canvas


def _squares(
    count: int, furthest: int, side: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Index of one random square in each of ``count`` images, (N, side, side)."""
    top, left = rng.integers(furthest + 1, size=(2, count, 1, 1))
    steps = np.arange(side)
    return np.arange(count)[:, None, None], top + steps[:, None], left + steps


def _uint8(canvas: NDArray[np.float32]) -> Pixels:
    """(N, H, W) of about 0..1 -> (N, H, W, 1); noise below 0 is cut off."""
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)[..., None]


def _names(prefix: str, canvas: NDArray[np.float32]) -> list[str]:
    return [f"{prefix}{i:05d}" for i in range(len(canvas))]


# ----------------------------------------------------------------------------- files


def _read_fold(path: Path, fold: str) -> tuple[Pixels, NDArray[np.uint8]]:
    digits = _read_idx(path, f"{fold}-images-idx3-ubyte", 3)
    names = _read_idx(path, f"{fold}-labels-idx1-ubyte", 1)
    if digits.shape[1:] != (DIGIT_PX, DIGIT_PX) or len(digits) != len(names):
        raise DataError(f"{path}: {fold} has images {digits.shape} and labels {names.shape}; fetch both again")
    if len(digits) <= HELD_BACK:
        raise DataError(f"{path}: {fold} has {len(digits)} digits only; fetch the whole file")
    return digits, names


def _read_idx(path: Path, name: str, axes: int) -> NDArray[np.uint8]:
    """Read an idx file: 0, 0, type, axes, the size of each axis as big-endian uint32, values."""
    packed, plain = path / f"{name}.gz", path / name
    file = packed if packed.is_file() else plain
    try:
        data = gzip.decompress(file.read_bytes()) if file == packed else file.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no {name} or {name}.gz in it; fetch the whole set") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read ({error}); fetch it again") from error
    start = 4 + 4 * axes
    if data[:4] != bytes((0, 0, IDX_UINT8, axes)) or len(data) < start:
        raise DataError(f"{file}: not an idx file of uint8 with {axes} axes; fetch it again")
    shape = tuple(int(n) for n in np.frombuffer(data[4:start], ">u4"))
    if len(data) - start != np.prod(shape):
        raise DataError(f"{file}: cut off: {len(data) - start} bytes for {shape}; fetch it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
