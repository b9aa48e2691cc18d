"""Reads the folder layout for one's own data, which ``docs/data.md`` describes.

``images/`` with ``labels/`` or ``labels_instance/``, ``slides/`` with ``annotations/``, pools of
images without labels, and ``dataset.toml``.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histostream.training.data import (
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
    MAX_LABEL,
    MIN_PX,
    collect,
    files_of,
    image_files,
    label_files,
    read_fitting,
    read_pixels,
    refuse_background_only,
    refuse_mixed_channels,
    refuse_same_stems,
    sample,
)
from histostream.training.datasets._layout import SPLITS, Layout, read_layout
from histostream.training.image_files import IMAGE_SUFFIXES
from histostream.wsi.slides.reader import slide_suffixes

POOLS = ("target", "unlabelled", "presence", "absence")


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
    refuse_background_only([s for samples in stored.values() for s in samples], path)
    samples: dict[str, Sequence[Sample]] = {**stored}  # by stem
    if slides:
        tiles = _slides.read_annotated(slides, path / "annotations", layout)
        for slide, slide_samples in zip(slides, tiles, strict=True):
            if slide.stem in samples:
                raise DataError(f"{path}: {slide.stem} is an image and a slide; rename one")
            samples[slide.stem] = slide_samples
    pools = {name: _read_pool(path / name, layout) for name in POOLS if (path / name).is_dir()}
    _check_channels(path, samples, pools)
    parts = _divide(layout, list(samples))
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


def _read_images(path: Path, layout: Layout) -> dict[str, list[StoredSample]]:
    """Read the images with labels, by stem."""
    images = image_files(path / "images")
    classes, objects = path / "labels", path / "labels_instance"
    if not classes.is_dir() and not objects.is_dir():
        raise DataError(f"{path}: no labels; put them in {path}/labels or /labels_instance")
    labels = label_files(images, classes) if classes.is_dir() else [None] * len(images)
    instances = label_files(images, objects) if objects.is_dir() else [None] * len(images)
    if not classes.is_dir() and len(layout.classes) not in (0, 2):
        raise DataError(
            f"{layout.file}: {len(layout.classes)} classes, but labels_instance/ alone tells two "
            "apart (background, object); add labels/ with the class of each pixel"
        )
    files = zip(images, labels, instances, strict=True)
    samples = collect(lambda paths: _read_sample(*paths, layout), files)
    if labels[0] is not None and not layout.classes:
        _check_values(classes, samples, layout)
    return {image.stem: cut(source, *layout.parts) for image, source in zip(images, samples, strict=True)}


def _read_sample(path: Path, label_path: Path | None, instance_path: Path | None, layout: Layout) -> StoredSample:
    image, instances = read_pixels(path), None
    if instance_path:
        instances = read_fitting(instance_path, image).astype(np.int32)
    if label_path:
        labels = _as_classes(label_path, read_fitting(label_path, image), layout)
    else:
        assert instances is not None  # one of the two paths is given
        labels = (instances > 0).astype(np.uint8)
    return sample(path.name, layout.group_of(path.stem), image, labels, instances)


def _as_classes(path: Path, raw: NDArray[np.integer], layout: Layout) -> NDArray[np.uint8]:
    """Turn the values of a label file into labels 0..K-1."""
    values = np.unique(raw)
    if not layout.classes:
        if values[-1] > MAX_LABEL:
            raise DataError(
                f"{path}: value {values[-1]} in it; classes are 0 to {MAX_LABEL}: if values stand "
                f"for classes, name them as [[classes]] in {layout.file.name}"
            )
        return raw.astype(np.uint8)
    unknown = [int(v) for v in values if v not in layout.values]
    if unknown:
        raise DataError(
            f"{path}: value {listed(unknown)} is no class of {layout.file.name} "
            f"({listed(layout.values)}); add it there, or correct the file"
        )
    order = np.argsort(layout.values)
    positions = np.searchsorted(np.asarray(layout.values)[order], raw)
    return order.astype(np.uint8)[positions]


def _check_values(folder: Path, samples: Sequence[StoredSample], layout: Layout) -> None:
    """Refuse grey values that stand for few classes, e.g. 0, 100 and 200."""
    used = sorted({int(v) for s in samples for v in np.unique(s.labels)})
    if 2 * len(used) < used[-1] + 1:
        raise DataError(
            f"{folder}: the values {listed(used)} are no labels 0, 1, 2, ...; "
            f"say which class each is, as [[classes]] with value, in {layout.file}"
        )


def _read_pool(folder: Path, layout: Layout) -> tuple[Picture, ...]:
    files = files_of(folder, _picture_suffixes())
    if not files:
        raise DataError(f"{folder}: no image and no slide in it; fill it or remove it")
    refuse_same_stems(files)
    return _read_files(files, layout)


def _read_files(files: Sequence[Path], layout: Layout) -> tuple[Picture, ...]:
    slides = [p for p in files if _slides.is_slide(p)]
    pictures = collect(
        lambda p: StoredPicture(p.name, p.stem, read_pixels(p)),
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


def _divide(layout: Layout, stems: Sequence[str]) -> dict[str, list[str]]:
    """Return the stems of each part; ``train``, if it is not given, has those that no part names."""
    chosen: dict[str, list[str]] = {}
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
