"""The report of a slide: what was found, how sure one can be of it, and where the time went."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from histostream.runtime.choices import PRECISIONS
from histostream.runtime.options import Options
from histostream.runtime.record import bound_by, plain
from histostream.runtime.report.json_view import JsonView, duration, figure, percent, size
from histostream.runtime.report.page import render
from histostream.runtime.report.picture import PICTURE_PX, Picture, read_picture
from histostream.wsi.outputs.sinks.overview import BACKGROUND, scale_bar

MAX_BOXES = 40  # damaged places that are listed
MAX_OUTLINED = 4000  # of them, in the picture
UPSAMPLED = 0.98  # stored pixels for one of the result, along a side: fewer were made up
STAGES = {
    "prepare": ("Prepare", "open the slide, find its tissue"),
    "read": ("Read", "wait for pixels of the slide"),
    "copy": ("Copy", "stage rows for the device"),
    "infer": ("Network", "run the tiles"),
    "blend": ("Blend", "join the tiles"),
    "crf": ("CRF", "refine the labels"),
    "write": ("Write", "hand rows to the files"),
    "finish": ("Finish", "complete the files"),
}
BOUNDS = {
    "prepare": "opening the slide",
    "read": "reading the slide",
    "copy": "copying to the device",
    "infer": "the network",
    "blend": "joining tiles",
    "crf": "the CRF",
    "write": "writing",
    "finish": "completing the files",
}
FILES = {
    "labels.tif": "class of each pixel, a pyramid: QuPath, OpenSlide, tifffile",
    "overview.png": "the slide with its classes painted over it",
    "summary.json": "area and share of each class",
    "summary.csv": "the same as a table",
    "run.json": "versions, hashes, options, times: what this page is made of",
    "probabilities.tif": "the scores of each class",
    "objects.geojson.gz": "outlines for QuPath",
    "annotations.json": "outlines for the Digital Slide Archive",
    "objects.csv": "a line for each object",
    "objects.parquet": "a line for each object",
}
OPTIONS = {  # said as the command says it, where that is another word
    "overlap_px": "overlap, px",
    "max_memory_mib": "memory at most, MiB",
    "roi": "region of interest",
    "force_upsampling": "force upsampling",
    "min_area_um2": "smallest object, \N{GREEK SMALL LETTER MU}m\N{SUPERSCRIPT TWO}",
    "simplify_um": "outlines simplified by, \N{GREEK SMALL LETTER MU}m",
    "tissue": "glass left out",
}
UM = "\N{GREEK SMALL LETTER MU}m"
BY = " \N{MULTIPLICATION SIGN} "
MM2 = "mm\N{SUPERSCRIPT TWO}"


@dataclass(frozen=True, slots=True)
class Fact:
    """A name and what is said of it; ``code`` is set in a typewriter's letters."""

    name: str
    value: str
    code: bool = False


@dataclass(frozen=True, slots=True)
class Share:
    """A class: its colour as CSS writes it, its area, and its share of what was analysed."""

    name: str
    color: str
    area_mm2: float | None
    share: float | None


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the run; ``bounds`` if the run waited for it most."""

    name: str
    does: str
    seconds: float
    share: float
    bounds: bool


@dataclass(frozen=True, slots=True)
class Warned:
    """What a reader must know before trusting the numbers, or, if ``mild``, may want to."""

    text: str
    mild: bool = False


@dataclass(frozen=True, slots=True)
class Parity:
    """How far a file of the model is from the network that was trained; ``used`` was run here."""

    file: str
    used: bool
    engine: str
    tiles: str
    agreement: float | None
    largest: float | None
    mean: float | None
    dice_change: float | None


@dataclass(frozen=True, slots=True)
class Damaged:
    """Places that could not be decoded, in pixels of the slide's full size.

    Attributes
    ----------
    boxes
        (level, x, y, width, height) of those that are listed.
    outline
        A path of SVG around all, or as many as a picture can show.
    count
        Of all.
    area_mm2, share
        Of all, at most: places of two levels may be the same. None where no resolution is known.
    width, height
        Of the slide.
    """

    boxes: list[tuple[float, ...]]
    outline: str
    count: int
    area_mm2: float | None
    share: float | None
    width: float | None
    height: float | None


@dataclass(frozen=True, slots=True)
class ScaleBar:
    """Length as a share of the picture's width, and in words."""

    share: float
    text: str


