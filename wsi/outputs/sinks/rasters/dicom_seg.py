"""labels.dcm: the label map as DICOM Segmentation, for archives and viewers of slides (PACS).

The kind is LABELMAP (Supplement 243): its pixels are the labels, one frame for each tile. (BINARY has an
uncompressed bit plane for each class.) Frames are compressed by JPEG-LS, which viewers decode: it is
lossless and smaller than deflate on labels, and takes 140 bytes for a tile of glass (RLE: 4096).

highdicom's constructor needs all pixels in memory, which is not possible for a slide. So it writes the
header for one tile, and the frames are written after it; with TILED_FULL the header lists no frames.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from histostream.wsi.errors import HistoError, SlideError, reason
from histostream.wsi.outputs.dicom_header import generated_uid, slide_header, text
from histostream.wsi.outputs.label_rows import ClassInfo, SlideInfo, background_label
from histostream.wsi.outputs.pyramid import PyramidLayout, PyramidWriter, TileCodec, nearest
from histostream.wsi.outputs.sinks import SinkKind
from histostream.wsi.outputs.sinks.pyramid import LABEL_BYTES, PyramidSink, pyramid_needs
from histostream.wsi.outputs.sinks.tiff import NOT_ANALYSED_COLOR, NOT_ANALYSED_NAME

JPEG_LS = "1.2.840.10008.1.2.4.80"  # lossless
SCHEME = "99HISTOSTREAM"  # coding scheme for all other classes; 99 marks a private one
# Words of a class's name -> category (CID 7150) and type in SNOMED CT, as pydicom spells them.
CODES = {
    ("nucleus", "nuclei"): ("AnatomicalStructure", "Nucleus"),
    ("cell", "cells"): ("AnatomicalStructure", "Cell"),
    ("tumor", "tumour", "neoplasm"): ("MorphologicallyAbnormalStructure", "Neoplasm"),
    ("necrosis", "necrotic"): ("MorphologicallyAbnormalStructure", "Necrosis"),
    ("fat", "adipose"): ("Tissue", "AdiposeTissue"),
    ("tissue",): ("Tissue", "Tissue"),
}
ITEM = struct.Struct("<HHL")  # group, element and length of an item of encapsulated pixels
ITEM_TAG, END_TAG = (0xFFFE, 0xE000), (0xFFFE, 0xE0DD)
# (7FE0,0010) OB of undefined length.
PIXELS = struct.pack("<HH2s2xL", 0x7FE0, 0x0010, b"OB", 0xFFFFFFFF)
MAX_OFFSET = 1 << 32  # above it, the extended offset table replaces the basic one
UNNAMED = "not known yet"


class DicomSeg(PyramidSink):
    """The label map as one DICOM Segmentation.

    A pixel is its class's label + 1, and 0 where nothing was analysed. The segmentation of a DICOM slide
    belongs to the slide's study and frame of reference; see `histostream.wsi.outputs.dicom_header`.

    Parameters
    ----------
    path
        Final name.
    info
        The label map.
    slide
        Path of the slide.
    tile_px
        Side of a frame; band edges must be multiples of it.

    Raises
    ------
    OutputError
        If highdicom is not installed.
    SlideError
        If the slide is DICOM, and its header cannot be used.
    """

    def __init__(self, path: Path, info: SlideInfo, slide: Path, tile_px: int = 512) -> None:
        SINK.check_installed()
        try:
            self._header = _header(info, slide_header(slide, info, tile_px), tile_px)
            _digest(self._header, iter(()))  # a header that cannot be written is an error now, not at the end
        except (HistoError, MemoryError):
            raise
        except Exception as error:  # pydicom's errors on damaged headers have no common base
            raise SlideError(
                f"{slide}: labels.dcm cannot be made of its header ({reason(error)}); leave dicom-seg out of --rasters"
            ) from error
        layout = PyramidLayout(
            info.width,
            info.height,
            1,
            info.mpp,
            nearest,
            tile_px,
            smallest_px=max(info.width, info.height),  # no lower levels
        )
        super().__init__(PyramidWriter(path, layout, TileCodec(_encode, _decode, {}), self._assemble))

    def _assemble(self, pyramid: PyramidWriter, path: Path) -> None:
        from pydicom import dcmwrite

        offsets, lengths = _offsets(pyramid.tile_bytes(0).ravel())
        short = not len(offsets) or int(offsets[-1]) < MAX_OFFSET
        if not short:
            self._header.ExtendedOffsetTable = offsets.astype("<u8").tobytes()
            self._header.ExtendedOffsetTableLengths = lengths.astype("<u8").tobytes()
        _name(self._header, _digest(self._header, pyramid.tiles(0)))
        with path.open("wb") as file:
            dcmwrite(file, self._header, enforce_file_format=True)
            file.write(PIXELS)
            _write_item(file, offsets.astype("<u4").tobytes() if short else b"")
            for frame in pyramid.tiles(0):
                _write_item(file, frame)
            file.write(ITEM.pack(*END_TAG, 0))


def _encode(tile: NDArray[np.uint8]) -> bytes:
    # `NOT_ANALYSED` is the last value there is, so it becomes 0.
    data = bytes(imagecodecs.jpegls_encode(np.ascontiguousarray(tile + np.uint8(1))))
    return data + b"\0" * (len(data) % 2)  # items have even lengths


def _decode(data: bytes, _: tuple[int, ...]) -> NDArray[np.uint8]:
    labels: NDArray[np.uint8] = imagecodecs.jpegls_decode(data) - np.uint8(1)
    return labels


def _offsets(lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where the item of each frame begins, counted from the first one, and the length of each frame."""
    ends = np.cumsum(lengths + ITEM.size)
    return ends - lengths - ITEM.size, lengths


