"""Columns of the tables of objects, and an object's line in them."""

from __future__ import annotations

from typing import Any

from histostream.wsi.outputs.label_rows import SlideInfo
from histostream.wsi.outputs.objects.slide_object import SlideObject

DECIMALS = 4
COLUMNS = (
    "slide",
    "object",
    "class",
    "x_px",
    "y_px",
    "left_px",
    "top_px",
    "right_px",
    "bottom_px",
    "area_um2",
    "perimeter_um",
    "eccentricity",
    "holes",
)


def table_line(found: SlideObject, info: SlideInfo) -> tuple[Any, ...]:
    """Return the values of `COLUMNS` for one object."""
    return (
        info.name,
        found.number,
        info.classes[found.label].name,
        round(found.x, DECIMALS),
        round(found.y, DECIMALS),
        *found.box,
        round(found.area_um2, DECIMALS),
        round(found.perimeter_um, DECIMALS),
        round(found.eccentricity, DECIMALS),
        len(found.rings) - 1,
    )
