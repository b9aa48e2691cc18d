"""summary.json and summary.csv: area and share of each class."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.files import json_text, remove, write_temporary
from histostream.wsi.outputs.label_rows import NOT_ANALYSED, LabelRows, SlideInfo

# At a time: it stays in a core's cache while each class is counted.
_COUNTED_PX = 1 << 18
_FEW_CLASSES = 16  # are counted one by one: 0.06 ns a pixel and class, np.bincount takes 2 ns


class Summary:
    """Counts pixels of each class.

    Parameters
    ----------
    folder
        Where summary.json and summary.csv will be.
    info
        The slide.
    """

    def __init__(self, folder: Path, info: SlideInfo) -> None:
        self.folder, self._info = folder, info
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
        rows = max(1, _COUNTED_PX // part.labels.shape[1])
        for top in range(0, len(part.labels), rows):
            self._counts += _counted(part.labels[top : top + rows], len(self._info.classes))
        strange = self._counts[len(self._info.classes) : NOT_ANALYSED]
        if strange.any():
            label = len(self._info.classes) + int(strange.argmax())
            raise ValueError(
                f"{self._info.name}: label {label} at y={part.y} or after is no class: "
                f"use 0 to {len(self._info.classes) - 1}, or {NOT_ANALYSED} for outside"
            )

    def as_dict(self) -> dict[str, object]:
        """Return what summary.json says, of the rows so far; areas in mm2, shares of 1."""
        info, pixel_mm2 = self._info, (self._info.mpp / 1000) ** 2
        analysed = int(self._counts[:NOT_ANALYSED].sum())
        return {
            "slide": info.name,
            "mpp": info.mpp,
            "width_px": info.width,
            "height_px": info.height,
            "slide_mm2": info.width * info.height * pixel_mm2,
            "analysed_mm2": analysed * pixel_mm2,
            "classes": [
                {
                    "label": label,
                    "name": entry.name,
                    "color": list(entry.color),
                    "pixels": int(self._counts[label]),
                    "area_mm2": int(self._counts[label]) * pixel_mm2,
                    "share": int(self._counts[label]) / analysed if analysed else None,
                }
                for label, entry in enumerate(info.classes)
            ],
        }

    def finish(self) -> list[tuple[Path, Path]]:
        """Write both files under their temporary names."""
        texts = {"summary.json": json_text(self.as_dict()), "summary.csv": self._csv()}
        pairs = []
        for name, text in texts.items():
            pairs.append(write_temporary(self.folder / name, text))
            self._temporary.append(pairs[-1][0])
        return pairs

    def abort(self) -> None:
        """Remove what was written."""
        remove(self._temporary)

    def _csv(self) -> str:
        """One line a class; the slide's values are repeated, so that tables can be joined."""
        summary, text = self.as_dict(), io.StringIO()
        classes = summary.pop("classes")
        assert isinstance(classes, list)
        lines = [summary | entry | {"color": info.hex} for entry, info in zip(classes, self._info.classes, strict=True)]
        table = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(lines)
        return text.getvalue()


def _counted(labels: NDArray[np.uint8], classes: int) -> NDArray[np.int64]:
    """How often each label occurs, (256,)."""
    if classes <= _FEW_CLASSES:
        counts = np.zeros(256, np.int64)
        for label in (*range(classes), NOT_ANALYSED):
            counts[label] = np.count_nonzero(labels == label)
        if counts.sum() == labels.size:
            return counts
    return np.bincount(labels.ravel(), minlength=256)
