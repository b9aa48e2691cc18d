"""Training images and their labels, from one folder layout.

``DIR/images/<name>.<png|jpg|webp|tif>`` with, for each image, either ``DIR/labels/<name>.png``
(class of each pixel, 0..K-1) or ``DIR/labels_instance/<name>.png`` (0 background, 1..N objects;
two classes). Everything is checked before training starts.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histostream.wsi.errors import HistoError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")


class DataError(HistoError, ValueError):
    """A training set cannot be used as it is."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One annotated image.

    Attributes
    ----------
    name
        File name of the image.
    image
        (H, W, 3) uint8 RGB, or (H, W, 1).
    labels
        (H, W) uint8, class of each pixel.
    object_px
        Median diameter of the objects (of the circle of equal area), in pixels; nan where the set
        has no instance labels or the image has no object.
    """

    name: str
    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    object_px: float


@dataclass(frozen=True, slots=True)
class Split:
    """Sample indices for training, for choosing the checkpoint, and for the final score."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


def read_folder(folder: Path) -> list[Sample]:
    """Read every image of a training set, sorted by name.

    Raises
    ------
    DataError
        If the layout is not as described, a label file is missing or unreadable, or sizes differ.
    """
    images = _image_files(folder)
    instances = (folder / "labels_instance").is_dir()
    label_folder = folder / ("labels_instance" if instances else "labels")
    if not label_folder.is_dir():
        raise DataError(f"{folder}: no labels; put them in {folder}/labels or /labels_instance")
    return [_read_sample(path, label_folder / f"{path.stem}.png", instances) for path in images]


def split(count: int, *, validation: float, test: float, seed: int) -> Split:
    """Divide ``count`` images at random; the same seed gives the same split.

    Raises
    ------
    DataError
        If a part would be empty.
    """
    order = np.random.default_rng(seed).permutation(count)
    n_test = round(test * count)
    n_validation = max(1, round(validation * count))
    if count - n_test - n_validation < 1:
        raise DataError(f"{count} images are too few for validation={validation}, test={test}")
    parts = np.split(order, [n_test, n_test + n_validation])
    test_part, validation_part, train_part = (tuple(int(i) for i in sorted(p)) for p in parts)
    return Split(train_part, validation_part, test_part)


def checksum(samples: list[Sample]) -> str:
    """SHA-256 over names, pixels and labels, so that a training record says what it saw."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.name}{sample.image.shape}".encode())
        digest.update(sample.image.tobytes())
        digest.update(sample.labels.tobytes())
    return digest.hexdigest()


def class_count(samples: list[Sample]) -> int:
    """Return one more than the largest label.

    Raises
    ------
    DataError
        If there is only one class to learn.
    """
    classes = 1 + max(int(sample.labels.max()) for sample in samples)
    if classes < 2:
        raise DataError("every label is 0: there is nothing to learn; check the label files")
    return classes


def _image_files(folder: Path) -> list[Path]:
    if not (folder / "images").is_dir():
        raise DataError(f"{folder}: no folder 'images' in it; see histo-train --help")
    files = sorted(p for p in (folder / "images").iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise DataError(f"{folder / 'images'}: no image in it ({', '.join(IMAGE_SUFFIXES)})")
    return files


def _read_sample(path: Path, label_path: Path, instances: bool) -> Sample:
    if not label_path.is_file():
        raise DataError(f"{path.name}: no label file {label_path}")
    image, raw = read_image(path), np.asarray(_open(label_path))
    if raw.ndim != 2:
        raise DataError(f"{label_path}: {raw.ndim} axes; labels are one grey channel")
    if raw.shape != image.shape[:2]:
        raise DataError(f"{label_path} is {raw.shape}, its image {image.shape[:2]}")
    if instances:
        return Sample(path.name, image, (raw > 0).astype(np.uint8), _median_diameter(raw))
    if raw.max() > 254:
        raise DataError(f"{label_path}: label {raw.max()}; classes are 0 to 254")
    return Sample(path.name, image, raw.astype(np.uint8), float("nan"))


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read an image as (H, W, 3) uint8 RGB, or (H, W, 1) where it is grey.

    Raises
    ------
    DataError
        If it is no image.
    """
    image = _open(path)
    if image.mode in ("L", "1"):
        return np.asarray(image.convert("L"))[..., None]
    return np.asarray(image.convert("RGB"))


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except OSError as error:
        raise DataError(f"{path}: cannot be read as an image ({error})") from error
    return image


def _median_diameter(instances: NDArray[np.integer]) -> float:
    areas = np.unique(instances[instances > 0], return_counts=True)[1]
    return float(2 * np.sqrt(np.median(areas) / np.pi)) if len(areas) else float("nan")
