"""annotations.json: objects for the Digital Slide Archive (HistomicsUI) and large-image."""

from __future__ import annotations

import json
from pathlib import Path

from histostream.wsi.errors import printable
from histostream.wsi.files import writing
from histostream.wsi.outputs.label_rows import ClassInfo, SlideInfo
from histostream.wsi.outputs.objects.slide_object import SlideObject, WholeObjectFile
from histostream.wsi.outputs.sinks import SinkKind

LINE_WIDTH = 1
FILL = 0.25  # opacity: the tissue stays visible
DECIMALS = 3  # of measurements


class Dsa(WholeObjectFile):
    """Objects as one large-image annotation, a line for each; a group for each class.

    Coordinates are pixels of the slide's full size, with a third that is 0. Measurements are in
    ``user``, the field that is left to users.

    Parameters
    ----------
    path
        Final name.
    info
        The slide.
    """

    def __init__(self, path: Path, info: SlideInfo) -> None:
        super().__init__(path)
        self._looks = [_look(entry) for entry in info.classes]
        head = {"name": "histostream", "description": f"Objects of {printable(info.name)}"}
        self._separator = ""
        with writing(path):
            self._file = self._temporary.open("w", encoding="ascii", newline="")
            self._open.append(self._file)
            self._file.write(json.dumps(head)[:-1] + ', "elements": [\n')

    def write(self, item: SlideObject) -> None:
        """Take the next object."""
        outside, *holes = ([[x, y, 0] for x, y in ring.tolist()] for ring in item.rings)
        element = {
            "type": "polyline",
            "closed": True,
            "points": outside,
            **({"holes": holes} if holes else {}),
            **self._looks[item.label],
            "user": {
                "area_um2": round(item.area_um2, DECIMALS),
                "perimeter_um": round(item.perimeter_um, DECIMALS),
                "eccentricity": round(item.eccentricity, DECIMALS),
            },
        }
        text = json.dumps(element, separators=(",", ":"), allow_nan=False)
        with writing(self.path):
            self._file.write(self._separator + text)
        self._separator = ",\n"

    def finish(self) -> tuple[Path, Path]:
        """Complete the file under its temporary name."""
        with writing(self.path):
            self._file.write("\n]}\n")
        return super().finish()


def _look(entry: ClassInfo) -> dict[str, object]:
    red, green, blue = entry.color
    return {
        "group": entry.name,
        "label": {"value": entry.name},
        "lineColor": f"rgb({red}, {green}, {blue})",
        "fillColor": f"rgba({red}, {green}, {blue}, {FILL})",
        "lineWidth": LINE_WIDTH,
    }


SINK = SinkKind("annotations.json", lambda path, info, slide: Dsa(path, info), bytes_per_px=0.31)