def slide_report(run: Mapping[str, Any], summary: Mapping[str, Any], overview: Path) -> str:
    """Return the report of a slide.

    Parameters
    ----------
    run, summary
        What run.json and summary.json say; of an older version, what there is.
    overview
        ``overview.png``; the page does without if there is none.
    """
    # As it will be read back, so that a report that is made again is the same.
    said, found = (JsonView(json.loads(json.dumps(plain(dict(part))))) for part in (run, summary))
    width, height = (int(found.number(f"{side}_px") or 0) for side in ("width", "height"))
    picture = read_picture(overview, width, height, PICTURE_PX)
    return render(
        "slide.html",
        name=_name(said, found),
        subtitle=_subtitle(said, found),
        warnings=_warnings(said, found),
        headline_figures=_headlines(said, found),
        picture=picture,
        scale_bar=_scale_bar(picture, found),
        classes=shares_of(found),
        analysed_mm2=found.number("analysed_mm2"),
        objects=list(said.at("objects")),
        damaged=_damaged(said, found),
        stages=_stages(said),
        time=_time(said),
        bound=BOUNDS.get(_bound(said), _bound(said)),
        memory=_memory(said),
        run_facts=_run_facts(said),
        crf=_crf_facts(said),
        options=_options(said),
        note=_paragraphs(said.text("model", "card", "note")),
        model=_model_facts(said),
        parity=_parity(said),
        scores=list(said.items("model", "card", "training", "scores")),
        slide=_slide_facts(said),
        hashes=_hashes(said),
        versions=[Fact(k, v.shown()) for k, v in said.items("versions")],
        files=[(name, FILES.get(name, "")) for name in _outputs(said)],
        started=said.text("started"),
        histostream=said.text("versions", "histostream"),
    )


def shares_of(summary: JsonView) -> list[Share]:
    """Return the classes of a summary.json, in the order of their labels."""
    return [
        Share(entry.text("name"), _css(entry.at("color")), entry.number("area_mm2"), entry.number("share"))
        for entry in summary.at("classes")
    ]


def _css(color: JsonView) -> str:
    values = [min(255, max(0, round(v.number() or 0))) for v in color]
    return f"rgb({values[0]} {values[1]} {values[2]})" if len(values) == 3 else "gray"


def _name(run: JsonView, summary: JsonView) -> str:
    source = run.text("slide", "source") or run.text("slide", "path")
    return summary.text("slide") or source.replace("\\", "/").rpartition("/")[2] or "a slide"


def _subtitle(run: JsonView, summary: JsonView) -> list[str]:
    model, mpp = run.text("model", "method"), summary.number("mpp")
    parts = [", ".join(c.name for c in shares_of(summary) if c.name != BACKGROUND)]
    if mpp is not None:
        parts.append(f"at {figure(mpp)} {UM} per pixel")
    if model:
        parts.append(f"model {model}")
    return [part for part in parts if part]


def _headlines(run: JsonView, summary: JsonView) -> list[tuple[str, str, str]]:
    """(name, value, what it is of) of the figures at the top."""
    total, rate = run.number("seconds", "total"), run.number("mpx_per_s")
    peak, bound = run.number("peak_memory_mib"), run.number("options", "max_memory_mib")
    whole = summary.number("slide_mm2")
    painted = [c for c in shares_of(summary) if c.name != BACKGROUND and c.share is not None]
    found = [
        (
            "Analysed",
            f"{figure(summary.number('analysed_mm2'))} {MM2}",
            f"of {figure(whole)} {MM2} of slide" if whole else "",
        )
    ]
    if painted:
        most = max(painted, key=lambda c: c.share or 0)
        found.append((most.name, percent(most.share), f"{figure(most.area_mm2)} {MM2}"))
    found.append(("Time", duration(total), f"{figure(rate)} Mpx/s" if rate is not None else ""))
    found.append(
        (
            "Peak memory",
            f"{figure(round(peak))} MiB" if peak is not None else figure(None),
            f"of {figure(bound)} MiB allowed" if bound else "no bound was asked for",
        )
    )
    return found


