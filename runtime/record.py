"""What run.json holds, and what tells two runs apart."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from histostream.runtime.bundle.card import ModelCard
from histostream.runtime.options import Options
from histostream.runtime.stream.context import DeviceRecord
from histostream.wsi.geometry import Box
from histostream.wsi.outputs.folder import RUN_FILE
from histostream.wsi.outputs.sinks.summary import SummaryRecord
from histostream.wsi.records import OMIT, from_json, to_json
from histostream.wsi.slides.staging import SlideVersion

SUMMARY_FILE = "summary.json"
TRAINING_FACTS = ("images", "scores", "data_sha256", "commit", "histostream")
MAX_CLASSES = 255  # numbers in a list are one for each class
MAX_FACT = 300  # characters
PACKAGES = (
    "histostream",
    "numpy",
    "onnxruntime-gpu",
    "onnxruntime",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-python",
    "pycuda",
    "large-image",
    "tifffile",
    "zarr",
    "highdicom",
)


@dataclass(frozen=True, slots=True)
class SlideRecord:
    """The slide, and the resolution at which it was read.

    Attributes
    ----------
    path, source
        The file that was read, and the path or URL that the user named.
    bytes, modified
        As in `SlideVersion`.
    reader
        Which reader opened it.
    mpp
        Micrometres per pixel of level 0, as the file says; None where it does not say.
    mpp_source
        Where the resolution of the run comes from: "--mpp", or the part of the file that says it, as "OME-XML".
    level, scale, downsample, width, height, result_mpp
        As in `SlideView`; the last three are size and resolution of the label map.
    sha256
        Of the file's content.
    bounds, notes
        As in `SlideReader`; no bounds where the slide is all that OpenSlide shows.
    """

    path: str = ""
    bytes: int | None = None
    modified: str = ""
    reader: str = ""
    mpp: float | None = None
    mpp_source: str = ""
    level: int | None = None
    scale: float | None = None
    downsample: float | None = None
    width: int | None = None
    height: int | None = None
    result_mpp: float | None = None
    sha256: str = ""
    source: str = ""
    bounds: Box | None = field(default=None, metadata=OMIT)
    notes: tuple[str, ...] = ()
    further: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DecodedBlocks:
    """How many blocks of the slide were decoded for the overview, and for the network."""

    overview: int | None = None
    stream: int | None = None
    further: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DamagedBlock:
    """A block of a stored level that could not be decoded; its box is in pixels of level 0."""

    level: int | None = None
    x: int | None = None
    y: int | None = None
    width: int | None = None
    height: int | None = None
    further: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CardRecord:
    """The part of the model card that a report shows, so that it needs no bundle; see `ModelCard`."""

    classes: tuple[str, ...] = ()
    note: str = ""
    channels: int | None = None
    tile_px: int | None = None
    align_px: int | None = None
    halo_px: int | None = None
    tile_statistics: bool | None = None
    score_kind: str = ""
    opset: int | None = None
    parity: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    further: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """The model that was run, and on which engine; ``sha256`` are those of the bundle's files."""

    method: str = ""
    engine: str = ""
    sha256: Mapping[str, str] = field(default_factory=dict)
    mpp: float | None = None
    card: CardRecord = field(default_factory=CardRecord)
    further: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GridRecord:
    """The tiles that covered the slide, and how many of them the network saw."""

    tile_px: int | None = None
    overlap_px: int | None = None
    tiles: int | None = None
    tiles_inferred: int | None = None
    column_bands: int | None = None
    further: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SecondsRecord:
    """Seconds in all, without ``wait``, and in each stage; see `StageSeconds`."""

    total: float | None = None
    prepare: float | None = None
    read: float | None = None
    copy: float | None = None
    infer: float | None = None
    blend: float | None = None
    crf: float | None = None
    write: float | None = None
    finish: float | None = None
    wait: float | None = None
    further: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CrfRecord:
    """How the CRF was run: its halo, the side of a cell, and how many cells were refined or skipped."""

    halo_px: int | None = None
    cell_px: int | None = None
    cells: int | None = None
    cells_skipped: int | None = None
    further: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ResumedRecord:
    """How often the run was begun, and the megapixels that were done before the last begin."""

    runs: int | None = None
    mpx_before: float | None = None
    further: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AreaRecord:
    """What of a slide was analysed.

    Attributes
    ----------
    mask_mpp, margin_um
        Micrometres per pixel of the tissue mask, and by how much tissue was widened on it; None where no tissue
        was looked for.
    tissue_mm2, unscanned_mm2
        Area of the tissue with its margin, and of what the scanner filled with one colour.
    absent_mm2
        Area of the blocks that the file does not hold.
    pen_mm2, blurred_mm2
        Area of pen ink, and of blocks of 64 um out of focus; None where they were not looked for, and where the slide
        is too coarse to judge its focus.
    """

    mask_mpp: float | None = None
    margin_um: float | None = None
    tissue_mm2: float | None = None
    unscanned_mm2: float | None = None
    absent_mm2: float | None = None
    pen_mm2: float | None = field(default=None, metadata=OMIT)
    blurred_mm2: float | None = field(default=None, metadata=OMIT)
    further: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What run.json holds. In files of other versions any field may be missing.

    Attributes
    ----------
    damaged
        Blocks that could not be decoded.
    options
        The `Options`.
    mpx, mpx_per_s
        Megapixels that were analysed, and their number per second in this run.
    bound_by
        The stage that the run waited for most.
    peak_memory_mib
        Of the process; None where the system does not say.
    device, crf, resumed
        None where no GPU and no other device and no CRF was requested, and where the run was not interrupted.
    started
        Time in ISO 8601.
    inputs
        The fingerprint of the run, see `fingerprint`.
    versions
        Of Python and packages.
    area
        What of the slide was analysed, and the resolution at which that was decided.
    no_tissue
        Why nothing was analysed, and what to do; None where something was.
    outputs
        Names of the result files.
    further
        Keys that this version does not know.
    """

    slide: SlideRecord = field(default_factory=SlideRecord)
    source_blocks_decoded: DecodedBlocks = field(default_factory=DecodedBlocks)
    damaged: tuple[DamagedBlock, ...] | None = field(default=None, metadata=OMIT)
    model: ModelRecord = field(default_factory=ModelRecord)
    options: Mapping[str, Any] = field(default_factory=dict)
    grid: GridRecord = field(default_factory=GridRecord)
    seconds: SecondsRecord = field(default_factory=SecondsRecord)
    mpx: float | None = None
    mpx_per_s: float | None = None
    bound_by: str = ""
    peak_memory_mib: float | None = None
    device: DeviceRecord | None = field(default=None, metadata=OMIT)
    crf: CrfRecord | None = field(default=None, metadata=OMIT)
    resumed: ResumedRecord | None = field(default=None, metadata=OMIT)
    started: str = ""
    inputs: Mapping[str, Any] | None = field(default=None, metadata=OMIT)
    versions: Mapping[str, str] = field(default_factory=dict)
    area: AreaRecord | None = field(default=None, metadata=OMIT)
    no_tissue: str | None = field(default=None, metadata=OMIT)
    outputs: tuple[str, ...] = ()
    further: Mapping[str, Any] = field(default_factory=dict)


def why_nothing(run: RunRecord) -> str:
    """Return why nothing of a slide was analysed, and what to do."""
    if run.no_tissue is not None:
        return run.no_tissue
    if run.options.get("tissue", True):
        return "no tissue was found, so nothing was analysed; --no-tissue analyses glass too"
    return "the file holds no pixels of what is to be analysed; check the slide and its region of interest"


def read_run(folder: Path) -> RunRecord | None:
    """Read the run.json of an output folder; None if it is missing or no JSON object."""
    content = read_json(folder / RUN_FILE)
    return None if content is None else from_json(RunRecord, content)


def read_summary(folder: Path) -> SummaryRecord | None:
    """Read the summary.json of an output folder; None if it is missing or no JSON object."""
    content = read_json(folder / SUMMARY_FILE)
    return None if content is None else from_json(SummaryRecord, content)


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a file that holds a JSON object; None if it is missing, broken, or holds another value."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def fingerprint(
    version: SlideVersion, card: ModelCard, options: Options, requested: Mapping[str, str]
) -> dict[str, Any]:
    """Return what decides the result of a run, as JSON values.

    Parameters
    ----------
    version
        Of the slide.
    card, options
        The model, and how it is run.
    requested
        Further requests, as ``{"precision": "auto"}``.
    """
    values = {
        "slide": asdict(version),
        "model": card.digest(),
        "objects": to_json([entry.rule for entry in options.classes_of(card)]),
        "options": {**options.for_model(card).result_options(), **requested},
        "histostream": metadata.version("histostream"),
    }
    as_read_back: dict[str, Any] = json.loads(json.dumps(values))  # tuples become lists
    return as_read_back


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List the entries in which two fingerprints differ, as "options.blend (hann, now crop)"."""
    old, new = dict(_flat(before)), dict(_flat(now))
    return [
        f"{name} ({_short(old.get(name))}, now {_short(new.get(name))})"
        for name in (*old, *(n for n in new if n not in old))
        if old.get(name) != new.get(name)
    ]


