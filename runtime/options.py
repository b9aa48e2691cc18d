"""How a slide is run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from histostream.runtime.crf.options import CrfOptions
from histostream.wsi.errors import HistoError
from histostream.wsi.outputs.sinks.objects import ANNOTATIONS, TABLES
from histostream.wsi.outputs.sinks.rasters import RASTERS
from histostream.wsi.slides.staging import sha256_of

FREE = ("batch", "threads", "max_memory_mib")  # options that change nothing in the result


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
        Window of the weighted sum: hann, gaussian, linear, mean, crop or exact.
    mpp
        Resolution of the slide's level 0 in um per pixel, where the file has none or a wrong one.
    roi
        GeoJSON file; only its polygons (level 0 pixels) are analysed.
    tissue
        Whether glass is left out.
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
        Files of outlines that are written: "qupath" (objects.geojson.gz), "dsa"
        (annotations.json).
    objects
        Tables of objects that are written: "csv" (objects.csv), "parquet" (objects.parquet).
    min_area_um2
        Objects smaller than this are left out of them.
    simplify_um
        How far outlines may deviate, to have fewer points; 0: they follow the pixels.
    rasters
        MemoryNeeds files of the label map: "ome-tiff" (labels.ome.tif), "ome-tiff-rgb"
        (labels.rgb.ome.tif, its colours), "ome-zarr" (labels.ome.zarr), "dicom-seg" (labels.dcm).

    Examples
    --------
    >>> Options(blend="linear", max_memory_mib=1024).blend
    'linear'
    >>> Options(batch=0)
    Traceback (most recent call last):
    histostream.runtime.options.OptionError: batch=0: use 1 or more
    """

    overlap_px: int | None = None
    blend: str = "hann"
    mpp: float | None = None
    roi: Path | None = None
    tissue: bool = True
    batch: int | None = None
    threads: int | None = None
    max_memory_mib: int | None = None
    probabilities: bool = False
    force_upsampling: bool = False
    crf: CrfOptions | None = None
    strict: bool = False
    annotations: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    min_area_um2: float = 0.0
    simplify_um: float = 0.0
    rasters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("batch", "threads", "max_memory_mib"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name}={value}: use 1 or more")
        if self.overlap_px is not None and self.overlap_px < 0:
            raise OptionError(f"overlap_px={self.overlap_px}: use 0 or more")
        self._check_files()

    def deciding(self) -> dict[str, Any]:
        """Return the options that decide the bits of the result, as run.json says them.

        Batch, threads and memory are not among them: blending is in integers, so the labels are
        the same for all of them.
        """
        values = {k: v for k, v in asdict(self).items() if k not in FREE}
        if self.roi is not None:
            values["roi"] = _content(self.roi)
        for name in ("annotations", "objects", "rasters"):  # in whatever order they are asked for
            values[name] = sorted(set(values[name]))
        return values

    def _check_files(self) -> None:
        lists = (("annotations", ANNOTATIONS), ("objects", TABLES), ("rasters", RASTERS))
        for name, known in lists:
            for value in getattr(self, name):
                if value not in known:
                    raise OptionError(f"{name}={value!r}: use {' or '.join(known)}")
        for name in ("min_area_um2", "simplify_um"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise OptionError(f"{name}={value}: use 0 or more")
            if value and not (self.annotations or self.objects):
                raise OptionError(
                    f"{name}={value} is of objects, and no file of them is asked for: "
                    "pass --geojson, --annotations or --objects"
                )


def _content(path: Path) -> str:
    """Return the SHA-256 of a file that matters by what is in it; its name where there is none."""
    try:
        return sha256_of(path)
    except OSError:
        return str(path)
