"""Measure the time and memory of each raster of the label map, in comparison with labels.tif.

::

    python -m histostream.benchmarks.rasters --out benchmarks/results/rasters-cpu.json

Label maps are written to one sink 512 rows at a time, as in a run, each in a process of its own:

- of a synthetic slide, and of its upper half, which shows whether time and memory grow with the area;
- a gigapixel: 65536 x 65536 px, an eighth of its rows full of discs, the others glass.

Peak memory is that of the process. ``raster_mib`` is its growth since the sink was opened: libraries, buffers, index
and the rows that are written. ``seconds_to_publish``, which wait for the disk, are not part of ``seconds``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from histostream.benchmarks.objects import BENCH, ROWS, SLIDE, discs, nuclei_rows
from histostream.benchmarks.report import write_result
from histostream.runtime.hardware import hardware
from histostream.runtime.process_memory import peak_memory_mib
from histostream.wsi.outputs.folder import OutputFolder
from histostream.wsi.outputs.label_rows import LabelRows, Sink, SlideInfo
from histostream.wsi.outputs.objects.counting import with_rules
from histostream.wsi.outputs.sinks import find_sink, sink_names
from histostream.wsi.outputs.sinks.tiff import LabelTiff
from histostream.wsi.synthetic import CLASSES

FIRST = "labels.tif"  # the others are compared with it
SIDE_PX, BLOCK_PX = 65536, 2048  # of the gigapixel; its discs repeat


def stored_rows(raw: Path, width: int) -> Iterator[NDArray[np.uint8]]:
    """Yield rows of a label map from a file."""
    with raw.open("rb") as file:
        while rows := file.read(width * ROWS):
            yield np.frombuffer(rows, np.uint8).reshape(-1, width)


def gigapixel_rows() -> Iterator[NDArray[np.uint8] | None]:
    """Yield rows of discs, and None for rows of glass."""
    tissue = np.tile(next(discs(BLOCK_PX, ROWS)), (1, SIDE_PX // BLOCK_PX))
    for top in range(0, SIDE_PX, ROWS):
        yield tissue if SIDE_PX // 4 <= top < SIDE_PX // 4 + SIDE_PX // 8 else None


def open_raster(name: str, folder: Path, info: SlideInfo, slide: Path) -> Sink:
    """Open the sink of one file."""
    if name == FIRST:
        return LabelTiff(folder / FIRST, info)
    kind = find_sink("rasters", name)
    sink: Sink = kind.open(folder / kind.file, info, slide)
    return sink


def write(raw: Path | None, size: tuple[int, int], name: str, out: Path) -> dict[str, Any]:
    """Write a label map to one sink and measure it; ``raw=None`` is the gigapixel."""
    width, height = size
    info = SlideInfo("synthetic", width, height, SLIDE.mpp, with_rules(CLASSES, count_all=True))
    rows = gigapixel_rows() if raw is None else stored_rows(raw, width)
    first = next(rows)
    before, seconds, y = peak_memory_mib() or 0.0, 0.0, 0
    slide = out.with_suffix(".svs")
    slide.write_bytes(b"slide")
    with OutputFolder(out, "slide") as folder:
        start = time.perf_counter()
        sink = folder.add(open_raster(name, folder.path, info, slide))
        seconds += time.perf_counter() - start
        for labels in chain([first], rows):
            glass = LabelRows.outside(0, y, width, min(ROWS, height - y))
            part = glass if labels is None else LabelRows(0, y, labels)
            start = time.perf_counter()
            sink.write(part)
            seconds += time.perf_counter() - start
            y += len(part.labels)
        start = time.perf_counter()
        folder.finish()
        end_s = time.perf_counter() - start
        start = time.perf_counter()
    publish_s = time.perf_counter() - start
    written = [p for p in folder.path.rglob("*") if p.is_file() and p.name != "run.json"]
    mpx, peak = width * height / 1e6, peak_memory_mib() or 0.0
    return {
        "width": width,
        "height": height,
        "mpx": round(mpx, 1),
        "seconds": round(seconds + end_s, 2),
        "seconds_beside": round(seconds, 2),
        "seconds_at_end": round(end_s, 2),
        "seconds_to_publish": round(publish_s, 2),
        "mpx_per_s": round(mpx / (seconds + end_s), 1),
        "megabytes": round(sum(p.stat().st_size for p in written) / 1e6, 4),
        "files": len(written),
        "peak_mib": peak,
        "raster_mib": round(peak - before, 1),
    }


@click.command(context_settings={"show_default": True})
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON to write.")
def main(out: Path) -> None:
    """Measure how long each raster takes, and how much memory."""
    rate = json.loads(BENCH.read_text())["runs"][0]["stages"]["end_to_end"]["mpx_per_s"]
    runs: dict[str, dict[str, Any]] = {}
    result: dict[str, Any] = {
        "hardware": hardware(),
        "load_before": round(os.getloadavg()[0], 2),
        "threads": 1,
        "inference": {"mpx_per_s": rate, "of": BENCH.name},
        "runs": runs,
    }
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw = folder / "labels"
        with raw.open("wb") as file:
            for part in nuclei_rows(SLIDE):
                file.write(part.tobytes())
        half = folder / "half"
        upper = SLIDE.height // 2 // ROWS * ROWS
        half.write_bytes(raw.read_bytes()[: SLIDE.width * upper])
        maps: dict[str, tuple[Path | None, tuple[int, int]]] = {
            "synthetic": (raw, (SLIDE.width, SLIDE.height)),
            "half": (half, (SLIDE.width, upper)),
            "gigapixel": (None, (SIDE_PX, SIDE_PX)),
        }
        for kind, (rows, size) in maps.items():
            rasters = runs[kind] = {}
            for title in (FIRST, *sink_names("rasters")):
                with ProcessPoolExecutor(1, context) as pool:
                    measured = pool.submit(write, rows, size, title, folder / f"{kind}-{title}").result()
                if title != FIRST:
                    measured["seconds_of_labels_tif"] = round(measured["seconds"] / rasters[FIRST]["seconds"], 2)
                rasters[title] = measured
                click.echo(f"{kind}, {title}: {measured}")
    write_result(out, result)


if __name__ == "__main__":
    main()
