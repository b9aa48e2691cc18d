"""Training images and their labels; `histostream.training.datasets` reads them.

Images are uint8, labels the class of each pixel. A `Picture` may be in memory, or be read at each
access, as the tile of a slide is.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.errors import HistoError
from histostream.wsi.outputs.label_rows import NOT_ANALYSED
from histostream.wsi.slides.resolution import resampled

SAME_MPP = 1e-6  # relative
MIN_PX = 16  # side of an image; no network here takes less
IGNORED = NOT_ANALYSED  # label of a pixel that is not annotated: it has no part in losses and scores

Classes = tuple[tuple[str, tuple[int, int, int]], ...]
Label = TypeVar("Label", np.uint8, np.int32)


class DataError(HistoError, ValueError):
    """A data set cannot be used as it is."""


class Picture(Protocol):
    """An image, with or without labels.

    Attributes
    ----------
    name
        Unique in its data set.
    group
        Patient, slide or image: images of one group stay in one part of any split.
    image
        (H, W, C) uint8: RGB, grey with one channel, or of any other number of channels.
    shape
        (H, W), known without loading.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def group(self) -> str: ...  # noqa: D102

    @property
    def image(self) -> NDArray[np.uint8]: ...  # noqa: D102

    @property
    def shape(self) -> tuple[int, int]: ...  # noqa: D102

    def digest(self) -> bytes:
        """SHA-256 of its contents (of a slide's tile: of the slide and the position), for records."""
        ...


class Sample(Picture, Protocol):
    """An annotated image.

    Attributes
    ----------
    labels
        (H, W) uint8, class of each pixel, 0..K-1, or `IGNORED`.
    instances
        (H, W) int32, 0 background and 1..N objects; None where the data set has none.
    object_px
        Median diameter of the objects (of the circle of equal area), in pixels; nan where the data
        set has no instances or the image has no object.
    """

    @property
    def labels(self) -> NDArray[np.uint8]: ...  # noqa: D102

    @property
    def instances(self) -> NDArray[np.int32] | None: ...  # noqa: D102

    @property
    def object_px(self) -> float: ...  # noqa: D102


@dataclass(frozen=True, slots=True, eq=False)
class StoredPicture:
    """A `Picture` in memory."""

    name: str
    group: str
    image: NDArray[np.uint8]

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""
        height, width = self.image.shape[:2]
        return height, width

    def digest(self) -> bytes:
        """SHA-256 of name, group and pixels."""
        return _sha256(self.name, self.group, self.image)


@dataclass(frozen=True, slots=True, eq=False)
class StoredSample(StoredPicture):
    """A `Sample` in memory."""

    labels: NDArray[np.uint8]
    instances: NDArray[np.int32] | None = None
    object_px: float = math.nan

    def __post_init__(self) -> None:
        for labels in (self.labels, self.instances):
            if labels is not None and labels.shape != self.image.shape[:2]:
                raise DataError(
                    f"{self.name}: labels are {labels.shape}, image {self.image.shape}; save them at one size"
                )

    def digest(self) -> bytes:
        """SHA-256 of name, group, pixels, labels and objects."""
        return _sha256(self.name, self.group, self.image, self.labels, self.instances)


