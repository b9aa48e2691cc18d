"""What the readers of data sets share: image files and their label files, checked before training starts."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from histostream.training.data import (
    MIN_PX,
    Classes,
    DataError,
    StoredSample,
    annotated,
    kind_of,
    listed,
    median_diameter,
)
from histostream.training.image_files import IMAGE_SUFFIXES, Reading, read_image, read_labels
from histostream.wsi.errors import HistoError

LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".webp", ".npy")
LOSSY_SUFFIXES = (".jpg", ".jpeg")  # label files that are found, to be refused with the cause
LABEL_ENDINGS = ("_mask", "_masks", "_label", "_labels", "_seg")  # of a label file's stem, after that of its image
MAX_PROBLEMS = 4  # in one message
MASKED = 128  # least value of a mask's object, of 255: masks may have soft edges
NUCLEI: Classes = (("background", (255, 255, 255)), ("nucleus", (30, 100, 220)))
MITOCHONDRIA: Classes = (("background", (0, 0, 0)), ("mitochondrion", (240, 150, 30)))

Source = TypeVar("Source")
Result = TypeVar("Result")


def files_of(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return the files of a folder with one of some suffixes, sorted by name, without hidden ones."""
    return sorted(
        p for p in folder.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith(".") and p.is_file()
    )


def image_files(folder: Path) -> list[Path]:
    """Return the image files of a folder, sorted by name.

    Raises
    ------
    DataError
        If there is no such folder, no image in it, or two of the same stem.
    """
    files = _existing_files(folder, IMAGE_SUFFIXES)
    labels = labels_beside(files)
    files = [path for path in files if path not in labels]
    if not files:
        raise DataError(f"{folder}: no image in it ({', '.join(IMAGE_SUFFIXES)}); put images there, or check the path")
    return files


def labels_beside(files: Sequence[Path]) -> set[Path]:
    """Return the files that are labels of others among them: ``a_mask.png`` beside ``a.jpg``."""
    stems = {path.stem for path in files}
    return {p for p in files for ending in LABEL_ENDINGS if p.stem.endswith(ending) and p.stem[: -len(ending)] in stems}


def label_files(images: Sequence[Path], folder: Path, suffixes: Sequence[str] = LABEL_SUFFIXES) -> list[Path]:
    """Return the label file of each image: that of the same stem in ``folder``, or of one with ``_mask`` after it.

    Raises
    ------
    DataError
        If some are missing, or an image has two; the message names them.
    """
    found = suffixes if suffixes != LABEL_SUFFIXES else (*suffixes, *LOSSY_SUFFIXES)
    own = set(images)
    by_stem = {path.stem: path for path in _existing_files(folder, found) if path not in own}
    of_image = {
        path: [by_stem[name] for ending in ("", *LABEL_ENDINGS) if (name := path.stem + ending) in by_stem]
        for path in images
    }
    missing = [path for path, labels in of_image.items() if not labels]
    if len(missing) == 1:
        (image,) = missing
        raise DataError(f"{image}: no label file {folder / image.stem}{suffixes[0]}; add it, or remove the image")
    for image, labels in of_image.items():
        if len(labels) > 1:
            raise DataError(f"{image}: two label files, {labels[0].name} and {labels[1].name}; keep one of them")
    if missing:
        names = listed([f"{path.stem}{suffixes[0]}" for path in missing])
        raise DataError(f"{folder}: {len(missing)} label files are missing: {names}; add them, or remove their images")
    return [of_image[path][0] for path in images]


def _existing_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder.parent}: no folder {folder.name!r} in it; see docs/data.md")
    files = files_of(folder, suffixes)
    refuse_same_stems(files)
    return files


def refuse_same_stems(files: Sequence[Path]) -> None:
    """Raise DataError where two files differ in their suffix only."""
    names = defaultdict(list)
    for path in files:
        names[path.stem].append(path.name)
    doubles = [" and ".join(same) for same in names.values() if len(same) > 1]
    if doubles:
        raise DataError(f"{files[0].parent}: more than one file of a name: {listed(doubles)}")


def collect(read: Callable[[Source], Result], sources: Iterable[Source]) -> list[Result]:
    """Apply ``read`` to all sources; one DataError lists the problems of all that fail."""
    results, errors = [], []
    for source in sources:
        try:
            results.append(read(source))
        except HistoError as error:
            errors.append(error)
    if errors:
        text = "; ".join(str(error) for error in errors[:MAX_PROBLEMS])
        more = len(errors) - MAX_PROBLEMS
        raise DataError(f"{text}; and {more} more like these" if more > 0 else text) from errors[0]
    return results


def read_pairs(images: Path, labels: Path, read: Callable[[Path, Path], StoredSample]) -> list[StoredSample]:
    """Apply ``read`` to each image of a folder and its label file in another one."""
    paths = image_files(images)
    return collect(lambda pair: read(*pair), zip(paths, label_files(paths, labels), strict=True))


