"""Label files to classes: by number, by colour, by a threshold; and what they are if they are none of these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histostream.training.data import IGNORED, DataError, listed
from histostream.training.datasets._layout import Layout

MAX_LABEL = 254  # 255 is "not annotated" in label maps
MAX_COLORS = 32  # of a label image in colour; more are soft edges or a photograph
MANY_OBJECTS = 10  # values, each of one blob, that are objects and no classes in whatever number of images
FEW_OBJECTS = 5  # the same, where their number differs from image to image
ONE_BLOB = 0.9  # least share of the values that are one blob each
SOFT_PX = 64  # grey levels about 0 and 255 in which the values of a soft mask lie
SOFT_SHARE = 0.75  # of its pixels, at least


@dataclass(frozen=True, slots=True)
class RawLabels:
    """A label file as it was read.

    Attributes
    ----------
    path
        The file.
    values
        (H, W) of whole numbers, or (H, W, 3) uint8 of colours.
    palette
        (256, 3) uint8, the colours of numbers that are indices; else None.
    """

    path: Path
    values: NDArray[np.integer]
    palette: NDArray[np.uint8] | None = None


def to_classes(files: Sequence[RawLabels], layout: Layout) -> list[NDArray[np.uint8]]:
    """Turn label files of one set into labels 0..K-1, and `IGNORED` where a pixel is not annotated.

    Raises
    ------
    DataError
        If values or colours are not those of the classes; the message says what they look like and how
        to have them read.
    """
    if layout.threshold is not None:
        return [_by_threshold(file, layout, layout.threshold) for file in files]
    coded = [
        _by_color(file, layout)
        if _is_colored(file, layout)
        else RawLabels(file.path, _numbers(file, layout), file.palette)
        for file in files
    ]
    numbers = [file for file in coded if isinstance(file, RawLabels)]
    if numbers:
        _check_numbers(numbers, layout)
    return [_by_number(file, layout) if isinstance(file, RawLabels) else file for file in coded]


def warn_of_masks(files: Sequence[RawLabels]) -> str:
    """Return a warning where files of objects give all objects of an image one number, else ""."""
    several = 0
    for file in files:
        counts = blobs(file.values)
        several += len(counts) == 1 and counts[0] > 1
    if 2 * several <= len(files):
        return ""
    return (
        f"{files[0].path.parent}: all objects of an image have one number, so that they count as one object; "
        "number them 1, 2, 3, ..., or rename the folder to labels"
    )


# ----------------------------------------------------------------------------- colours


def _is_colored(file: RawLabels, layout: Layout) -> bool:
    """Whether the classes of a file are found by its colours; a palette's, if its numbers are no classes."""
    if file.values.ndim == 2:
        if file.palette is None or not layout.by_color:
            return False
        used = np.unique(file.values)
        known = {color: label for label, (_, color) in enumerate(layout.classes)}
        of_color = [known.get(_color(file.palette[i])) for i in used]
        of_number = [layout.values.index(i) if i in layout.values else None for i in used.tolist()]
        if None in of_color or of_color == of_number:
            return False
        if None not in of_number:
            raise DataError(
                f"{file.path}: its numbers name other classes than the colours of its palette do: save it as grey, "
                f"or as RGB; or leave the colors out of {layout.file}"
            )
        return True
    grey = (file.values[..., :1] == file.values).all()
    return not grey or (layout.by_color and not layout.by_value)


def _by_color(file: RawLabels, layout: Layout) -> NDArray[np.uint8]:
    colors = file.values if file.values.ndim == 3 else _of_palette(file)
    codes = colors.astype(np.int64) @ (1 << 16, 1 << 8, 1)
    used, inverse, counts = np.unique(codes, return_inverse=True, return_counts=True)
    table = {_code(color): label for label, (_, color) in enumerate(layout.classes)} if layout.by_color else {}
    if isinstance(layout.ignore, tuple):
        table[_code(layout.ignore)] = IGNORED
    unknown = [int(used[i]) for i in np.argsort(-counts) if int(used[i]) not in table]
    if unknown:
        raise DataError(_unknown_colors(file.path, unknown, layout))
    of_code: NDArray[np.uint8] = np.asarray([table[int(code)] for code in used], np.uint8)
    labels: NDArray[np.uint8] = of_code[inverse.reshape(codes.shape)]
    return labels


def _unknown_colors(path: Path, codes: Sequence[int], layout: Layout) -> str:
    shown = listed([[code >> 16, code >> 8 & 255, code & 255] for code in codes])
    if len(codes) > MAX_COLORS:
        return (
            f"{path}: {len(codes)} colours, too many for classes: soft edges, a lossy copy, or the image itself; "
            "export the labels again without smoothing, as PNG"
        )
    if not layout.by_color:
        return (
            f"{path}: labels in colour: {shown}; say in {layout.file} which class each colour is, "
            'as [[classes]] with name and color, e.g. name = "gland", color = [255, 0, 0]'
        )
    return (
        f"{path}: colour {shown} is no class of {layout.file.name}; add it there as [[classes]], or as ignore = "
        "[red, green, blue] if it means not annotated"
    )


def _of_palette(file: RawLabels) -> NDArray[np.uint8]:
    assert file.palette is not None  # `_is_colored` said so
    colors: NDArray[np.uint8] = file.palette[file.values]
    return colors


def _color(color: NDArray[np.uint8]) -> tuple[int, int, int]:
    return int(color[0]), int(color[1]), int(color[2])


