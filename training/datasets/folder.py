"""Reads the folder layout for one's own data, which ``docs/data.md`` describes.

``images/`` with ``labels/``, ``masks/`` or ``labels_instance/``, or ``NAME_mask`` beside ``NAME``; the
same in ``train/``, ``val/`` and ``test/``; ``slides/`` with ``annotations/``, pools of images without
labels, and ``dataset.toml``.
"""

from __future__ import annotations

import fnmatch
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histostream.training.data import (
    MIN_PX,
    DataError,
    DataSet,
    Picture,
    Sample,
    StoredPicture,
    StoredSample,
    listed,
    pictures_at,
)
from histostream.training.datasets import _slides
from histostream.training.datasets._files import (
    collect,
    files_of,
    image_files,
    label_files,
    labels_beside,
    read_fitting,
    read_pixels,
    refuse_background_only,
    refuse_mixed_channels,
    refuse_same_stems,
    refuse_unfitting,
    sample,
)
from histostream.training.datasets._labels import RawLabels, to_classes, warn_of_masks
from histostream.training.datasets._layout import SPLITS, Layout, read_layout
from histostream.training.image_files import IMAGE_SUFFIXES, read_coded_labels
from histostream.wsi.slides.reader import slide_suffixes

log = logging.getLogger(__name__)

POOLS = ("target", "unlabelled", "presence", "absence")
LABEL_FOLDERS = ("labels", "masks")
PART_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}

Objects = NDArray[np.int32] | None


def read(path: Path) -> DataSet:
    """Read a data set from a folder, and check all of its files.

    Raises
    ------
    DataError
        If a file, a label or ``dataset.toml`` cannot be used.
    SlideError
        If a slide or its annotations cannot be read.
    """
    layout = read_layout(path)
    slides = _slides.slide_files(path / "slides") if (path / "slides").is_dir() else []
    stored = _read_images(path, layout) if (path / "images").is_dir() or not slides else {}
    refuse_background_only([s for _, samples in stored.values() for s in samples], path)
    samples: dict[str, Sequence[Sample]] = {stem: own for stem, (_, own) in stored.items()}
    if slides:
        tiles = _slides.read_annotated(slides, path / "annotations", layout)
        for slide, slide_samples in zip(slides, tiles, strict=True):
            if slide.stem in samples:
                raise DataError(f"{path}: {slide.stem} is an image and a slide; rename one")
            samples[slide.stem] = slide_samples
    pools = {name: _read_pool(path / name, layout) for name in POOLS if (path / name).is_dir()}
    _check_channels(path, samples, pools)
    parts = _divide(layout, list(samples), {stem: part for stem, (part, _) in stored.items() if part})
    _refuse_split_groups(layout, samples, parts)
    train, validation, test = (tuple(s for stem in parts[part] for s in samples[stem]) for part in SPLITS)
    return DataSet(layout.name, layout.classes, layout.mpp, train, validation, test, pools)


def read_folder(folder: Path) -> list[Sample]:
    """Read all labelled images of a folder, of whichever part, sorted by name.

    Raises
    ------
    DataError
        As `read`.
    """
    data = read(folder)
    return sorted((*data.train, *data.validation, *data.test), key=lambda sample: sample.name)


def holds_pictures(path: Path) -> bool:
    """Whether a path is a slide or an image, or a folder directly of such files, and not of a data set."""
    if path.is_dir():
        is_dataset = any((path / name).is_dir() for name in ("images", "slides"))
        return not is_dataset and bool(files_of(path, _picture_suffixes()))
    return path.is_file()


def read_pictures(path: Path, mpp: float) -> tuple[Picture, ...]:
    """Read a slide, an image, or a folder of them (it may have a ``dataset.toml``), at ``mpp``.

    Raises
    ------
    DataError
        If a file cannot be used.
    SlideError
        If a slide cannot be read.
    """
    layout = read_layout(path if path.is_dir() else path.parent)
    own_mpp = layout.mpp or mpp
    layout = replace(layout, mpp=own_mpp)
    if path.is_dir():
        pictures = _read_pool(path, layout)
    elif path.suffix.lower() in _picture_suffixes():
        pictures = _read_files([path], layout)
    else:
        raise DataError(f"{path}: not an image or slide ({', '.join(_picture_suffixes())}); check the path")
    return pictures_at(pictures, own_mpp, mpp)


