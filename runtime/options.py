"""How a slide is run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from histostream.runtime.bundle.card import ModelCard
from histostream.runtime.choices import AUTO
from histostream.runtime.crf.options import CrfOptions
from histostream.wsi.errors import HistoError
from histostream.wsi.outputs.label_rows import ClassInfo
from histostream.wsi.outputs.objects.counting import with_rules
from histostream.wsi.outputs.sinks import OPTIONS as SINK_OPTIONS
from histostream.wsi.outputs.sinks import SinkKind, find_sink, sink_names
from histostream.wsi.outputs.sinks.object_files import check_installed
from histostream.wsi.records import to_json
from histostream.wsi.slides.coordinates import COORDINATES
from histostream.wsi.slides.staging import sha256_of

FREE = ("batch", "threads", "max_memory_mib")  # options that do not change the result


class OptionError(HistoError, ValueError):
    """An option has a value that cannot work."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a slide is run; ``histo-infer`` has an option for each.

    Attributes
    ----------
    overlap_px
        Pixels that neighbouring tiles share; None: 64, or what ``blend="exact"`` needs.
    blend
        Window of the weighted sum: hann, gaussian, linear, mean, crop or exact; auto: hann, unless the model gives
        labels, or no scores at the border of a tile.
    mpp
        Resolution of the slide's level 0 in um per pixel, where the file has none or a wrong one.
    channels
        For each of the model's channels the index of a channel of the slide, from 0; None: the slide's colours, or all
        its channels in their order.
    roi
        GeoJSON file; only its polygons (level 0 pixels) are analysed.
    coordinates
        Where level 0 begins in ``roi`` and in files of objects: "qupath", at the corner of the area that was
        scanned; "openslide", at the corner of OpenSlide's level 0, which may be larger (MIRAX).
    mask
        PNG, TIFF or GeoJSON file of what is to be analysed; see `read_mask`.
    tissue
        Whether glass is left out.
    artefacts
        Whether pen ink and tissue out of focus are left out; see `find_artefacts`.
    batch
        Tiles per inference; None: what suits the device.
    threads
        CPU threads for reading; None: 2.
    max_memory_mib
        Bound on the process's memory; wide slides are then run in column bands.
    probabilities
        Whether ``probabilities.tif`` is written.
    force_upsampling
        Whether a slide much coarser than the model may be enlarged.
    crf
        How labels are refined by a dense CRF; None: not at all.
    strict
        Whether a damaged block stops the slide, instead of being left as background.
    annotations
        Files of outlines to write: "qupath" (objects.geojson.gz), "dsa" (annotations.json).
    objects
        Tables of objects to write: "csv" (objects.csv), "parquet" (objects.parquet).
    min_area_um2
        Smaller objects are neither counted nor in those files; None: as the model's card says.
    simplify_um
        How far outlines may deviate, to have fewer points; 0: they follow the pixels.
    rasters
        Further formats of the label map to write: "ome-tiff" (labels.ome.tif), "ome-tiff-rgb"
        (labels.rgb.ome.tif, its colours), "ome-zarr" (labels.ome.zarr), "dicom-seg" (labels.dcm); and "density"
        (density.tif), objects per mm2.

    Other packages may add values of ``annotations``, ``objects`` and ``rasters``; see
    `histostream.wsi.outputs.sinks`.

    Examples
    --------
    >>> Options(blend="linear", max_memory_mib=1024).blend
    'linear'
    >>> Options(batch=0)
    Traceback (most recent call last):
    histostream.runtime.options.OptionError: batch=0: use 1 or more
    """

    overlap_px: int | None = None
    blend: str = AUTO
    mpp: float | None = None
    channels: tuple[int, ...] | None = None
    roi: Path | None = None
    coordinates: str = COORDINATES[0]
    mask: Path | None = None
    tissue: bool = True
    artefacts: bool = False
    batch: int | None = None
    threads: int | None = None
    max_memory_mib: int | None = None
    probabilities: bool = False
    force_upsampling: bool = False
    crf: CrfOptions | None = None
    strict: bool = False
    annotations: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    min_area_um2: float | None = None
    simplify_um: float = 0.0
    rasters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("batch", "threads", "max_memory_mib"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name}={value}: use 1 or more")
        if self.overlap_px is not None and self.overlap_px < 0:
            raise OptionError(f"overlap_px={self.overlap_px}: use 0 or more")
        if self.channels is not None and (not self.channels or min(self.channels) < 0):
            raise OptionError(f"channels={self.channels}: name channels by their numbers, from 0")
        if self.coordinates not in COORDINATES:
            raise OptionError(f"coordinates={self.coordinates!r}: use {' or '.join(COORDINATES)}")
        if self.artefacts and not self.tissue:
            raise OptionError("artefacts are looked for in tissue: leave out one of --artefacts and --no-tissue")
        self._check_files()

    def for_model(self, card: ModelCard) -> Options:
        """Return the options with what is left to the model.

        Raises
        ------
        OptionError
            If another number of channels is picked than the model has.
        """
        if self.channels is not None and len(self.channels) != card.channels:
            names = f" ({', '.join(card.channel_names)})" if card.channel_names else ""
            raise OptionError(
                f"--channels picks {len(self.channels)}, and the model takes {card.channels}{names}: pick one for each"
            )
        return replace(self, blend=card.default_blend) if self.blend == AUTO else self

    def classes_of(self, card: ModelCard) -> tuple[ClassInfo, ...]:
        """Return the classes of a model with the rules by which their objects are found and counted.

        Classes whose card has no rule are counted where objects or their density are asked for.

        Raises
        ------
        OptionError
            If a class has no objects as large as ``min_area_um2``.
        """
        wanted = bool(self.annotations or self.objects) or any(
            find_sink("rasters", name).counts_objects for name in self.rasters
        )
        try:
            return with_rules(card.classes, self.min_area_um2, count_all=wanted)
        except ValueError as error:
            raise OptionError(f"--min-area does not fit the model's card: {error}") from error

    def result_options(self) -> dict[str, Any]:
        """Return the options that decide the bits of the result, as JSON values.

        Batch, threads and memory are not among them: blending is in integers, so the labels are
        the same for all of them.
        """
        values = {name: value for name, value in asdict(self).items() if name not in FREE}
        for name in ("roi", "mask"):
            path = getattr(self, name)
            values[name] = None if path is None else _content(path)
        for name in SINK_OPTIONS:  # their order does not matter
            values[name] = sorted(set(values[name]))
        values_json: dict[str, Any] = to_json(values)
        return values_json

    def object_sinks(self) -> list[SinkKind]:
        """Return the files of outlines and the tables of objects that are written.

        Raises
        ------
        SinkError
            If one cannot be loaded.
        """
        chosen = [("annotations", name) for name in self.annotations] + [("objects", name) for name in self.objects]
        return [find_sink(option, name) for option, name in dict.fromkeys(chosen)]

    def check_installed(self) -> None:
        """Check that the optional packages are installed that the chosen files need.

        Raises
        ------
        OutputError
            If one is not; the message says how to install it.
        """
        check_installed(self.object_sinks(), self.simplify_um)
        for name in self.rasters:
            find_sink("rasters", name).check_installed()

    def _check_files(self) -> None:
        for option in SINK_OPTIONS:
            for value in getattr(self, option):
                if value not in sink_names(option):
                    raise OptionError(f"{option}={value!r}: use {' or '.join(sink_names(option))}")
        for name in ("min_area_um2", "simplify_um"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise OptionError(f"{name}={value}: use 0 or more")
        if self.simplify_um and not (self.annotations or self.objects):
            raise OptionError(
                f"simplify_um={self.simplify_um} applies to files of objects, and none is written: "
                "pass --geojson, --annotations or --objects"
            )


def _content(path: Path) -> str:
    """Return the SHA-256 of a file; its path if it cannot be read."""
    try:
        return sha256_of(path)
    except OSError:
        return str(path)
