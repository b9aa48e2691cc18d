"""Several devices, a process each: they share slides, or the column bands of one slide.

Every process opens the network once and takes one job after the other. A band's finished rows go
to a file beside the results, from which this process writes the label map; integer blending makes
it the same bits as on one device.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from histostream.runtime.card import ModelCard, read_card
from histostream.runtime.engine import EngineError, open_engine
from histostream.runtime.infer import (
    Counts,
    Options,
    SlideResult,
    StageSeconds,
    run_band,
    segment_slide,
)
from histostream.runtime.memory import BAND_ALIGN_PX, return_buffers_at_once
from histostream.wsi.errors import HistoError
from histostream.wsi.grid import TileGrid
from histostream.wsi.reader import open_slide
from histostream.wsi.resolution import at_mpp
from histostream.wsi.sink import OutputFolder, Segmented
from histostream.wsi.tissue import RegionOfInterest

CPU = "cpu"  # names a process on the CPU among the devices; a number names a GPU


@dataclass(frozen=True, slots=True)
class BandJob:
    """One column band of a slide: its finished rows are written to ``spool``."""

    slide: Path
    grid: TileGrid
    roi: RegionOfInterest | None
    options: Options
    spool: Path


@dataclass(frozen=True, slots=True)
class SlideJob:
    """A whole slide."""

    slide: Path
    out: Path
    options: Options


Job = BandJob | SlideJob


@dataclass(slots=True)
class _Worker:
    """A process on one device, and the job that it has."""

    device: str
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    job: int | None = None


class Fleet:
    """The same network on several devices.

    Parameters
    ----------
    bundle
        Folder of the model.
    devices
        Numbers of GPUs, as "0"; "cpu" is a process on the CPU, and may be named more than once.
    backend, precision, threads
        As for `open_engine`; the CPU's threads are shared out among its processes.

    Raises
    ------
    EngineError
        If a device is named twice or is not usable.

    Attributes
    ----------
    card
        The model's card.
    name
        What the engines say of themselves, with the devices.
    devices
        How many there are.
    """

    def __init__(
        self,
        bundle: Path,
        devices: tuple[str, ...],
        *,
        backend: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
    ) -> None:
        self.card: ModelCard = read_card(bundle)
        self._workers: list[_Worker] = []
        check_devices(devices)
        on_cpu = devices.count(CPU)
        if threads is None and on_cpu:
            threads = max(1, (os.cpu_count() or 1) // on_cpu)
        context = multiprocessing.get_context("spawn")
        try:
            for device in devices:
                ours, theirs = context.Pipe()
                how = {"backend": CPU if device == CPU and backend == "auto" else backend,
                       "precision": precision, "threads": threads}  # fmt: skip
                process = context.Process(
                    target=_work, args=(theirs, bundle, device, how), daemon=True
                )
                process.start()
                theirs.close()
                self._workers.append(_Worker(device, process, ours))
            opened = [self._receive(worker) for worker in self._workers]
        except BaseException:
            self.close()
            raise
        self.name = f"{opened[0]} x {len(devices)} ({', '.join(devices)})"
        self.devices = len(devices)

    def plan_bands(self, grid: TileGrid, align_px: int = BAND_ALIGN_PX) -> list[tuple[int, int]]:
        """Cut a slide into one column band for each device, with as many tiles in each.

        Bands begin at multiples of ``align_px``, itself a multiple of the sinks' tiles. A narrow
        slide gives fewer.
        """
        tiles = np.zeros(grid.width // align_px + 1)
        for tile in grid:
            tiles[tile.write.x // align_px] += 1
        share = np.cumsum(tiles) / max(tiles.sum(), 1)
        wanted = np.arange(1, len(self._workers)) / len(self._workers)
        cuts = {int(np.searchsorted(share, w) + 1) * align_px for w in wanted}
        edges = [0, *sorted(c for c in cuts if c < grid.width), grid.width]
        return list(pairwise(edges))

    def run_bands(
        self,
        slide: Path,
        grid: TileGrid,
        roi: RegionOfInterest | None,
        bands: list[tuple[int, int]],
        options: Options,
        folder: OutputFolder,
        seconds: StageSeconds,
        counts: Counts,
    ) -> dict[str, Any]:
        """Run the bands of a slide, and write their rows to ``folder``, one band after the other.

        Returns
        -------
        What each device did, for ``run.json``.

        Raises
        ------
        HistoError
            If a band fails, or a device's process ends.
        """
        with tempfile.TemporaryDirectory(prefix=".bands-", dir=folder.path) as scratch:
            jobs: list[Job] = [
                BandJob(slide, grid.band(*band), roi, options, Path(scratch) / str(i))
                for i, band in enumerate(bands)
            ]
            done: dict[int, dict[str, Any]] = {}
            doing: dict[int, tuple[int, int]] = {}

            def progressed(job: int, tiles: int, pixels: int) -> None:
                doing[job] = tiles, pixels
                counts.tiles, counts.pixels = (sum(v) for v in zip(*doing.values(), strict=True))
                counts.report(counts.pixels, counts.total_pixels)

            results = self._run(jobs, progressed)
            try:
                for band in range(len(jobs)):
                    while band not in done:
                        with seconds.time("infer"):
                            job, result = next(results)
                        if isinstance(result, HistoError):
                            raise result
                        done[job] = result
                    with seconds.time("write"):
                        for part in _read_spool(Path(scratch) / str(band)):
                            folder.write(part)
            finally:
                for _ in results:  # nobody may be left with a job of this slide
                    pass
            return {"devices": [done[i] for i in range(len(jobs))]}

    def segment_slides(
        self, slides: tuple[Path, ...], out: Path, options: Options
    ) -> Iterator[tuple[Path, SlideResult | HistoError]]:
        """Segment slides, a slide on each device, as each is done; a failed one gives its error."""
        jobs: list[Job] = [SlideJob(slide, out, options) for slide in slides]
        for job, result in self._run(jobs, lambda job, tiles, pixels: None):
            yield slides[job], result

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.pipe.send(None)
            worker.pipe.close()
        for worker in self._workers:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.terminate()
                worker.process.join()
        self._workers = []

    def _run(
        self, jobs: list[Job], progressed: Callable[[int, int, int], None]
    ) -> Iterator[tuple[int, Any]]:
        """Give jobs to whoever is free; yields (job, result) as they are done."""
        waiting = list(range(len(jobs)))
        for worker in self._workers:
            self._give(worker, waiting, jobs)
        while any(worker.job is not None for worker in self._workers):
            ready = wait([w.pipe for w in self._workers if w.job is not None])
            for worker in [w for w in self._workers if w.pipe in ready]:
                job = worker.job
                assert job is not None
                try:
                    kind, content = worker.pipe.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    self._workers.remove(worker)
                    kind, content = "failed", _ended(worker)
                if kind == "progress":
                    progressed(job, *content)
                    continue
                worker.job = None
                yield job, HistoError(content) if kind == "failed" else content
                if worker in self._workers:
                    self._give(worker, waiting, jobs)
        for job in waiting:
            yield job, HistoError("no device is left to run it on")

    def _give(self, worker: _Worker, waiting: list[int], jobs: list[Job]) -> None:
        if waiting:
            worker.job = waiting.pop(0)
            worker.pipe.send(jobs[worker.job])

    def _receive(self, worker: _Worker) -> Any:
        try:
            kind, content = worker.pipe.recv()
        except (EOFError, OSError) as error:
            worker.process.join()
            raise EngineError(_ended(worker)) from error
        if kind == "failed":
            raise EngineError(f"device {worker.device}: {content}")
        return content


def check_devices(devices: tuple[str, ...]) -> None:
    """Refuse devices that cannot be meant.

    Raises
    ------
    EngineError
        If none is named, a name is no number, or a GPU is named twice.
    """
    for device in devices:
        if device != CPU and not (device.isascii() and device.isdigit()):
            raise EngineError(f"device {device!r}: name GPUs by number, as 0,1; or cpu")
        if device != CPU and devices.count(device) > 1:
            raise EngineError(f"device {device} is named twice")
    if not devices:
        raise EngineError("no device is named; as 0,1")


def _ended(worker: _Worker) -> str:
    return (
        f"device {worker.device}: its process ended with exit code {worker.process.exitcode} "
        "(-9: killed, often for want of memory)"
    )


def _work(pipe: Connection, bundle: Path, device: str, how: dict[str, Any]) -> None:
    """Open the network on one device, then do jobs until there are no more: a process's life."""
    if device != CPU:
        os.environ["CUDA_VISIBLE_DEVICES"] = device  # before anything of CUDA is loaded
    return_buffers_at_once()
    try:
        engine = open_engine(bundle, **how)
    except HistoError as error:
        pipe.send(("failed", str(error)))
        return
    pipe.send(("opened", engine.name))
    try:
        while (job := pipe.recv()) is not None:
            try:
                result = _do(job, engine, device, pipe)
            except HistoError as error:
                pipe.send(("failed", str(error)))
            except MemoryError:
                pipe.send(("failed", "out of memory; use a smaller --batch or fewer --devices"))
            except Exception:  # what it is has to reach the user, whose process this is not
                pipe.send(("failed", traceback.format_exc(limit=-3)))
            else:
                pipe.send(("done", result))
    except (EOFError, OSError, KeyboardInterrupt):
        pass  # the parent is gone, or is stopping
    finally:
        engine.close()


