"""What a run left behind, to look at and to compute with."""

from __future__ import annotations

import html
import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.engines.base import to_channels
from histostream.runtime.record import read_run
from histostream.runtime.report.picture import read_picture
from histostream.wsi.errors import HistoError, SlideError
from histostream.wsi.optional import require
from histostream.wsi.outputs.label_rows import ClassInfo
from histostream.wsi.outputs.raster import Raster
from histostream.wsi.outputs.sinks.overview import BACKGROUND
from histostream.wsi.slides.reader import SlideReader, open_slide
from histostream.wsi.slides.resolution import SlideView
from histostream.wsi.slides.slide_locator import SlideLocator
from histostream.wsi.slides.staging import SlideVersion

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT_PX = 1200  # longer side of a picture
SHOWN_PX = 700  # of the overview in a notebook, which keeps it
GLASS = 255
log = logging.getLogger(__name__)


class ResultError(HistoError, ValueError):
    """A folder of results does not hold what it should, or there is no such result."""


@dataclass(frozen=True, repr=False)
class SlideResult:
    """What a run left behind.

    ::

        result = SlideResult.read("out/slide")
        result.areas                        # {"background": 3.1, "nucleus": 0.4}, mm2
        result.labels[1000:2000, :500]      # read from labels.tif
        result.plot()

    Attributes
    ----------
    folder
        Where ``labels.tif`` and the other files are.
    summary
        Area and share per class, as in ``summary.json``.
    run
        Versions, options and times, as in ``run.json``.
    """

    folder: Path
    summary: dict[str, Any]
    run: dict[str, Any]

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
        try:
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            return cls(folder, {**summary, "classes": list(summary["classes"])}, run)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResultError(
                f"{folder / 'summary.json'}: cannot be read ({error}); run the slide with --restart"
            ) from error

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        """The classes, in label order."""
        return tuple(ClassInfo(c["name"], tuple(c["color"])) for c in self.summary["classes"])

    @property
    def areas(self) -> dict[str, float]:
        """Area of each class, in mm2."""
        return {c["name"]: c["area_mm2"] for c in self.summary["classes"]}

    @property
    def shares(self) -> dict[str, float]:
        """Share of each class in what was analysed; nan where nothing was."""
        return {c["name"]: float("nan") if c["share"] is None else c["share"] for c in self.summary["classes"]}

    @property
    def mpp(self) -> float:
        """Micrometres per pixel of the label map."""
        return float(self.summary["mpp"])

    @cached_property
    def labels(self) -> Raster:
        """The label map, (H, W) uint8, read where it is looked at; 255 was not analysed.

        Raises
        ------
        SlideError
            If ``labels.tif`` is not there, or damaged.
        """
        return Raster(self.folder / "labels.tif")

    @cached_property
    def probabilities(self) -> Raster | None:
        """``round(255 p)`` of each class, (H, W, K) uint8; None if none were asked for."""
        path = self.folder / "probabilities.tif"
        return Raster(path) if "probabilities.tif" in self.run.get("outputs", ()) else None

    @property
    def files(self) -> dict[str, Path]:
        """The files of the result, by name."""
        names = (Path(str(name)).name for name in self.run.get("outputs", ()))
        return {name: self.folder / name for name in names}

    def open_slide(self, slides: str | Path | None = None) -> SlideReader:
        """Open the slide that this is the result of.

        Parameters
        ----------
        slides
            Folder that it is in by now, where it was moved.

        Raises
        ------
        SlideError
            If it is in neither place as it was then.
        """
        said = self.run.get("slide", {})
        version = SlideVersion(said.get("bytes", 0), said.get("modified", ""))
        place = SlideLocator(said.get("source", ""), version, said.get("sha256", ""))
        return open_slide(place.find(None if slides is None else Path(slides)))

    def region(
        self,
        x: int = 0,
        y: int = 0,
        width: int | None = None,
        height: int | None = None,
        *,
        longest_px: int = PLOT_PX,
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8], int]:
        """Read a place of the slide and of the label map, both small enough for a picture.

        Parameters
        ----------
        x, y, width, height
            In pixels of the label map; width and height None: to its border.
        longest_px
            About the longer side of the picture: every 2nd, 4th, ... label is taken until it is no
            longer.

        Returns
        -------
        Pixels (h, w, 3) uint8, white where the slide is not there any more; labels (h, w) uint8;
        and how many pixels of the label map one of them stands for, along a side.

        Raises
        ------
        ValueError
            If the place is not on the slide.
        """
        rows, columns = self.labels.shape[:2]
        width = columns - x if width is None else width
        height = rows - y if height is None else height
        if not (0 <= x < x + width <= columns and 0 <= y < y + height <= rows):
            raise ValueError(f"x={x} y={y} {width}x{height} is no place on a label map of {columns}x{rows} px")
        step = 1
        while max(width, height) > longest_px * step:
            step *= 2
        # From a multiple of the step on, whose labels a reduced level holds.
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
        """Draw a place of the slide with its classes painted over it; needs matplotlib.

        Parameters
        ----------
        x, y, width, height
            As of `region`: pixels of the label map. By default all of it.
        ax
            Where to draw; None: on a new figure.
        opacity
            Of the paint, 0 to 1.
        legend
            Whether classes are named beside it, with their areas in the whole slide.

        Returns
        -------
        The axes; their units are um on the slide.

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
        left, top = ((place - place % step) * self.mpp for place in (x, y))
        high, wide = labels.shape
        ax.imshow(
            self._painted(pixels, labels, opacity),
            extent=(left, left + wide * um, top + high * um, top),
            interpolation="nearest" if step == 1 else "antialiased",
        )
        ax.set(xlabel="um", ylabel="um", title=str(self.summary["slide"]))
        if legend:
            ax.legend(
                handles=[
                    Patch(color=c.hex, label=f"{c.name}  {self.areas[c.name]:.3g} mm²")
                    for c in self.classes
                    if c.name != BACKGROUND
                ],
                loc="upper left",
                bbox_to_anchor=(1, 1),
                frameon=False,
            )
        return ax

    def __repr__(self) -> str:
        areas = ", ".join(f"{name} {area:.3g} mm2" for name, area in self.areas.items())
        return f"<SlideResult of {self.summary['slide']} in {self.folder}: {areas}>"

    def _repr_html_(self) -> str:
        """Overview and areas, where a notebook shows it."""
        lines = "".join(
            f"<tr><td style='border-left:1em solid {c.hex}'>{html.escape(c.name)}</td>"
            f"<td>{self.areas[c.name]:.4g} mm²</td><td>{100 * self.shares[c.name]:.1f} %</td></tr>"
            for c in self.classes
        )
        size = self.summary["width_px"], self.summary["height_px"]
        picture = read_picture(self.folder / "overview.png", *size, SHOWN_PX)
        shown = "" if picture is None else f"<img style='max-width:100%' src='{picture.uri}'>"
        return (
            f"<p><b>{html.escape(str(self.summary['slide']))}</b>: "
            f"{html.escape(str(self.folder))}</p><table>{lines}</table>{shown}"
        )

    def _pixels(self, x: int, y: int, step: int, width: int, height: int) -> NDArray[np.uint8]:
        """Read the slide where the labels at x, y and so on are, each pixel an average."""
        found = np.full((height, width, 3), GLASS, np.uint8)
        try:
            slide = self.open_slide()
        except SlideError as error:
            log.warning("%s; the classes are shown without it", error)
            return found
        with slide:
            seen = self.run["slide"]  # as the network saw it
            downsample = slide.levels[seen["level"]].downsample * seen["scale"] * step
            fine = [i for i, level in enumerate(slide.levels) if level.downsample <= downsample]
            level = max(fine, default=0, key=lambda i: slide.levels[i].downsample)
            view = SlideView(slide, level, downsample / slide.levels[level].downsample, None)
            left, top = x // step, y // step
            # The last pixel may be less than half on the slide, and then it is not of the view.
            wide, high = min(width, view.width - left), min(height, view.height - top)
            if wide > 0 and high > 0:
                found[:high, :wide] = to_channels(view.read(left, top, wide, high), 3)
        return found

    def _painted(self, pixels: NDArray[np.uint8], labels: NDArray[np.uint8], opacity: float) -> NDArray[np.uint8]:
        colors = np.zeros((256, 3), np.float32)
        strength = np.zeros(256, np.float32)
        for label, entry in enumerate(self.classes):
            colors[label] = entry.color
            strength[label] = opacity * (entry.name != BACKGROUND)
        share = strength[labels][..., None]
        mixed = pixels * (1 - share) + colors[labels] * share
        return np.rint(mixed).astype(np.uint8)
