"""Find the DICOM files that make a slide: those of one series, whatever their names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.errors import SlideError

PREAMBLE = 128  # bytes before the mark
MARK = b"DICM"
WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"  # SOP class of whole slide microscopy images


def is_dicom(path: Path) -> bool:
    """Whether a path is a regular file with the preamble of DICOM."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(PREAMBLE + len(MARK))[PREAMBLE:] == MARK


def series_among(files: Iterable[Path]) -> list[list[Path]]:
    """Group the DICOM files of slides by their series.

    Parameters
    ----------
    files
        Files of one folder; those that are not DICOM are left out, and so are series of other kinds (segmentations,
        annotations) where there is a slide.

    Returns
    -------
    The files of each series, sorted by name; the series in the order of their first files.
    """
    import pydicom

    series: dict[str, list[Path]] = {}
    slides = set()
    for path in sorted(files):
        if not is_dicom(path):
            continue
        try:
            header = pydicom.dcmread(
                path, stop_before_pixels=True, specific_tags=["SeriesInstanceUID", "SOPClassUID"], force=True
            )
        except (OSError, MemoryError):
            raise
        except Exception:  # pydicom raises errors of any kind; the file belongs to no series that can be read
            continue
        uid = str(header.get("SeriesInstanceUID", ""))
        series.setdefault(uid, []).append(path)
        if header.get("SOPClassUID") == WHOLE_SLIDE:
            slides.add(uid)
    return [paths for uid, paths in series.items() if not slides or uid in slides]


def series_files(path: Path) -> list[Path]:
    """Return the files of the series that a DICOM file belongs to, or of the only series of a folder.

    Raises
    ------
    SlideError
        If a folder holds no DICOM files, or several series.
    """
    folder = path if path.is_dir() else path.parent
    series = series_among(file for file in folder.iterdir() if not file.name.startswith("."))
    if path.is_dir():
        if not series:
            raise SlideError(f"{path}: a folder without DICOM files; name a slide file")
        if len(series) > 1:
            names = ", ".join(str(files[0]) for files in series)
            raise SlideError(f"{path}: it holds {len(series)} DICOM series; name one file of the series: {names}")
        return series[0]
    return next((files for files in series if path in files), [path])


def missing_frames(level: Any) -> NDArray[np.bool_] | None:
    """Return which frames a level does not hold, (rows, columns) bool; None if it holds all.

    Parameters
    ----------
    level
        A level of ``wsidicom.WsiDicom``.
    """
    index = level.default_instance.image_data.tiles
    planes = getattr(index, "planes", None)  # those of a sparse level
    if not planes:
        return None
    missing = np.all([plane.plane.T == -1 for plane in planes.values()], axis=0)
    return np.asarray(missing) if missing.any() else None
