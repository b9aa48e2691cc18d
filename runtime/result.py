"""The result of a slide, to look at and to compute with."""

from __future__ import annotations

import html
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.engines.base import to_channels
from histostream.runtime.record import SUMMARY_FILE, RunRecord, read_run, read_summary
from histostream.runtime.report.picture import read_picture
from histostream.wsi.errors import HistoError, SlideError
from histostream.wsi.optional import require
from histostream.wsi.outputs.label_rows import ClassInfo, background_label
from histostream.wsi.outputs.raster import Raster
from histostream.wsi.outputs.sinks.rasters.density import DENSITY_FILE, DensityMap, read_density
from histostream.wsi.outputs.sinks.summary import ClassSummary, SummaryRecord
from histostream.wsi.slides.channels import open_for_channels
from histostream.wsi.slides.reader import SlideReader
from histostream.wsi.slides.resolution import SlideView
from histostream.wsi.slides.slide_locator import SlideLocator
from histostream.wsi.slides.staging import SlideVersion

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT_PX = 1200  # longer side of a picture
NOTEBOOK_PX = 700  # longer side of the overview in a notebook, whose file keeps it
GLASS = 255
log = logging.getLogger(__name__)


class ResultError(HistoError, ValueError):
    """A folder of results does not hold what it should, or there is no such result."""