@dataclass(frozen=True, slots=True)
class DataSet:
    """The images of one data set, as its authors divided them.

    Attributes
    ----------
    name
        E.g. "glas".
    classes
        (name, (r, g, b)) in the order of the labels; empty if not known.
    mpp
        Micrometres per pixel of the images as they are stored; None if not known.
    train
        All labelled images that are in no official validation or test part.
    validation, test
        Official parts, often empty.
    pools
        Images whose labels are missing or not used, by name: "target", "unlabelled", "presence" or
        "absence".
    """

    name: str
    classes: Classes
    mpp: float | None
    train: tuple[Sample, ...]
    validation: tuple[Sample, ...] = ()
    test: tuple[Sample, ...] = ()
    pools: Mapping[str, tuple[Picture, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        labelled = (*self.train, *self.validation, *self.test)
        if not labelled:
            raise DataError(f"{self.name}: no labelled image in it; add labels")
        for part in (labelled, *self.pools.values()):
            repeated = [name for name, n in Counter(p.name for p in part).items() if n > 1]
            if repeated:
                raise DataError(f"{self.name}: two images have the name {listed(repeated)}")

    @property
    def channels(self) -> int:
        """Of each image: 3 (RGB), 1 (grey) or another number."""
        first = next(chain(self.train, self.validation, self.test))
        return int(first.image.shape[2])

    def at_mpp(self, mpp: float) -> DataSet:
        """Return the data set with every image resampled to ``mpp`` micrometres per pixel.

        Images are resampled as slides are (area average down, bilinear up), labels and objects are
        taken at the pixels' centres. A data set of unknown resolution stays as it is.

        Raises
        ------
        DataError
            If ``mpp`` is not positive.
        """
        if not mpp > 0:
            raise DataError(f"mpp={mpp}: a resolution is a positive number of um per pixel: pass another --mpp")
        if self.mpp is None or same_mpp(self.mpp, mpp):
            return self
        scale = mpp / self.mpp
        return replace(
            self,
            mpp=mpp,
            train=tuple(_resampled_sample(s, scale) for s in self.train),
            validation=tuple(_resampled_sample(s, scale) for s in self.validation),
            test=tuple(_resampled_sample(s, scale) for s in self.test),
            pools={k: pictures_at(v, self.mpp, mpp) for k, v in self.pools.items()},
        )


def pictures_at(pictures: Sequence[Picture], own_mpp: float, mpp: float) -> tuple[Picture, ...]:
    """Resample images of ``own_mpp`` to ``mpp`` micrometres per pixel."""
    if same_mpp(own_mpp, mpp):
        return tuple(pictures)
    return tuple(_resampled_picture(picture, mpp / own_mpp) for picture in pictures)


def same_mpp(own_mpp: float, mpp: float) -> bool:
    """Whether two resolutions are so close that no resampling is needed."""
    return math.isclose(own_mpp, mpp, rel_tol=SAME_MPP)


def checksum(samples: Sequence[Picture]) -> str:
    """SHA-256 over all digests in order: the identity of the data in a training record."""
    return hashlib.sha256(b"".join(sample.digest() for sample in samples)).hexdigest()


def class_count(samples: Sequence[Sample]) -> int:
    """Return one more than the largest label.

    Raises
    ------
    DataError
        If there is only one class to learn.
    """
    classes = 1 + max(int(annotated(sample.labels).max(initial=0)) for sample in samples)
    if classes < 2:
        raise DataError("every label is 0: there is nothing to learn; check the label files")
    return classes


def annotated(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the labels of a map that are not `IGNORED`, flat."""
    chosen: NDArray[np.uint8] = labels[labels != IGNORED]
    return chosen


def kind_of(channels: int) -> str:
    """Return what images of so many channels are called in a message."""
    return {1: "grey", 3: "RGB"}.get(channels, f"of {channels} channels")


def median_diameter(instances: NDArray[np.integer]) -> float:
    """Median diameter of the objects (of the circle of equal area), in pixels; nan without any."""
    areas = np.unique(instances[instances > 0], return_counts=True)[1]
    return float(2 * np.sqrt(np.median(areas) / np.pi)) if len(areas) else math.nan


def listed(names: Sequence[object], most: int = 8) -> str:
    """Join names for a message, the first ``most`` of them."""
    text = ", ".join(str(name) for name in names[:most])
    return text + f" and {len(names) - most} more" if len(names) > most else text


def _sha256(*parts: str | NDArray[np.generic] | None) -> bytes:
    """Hash texts and arrays with their lengths and shapes, so that different lists differ."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(f"{len(part)} {part}".encode())
        elif part is not None:
            digest.update(f"{part.shape}{part.dtype.str}".encode())
            digest.update(np.ascontiguousarray(part).data)
    return digest.digest()


# ----------------------------------------------------------------------------- resolution


@dataclass(frozen=True, slots=True, eq=False)
class _ResampledPicture:
    """A picture at another resolution, resampled at each access."""

    _source: Picture
    _scale: float

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def group(self) -> str:
        return self._source.group

    @property
    def image(self) -> NDArray[np.uint8]:
        return resampled(self._source.image, self._scale)

    @property
    def shape(self) -> tuple[int, int]:
        height, width = (len(_centres(side, self._scale)) for side in self._source.shape)
        return height, width

    def digest(self) -> bytes:
        return _sha256(self._source.digest().hex(), f"{self._scale:.9g}")


@dataclass(frozen=True, slots=True, eq=False)
class _ResampledSample(_ResampledPicture):
    """A sample at another resolution, resampled at each access."""

    _source: Sample

    @property
    def labels(self) -> NDArray[np.uint8]:
        return _at_centres(self._source.labels, self._scale)

    @property
    def instances(self) -> NDArray[np.int32] | None:
        instances = self._source.instances
        return None if instances is None else _at_centres(instances, self._scale)

    @property
    def object_px(self) -> float:
        return self._source.object_px / self._scale


def _resampled_picture(picture: Picture, scale: float) -> Picture:
    if isinstance(picture, StoredPicture):
        return StoredPicture(picture.name, picture.group, resampled(picture.image, scale))
    return _ResampledPicture(picture, scale)


def _resampled_sample(sample: Sample, scale: float) -> Sample:
    small = _ResampledSample(sample, scale)
    if isinstance(sample, StoredSample):
        return StoredSample(sample.name, sample.group, small.image, small.labels, small.instances, small.object_px)
    return small


def _at_centres(labels: NDArray[Label], scale: float) -> NDArray[Label]:
    rows, columns = (_centres(side, scale) for side in labels.shape)
    return labels[rows[:, None], columns]


def _centres(side: int, scale: float) -> NDArray[np.int64]:
    """Return the pixel of a row of ``side`` that lies under the centre of each resampled one."""
    count = max(1, int(side / scale + 0.5))
    return np.minimum(((np.arange(count) + 0.5) * scale).astype(np.int64), side - 1)
