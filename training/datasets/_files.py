"""What the sets share: image files and their label files, checked before anything is trained."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from histostream.training.data import Classes, DataError, StoredPicture, StoredSample, listed, median_diameter
from histostream.training.image_files import IMAGE_SUFFIXES, read_image, read_labels
from histostream.wsi.errors import HistoError

LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".webp")
MIN_PX = 16  # side; no network here takes less
MAX_LABEL = 254  # 255 says "outside" in the runtime's label maps
MAX_PROBLEMS = 4  # told at once
NUCLEI: Classes = (("background", (255, 255, 255)), ("nucleus", (30, 100, 220)))
MITOCHONDRIA: Classes = (("background", (0, 0, 0)), ("mitochondrion", (240, 150, 30)))

Given = TypeVar("Given")
Made = TypeVar("Made")


def files_of(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return the files with one of some suffixes, sorted by name; hidden ones do not count."""
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
    if not folder.is_dir():
        raise DataError(f"{folder.parent}: no folder {folder.name!r} in it; see docs/data.md")
    files = files_of(folder, IMAGE_SUFFIXES)
    if not files:
        raise DataError(f"{folder}: no image in it ({', '.join(IMAGE_SUFFIXES)}); put images there, or check the path")
    refuse_same_stems(files)
    return files


def label_files(images: Sequence[Path], folder: Path, suffixes: Sequence[str] = LABEL_SUFFIXES) -> list[Path]:
    """Return the file of the same stem in a folder of labels for each image.

    Parameters
    ----------
    images
        The images.
    folder
        Where their labels are.
    suffixes
        What their files end with.

    Raises
    ------
    DataError
        If one is missing; all of them are named.
    """
    if not folder.is_dir():
        raise DataError(f"{folder.parent}: no folder {folder.name!r} in it; see docs/data.md")
    files = files_of(folder, suffixes)
    refuse_same_stems(files)
    found = {path.stem: path for path in files}
    missing = [path for path in images if path.stem not in found]
    if len(missing) == 1:
        (image,) = missing
        raise DataError(f"{image}: no label file {folder / image.stem}{suffixes[0]}; add it, or remove the image")
    if missing:
        names = listed([f"{path.stem}{suffixes[0]}" for path in missing])
        raise DataError(f"{folder}: {len(missing)} label files are missing: {names}; add them, or remove their images")
    return [found[path.stem] for path in images]


def refuse_same_stems(files: Sequence[Path]) -> None:
    """Raise DataError where two files differ in their suffix only."""
    same = defaultdict(list)
    for path in files:
        same[path.stem].append(path.name)
    doubles = [" and ".join(names) for names in same.values() if len(names) > 1]
    if doubles:
        raise DataError(f"{files[0].parent}: more than one file of a name: {listed(doubles)}")


def collect(read: Callable[[Given], Made], things: Iterable[Given]) -> list[Made]:
    """Apply ``read`` to all things; where some fail, one error tells of them together."""
    made, problems = [], []
    for thing in things:
        try:
            made.append(read(thing))
        except HistoError as error:
            problems.append(error)
    if problems:
        raise DataError(listed_problems([str(error) for error in problems])) from problems[0]
    return made


def listed_problems(problems: Sequence[str]) -> str:
    """Join whole messages, the first few of them, to one."""
    more = len(problems) - MAX_PROBLEMS
    text = "; ".join(problems[:MAX_PROBLEMS])
    return f"{text}; and {more} more like these" if more > 0 else text


def read_pixels(path: Path) -> NDArray[np.uint8]:
    """Read an image that is large enough to train on.

    Raises
    ------
    DataError
        If it is not, or cannot be read.
    """
    image = read_image(path)
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
    if labels.shape != image.shape[:2]:
        (h, w), (height, width) = labels.shape, image.shape[:2]
        raise DataError(
            f"{path}: {w} x {h} px, its image {width} x {height}; "
            "labels are for each pixel of the image: export them again at its size"
        )
    if labels.size and labels.min() < 0:
        raise DataError(f"{path}: value {labels.min()} in it; labels begin at 0")
    return labels


def annotated(image_path: Path, instance_path: Path, *, group: str = "", name: str = "") -> StoredSample:
    """Read an image and its objects (0 background, 1..N); all objects are class 1.

    Parameters
    ----------
    image_path, instance_path
        The files.
    group, name
        The group, else the stem of the image's file; the name, else the name of that file.
    """
    image = read_pixels(image_path)
    instances = read_fitting(instance_path, image).astype(np.int32)
    return sample(name or image_path.name, group or image_path.stem, image, (instances > 0).astype(np.uint8), instances)


def read_objects(folder: Path, group: Callable[[str], str] = str) -> list[StoredSample]:
    """Read ``images/`` and ``labels_instance/`` of a folder; ``group`` is of an image's stem."""
    images = image_files(folder / "images")
    pairs = zip(images, label_files(images, folder / "labels_instance"), strict=True)
    return collect(lambda pair: annotated(*pair, group=group(pair[0].stem)), pairs)


def masked(image_path: Path, mask_path: Path, *, at_least: int, group: str, name: str) -> StoredSample:
    """Read an image and a mask; what is ``at_least`` is class 1."""
    image = read_pixels(image_path)
    mask = read_fitting(mask_path, image)
    if mask.max() <= 1:
        at_least = 1  # a mask of 1 bit
    return sample(name, group, image, (mask >= at_least).astype(np.uint8), None)


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


def refuse_mixed_channels(kinds: Mapping[str, int], where: Path) -> None:
    """Raise DataError where some images (name -> channels) are grey and some are RGB."""
    grey = [name for name, channels in kinds.items() if channels == 1]
    rgb = [name for name, channels in kinds.items() if channels == 3]
    if grey and rgb:
        few, kind, rest = (grey, "grey", rgb) if len(grey) <= len(rgb) else (rgb, "RGB", grey)
        other = "RGB" if kind == "grey" else "grey"
        raise DataError(
            f"{where}: {len(few)} images are {kind} ({listed(few)}), {len(rest)} are {other}; convert them to one kind"
        )


def refuse_background_only(samples: Sequence[StoredSample], where: Path) -> None:
    """Raise DataError where no pixel of any sample has a label."""
    if samples and not any(s.labels.any() for s in samples):
        raise DataError(
            f"{where}: every label of its {len(samples)} images is 0, which is background: "
            "there is nothing to learn; check the label files"
        )


def channels_of(pictures: Iterable[StoredPicture]) -> dict[str, int]:
    """Return the channels of each picture by its name."""
    return {p.name: p.image.shape[2] for p in pictures}


def one_of(option: str, value: str, allowed: Sequence[str]) -> None:
    """Raise DataError unless an option has one of its values."""
    if value not in allowed:
        raise DataError(f"{option}={value!r}: use {', '.join(allowed[:-1])} or {allowed[-1]}")


def by_number(path: Path) -> tuple[object, ...]:
    """Sort key by which train_2 comes before train_10."""
    parts = re.split(r"(\d+)", path.stem)
    return tuple(int(part) if i % 2 else part for i, part in enumerate(parts))
