"""labels.ome.tif: the label map as OME-TIFF, its reduced levels as SubIFDs."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from histostream.wsi.errors import printable
from histostream.wsi.outputs.label_rows import NOT_ANALYSED, SlideInfo
from histostream.wsi.outputs.pyramid import PyramidLayout, PyramidWriter, deflate_codec, nearest, write_tiff
from histostream.wsi.outputs.sinks import SinkKind
from histostream.wsi.outputs.sinks.pyramid import LABEL_BYTES, PyramidSink, pyramid_needs
from histostream.wsi.outputs.sinks.tiff import NOT_ANALYSED_NAME, color_map

SCHEMA = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
NAMES, COLORS = "histostream/class-names", "histostream/class-colors"  # namespaces of annotations


class OmeTiff(PyramidSink):
    """The label map as in labels.tif, for readers of OME-TIFF (Bio-Formats, OMERO).

    Parameters
    ----------
    path
        Final name.
    info
        The slide.
    tile_px
        Side of the file's tiles; band edges must be multiples of it.
    """

    def __init__(self, path: Path, info: SlideInfo, tile_px: int = 512) -> None:
        layout = PyramidLayout(info.width, info.height, 1, info.mpp, nearest, tile_px, description=ome_xml(info))
        codec = deflate_codec({"photometric": "palette", "colormap": color_map(info)})
        super().__init__(PyramidWriter(path, layout, codec, partial(write_tiff, subifds=True)))


def ome_xml(info: SlideInfo, samples: int = 1) -> str:
    """Describe the label map in OME-XML (2016-06): its size, um per pixel, names of classes.

    ``samples`` is 1 for labels, 3 for their colours. TIFF holds only ASCII text, so other characters
    are numeric references of XML.
    """
    head = {
        "xmlns": SCHEMA,
        "xmlns:xsi": "http://www.w3.org/2001/XMLSchema-instance",
        "xsi:schemaLocation": f"{SCHEMA} {SCHEMA}/ome.xsd",
    }
    root = ET.Element("OME", head, Creator="HistoStream")
    image = ET.SubElement(root, "Image", ID="Image:0", Name=printable(info.name))
    size = {"SizeX": info.width, "SizeY": info.height, "SizeC": samples, "SizeZ": 1, "SizeT": 1}
    pixels = ET.SubElement(
        image,
        "Pixels",
        {n: str(v) for n, v in size.items()},
        ID="Pixels:0",
        DimensionOrder="XYCZT",
        Type="uint8",
        BigEndian="false",
        Interleaved=str(samples > 1).lower(),
        PhysicalSizeX=repr(info.mpp),
        PhysicalSizeY=repr(info.mpp),  # um is the default unit
    )
    channel = ET.SubElement(pixels, "Channel", ID="Channel:0:0", SamplesPerPixel=str(samples))
    if samples == 1:
        channel.set("Name", "class")
    ET.SubElement(pixels, "TiffData", IFD="0", PlaneCount="1")
    names = {k: printable(entry.name) for k, entry in enumerate(info.classes)}
    colors = {k: entry.hex for k, entry in enumerate(info.classes)}
    annotations = ET.SubElement(root, "StructuredAnnotations")
    for namespace, values in ((NAMES, {**names, NOT_ANALYSED: NOT_ANALYSED_NAME}), (COLORS, colors)):
        _annotate(image, annotations, namespace, values)
    text: bytes = ET.tostring(root, encoding="us-ascii", xml_declaration=True)
    return text.decode("ascii")


def _annotate(image: ET.Element, annotations: ET.Element, namespace: str, values: Mapping[int, str]) -> None:
    name = f"Annotation:{len(annotations)}"
    ET.SubElement(image, "AnnotationRef", ID=name)
    annotation = ET.SubElement(annotations, "MapAnnotation", ID=name, Namespace=namespace)
    value = ET.SubElement(annotation, "Value")
    for label, text in values.items():
        ET.SubElement(value, "M", K=str(label)).text = text


SINK = SinkKind(
    "labels.ome.tif",
    lambda path, info, slide: OmeTiff(path, info),
    needs=pyramid_needs,
    bytes_per_px=LABEL_BYTES,
)
