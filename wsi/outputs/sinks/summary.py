"""summary.json and summary.csv: area and share of each class."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.files import json_text, remove, write_temporary
from histostream.wsi.outputs.label_rows import BACKGROUND, NOT_ANALYSED, LabelRows, SlideInfo, background_label
from histostream.wsi.outputs.objects.counting import ObjectCounter
from histostream.wsi.records import to_json

COUNTED_PX = 1 << 18  # pixels counted at a time: they stay in a core's cache for all classes
FEW_CLASSES = 16  # so many are counted one by one: 0.06 ns a pixel and class, np.bincount takes 2 ns


@dataclass(frozen=True, slots=True)
class ClassSummary:
    """How much of a slide is of one class.

    Attributes
    ----------
    label
        Its value in the label map.
    name, color
        As shown to people; red, green, blue, 0 to 255.
    role
        "background" for the class that is not painted and has no objects, else "".
    pixels, area_mm2
        Its area in the label map.
    share
        Of the analysed area; None where nothing was analysed.
    objects, mean_object_um2
        Number of objects and their mean area; None where they are not counted, or there is none.
    objects_per_mm2
        Objects per mm2 of the analysed area.
    touching_share
        Share of the objects that are probably several that touch; see `ObjectCount`.
    """

    label: int | None = None
    name: str = ""
    color: tuple[int, int, int] = (0, 0, 0)
    role: str = ""
    pixels: int | None = None
    area_mm2: float | None = None
    share: float | None = None
    objects: int | None = None
    objects_per_mm2: float | None = None
    mean_object_um2: float | None = None
    touching_share: float | None = None
    further: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SummaryRecord:
    """What summary.json holds: area and share of each class.

    Attributes
    ----------
    slide
        Name of the slide's file.
    mpp, width_px, height_px
        Resolution (um per pixel) and size of the label map.
    slide_mm2, analysed_mm2
        Area of the slide, and of what was analysed.
    classes
        The classes, in the order of their labels.
    further
        Keys that this version does not know.
    """

    slide: str = ""
    mpp: float | None = None
    width_px: int | None = None
    height_px: int | None = None
    slide_mm2: float | None = None
    analysed_mm2: float | None = None
    classes: tuple[ClassSummary, ...] = ()
    further: Mapping[str, Any] = field(default_factory=dict)


class Summary:
    """Counts pixels of each class, and takes over the counts of its objects.

    Parameters
    ----------
    folder
        Where summary.json and summary.csv will be.
    info
        The slide.
    counter
        Counts its objects in a sink that is finished before this one; None: they are not counted.
    """

    def __init__(self, folder: Path, info: SlideInfo, counter: ObjectCounter | None = None) -> None:
        self.folder, self._info, self._counter = folder, info, counter
        self._counts = np.zeros(256, np.int64)
        self._temporary: list[Path] = []

    def write(self, part: LabelRows) -> None:
        """Take the next rows.

        Raises
        ------
        ValueError
            If a label is neither a class nor `NOT_ANALYSED`.
        """
        if part.all_outside:
            self._counts[NOT_ANALYSED] += part.labels.size
            return
        rows = max(1, COUNTED_PX // part.labels.shape[1])
        for top in range(0, len(part.labels), rows):
            self._counts += _counted(part.labels[top : top + rows], len(self._info.classes))
        strange = self._counts[len(self._info.classes) : NOT_ANALYSED]
        if strange.any():
            label = len(self._info.classes) + int(strange.argmax())
            raise ValueError(
                f"{self._info.name}: label {label} at y={part.y} or after is no class: "
                f"use 0 to {len(self._info.classes) - 1}, or {NOT_ANALYSED} for outside"
            )

    def record(self) -> SummaryRecord:
        """Return the summary of the rows so far."""
        info, pixel_mm2 = self._info, (self._info.mpp / 1000) ** 2
        analysed = int(self._counts[:NOT_ANALYSED].sum())
        classes, background = [], background_label(info.classes)
        for label, entry in enumerate(info.classes):
            pixels = int(self._counts[label])
            share = pixels / analysed if analysed else None
            role = BACKGROUND if label == background else ""
            classes.append(
                ClassSummary(
                    label,
                    entry.name,
                    entry.color,
                    role,
                    pixels,
                    pixels * pixel_mm2,
                    share,
                    **self._objects(label, analysed * pixel_mm2),
                )
            )
        return SummaryRecord(
            info.name,
            info.mpp,
            info.width,
            info.height,
            info.width * info.height * pixel_mm2,
            analysed * pixel_mm2,
            tuple(classes),
        )

    def finish(self) -> list[tuple[Path, Path]]:
        """Write both files under their temporary names."""
        texts = {"summary.json": json_text(to_json(self.record())), "summary.csv": self._csv()}
        pairs = []
        for name, text in texts.items():
            pairs.append(write_temporary(self.folder / name, text))
            self._temporary.append(pairs[-1][0])
        return pairs

    def abort(self) -> None:
        """Remove what was written."""
        remove(self._temporary)

    def _objects(self, label: int, analysed_mm2: float) -> dict[str, Any]:
        """Return the counts of a class as arguments of `ClassSummary`."""
        count = None if self._counter is None else self._counter.count(label)
        if count is None:
            return {}
        per_mm2 = round(count.objects / analysed_mm2, 3) if analysed_mm2 else None
        return {
            "objects": count.objects,
            "objects_per_mm2": per_mm2,
            "mean_object_um2": count.mean_um2,
            "touching_share": count.touching_share,
        }

    def _csv(self) -> str:
        """Return one line for each class; the slide's values are in every line, so that tables can be joined."""
        summary, text = to_json(self.record()), io.StringIO()
        classes = summary.pop("classes")
        lines = [summary | entry | {"color": info.hex} for entry, info in zip(classes, self._info.classes, strict=True)]
        table = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(lines)
        return text.getvalue()


def _counted(labels: NDArray[np.uint8], classes: int) -> NDArray[np.int64]:
    """Return how often each label occurs, (256,)."""
    if classes <= FEW_CLASSES:
        counts = np.zeros(256, np.int64)
        for label in (*range(classes), NOT_ANALYSED):
            counts[label] = np.count_nonzero(labels == label)
        if counts.sum() == labels.size:
            return counts
    return np.bincount(labels.ravel(), minlength=256)
