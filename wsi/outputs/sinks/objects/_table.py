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


def table_line(item: SlideObject, info: SlideInfo) -> tuple[Any, ...]:
    """Return the values of `COLUMNS` for one object."""
    return (
        info.name,
        item.number,
        info.classes[item.label].name,
        round(item.x, DECIMALS),
        round(item.y, DECIMALS),
        *item.box,
        round(item.area_um2, DECIMALS),
        round(item.perimeter_um, DECIMALS),
        round(item.eccentricity, DECIMALS),
        len(item.rings) - 1,
    )
