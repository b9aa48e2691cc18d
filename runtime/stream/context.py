"""What the column bands of one slide share: times, counts, and what is recorded of the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from histostream.runtime.bundle.card import ModelCard
from histostream.runtime.options import Options
from histostream.wsi.geometry import Box
from histostream.wsi.outputs.journal import Journal
from histostream.wsi.outputs.label_rows import LabelRows
from histostream.wsi.records import OMIT
from histostream.wsi.slides.damage import Damage
from histostream.wsi.slides.resolution import SlideView
from histostream.wsi.tiling.area import AnalysedArea
from histostream.wsi.tiling.grid import TileGrid


@dataclass(slots=True)
class StageSeconds:
    """Seconds that the main thread spent in each stage, or waited for it.

    On a device, ``infer`` is the time for queueing work and waiting for it, blending included, and
    ``copy`` the time for staging rows in pinned memory. On the host there is no copy. ``wait`` is
    the time in which another slide had the device.
    """

    prepare: float = 0.0
    read: float = 0.0
    copy: float = 0.0
    infer: float = 0.0
    blend: float = 0.0
    crf: float = 0.0
    write: float = 0.0
    finish: float = 0.0
    wait: float = 0.0

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add the duration of the block to one stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, stage, getattr(self, stage) + time.perf_counter() - start)

    def rounded(self) -> dict[str, float]:
        """Return the seconds of each stage, to the millisecond."""
        return {name: round(getattr(self, name), 3) for name in self.__dataclass_fields__}


@dataclass(slots=True)
class Counts:
    """Tiles and pixels that are done, for the record and for the progress bar.

    Attributes
    ----------
    pixels_before
        Those of ``pixels`` that an interrupted run had done.
    """

    tiles: int = 0
    pixels: int = 0
    pixels_before: int = 0
    total_pixels: int = 0
    report: Callable[[int, int], None] = field(default=lambda done, total: None)


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """What run.json records of a GPU, or of several devices that shared a slide.

    Attributes
    ----------
    name, sm, memory_bytes
        The GPU, its compute capability and its memory.
    bytes_planned, pinned_bytes
        Memory that the stream took on the GPU, and pinned memory on the host.
    batch
        Tiles per inference.
    bytes_uploaded
        Pixels that were copied to the GPU.
    devices
        Where several devices shared the slide: what each of them did.
    """

    name: str | None = field(default=None, metadata=OMIT)
    sm: str | None = field(default=None, metadata=OMIT)
    memory_bytes: int | None = field(default=None, metadata=OMIT)
    bytes_planned: int | None = field(default=None, metadata=OMIT)
    pinned_bytes: int | None = field(default=None, metadata=OMIT)
    batch: int | None = field(default=None, metadata=OMIT)
    bytes_uploaded: int | None = field(default=None, metadata=OMIT)
    devices: tuple[BandRecord, ...] | None = field(default=None, metadata=OMIT)
    further: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BandRecord:
    """What run.json records of one of several devices, which ran one column band.

    Of a GPU, ``further`` holds what `DeviceRecord` has.
    """

    device: str = ""
    columns: tuple[int, int] = (0, 0)
    tiles: int = 0
    source_blocks_decoded: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    further: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What is to be run of a slide, as it is sent to other processes.

    Attributes
    ----------
    path
        The slide, on a local drive.
    folder
        Its output folder, which holds the journal.
    options
        How to run.
    grid
        The tiles of the whole slide.
    area
        What is analysed: nothing outside of it is labelled.
    """

    path: Path
    folder: Path
    options: Options
    grid: TileGrid
    area: AnalysedArea


@dataclass(frozen=True, slots=True)
class RunContext:
    """What the column bands of one slide share.

    Attributes
    ----------
    plan
        What is to be run.
    view
        The open slide, at the model's resolution.
    card
        The model's card.
    write
        Takes finished rows.
    damage
        Blocks of the slide that cannot be decoded are added to it.
    seconds, counts
        Times and counts are added to them.
    stopping
        Called after each row of tiles; if it returns True, the run stops there.
    """

    plan: RunPlan
    view: SlideView
    card: ModelCard
    write: Callable[[LabelRows], None]
    damage: Damage
    seconds: StageSeconds = field(default_factory=StageSeconds)
    counts: Counts = field(default_factory=Counts)
    stopping: Callable[[], bool] = lambda: False

    @property
    def journal(self) -> Journal:
        """The journal of the slide's run."""
        return Journal(self.plan.folder)


@dataclass(frozen=True, slots=True)
class BandResult:
    """What one column band was run on, and what was found.

    Attributes
    ----------
    device
        The GPU; None on the host.
    cells, cells_skipped
        Cells that the CRF refined, and that it skipped.
    band
        Which of several devices ran it; None in a run on one device.
    damaged
        (level, box) of blocks that the other process could not decode.
    """

    device: DeviceRecord | None = None
    cells: int = 0
    cells_skipped: int = 0
    band: BandRecord | None = None
    damaged: tuple[tuple[int, Box], ...] = ()


def join_devices(results: Sequence[BandResult]) -> DeviceRecord | None:
    """Join what column bands say of the GPU: uploaded bytes add up, memory is the largest of all."""
    records = [result.device for result in results if result.device is not None]
    if not records:
        return None
    return replace(
        records[-1],
        bytes_uploaded=sum(record.bytes_uploaded or 0 for record in records),
        bytes_planned=max(record.bytes_planned or 0 for record in records),
        pinned_bytes=max(record.pinned_bytes or 0 for record in records),
        batch=min(record.batch or 0 for record in records),
    )