def _warnings(run: JsonView, summary: JsonView) -> list[Warned]:
    found = []
    damaged, runs = len(run.at("damaged")), run.number("resumed", "runs")
    scale, own = run.number("slide", "scale"), run.number("slide", "mpp")
    given, mpp = run.number("options", "mpp"), run.number("slide", "result_mpp")
    if damaged:
        places = f"{damaged} blocks" if damaged > 1 else "1 block"
        background = any(c.name == BACKGROUND for c in shares_of(summary))
        found.append(
            Warned(
                f"{places} of the slide could not be decoded: "
                f"{'background in the labels' if background else 'not analysed'}."
            )
        )
    if summary.number("analysed_mm2") == 0:
        found.append(Warned("No tissue was found, and nothing was analysed. --no-tissue analyses all of the slide."))
    if scale is not None and 0 < scale < UPSAMPLED:
        at = f" of {figure(mpp / scale)} {UM}" if mpp else ""
        found.append(
            Warned(
                f"The slide is coarser than the model: its pixels{at} were enlarged "
                f"{figure(1 / scale)} times, and what is lost cannot be found."
            )
        )
    if given is not None:
        says = f"the file says {figure(own)}" if own is not None else "the file says none"
        found.append(
            Warned(
                f"The resolution, {figure(given)} {UM} per pixel, was given by hand ({says}). Areas are right if it is."
            )
        )
    if runs is not None and runs > 1:
        before = run.number("resumed", "mpx_before")
        found.append(
            Warned(
                f"The run was broken off and went on {_times(runs - 1)}; the labels are those of an "
                f"unbroken run. {figure(before)} Mpx were done before, and are not in the times.",
                mild=True,
            )
        )
    if run.text("options", "roi"):
        found.append(Warned("Only the region of interest was analysed.", mild=True))
    return found


def _times(count: float) -> str:
    return "once" if count == 1 else f"{figure(count)} times"


