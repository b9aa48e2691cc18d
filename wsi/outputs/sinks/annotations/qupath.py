"""objects.geojson.gz: objects as QuPath reads them (drag the file onto the slide)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from histostream.wsi.files import writing
from histostream.wsi.outputs.label_rows import SlideInfo
from histostream.wsi.outputs.objects.slide_object import SlideObject, WholeObjectFile
from histostream.wsi.outputs.sinks import SinkKind

# QuPath shows detections by the hundred thousand, annotations can be edited. The largest nucleus
# has about 1000 um2.
ANNOTATION_UM2 = 5000
GZIP_LEVEL = 5  # 53 MB of outlines: 1.0 s and 7.0 MB; level 6 takes 2.2 s, level 4 makes 8.6 MB
DECIMALS = 3  # of measurements


class GeoJson(WholeObjectFile):
    """Objects as a GeoJSON FeatureCollection (RFC 7946), in QuPath's terms, a line for each.

    Coordinates are pixels of the slide's full size. Objects of `ANNOTATION_UM2` and more are
    annotations, smaller ones detections. The bytes depend on the objects alone.

    Parameters
    ----------
    path
        Final name.
    info
        The slide.
    """

    def __init__(self, path: Path, info: SlideInfo) -> None:
        super().__init__(path)
        self._classes = [{"name": entry.name, "color": list(entry.color)} for entry in info.classes]
        self._separator = ""
        with writing(path):
            raw = self._temporary.open("wb")
            self._file = gzip.GzipFile("", "wb", GZIP_LEVEL, raw, mtime=0)
            self._open += [self._file, raw]
        self._put('{"type":"FeatureCollection","features":[\n')

    def write(self, item: SlideObject) -> None:
        """Take the next object."""
        properties = {
            "objectType": "annotation" if item.area_um2 >= ANNOTATION_UM2 else "detection",
            "classification": self._classes[item.label],
            "measurements": {
                "Area µm^2": round(item.area_um2, DECIMALS),
                "Perimeter µm": round(item.perimeter_um, DECIMALS),
                "Eccentricity": round(item.eccentricity, DECIMALS),
            },
        }
        before = '{"type":"Feature","geometry":{"type":"Polygon","coordinates":['
        self._put(self._separator + before)
        self._separator = ",\n"
        comma = ""
        for ring in item.rings:  # one at a time: there may be 100 000
            points = ring.tolist()
            self._put(comma + _compact([*points, points[0]]))
            comma = ","
        self._put(f']}},"properties":{_compact(properties)}}}')

    def finish(self) -> tuple[Path, Path]:
        """Complete the file under its temporary name."""
        self._put("\n]}\n")
        return super().finish()

    def _put(self, text: str) -> None:
        with writing(self.path):
            self._file.write(text.encode("ascii"))


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


SINK = SinkKind("objects.geojson.gz", lambda path, info, slide: GeoJson(path, info), bytes_per_px=0.042)