def _code(color: tuple[int, int, int]) -> int:
    return color[0] << 16 | color[1] << 8 | color[2]


# ----------------------------------------------------------------------------- numbers


def _numbers(file: RawLabels, layout: Layout) -> NDArray[np.integer]:
    """Return the values of a file, of colours that are grey their level."""
    if file.values.ndim == 2:
        return file.values
    if not (file.values[..., :1] == file.values).all():
        raise DataError(f"{file.path}: labels in colour have no threshold; leave it out of {layout.file}")
    return file.values[..., 0]


def _by_threshold(file: RawLabels, layout: Layout, threshold: float) -> NDArray[np.uint8]:
    raw = _numbers(file, layout)
    return np.where(raw == layout.ignore, IGNORED, raw >= threshold).astype(np.uint8)


def _by_number(file: RawLabels, layout: Layout) -> NDArray[np.uint8]:
    raw = file.values
    ignored = raw == layout.ignored_value
    if not layout.classes:
        return np.where(ignored, IGNORED, raw).astype(np.uint8)
    order = np.argsort(layout.values)
    positions = np.searchsorted(np.asarray(layout.values)[order], raw).clip(max=len(order) - 1)
    return np.where(ignored, IGNORED, order.astype(np.uint8)[positions])


def _check_numbers(files: Sequence[RawLabels], layout: Layout) -> None:
    """Refuse values that are no classes, and say what they look like."""
    values = [np.unique(file.values) for file in files]
    ignored = layout.ignored_value
    used = sorted({int(v) for own in values for v in own} - ({ignored} if ignored is not None else set()))
    for file, own in zip(files, values, strict=True):
        if (lowest := next((int(v) for v in own if v != ignored), 0)) < 0:
            raise DataError(
                f"{file.path}: value {lowest} in it; labels begin at 0: if it means not annotated, add "
                f"ignore = {lowest} to {layout.file}"
            )
    first_value = layout.values[0] if layout.values else 0
    two = len(layout.classes) in (0, 2)
    if used == [first_value] and two and ignored == IGNORED and any(IGNORED in own for own in values):
        raise DataError(
            f"{files[0].path.parent}: the values are {first_value} and 255, a mask of two classes: "
            f"add threshold = 128 to {layout.file} (255 alone would mean not annotated)"
        )
    if layout.classes:
        unknown = [v for v in used if v not in layout.values]
        if unknown:
            first = next(file for file, own in zip(files, values, strict=True) if set(unknown) & set(own.tolist()))
            raise DataError(
                f"{first.path}: value {listed(unknown)} is no class of {layout.file.name} "
                f"({listed(layout.values)}); {_remedy(files, layout) or 'add it there, or correct the file'}"
            )
        return
    numbered = bool(used) and used[-1] <= MAX_LABEL and 2 * len(used) >= used[-1] + 1
    if numbered and not _look_like_objects(files):
        return
    shown = f"the values {listed(used)} are no labels 0, 1, 2, ..."
    raise DataError(
        f"{files[0].path.parent}: {shown if not numbered else f'the values are 0 to {used[-1]}'}; "
        + (
            _remedy(files, layout)
            or f"say which class each is, as [[classes]] with name and value, in {layout.file}; "
            "if one means not annotated, as ignore"
        )
    )


def _remedy(files: Sequence[RawLabels], layout: Layout) -> str:
    """Return what values that are no classes look like, and what to do then; "" if like nothing known."""
    if _look_like_objects(files):
        folder = files[0].path.parent
        return (
            "each is one blob, so they look like the numbers of objects: rename the folder, "
            f"mv {folder} {folder.parent / 'labels_instance'}; if they are classes, name them all as [[classes]] "
            f"in {layout.file}"
        )
    if _look_soft(files):
        return (
            "most are near 0 or 255, like a mask with soft edges or from a JPEG: "
            f"add threshold = 128 to {layout.file} if there are two classes"
        )
    return ""


def _look_soft(files: Sequence[RawLabels]) -> bool:
    raw = np.concatenate([file.values.ravel() for file in files])
    low, high = raw <= SOFT_PX, (raw >= 255 - SOFT_PX) & (raw <= 255)
    return bool(raw.max() <= 255 and low.any() and high.any() and (low | high).mean() >= SOFT_SHARE)


def _look_like_objects(files: Sequence[RawLabels]) -> bool:
    """Whether values are the numbers of objects: many, or another number in each image, and each one blob."""
    several = [len(np.unique(file.values)) - 1 for file in files]
    if max(several) < FEW_OBJECTS:
        return False
    varied = len(set(several)) > 1 or len(files) == 1
    if max(several) < MANY_OBJECTS and not varied:
        return False
    counts = Counter(count for file in files for count in blobs(file.values))
    return counts[1] >= ONE_BLOB * counts.total()


def blobs(values: NDArray[np.integer]) -> list[int]:
    """Return how many connected regions each value but 0 has in a map (H, W), pixels joined at corners too."""
    from scipy import ndimage

    present, order = np.unique(values, return_inverse=True)
    order = order.reshape(values.shape) + 1
    windows = ndimage.find_objects(order)
    joined = np.ones((3, 3), bool)
    return [
        int(ndimage.label(order[window] == i, joined)[1])
        for i, (value, window) in enumerate(zip(present, windows, strict=True), start=1)
        if value
    ]