def _scale_bar(picture: Picture | None, summary: JsonView) -> ScaleBar | None:
    mpp, width = summary.number("mpp"), summary.number("width_px")
    if picture is None or not mpp or not width or mpp < 0:
        return None
    length_px, text = scale_bar(mpp * width / picture.width, max(1, picture.width // 4))
    return ScaleBar(length_px / picture.width, text.replace("um", UM))


def _full_mpp(run: JsonView) -> float | None:
    """Resolution of the slide's level 0."""
    mpp = run.number("options", "mpp") or run.number("slide", "mpp")
    return mpp if mpp is not None and mpp > 0 else None


def _damaged(run: JsonView, summary: JsonView) -> Damaged | None:
    sides = ("level", "x", "y", "width", "height")
    every = [[box.number(side) for side in sides] for box in run.at("damaged")]
    boxes = [tuple(v for v in box if v is not None) for box in every]
    boxes = [box for box in boxes if len(box) == len(sides)]
    if not boxes:
        return None
    mpp, slide_mm2 = _full_mpp(run), summary.number("slide_mm2")
    area = None if mpp is None else sum(b[3] * b[4] for b in boxes) * (mpp / 1000) ** 2
    share = min(1.0, area / slide_mm2) if area is not None and slide_mm2 else None
    shape: list[float | None] = [None, None]
    if mpp is not None:
        scale = (summary.number("mpp") or 0) / mpp
        shape = [(summary.number(f"{side}_px") or 0) * scale for side in ("width", "height")]
    outline = "".join(f"M{x:.0f} {y:.0f}h{w:.0f}v{h:.0f}h{-w:.0f}z" for _, x, y, w, h in boxes[:MAX_OUTLINED])
    return Damaged(boxes[:MAX_BOXES], outline, len(boxes), area, share, *shape)


def _seconds(run: JsonView) -> dict[str, float]:
    found = {name: run.number("seconds", name) for name in STAGES}
    return {name: value for name, value in found.items() if value is not None and value >= 0}


def _bound(run: JsonView) -> str:
    seconds = _seconds(run)
    return run.text("bound_by") or (bound_by(seconds) if seconds else "")


def _stages(run: JsonView) -> list[Stage]:
    seconds, bound = _seconds(run), _bound(run)
    if not seconds:
        return []
    total = run.number("seconds", "total") or 0.0
    whole = max(total, sum(seconds.values())) or 1.0  # several devices' seconds may be more
    found = [
        Stage(*STAGES[name], value, value / whole, name == bound)
        for name, value in seconds.items()
        if value or name not in ("copy", "crf")
    ]
    rest = total - sum(seconds.values())
    if rest > 0.005 * total:
        found.append(Stage("Other", "what is not one of these", rest, rest / whole, False))
    return found


def _time(run: JsonView) -> list[Fact]:
    wait = run.number("seconds", "wait")
    found = [
        ("In all", duration(run.number("seconds", "total"))),
        ("Done", f"{figure(run.number('mpx'))} Mpx"),
        ("Rate", f"{figure(run.number('mpx_per_s'))} Mpx/s"),
    ]
    if wait and wait > 0.05:
        found.append(("Not counted", f"{duration(wait)} in which another slide had the device"))
    return [Fact(*fact) for fact in found]


def _memory(run: JsonView) -> tuple[float, float] | None:
    """Return (peak, bound) in MiB where both are known."""
    peak, bound = run.number("peak_memory_mib"), run.number("options", "max_memory_mib")
    return (peak, bound) if peak and bound and peak > 0 and bound > 0 else None


def _run_facts(run: JsonView) -> list[Fact]:
    tiles, done = run.number("grid", "tiles"), run.number("grid", "tiles_inferred")
    found = []
    if tiles is not None and done is not None:
        if run.at("resumed"):
            text = f"{figure(done)} in the last run, of a grid of {figure(tiles)}"
        else:
            skipped = f", {figure(tiles - done)} skipped" if tiles > done else ""
            text = f"{figure(done)} run{skipped}"
        found.append(Fact("Tiles", text))
    px, overlap = run.number("grid", "tile_px"), run.number("grid", "overlap_px")
    if px is not None:
        text = f"{figure(px)} px, {figure(overlap)} px shared"
        blend = run.text("options", "blend")
        found.append(Fact("Tile", f"{text}, joined by {blend}" if blend else text))
    bands = run.number("grid", "column_bands")
    if bands is not None and bands > 1:
        found.append(Fact("Column bands", figure(bands)))
    found.append(Fact("Engine", run.text("model", "engine")))
    found += [
        Fact(f"Device, {name}", value.shown())
        for name, value in run.items("device")
        if not isinstance(value.plain(), list | dict)
    ]
    if devices := len(run.at("device", "devices")):
        found.append(Fact("Devices", figure(devices)))
    return [fact for fact in found if fact.value]


def _crf_facts(run: JsonView) -> list[Fact]:
    crf = run.at("options", "crf")
    if not crf:
        return []
    found = [Fact(name, value.shown(), code=True) for name, value in crf.items("params")]
    uncertain = crf.number("uncertain")
    where = "everywhere" if uncertain is None else f"where scores are nearer than {uncertain:g}"
    found.append(Fact("refined", where))
    cells, skipped = run.number("crf", "cells"), run.number("crf", "cells_skipped")
    if cells is not None:
        said = f"{figure(cells)} of {figure(run.number('crf', 'cell_px'))} px"
        found.append(Fact("cells", f"{said}, {figure(skipped)} more skipped" if skipped else said))
    return found


def _options(run: JsonView) -> list[Fact]:
    """Options that are not as they are by default."""
    usual = json.loads(json.dumps(plain(asdict(Options())))) | {"crf": None}
    found = [
        Fact(OPTIONS.get(name, name.replace("_", " ")), value.shown())
        for name, value in run.items("options")
        if name != "crf" and value.plain() != usual.get(name)
    ]
    for name in ("backend", "precision"):
        asked = run.text("inputs", "options", name)
        if asked and asked != "auto":
            found.append(Fact(name, asked))
    return found


def _model_facts(run: JsonView) -> list[Fact]:
    card = run.at("model", "card")
    found = [("Method", run.text("model", "method"))]
    if classes := [c.shown() for c in card.at("classes")]:
        found.append(("Classes", ", ".join(classes)))
    if (mpp := run.number("model", "mpp")) is not None:
        found.append(("Resolution", f"{figure(mpp)} {UM} per pixel"))
    if (px := card.number("tile_px")) is not None:
        kind = {1: "grey", 3: "RGB"}.get(int(card.number("channels") or 0), "")
        found.append(("Input", f"{figure(px)} px, {kind}".strip(", ")))
    if (halo := card.number("halo_px")) is not None:
        found.append(("Halo", f"{figure(halo)} px around each"))
    if card:
        depends = card.true("tile_statistics")
        found.append(("Tile statistics", "its result depends on them" if depends else "none"))
        found.append(("Scores", card.text("score_kind")))
    if images := card.items("training", "images"):
        found.append(("Images", ", ".join(f"{n.shown()} {k}" for k, n in images)))
    return [Fact(*fact) for fact in found if fact[1]]


def _used_file(run: JsonView) -> str:
    """Return which graph was run; the engine's name ends with its precision."""
    precision = run.text("model", "engine").rpartition(" ")[2]
    return PRECISIONS.get("fp32" if precision == "bf16" else precision, "")


def _parity(run: JsonView) -> list[Parity]:
    used = _used_file(run)
    return [
        Parity(
            file,
            file == used,
            entry.text("engine"),
            entry.at("tiles").shown(),
            entry.number("label_agreement"),
            entry.number("max_difference"),
            entry.number("mean_difference"),
            entry.number("dice_change"),
        )
        for file, entry in run.items("model", "card", "parity")
    ]


def _slide_facts(run: JsonView) -> list[Fact]:
    slide = run.at("slide")
    width, height = slide.number("width"), slide.number("height")
    mpp, own = slide.number("result_mpp"), slide.number("mpp")
    found = [Fact("File", slide.text("source") or slide.text("path"), code=True)]
    if (length := slide.number("bytes")) is not None:
        found.append(Fact("Size", size(length)))
    if width is not None and height is not None:
        at = f" at {figure(mpp)} {UM}" if mpp is not None else ""
        found.append(Fact("Seen as", f"{figure(width)}{BY}{figure(height)} px{at}"))
        if mpp is not None:
            extent = BY.join(figure(side * mpp / 1000) for side in (width, height))
            found.append(Fact("Extent", f"{extent} mm"))
    full = f"{figure(own)} {UM} per pixel" if own is not None else "no resolution in it"
    found.append(Fact("Full size", full))
    level, scale = slide.number("level"), slide.number("scale")
    if level is not None and scale is not None:
        how = "as stored" if scale == 1 else f"resampled by {figure(scale)}"
        found.append(Fact("Read from", f"level {figure(level)}, {how}"))
    found.append(Fact("Reader", slide.text("reader")))
    return [fact for fact in found if fact.value]


def _hashes(run: JsonView) -> list[Fact]:
    used = _used_file(run)
    found = [Fact("slide", run.text("slide", "sha256"), code=True)]
    for file, value in run.items("model", "sha256"):
        name = f"{file} (run here)" if file == used else file
        found.append(Fact(name, value.shown(), code=True))
    data = run.text("model", "card", "training", "data_sha256")
    found.append(Fact("training data", data, code=True))
    found.append(Fact("network, as its card says it", run.text("inputs", "model"), code=True))
    return [fact for fact in found if fact.value]


def _outputs(run: JsonView) -> list[str]:
    """Return the files beside the report; what is not a plain name is no file of ours."""
    names = [entry.text() for entry in run.at("outputs")]
    return sorted({name for name in (*names, "run.json") if name in FILES})


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]
