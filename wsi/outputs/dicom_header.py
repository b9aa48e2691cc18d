"""The DICOM header of a slide: patient, study, series, and its position in space.

Results of a DICOM slide belong to its study. For other slides an identity is generated that depends
on the file's content alone.
"""

from __future__ import annotations

import hashlib
import math
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from histostream.wsi.errors import SlideError, printable
from histostream.wsi.outputs.label_rows import SlideInfo

SM_IMAGE = "1.2.840.10008.5.1.4.1.1.77.1.6"  # VL Whole Slide Microscopy Image Storage
PREFIX = b"DICM"  # after 128 bytes of anything
UIDS = uuid.UUID("5f3c1c66-5a0b-4c57-9f5e-0d7f3f6c6a52")  # namespace of the UIDs generated here
SAMPLE_BYTES = 1 << 20  # of each end of a file; two scans do not share both
# Attributes of type 2: required, but they may be empty.
MAY_BE_EMPTY = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
)


def generated_uid(*words: str) -> str:
    """Return a UID that is the same for the same words (PS3.5 B.2, from a UUID)."""
    return f"2.25.{uuid.uuid5(UIDS, chr(0).join(words)).int}"


def text(value: str, longest: int = 64) -> str:
    r"""Return a text that fits DICOM's LO and SH: no control characters and no ``\``."""
    return printable(value).replace("\\", "/")[:longest]


def slide_header(path: Path, info: SlideInfo, tile_px: int) -> Any:
    """Return the header of the first tile of a label map, as if it were the whole slide image.

    highdicom requires the pixels of everything that a header describes.

    Parameters
    ----------
    path
        The slide: a file, or the folder of a DICOM series.
    info
        Size and resolution of the label map.
    tile_px
        Side of its tiles.

    Returns
    -------
    pydicom.Dataset without pixels. For a DICOM slide it is that of the level nearest in size,
    completed where attributes are missing; for others it is generated. Position, tile and spacing
    are those of the label map.

    Raises
    ------
    SlideError
        If the slide is DICOM, but not a whole slide image.
    Exception
        Of any kind, from pydicom, if its header is damaged.
    """
    level = _nearest_level(path, info)
    header = _generated(path, info) if level is None else _completed(level, path, info)
    _set_grid(header, info, tile_px)
    return header


def _nearest_level(path: Path, info: SlideInfo) -> Any | None:
    """Return the header of the level of a DICOM slide that is nearest in size; None if it is not DICOM.

    The levels of a slide are files of one series in one folder.
    """
    import pydicom

    files = sorted(path.glob("*.dcm")) if path.is_dir() else [path]
    if not files or not _is_dicom(files[0]):
        return None
    tags = ["SOPClassUID", "SeriesInstanceUID", "ImageType", "TotalPixelMatrixColumns"]
    first = pydicom.dcmread(files[0], stop_before_pixels=True, specific_tags=tags)
    levels = []
    for file in sorted(files[0].parent.iterdir()):
        if file.suffix != files[0].suffix or not file.is_file() or not _is_dicom(file):
            continue
        level = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags)
        columns = level.get("TotalPixelMatrixColumns")
        if (
            level.get("SOPClassUID") == SM_IMAGE
            and level.get("SeriesInstanceUID") == first.get("SeriesInstanceUID")
            and "VOLUME" in level.get("ImageType", ())
            and columns
        ):
            levels.append((abs(math.log(columns / info.width)), file.name, file))
    if not levels:
        raise SlideError(f"{path}: no whole slide image in its DICOM series; leave dicom-seg out of --rasters")
    return pydicom.dcmread(min(levels)[2], stop_before_pixels=True)