def read_pixels(path: Path, reading: Reading | None = None) -> NDArray[np.uint8]:
    """Read an image that is large enough to train on.

    Raises
    ------
    DataError
        If it is not, or cannot be read.
    """
    image = read_image(path, reading)
    if min(image.shape[:2]) < MIN_PX:
        height, width = image.shape[:2]
        raise DataError(f"{path}: {width} x {height} px; at least {MIN_PX} x {MIN_PX} are needed: leave it out")
    return image


def read_fitting(path: Path, image: NDArray[np.uint8]) -> NDArray[np.integer]:
    """Read a label image of an image's size.

    Raises
    ------
    DataError
        If it has another size, or cannot be read.
    """
    labels = read_labels(path)
    refuse_unfitting(path, labels, image)
    if labels.size and labels.min() < 0:
        raise DataError(f"{path}: value {labels.min()} in it; objects are numbered from 1: add 1 to all values")
    return labels


def refuse_unfitting(path: Path, labels: NDArray[np.integer], image: NDArray[np.uint8]) -> None:
    """Raise DataError where a label image has not the size of its image."""
    if labels.shape[:2] != image.shape[:2]:
        (h, w), (height, width) = labels.shape[:2], image.shape[:2]
        raise DataError(
            f"{path}: {w} x {h} px, its image {width} x {height}; "
            "labels are for each pixel of the image: export them again at its size"
        )


def read_objects(image_path: Path, instance_path: Path, group: str = "") -> StoredSample:
    """Read an image and its objects (0 background, 1..N), which are all class 1.

    The group is the stem of the image's file where none is given.
    """
    image = read_pixels(image_path)
    instances = read_fitting(instance_path, image).astype(np.int32)
    return sample(image_path.name, group or image_path.stem, image, (instances > 0).astype(np.uint8), instances)


def read_object_folder(folder: Path, group: Callable[[str], str] = str) -> list[StoredSample]:
    """Read ``images/`` and ``labels_instance/`` of a folder; ``group`` maps an image's stem to its group."""

    def read(image_path: Path, instance_path: Path) -> StoredSample:
        return read_objects(image_path, instance_path, group(image_path.stem))

    return read_pairs(folder / "images", folder / "labels_instance", read)


def read_masks(
    images: Path, masks: Path, *, group: Callable[[Path], str], name: Callable[[Path], str]
) -> list[StoredSample]:
    """Read images and their masks, whose objects are class 1; group and name are made of an image's path.

    Raises
    ------
    DataError
        If a file is missing or cannot be used, or all masks are empty.
    """

    def read(image_path: Path, mask_path: Path) -> StoredSample:
        image = read_pixels(image_path)
        mask = read_fitting(mask_path, image)
        least = 1 if mask.max() <= 1 else MASKED  # a mask may have 1 bit
        return sample(name(image_path), group(image_path), image, (mask >= least).astype(np.uint8), None)

    samples = read_pairs(images, masks, read)
    refuse_background_only(samples, images.parent)
    return samples


def sample(
    name: str,
    group: str,
    image: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    instances: NDArray[np.int32] | None,
) -> StoredSample:
    """Make a sample and measure its objects."""
    object_px = math.nan if instances is None else median_diameter(instances)
    return StoredSample(name, group, image, labels, instances, object_px)


def refuse_mixed_channels(channels: Mapping[str, int], path: Path) -> None:
    """Raise DataError where images have different numbers of channels; ``channels`` is by name."""
    kinds = Counter(channels.values()).most_common()
    if len(kinds) > 1:
        most, several = kinds[0]
        few = [name for name, count in channels.items() if count != most]
        raise DataError(
            f"{path}: {len(few)} images are {kind_of(channels[few[0]])} ({listed(few)}), {several} are "
            f"{kind_of(most)}; convert them to one kind"
        )


def refuse_background_only(samples: Sequence[StoredSample], path: Path) -> None:
    """Raise DataError where no pixel of any sample has a label."""
    if samples and not any(annotated(s.labels).any() for s in samples):
        raise DataError(
            f"{path}: every label of its {len(samples)} images is 0, which is background, or not annotated: "
            "there is nothing to learn; check the label files"
        )


def check_option(option: str, value: str, allowed: Sequence[str]) -> None:
    """Raise DataError unless an option has one of its values."""
    if value not in allowed:
        raise DataError(f"{option}={value!r}: use {', '.join(allowed[:-1])} or {allowed[-1]}")


def by_number(path: Path) -> tuple[object, ...]:
    """Sort key by which train_2 comes before train_10."""
    parts = re.split(r"(\d+)", path.stem)
    return tuple(int(part) if i % 2 else part for i, part in enumerate(parts))