def cut(source: StoredSample, rows: int, columns: int) -> list[StoredSample]:
    """Cut a sample into ``rows`` x ``columns`` parts that cover it and stay in its group.

    Raises
    ------
    DataError
        If the parts would be too small.
    """
    if (rows, columns) == (1, 1):
        return [source]
    height, width = source.shape
    if min(height // rows, width // columns) < MIN_PX:
        raise DataError(
            f"{source.name}: {width} x {height} px cannot be cut into {rows} x {columns} parts of {MIN_PX} px or more"
        )
    ys = [height * i // rows for i in range(rows + 1)]
    xs = [width * i // columns for i in range(columns + 1)]
    return [
        _part(source, f"_r{i}c{j}", np.s_[top:bottom, left:right])
        for (i, (top, bottom)), (j, (left, right)) in product(enumerate(pairwise(ys)), enumerate(pairwise(xs)))
    ]


def _part(source: StoredSample, ending: str, window: tuple[slice, slice]) -> StoredSample:
    name = Path(source.name)
    instances = None if source.instances is None else source.instances[window]
    return sample(
        f"{name.stem}{ending}{name.suffix}", source.group, source.image[window], source.labels[window], instances
    )


# ----------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class _Source:
    """Folders of images and of their labels; what they are part of, "" if that is said elsewhere."""

    images: Path
    labels: Path | None
    instances: Path | None
    part: str = ""


def _sources(path: Path, layout: Layout) -> list[_Source]:
    """Find images and labels: in one folder, or in one for each part, above or below ``images``."""
    parts = [(part, name) for part, names in PART_FOLDERS.items() for name in names]
    above = [(part, path / name) for part, name in parts if (path / name).is_dir()]
    below = [(part, name) for part, name in parts if (path / "images" / name).is_dir()]
    if (path / "images").is_dir() and not (below and not files_of(path / "images", IMAGE_SUFFIXES)):
        return [_source(path, "images", "")]
    if below:
        sources = [_source(path, f"images/{name}", part) for part, name in below]
    elif above and all((folder / "images").is_dir() or labels_beside(_images_in(folder)) for _, folder in above):
        sources = [_source(folder, "images" if (folder / "images").is_dir() else ".", part) for part, folder in above]
    elif labels_beside(_images_in(path)):
        return [_source(path, ".", "")]
    else:
        names = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        raise DataError(
            f"{path}: no folder 'images' in it, but {listed(names) or 'no folder at all'}; put images into images/ and "
            "labels into labels/, or name a known set as glas:PATH (docs/data.md)"
        )
    if layout.splits:
        raise DataError(f"{layout.file}: [splits] and folders of parts ({sources[0].part}); leave one out")
    return sources


def _source(path: Path, images: str, part: str) -> _Source:
    """Find the labels of one folder of images: beside it, or among its files."""
    folder = path / images
    _, _, below = images.partition("/")  # images/train has labels/train
    classes = [path / name / below for name in LABEL_FOLDERS if (path / name / below).is_dir()]
    if len(classes) > 1:
        raise DataError(f"{path}: labels in {classes[0].name} and in {classes[1].name}; keep one of the folders")
    objects = path / "labels_instance" / below
    if not classes and not objects.is_dir():
        if not labels_beside(_images_in(folder)):
            raise DataError(
                f"{path}: no labels; put them in {path / 'labels' / below} or /labels_instance, "
                "or beside the images as NAME_mask.png"
            )
        classes = [folder]
    return _Source(folder, classes[0] if classes else None, objects if objects.is_dir() else None, part)


def _images_in(folder: Path) -> list[Path]:
    return files_of(folder, IMAGE_SUFFIXES)


def _read_images(path: Path, layout: Layout) -> dict[str, tuple[str, list[StoredSample]]]:
    """Read the images with labels: the part of each, "" if no folder says it, and its samples, by stem."""
    found: dict[str, tuple[str, list[StoredSample]]] = {}
    for source in _sources(path, layout):
        prefix = f"{source.part}/" if source.part else ""
        for stem, one in _read_source(source, layout, prefix).items():
            found[stem] = source.part, cut(one, *layout.parts)
    return found


def _read_source(source: _Source, layout: Layout, prefix: str) -> dict[str, StoredSample]:
    images = image_files(source.images)
    labels = label_files(images, source.labels) if source.labels else [None] * len(images)
    instances = label_files(images, source.instances) if source.instances else [None] * len(images)
    if not source.labels and len(layout.classes) not in (0, 2):
        raise DataError(
            f"{layout.file}: {len(layout.classes)} classes, but labels_instance/ alone tells two "
            "apart (background, object); add labels/ with the class of each pixel"
        )

    def read(files: tuple[Path, Path | None, Path | None]) -> tuple[NDArray[np.uint8], RawLabels | None, Objects]:
        image = read_pixels(files[0], layout.reading)
        raw = _read_raw(files[1], image, layout) if files[1] else None
        return image, raw, read_fitting(files[2], image).astype(np.int32) if files[2] else None

    read_files = collect(read, zip(images, labels, instances, strict=True))
    classes: list[NDArray[np.uint8]]
    if source.labels:
        classes = to_classes([raw for _, raw, _ in read_files if raw], layout)
    else:
        classes = [(objects > 0).astype(np.uint8) for _, _, objects in read_files if objects is not None]
        warning = warn_of_masks(
            [RawLabels(p, o) for p, (*_, o) in zip(instances, read_files, strict=True) if p and o is not None]
        )
        if warning:
            log.warning(warning)
    return {
        prefix + path.stem: sample(
            prefix + path.name, prefix * (not layout.group) + layout.group_of(path.stem), image, own, objects
        )
        for path, (image, _, objects), own in zip(images, read_files, classes, strict=True)
    }


def _read_raw(path: Path, image: NDArray[np.uint8], layout: Layout) -> RawLabels:
    values, palette = read_coded_labels(path, place=str(layout.file), lossy=layout.threshold is not None)
    refuse_unfitting(path, values, image)
    return RawLabels(path, values, palette)


def _read_pool(folder: Path, layout: Layout) -> tuple[Picture, ...]:
    files = files_of(folder, _picture_suffixes())
    if not files:
        raise DataError(f"{folder}: no image and no slide in it; fill it or remove it")
    refuse_same_stems(files)
    return _read_files(files, layout)


def _read_files(files: Sequence[Path], layout: Layout) -> tuple[Picture, ...]:
    slides = [p for p in files if _slides.is_slide(p)]
    pictures = collect(
        lambda p: StoredPicture(p.name, p.stem, read_pixels(p, layout.reading)),
        [p for p in files if p not in slides],
    )
    return (*pictures, *_slides.read_pictures(slides, layout))


# ----------------------------------------------------------------------------- checks, parts


def _check_channels(path: Path, samples: dict[str, Sequence[Sample]], pools: dict[str, tuple[Picture, ...]]) -> None:
    channels = {}
    for folder, pictures in [("", [s for part in samples.values() for s in part]), *pools.items()]:
        for picture in _one_per_slide(pictures):
            channels[f"{folder}/{picture.name}".lstrip("/")] = picture.image.shape[2]
    refuse_mixed_channels(channels, path)


def _one_per_slide(pictures: Sequence[Picture]) -> Iterator[Picture]:
    """Yield all images in memory, and one tile of each group of slides."""
    groups = set()
    for picture in pictures:
        if isinstance(picture, StoredPicture) or picture.group not in groups:
            groups.add(picture.group)
            yield picture


def _divide(layout: Layout, stems: Sequence[str], by_folder: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the stems of each part; ``train``, if it is not given, has those that no part names.

    The part of a stem may be that of its folder.
    """
    chosen: dict[str, list[str]] = {}
    for stem, part in by_folder.items():
        chosen.setdefault(part, []).append(stem)
    for part, patterns in layout.splits.items():
        for pattern in patterns:
            if not fnmatch.filter(stems, pattern):
                raise DataError(f"{layout.file}: splits.{part}: {pattern!r} matches no image; correct it")
        chosen[part] = [s for s in stems if any(fnmatch.fnmatchcase(s, p) for p in patterns)]
    counts = Counter(stem for part in chosen.values() for stem in part)
    repeated = [stem for stem, n in counts.items() if n > 1]
    if repeated:
        raise DataError(f"{layout.file}: in two splits: {listed(repeated)}; name each in one")
    if "train" not in chosen:
        chosen["train"] = [stem for stem in stems if stem not in counts]
    return {part: chosen.get(part, []) for part in SPLITS}


def _refuse_split_groups(layout: Layout, samples: dict[str, Sequence[Sample]], parts: dict[str, list[str]]) -> None:
    part_of: dict[str, str] = {}
    for part, stems in parts.items():
        for group in {s.group for stem in stems for s in samples[stem]}:
            if part_of.setdefault(group, part) != part:
                raise DataError(
                    f"{layout.file}: group {group!r} is in {part_of[group]} and in {part}; put all of it in one split"
                )


def _picture_suffixes() -> tuple[str, ...]:
    return *IMAGE_SUFFIXES, *sorted(slide_suffixes() - set(IMAGE_SUFFIXES))
