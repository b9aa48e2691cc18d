"""The report of one slide: areas, objects, warnings, times, and what the result was made with."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histostream.runtime.choices import PRECISIONS
from histostream.runtime.options import Options
from histostream.runtime.record import RunRecord, why_nothing
from histostream.runtime.report.picture import PICTURE_PX, Picture, read_picture
from histostream.wsi.outputs.label_rows import background_label
from histostream.wsi.outputs.sinks.overview import scale_bar
from histostream.wsi.outputs.sinks.summary import SummaryRecord
from histostream.wsi.records import to_json
from histostream.wsi.report.json_view import JsonView
from histostream.wsi.report.page import read_file, render

MAX_BOXES = 40  # damaged regions that are listed
MAX_OUTLINED = 4000  # damaged regions that are outlined in the picture
UPSAMPLED = 0.98  # slide pixels per result pixel along a side; below this the slide was enlarged


@dataclass(frozen=True, slots=True)
class Stage:
    """Time that one stage of the run took; ``is_slowest`` marks the stage that limited the speed."""

    name: str
    does: str
    seconds: float
    share: float
    is_slowest: bool = False


@dataclass(frozen=True, slots=True)
class DamagedRegions:
    """Regions of the slide that could not be decoded, in pixels of level 0.

    Attributes
    ----------
    boxes
        (level, x, y, width, height) of the listed regions.
    outline
        SVG path around the first `MAX_OUTLINED` regions.
    count
        Number of all regions.
    area_mm2, share
        Area of all regions and their share of the slide: an upper bound, because regions of two levels may overlap.
    width, height
        Size of the slide in pixels of level 0.
    """

    boxes: list[tuple[int, int, int, int, int]]
    outline: str
    count: int
    area_mm2: float
    share: float
    width: float
    height: float


def slide_report(run: RunRecord, summary: SummaryRecord, overview: Path) -> str:
    """Return the report of a slide as HTML.

    Parameters
    ----------
    run, summary
        The records of a run that is finished now.
    overview
        Path of ``overview.png``; without that file the page has no picture.
    """
    texts = _texts()
    picture = read_picture(overview, summary.width_px or 0, summary.height_px or 0, PICTURE_PX)
    background = background_label(summary.classes)
    painted = [entry for label, entry in enumerate(summary.classes) if label != background]
    counted = [entry for entry in painted if entry.objects is not None]
    precision = run.model.engine.rpartition(" ")[2]  # the name of an engine ends with its precision
    return render(
        __package__,
        "slide.html",
        run=run,
        options=to_json(run.options),
        device=to_json(run.device) or {},
        summary=summary,
        # A card may hold anything in its records of parity and training.
        parity=JsonView(run.model.card.parity),
        training=JsonView(run.model.card.training),
        picture=picture,
        scale_bar=_scale_bar(picture, summary),
        painted=painted,
        nothing=why_nothing(run),
        largest=max((c for c in painted if c.share is not None), key=lambda c: c.share or 0, default=None),
        counted=counted,
        smallest=_smallest(run, summary),
        touching=any(entry.touching_share is not None for entry in counted),
        upsampled=UPSAMPLED,
        damaged=_damaged_regions(run, summary),
        stages=_stages(run),
        limit=texts["stages"][run.bound_by]["limit"],
        changed_options=_changed_options(run),
        used_file=PRECISIONS.get("fp32" if precision == "bf16" else precision, ""),
        files=[(name, texts["files"][name]) for name in sorted({*run.outputs, "run.json"} & texts["files"].keys())],
    )


@functools.cache
def _texts() -> dict[str, dict[str, Any]]:
    return tomllib.loads(read_file(__package__, "texts.toml"))


def _scale_bar(picture: Picture | None, summary: SummaryRecord) -> tuple[float, str] | None:
    """Return the length of the scale bar as a share of the picture's width, and its label."""
    if picture is None or not summary.mpp or not summary.width_px:
        return None
    length_px, label = scale_bar(summary.mpp * summary.width_px / picture.width, max(1, picture.width // 4))
    return length_px / picture.width, label.replace("um", "μm")


def _damaged_regions(run: RunRecord, summary: SummaryRecord) -> DamagedRegions | None:
    boxes = [(b.level or 0, b.x or 0, b.y or 0, b.width or 0, b.height or 0) for b in run.damaged or ()]
    mpp = run.options.get("mpp") or run.slide.mpp
    if not boxes or not mpp or not summary.mpp or not summary.slide_mm2:
        return None
    area_mm2 = sum(width * height for *_, width, height in boxes) * (mpp / 1000) ** 2
    scale = summary.mpp / mpp
    return DamagedRegions(
        boxes[:MAX_BOXES],
        "".join(f"M{x} {y}h{w}v{h}h{-w}z" for _, x, y, w, h in boxes[:MAX_OUTLINED]),
        len(boxes),
        area_mm2,
        min(1.0, area_mm2 / summary.slide_mm2),
        (summary.width_px or 0) * scale,
        (summary.height_px or 0) * scale,
    )


def _smallest(run: RunRecord, summary: SummaryRecord) -> dict[str, float]:
    """Return the smallest area of an object in um2 by the names of the classes that have one."""
    rules = (run.inputs or {}).get("objects")
    if not isinstance(rules, list) or len(rules) != len(summary.classes):
        return {}
    least = {entry.name: (rule or {}).get("min_area_um2") for entry, rule in zip(summary.classes, rules, strict=True)}
    return {name: area for name, area in least.items() if area}


def _stages(run: RunRecord) -> list[Stage]:
    texts = _texts()["stages"]
    seconds: dict[str, float] = {name: getattr(run.seconds, name) or 0.0 for name in texts}
    total, sum_of_stages = run.seconds.total or 0.0, sum(seconds.values())
    whole = max(total, sum_of_stages) or 1.0  # stages of several devices may add up to more than the total
    stages = [
        Stage(texts[name]["name"], texts[name]["does"], value, value / whole, name == run.bound_by)
        for name, value in seconds.items()
        if value or name not in ("copy", "crf")
    ]
    rest = total - sum_of_stages
    if rest > 0.005 * total:
        stages.append(Stage("Other", "everything else", rest, rest / whole))
    return stages


def _changed_options(run: RunRecord) -> list[tuple[str, str]]:
    """Return (name, value) of each option that differs from its default, as the page shows it."""
    # Records have the blending that was used; the one of most models is not worth a line.
    options, defaults = to_json(run.options), to_json(Options(blend="hann"))
    changed = {name: value for name, value in options.items() if name != "crf" and value != defaults.get(name)}
    requested = (run.inputs or {}).get("options", {})
    changed |= {name: requested[name] for name in ("backend", "precision") if requested.get(name, "auto") != "auto"}
    names = _texts()["options"]
    return [(names.get(name, name.replace("_", " ")), JsonView(value).shown()) for name, value in changed.items()]