def bound_by(stages: Mapping[str, float]) -> str:
    """Return the stage that a run with these seconds waited for most."""
    return max(stages, key=lambda name: stages[name])


def card_record(card: ModelCard) -> CardRecord:
    """Return the part of a model card that a report shows.

    Methods write their training record as they like, so only numbers and short texts are taken.
    """
    return CardRecord(
        tuple(entry.name for entry in card.classes),
        card.note,
        card.channels,
        card.tile_px,
        card.align_px,
        card.halo_px,
        card.tile_statistics,
        card.score_kind,
        card.opset,
        _figures(card.parity),
        _figures({name: value for name, value in card.training.items() if name in TRAINING_FACTS}),
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _figures(value: Any, depth: int = 3) -> Any:
    """Return the names and numbers of a part of a card; of lists only those of numbers."""
    if isinstance(value, dict):
        entries = {str(name): _figures(entry, depth - 1) for name, entry in value.items()} if depth else {}
        return {name: entry for name, entry in entries.items() if entry is not None}
    if isinstance(value, list):
        return value if len(value) <= MAX_CLASSES and all(map(_is_number, value)) else None
    if isinstance(value, str):
        return value[:MAX_FACT]
    return value if _is_number(value) else None


def _is_number(value: Any) -> bool:
    # Compared, not converted: an integer of a card may be too long for a float.
    return isinstance(value, int | float) and abs(value) < math.inf