def _do(job: Job, engine: Any, device: str, pipe: Connection) -> Any:
    if isinstance(job, SlideJob):
        return segment_slide(job.slide, engine, job.out, job.options)
    seconds = StageSeconds()
    counts = Counts()
    counts.report = lambda done, total: pipe.send(("progress", (counts.tiles, counts.pixels)))
    with open_slide(job.slide) as slide, job.spool.open("wb") as spool:
        options = job.options
        view = at_mpp(slide, engine.card.mpp, slide_mpp=options.mpp, force=options.force_upsampling)
        record = run_band(view, job.grid, job.roi, engine, options, _Spool(spool), seconds, counts)
        blocks = slide.decoded_blocks
    return {
        "device": device,
        "columns": [job.grid.x0, job.grid.x1],
        "tiles": counts.tiles,
        "source_blocks_decoded": blocks,
        "seconds": {k: round(v, 3) for k, v in asdict(seconds).items()},
        **record,
    }


class _Spool:
    """Where a band's finished rows wait for their turn: a file of arrays, one after the other."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, part: Segmented) -> None:
        """Append a part."""
        place = np.array((part.x, part.y, part.probabilities is not None), np.int64)
        for array in (place, part.labels, part.probabilities):
            if array is not None:
                np.lib.format.write_array(self._file, array, allow_pickle=False)


def _read_spool(path: Path) -> Iterator[Segmented]:
    """Read the parts of a band again, and remove the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        while file.tell() < size:
            read = np.lib.format.read_array
            x, y, shared = (int(v) for v in read(file, allow_pickle=False))
            labels = read(file, allow_pickle=False)
            yield Segmented(x, y, labels, read(file, allow_pickle=False) if shared else None)
    path.unlink()
