"""A slide as DICOM knows it: patient, study, series, and where it lies in space.

What is made of a DICOM slide belongs to its study. Other slides get an identity of their own, the
same whenever the same file is seen.
"""

from __future__ import annotations

import hashlib
import math
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from histostream.wsi.errors import SlideError, printable
from histostream.wsi.outputs.label_rows import SlideInfo

SM_IMAGE = "1.2.840.10008.5.1.4.1.1.77.1.6"  # VL Whole Slide Microscopy Image Storage
PREFIX = b"DICM"  # after 128 bytes of anything
UIDS = uuid.UUID("5f3c1c66-5a0b-4c57-9f5e-0d7f3f6c6a52")  # namespace of the UIDs made up here
SAMPLE_BYTES = 1 << 20  # of each end of a file; two scans do not share both
# Type 2: they have to be there, and may be empty.
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


def made_up_uid(*words: str) -> str:
    """Return a UID that is the same for the same words (PS3.5 B.2, from a UUID)."""
    return f"2.25.{uuid.uuid5(UIDS, chr(0).join(words)).int}"


def text(value: str, longest: int = 64) -> str:
    r"""Write something as DICOM's LO and SH take it: no control characters and no ``\``."""
    return printable(value).replace("\\", "/")[:longest]


def slide_header(path: Path, info: SlideInfo, tile_px: int) -> Any:
    """Describe the first tile of a label map, as if it were the whole slide image.

    highdicom wants the pixels of all that a header describes.

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
    pydicom.Dataset without pixels: of a DICOM slide that of the level that is nearest in
    size, with what it leaves out; otherwise made up. Place, tile and spacing are those of the
    label map.

    Raises
    ------
    SlideError
        If the slide is DICOM, and not a whole slide image.
    Exception
        Of any kind, as pydicom has it, if its header is damaged.
    """
    found = _nearest_level(path, info)
    header = _made_up(path, info) if found is None else _completed(found, path, info)
    _lay_grid(header, info, tile_px)
    return header


def _nearest_level(path: Path, info: SlideInfo) -> Any | None:
    """Return the header of the level of a DICOM slide that is nearest in size; None if it is none.

    The other levels lie in the same folder, and say that they are of the same series.
    """
    import pydicom

    named = sorted(path.glob("*.dcm"))[:1] if path.is_dir() else [path]
    if not named or not _is_dicom(named[0]):
        return None
    tags = ["SOPClassUID", "SeriesInstanceUID", "ImageType", "TotalPixelMatrixColumns"]
    first = pydicom.dcmread(named[0], stop_before_pixels=True, specific_tags=tags)
    found = []
    for file in _siblings(named[0]):
        level = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags)
        columns = level.get("TotalPixelMatrixColumns")
        if (
            level.get("SOPClassUID") == SM_IMAGE
            and level.get("SeriesInstanceUID") == first.get("SeriesInstanceUID")
            and "VOLUME" in level.get("ImageType", ())
            and columns
        ):
            found.append((abs(math.log(columns / info.width)), file.name, file))
    if not found:
        raise SlideError(f"{path}: no whole slide image in its DICOM series; leave dicom-seg out of --rasters")
    return pydicom.dcmread(min(found)[2], stop_before_pixels=True)


def _siblings(file: Path) -> Iterator[Path]:
    for other in sorted(file.parent.iterdir()):  # `file` among them
        if other.suffix == file.suffix and other.is_file() and _is_dicom(other):
            yield other


def _is_dicom(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(128 + len(PREFIX))[128:] == PREFIX


def _completed(header: Any, path: Path, info: SlideInfo) -> Any:
    """Fill in what a slide should say and many do not."""
    header.decode()  # what is made of it is in UTF-8
    for name in MAY_BE_EMPTY:
        if name not in header:
            setattr(header, name, "")
    if "FrameOfReferenceUID" not in header:
        header.FrameOfReferenceUID = made_up_uid("frame of reference", header.SeriesInstanceUID)
    if "PositionReferenceIndicator" not in header:
        header.PositionReferenceIndicator = "SLIDE_CORNER"
    if not (header.get("ContentDate") and header.get("ContentTime")):
        _date(header, path)
    if "ContainerIdentifier" in header or "SpecimenDescriptionSequence" in header:
        _complete_specimen(header, info.name, header.SeriesInstanceUID)
    return header


def _made_up(path: Path, info: SlideInfo) -> Any:
    """Return what a scanner would have said of the slide, with UIDs that follow from the file."""
    from pydicom import Dataset

    print_of_file = _fingerprint(path)
    header = Dataset()
    for name in MAY_BE_EMPTY:
        setattr(header, name, "")
    header.SOPClassUID = SM_IMAGE
    header.Modality = "SM"
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"):
        setattr(header, name, made_up_uid(name, print_of_file))
    header.PositionReferenceIndicator = "SLIDE_CORNER"
    header.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    header.PatientID = text(info.name)
    _complete_specimen(header, info.name, print_of_file)
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
        specimen.SpecimenUID = made_up_uid("specimen", identity)
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
    """Tell a file from others by its size and both ends: a name says nothing, and all is slow."""
    size = path.stat().st_size
    with path.open("rb") as file:
        found = hashlib.sha256(file.read(SAMPLE_BYTES))
        file.seek(max(size - SAMPLE_BYTES, 0))
        found.update(file.read(SAMPLE_BYTES))
    return f"{size} {found.hexdigest()}"


def _date(header: Any, path: Path) -> None:
    # A date of the run would make bits differ where nothing else does.
    when = datetime.fromtimestamp(int(path.stat().st_mtime), UTC)
    header.ContentDate, header.ContentTime = f"{when:%Y%m%d}", f"{when:%H%M%S}"


def _lay_grid(header: Any, info: SlideInfo, tile_px: int) -> None:
    """Replace the tiles of a header by those of a label map over the same place."""
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
        header.ImageOrientationSlide = [0, -1, 0, -1, 0, 0]  # as scanners lay a slide
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
    """Return the sides of a pixel of the label map: square, or as the slide's own pixels are."""
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

    return DSfloat(value, auto_format=True)  # 16 characters are what there is room for