def _write_item(file: IO[bytes], data: bytes) -> None:
    file.write(ITEM.pack(*ITEM_TAG, len(data)))
    file.write(data)


def _header(info: SlideInfo, slide: Any, tile_px: int) -> Any:
    """Return the header that highdicom makes for one tile, changed to the size of the label map."""
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.color import CIELabColor
    from highdicom.seg import Segmentation
    from pydicom.sr.codedict import codes

    version = metadata.version("histostream")
    algorithm = AlgorithmIdentificationSequence("HistoStream", codes.DCM.ArtificialIntelligence, version)
    background = background_label(info.classes)
    header = Segmentation(
        source_images=[slide],
        pixel_array=np.zeros((1, tile_px, tile_px), np.uint8),
        segmentation_type="LABELMAP",
        segment_descriptions=[
            _segment(label + 1, entry, algorithm, is_background=label == background)
            for label, entry in enumerate(info.classes)
        ],
        series_instance_uid=generated_uid(UNNAMED),
        series_number=1,
        sop_instance_uid=generated_uid(UNNAMED),
        instance_number=1,
        manufacturer="HistoStream",
        manufacturer_model_name="histo-infer",
        software_versions=version,
        device_serial_number=version,
        series_description="HistoStream label map",
        content_label="LABELMAP",
        content_description=text(f"Classes of {info.name}"),
        transfer_syntax_uid=JPEG_LS,
        omit_empty_frames=False,
        dimension_organization_type="TILED_FULL",
        tile_pixel_array=True,
        tile_size=(tile_px, tile_px),
        specific_character_set="ISO_IR 192",
    )
    outside = header.SegmentSequence[0]
    outside.SegmentLabel = NOT_ANALYSED_NAME
    outside.RecommendedDisplayCIELabValue = list(CIELabColor.from_rgb(*NOT_ANALYSED_COLOR).value)
    header.TotalPixelMatrixColumns, header.TotalPixelMatrixRows = info.width, info.height
    header.NumberOfFrames = -(-info.width // tile_px) * -(-info.height // tile_px)
    # highdicom writes the time of the run, which would change the bits of equal results.
    header.ContentDate, header.ContentTime = slide.ContentDate, slide.ContentTime
    del header.InstanceCreationDate, header.InstanceCreationTime
    for equipment in header.ContributingEquipmentSequence:
        del equipment.ContributionDateTime
    del header.PixelData
    _name(header, UNNAMED)
    return header


def _digest(header: Any, frames: Iterator[bytes]) -> str:
    from pydicom import dcmwrite

    text = BytesIO()
    dcmwrite(text, header, enforce_file_format=True)
    digest = hashlib.sha256(text.getvalue())
    for frame in frames:
        digest.update(frame)
    return digest.hexdigest()


def _name(header: Any, digest: str) -> None:
    """Set the UIDs of the segmentation from a digest of its content: another result has other UIDs."""
    header.SOPInstanceUID = generated_uid("instance", digest)
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
    header.SeriesInstanceUID = generated_uid("series", digest)
    organization = generated_uid("dimensions", digest)
    header.DimensionOrganizationSequence[0].DimensionOrganizationUID = organization


def _segment(number: int, entry: ClassInfo, algorithm: Any, *, is_background: bool) -> Any:
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentDescription

    category, kind = _codes(entry.name, is_background=is_background)
    return SegmentDescription(
        segment_number=number,
        segment_label=text(entry.name) or f"class {number - 1}",
        segmented_property_category=category,
        segmented_property_type=kind,
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm,
        display_color=CIELabColor.from_rgb(*entry.color),
    )


def _codes(name: str, *, is_background: bool) -> tuple[Any, Any]:
    """Return category and type of a class: codes of SNOMED CT by the words of its name, or a private type."""
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    if is_background:
        return codes.DCM.Background, codes.DCM.Background
    words = set(name.lower().split())
    for known, (category, kind) in CODES.items():
        if words & set(known):
            return getattr(codes.SCT, category), getattr(codes.SCT, kind)
    value = hashlib.sha256(name.encode(errors="backslashreplace")).hexdigest()[:16]
    return codes.SCT.AnatomicalStructure, CodedConcept(value, SCHEME, text(name) or "class")


SINK = SinkKind(
    "labels.dcm",
    DicomSeg,
    needs=pyramid_needs,  # highdicom (120 MiB) is loaded when the sink is opened, before memory is measured
    bytes_per_px=LABEL_BYTES,
    module="highdicom",
    extra="dicom",
)
