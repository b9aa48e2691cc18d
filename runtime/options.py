"""How a slide is run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from histostream.runtime.crf.options import CrfOptions
from histostream.wsi.errors import HistoError
from histostream.wsi.staging import sha256_of

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

    def __post_init__(self) -> None:
        for name in ("batch", "threads", "max_memory_mib"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name}={value}: use 1 or more")
        if self.overlap_px is not None and self.overlap_px < 0:
            raise OptionError(f"overlap_px={self.overlap_px}: use 0 or more")

    def deciding(self) -> dict[str, Any]:
        """Return the options that decide the bits of the result, as run.json says them.

        Batch, threads and memory are not among them: blending is in integers, so the labels are
        the same for all of them.
        """
        values = {k: v for k, v in asdict(self).items() if k not in FREE}
        if self.roi is not None:
            values["roi"] = _content(self.roi)
        return values


def _content(path: Path) -> str:
    """Return the SHA-256 of a file that matters by what is in it; its name where there is none."""
    try:
        return sha256_of(path)
    except OSError:
        return str(path)