def _is_dicom(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(128 + len(PREFIX))[128:] == PREFIX


def _completed(header: Any, path: Path, info: SlideInfo) -> Any:
    """Add required attributes that many slides lack."""
    header.decode()  # the result is in UTF-8
    for name in MAY_BE_EMPTY:
        if name not in header:
            setattr(header, name, "")
    if "FrameOfReferenceUID" not in header:
        header.FrameOfReferenceUID = generated_uid("frame of reference", header.SeriesInstanceUID)
    if "PositionReferenceIndicator" not in header:
        header.PositionReferenceIndicator = "SLIDE_CORNER"
    if not (header.get("ContentDate") and header.get("ContentTime")):
        _date(header, path)
    if "ContainerIdentifier" in header or "SpecimenDescriptionSequence" in header:
        _complete_specimen(header, info.name, header.SeriesInstanceUID)
    return header


def _generated(path: Path, info: SlideInfo) -> Any:
    """Return a header like that of a scanner, with UIDs that depend on the file."""
    from pydicom import Dataset

    identity = _fingerprint(path)
    header = Dataset()
    for name in MAY_BE_EMPTY:
        setattr(header, name, "")
    header.SOPClassUID = SM_IMAGE
    header.Modality = "SM"
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"):
        setattr(header, name, generated_uid(name, identity))
    header.PositionReferenceIndicator = "SLIDE_CORNER"
    header.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    header.PatientID = text(info.name)
    _complete_specimen(header, info.name, identity)
    _date(header, path)
    return header


def _complete_specimen(header: Any, name: str, identity: str) -> None:
    from pydicom import Dataset, Sequence

    if not header.get("ContainerIdentifier"):
        header.ContainerIdentifier = text(name)
    if "IssuerOfTheContainerIdentifierSequence" not in header:
        header.IssuerOfTheContainerIdentifierSequence = Sequence()
    if "ContainerTypeCodeSequence" not in header:
        header.ContainerTypeCodeSequence = Sequence([_code("433466003", "SCT", "Microscope slide")])
    if not header.get("SpecimenDescriptionSequence"):
        specimen = Dataset()
        specimen.SpecimenIdentifier = header.ContainerIdentifier
        specimen.SpecimenUID = generated_uid("specimen", identity)
        header.SpecimenDescriptionSequence = Sequence([specimen])
    for specimen in header.SpecimenDescriptionSequence:
        for keyword in ("IssuerOfTheSpecimenIdentifierSequence", "SpecimenPreparationSequence"):
            if keyword not in specimen:
                setattr(specimen, keyword, Sequence())


def _code(value: str, scheme: str, meaning: str) -> Any:
    from pydicom import Dataset

    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
    return code


def _fingerprint(path: Path) -> str:
    """Return size and SHA-256 of both ends of a file, since hashing all of it is slow."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(SAMPLE_BYTES))
        file.seek(max(size - SAMPLE_BYTES, 0))
        digest.update(file.read(SAMPLE_BYTES))
    return f"{size} {digest.hexdigest()}"


def _date(header: Any, path: Path) -> None:
    # Not the date of the run: two runs on a file give the same bytes.
    modified = datetime.fromtimestamp(int(path.stat().st_mtime), UTC)
    header.ContentDate, header.ContentTime = f"{modified:%Y%m%d}", f"{modified:%H%M%S}"


def _set_grid(header: Any, info: SlideInfo, tile_px: int) -> None:
    """Replace the tiles of a header by those of a label map of the same area."""
    from pydicom import Dataset, Sequence

    x, y = _spacing_mm(header, info)
    header.Rows = header.Columns = tile_px
    header.TotalPixelMatrixColumns = header.TotalPixelMatrixRows = tile_px
    header.NumberOfFrames = header.TotalPixelMatrixFocalPlanes = 1
    header.ImagedVolumeWidth, header.ImagedVolumeHeight = x * tile_px, y * tile_px
    if not header.get("ImagedVolumeDepth"):
        header.ImagedVolumeDepth = 0.001
    header.DimensionOrganizationType = "TILED_FULL"
    if len(header.get("ImageOrientationSlide") or ()) != 6:
        header.ImageOrientationSlide = [0, -1, 0, -1, 0, 0]  # as scanners orient a slide
    if not header.get("TotalPixelMatrixOriginSequence"):
        origin = Dataset()
        origin.XOffsetInSlideCoordinateSystem = origin.YOffsetInSlideCoordinateSystem = 0
        header.TotalPixelMatrixOriginSequence = Sequence([origin])
    measures, shared = Dataset(), Dataset()
    measures.PixelSpacing = [_decimal(y), _decimal(x)]
    measures.SliceThickness = _decimal(float(header.ImagedVolumeDepth))
    shared.PixelMeasuresSequence = Sequence([measures])
    header.SharedFunctionalGroupsSequence = Sequence([shared])
    if "PerFrameFunctionalGroupsSequence" in header:
        del header.PerFrameFunctionalGroupsSequence


def _spacing_mm(header: Any, info: SlideInfo) -> tuple[float, float]:
    """Return width and height of a label map's pixel; their ratio is that of the slide's own pixels."""
    shared = header.get("SharedFunctionalGroupsSequence") or [{}]
    measures = shared[0].get("PixelMeasuresSequence") or [{}]
    spacing = [float(side) for side in measures[0].get("PixelSpacing") or ()]
    mm = info.mpp / 1000
    if len(spacing) != 2 or not all(0 < side < math.inf for side in spacing):
        return mm, mm
    y, x = spacing
    return 2 * mm * x / (x + y), 2 * mm * y / (x + y)


def _decimal(value: float) -> Any:
    from pydicom.valuerep import DSfloat

    return DSfloat(value, auto_format=True)  # at most 16 characters