@dataclass(frozen=True, repr=False)
class SlideResult:
    """The result of a slide.

    ::

        result = SlideResult.read("out/slide")
        result.areas                        # {"background": 3.1, "nucleus": 0.4}, mm2
        result.objects["nucleus"].objects   # 5120; objects_per_mm2, mean_object_um2, touching_share
        result.labels[1000:2000, :500]      # read from labels.tif
        result.plot()

    Attributes
    ----------
    folder
        The folder of ``labels.tif`` and the other files.
    summary
        Area, share and objects of each class, as in ``summary.json``.
    run
        Versions, options and times, as in ``run.json``.
    """

    folder: Path
    summary: SummaryRecord
    run: RunRecord

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Read the result that an earlier run left in a folder.

        Raises
        ------
        ResultError
            If there is none that is complete.
        """
        folder = Path(folder)
        run = read_run(folder)
        if run is None:
            raise ResultError(
                f"{folder}: no finished result (no run.json); run histo-infer, or name the folder of one slide"
            )
        summary = read_summary(folder)
        if summary is None or not summary.classes:
            raise ResultError(
                f"{folder / SUMMARY_FILE}: missing, or no summary of classes; run the slide with --restart"
            )
        return cls(folder, summary, run)

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        """The classes, in label order."""
        return tuple(ClassInfo(entry.name, entry.color, entry.role) for entry in self.summary.classes)

    @property
    def areas(self) -> dict[str, float]:
        """Area of each class, in mm2."""
        return {entry.name: _number(entry.area_mm2) for entry in self.summary.classes}

    @property
    def shares(self) -> dict[str, float]:
        """Share of each class in the analysed area; nan where nothing was analysed."""
        return {entry.name: _number(entry.share) for entry in self.summary.classes}

    @property
    def objects(self) -> dict[str, ClassSummary]:
        """The classes whose objects are counted, with their number, density, mean area and share of touching ones."""
        return {entry.name: entry for entry in self.summary.classes if entry.objects is not None}

    @cached_property
    def density(self) -> DensityMap | None:
        """Objects per mm2 on a grid of 64 um; None if it was not written.

        Raises
        ------
        SlideError
            If ``density.tif`` cannot be read.
        """
        path = self.folder / DENSITY_FILE
        return read_density(path) if path.name in self.run.outputs else None

    @property
    def mpp(self) -> float:
        """Micrometres per pixel of the label map."""
        return _number(self.summary.mpp)

    @cached_property
    def labels(self) -> Raster:
        """The label map, (H, W) uint8; a slice is read when it is indexed; 255 was not analysed.

        Raises
        ------
        SlideError
            If ``labels.tif`` is not there, or damaged.
        """
        return Raster(self.folder / "labels.tif")

    @cached_property
    def probabilities(self) -> Raster | None:
        """``round(65535 p)`` of each class, (H, W, K) uint16; None if they were not written.

        Versions before 0.2 wrote ``round(255 p)`` as uint8; the array's ``dtype`` says which.
        """
        path = self.folder / "probabilities.tif"
        return Raster(path) if path.name in self.run.outputs else None

    @property
    def files(self) -> dict[str, Path]:
        """The files of the result, by name."""
        return {name: self.folder / name for name in (Path(output).name for output in self.run.outputs)}

    def open_slide(self, slides: str | Path | None = None) -> SlideReader:
        """Open the slide that was segmented.

        Parameters
        ----------
        slides
            Folder of the slide, if it was moved since.

        Raises
        ------
        SlideError
            If the same slide is neither at its old place nor in that folder.
        """
        slide = self.run.slide
        version = SlideVersion(slide.bytes or 0, slide.modified)
        locator = SlideLocator(slide.source, version, slide.sha256)
        path = locator.find(None if slides is None else Path(slides))
        return open_for_channels(path, self.run.model.card.channels or 3, picked=_picked(self.run.options))

    def region(
        self,
        x: int = 0,
        y: int = 0,
        width: int | None = None,
        height: int | None = None,
        *,
        longest_px: int = PLOT_PX,
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8], int]:
        """Read a region of the slide and of the label map, both small enough for a picture.

        Parameters
        ----------
        x, y, width, height
            In pixels of the label map; width and height None: to its border.
        longest_px
            Bound on the longer side of the picture: only every 2nd, 4th, ... label is taken, as needed.

        Returns
        -------
        Pixels (h, w, 3) uint8, white where the slide cannot be read; labels (h, w) uint8; and how many
        pixels of the label map one of them stands for, along a side.

        Raises
        ------
        ValueError
            If the region is not on the slide.
        """
        rows, columns = self.labels.shape[:2]
        width = columns - x if width is None else width
        height = rows - y if height is None else height
        if not (0 <= x < x + width <= columns and 0 <= y < y + height <= rows):
            raise ValueError(f"x={x} y={y} {width}x{height} does not lie on a label map of {columns}x{rows} px")
        step = 1
        while max(width, height) > longest_px * step:
            step *= 2
        # Begin at a multiple of the step: a reduced level holds those labels.
        x, y, right, bottom = x - x % step, y - y % step, x + width, y + height
        labels = self.labels[y:bottom:step, x:right:step]
        return self._pixels(x, y, step, labels.shape[1], labels.shape[0]), labels, step

    def plot(
        self,
        x: int = 0,
        y: int = 0,
        width: int | None = None,
        height: int | None = None,
        *,
        ax: Axes | None = None,
        opacity: float = 0.5,
        legend: bool = True,
    ) -> Axes:
        """Draw a region of the slide with its classes painted over it; needs matplotlib.

        Parameters
        ----------
        x, y, width, height
            As of `region`: pixels of the label map. By default all of it.
        ax
            Axes to draw on; None: those of a new figure.
        opacity
            Opacity of the classes, 0 to 1.
        legend
            Whether a legend names the classes and their areas in the whole slide.

        Returns
        -------
        The axes, in um on the slide.

        Raises
        ------
        OutputError
            If matplotlib is not installed.
        """
        require("matplotlib", "plots need", "notebook")
        import matplotlib.pyplot as plt
        from matplotlib.patches import Patch

        pixels, labels, step = self.region(x, y, width, height)
        if ax is None:
            ax = plt.subplots(layout="constrained")[1]
        um = self.mpp * step
        left, top = ((start - start % step) * self.mpp for start in (x, y))
        high, wide = labels.shape
        background = background_label(self.classes)
        ax.imshow(
            self._painted(pixels, labels, opacity),
            extent=(left, left + wide * um, top + high * um, top),
            interpolation="nearest" if step == 1 else "antialiased",
        )
        ax.set(xlabel="um", ylabel="um", title=self.summary.slide)
        if legend:
            ax.legend(
                handles=[
                    Patch(color=c.hex, label=f"{c.name}  {self.areas[c.name]:.3g} mm²")
                    for label, c in enumerate(self.classes)
                    if label != background
                ],
                loc="upper left",
                bbox_to_anchor=(1, 1),
                frameon=False,
            )
        return ax

    def __repr__(self) -> str:
        areas = ", ".join(f"{name} {area:.3g} mm2" for name, area in self.areas.items())
        return f"<SlideResult of {self.summary.slide} in {self.folder}: {areas}>"

    def _repr_html_(self) -> str:
        """Show overview and areas in a notebook."""
        lines = "".join(
            f"<tr><td style='border-left:1em solid {c.hex}'>{html.escape(c.name)}</td>"
            f"<td>{self.areas[c.name]:.4g} mm²</td><td>{100 * self.shares[c.name]:.1f} %</td>"
            f"<td>{_objects_text(entry)}</td></tr>"
            for c, entry in zip(self.classes, self.summary.classes, strict=True)
        )
        size = self.summary.width_px or 0, self.summary.height_px or 0
        picture = read_picture(self.folder / "overview.png", *size, NOTEBOOK_PX)
        image = "" if picture is None else f"<img style='max-width:100%' src='{picture.uri}'>"
        return (
            f"<p><b>{html.escape(self.summary.slide)}</b>: "
            f"{html.escape(str(self.folder))}</p><table>{lines}</table>{image}"
        )

    def _pixels(self, x: int, y: int, step: int, width: int, height: int) -> NDArray[np.uint8]:
        """Read the slide at the labels x, y, ... (h, w); each pixel is an average."""
        pixels = np.full((height, width, 3), GLASS, np.uint8)
        try:
            slide = self.open_slide()
        except SlideError as error:
            log.warning("%s; the classes are shown without it", error)
            return pixels
        with slide:
            record = self.run.slide  # the network saw it at this level and scale
            downsample = slide.levels[record.level or 0].downsample * (record.scale or 1.0) * step
            fine = [i for i, level in enumerate(slide.levels) if level.downsample <= downsample]
            level = max(fine, default=0, key=lambda i: slide.levels[i].downsample)
            view = SlideView(slide, level, downsample / slide.levels[level].downsample, None)
            left, top = x // step, y // step
            # A last pixel that is less than half on the slide is not part of the view.
            wide, high = min(width, view.width - left), min(height, view.height - top)
            if wide > 0 and high > 0:
                pixels[:high, :wide] = to_channels(view.read(left, top, wide, high), 3)
        return pixels

    def _painted(self, pixels: NDArray[np.uint8], labels: NDArray[np.uint8], opacity: float) -> NDArray[np.uint8]:
        colors = np.zeros((256, 3), np.float32)
        strength = np.zeros(256, np.float32)
        background = background_label(self.classes)
        for label, entry in enumerate(self.classes):
            colors[label] = entry.color
            strength[label] = opacity * (label != background)
        share = strength[labels][..., None]
        mixed = pixels * (1 - share) + colors[labels] * share
        return np.rint(mixed).astype(np.uint8)


def _picked(options: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the channels that a run picked; None if it picked none, or its record is odd."""
    picked = options.get("channels")
    if not isinstance(picked, list) or not picked or not all(isinstance(i, int) and i >= 0 for i in picked):
        return None
    return tuple(picked)


def _objects_text(entry: ClassSummary) -> str:
    return "" if entry.objects is None else f"{entry.objects} objects, {entry.objects_per_mm2 or 0:.0f} per mm²"


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
