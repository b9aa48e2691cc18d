"""Measure the time and memory of objects, and compare them with the nuclei that were drawn.

::

    python -m histostream.benchmarks.objects --out benchmarks/results/objects-cpu.json

Label maps are written to the sink 512 rows at a time, as in a run, each in a process of its own:

- of a synthetic slide, whose nuclei are known, with each kind of file;
- crowded, with a disc every 24 px (12 um), and half of it, which shows whether the time is proportional to the area;
- its inverse: a single object with as many holes, which is complete only at the last row.

Then the shipped model runs on a part of the slide. Objects and nuclei are matched one to one by their centroids, each
the other's nearest. Nuclei that touch are one object of a label map, so there are also figures for touching nuclei
counted as one, and for isolated nuclei only.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from histostream.benchmarks.report import write_result
from histostream.runtime.bundle.card import default_bundle
from histostream.runtime.engines.opener import open_engine
from histostream.runtime.hardware import hardware
from histostream.runtime.options import Options
from histostream.runtime.process_memory import peak_memory_mib
from histostream.runtime.slide_run import segment_slide
from histostream.wsi.outputs.folder import OutputFolder
from histostream.wsi.outputs.label_rows import LabelRows, SlideInfo
from histostream.wsi.outputs.object_rule import ObjectRule
from histostream.wsi.outputs.objects.counting import with_rules
from histostream.wsi.outputs.sinks import find_sink, sink_names
from histostream.wsi.outputs.sinks.object_counts import ObjectCounts
from histostream.wsi.outputs.sinks.object_files import Objects
from histostream.wsi.records import to_json
from histostream.wsi.runs import connected
from histostream.wsi.synthetic import CLASSES, SyntheticSlide

Labels = NDArray[np.uint8]
Points = NDArray[np.float64]  # (n, 2) x, y

ROWS = 512
MATCH_UM = 3.0  # half of the smallest nucleus
WOBBLE_UM = 0.45  # irregularity of the outlines of synthetic nuclei: those that are nearer to each other may touch
ALONE_UM = 2.0  # a nucleus without a neighbour within this distance is isolated
PITCH_PX, RADIUS_PX = 24, 8
SLIDE = SyntheticSlide(20480, 18432, seed=1)
INFERRED = SyntheticSlide(3072, 3072, seed=1)
BENCH = Path(__file__).parent / "results" / "bench-cpu.json"


@dataclass(frozen=True, slots=True)
class Case:
    """A label map, and the files that are written from it; none: its objects are only counted, as in every run."""

    labels: str
    files: tuple[str, ...]
    simplify_um: float = 0.0


CASES = {
    "synthetic, counted": Case("synthetic", ()),
    "synthetic, geojson and csv": Case("synthetic", ("qupath", "csv")),
    "synthetic, all files, simplified by 0.5 um": Case("synthetic", ("qupath", "dsa", "csv", "parquet"), 0.5),
    "crowded, geojson": Case("crowded", ("qupath",)),
    "half as high, geojson": Case("half", ("qupath",)),
    "one object with holes, geojson": Case("holes", ("qupath",)),
    "one object with holes, simplified by 0.5 um": Case("holes", ("qupath",), 0.5),
}


def discs(width: int, height: int, *, inverse: bool = False) -> Iterator[Labels]:
    """Yield rows with a disc at each point of a grid."""
    x = np.arange(width) % PITCH_PX - PITCH_PX // 2
    for top in range(0, height, ROWS):
        y = np.arange(top, min(top + ROWS, height)) % PITCH_PX - PITCH_PX // 2
        inside = np.add.outer(y * y, x * x) < RADIUS_PX**2
        yield (inside ^ inverse).astype(np.uint8)


def nuclei_rows(slide: SyntheticSlide) -> Iterator[Labels]:
    """Yield rows of the true label map."""
    for top in range(0, slide.height, ROWS):
        yield slide.region(0, top, slide.width, min(ROWS, slide.height - top))[1]


MAPS: dict[str, tuple[int, int, Callable[[], Iterator[Labels]]]] = {
    "synthetic": (SLIDE.width, SLIDE.height, lambda: nuclei_rows(SLIDE)),
    "crowded": (10240, 10240, lambda: discs(10240, 10240)),
    "half": (10240, 5120, lambda: discs(10240, 5120)),
    "holes": (10240, 10240, lambda: discs(10240, 10240, inverse=True)),
}


def export(raw: Path, size: tuple[int, int], case: Case, out: Path) -> dict[str, Any]:
    """Write a stored label map to the sink and measure it; seconds are of CPU time, memory is that of the process."""
    width, height = size
    classes = with_rules(tuple(replace(entry, rule=ObjectRule(touching=True)) for entry in CLASSES))
    info = SlideInfo("synthetic", width, height, SLIDE.mpp, classes)
    before, seconds = peak_memory_mib(), 0.0
    with OutputFolder(out, "slide") as folder, raw.open("rb") as file:
        annotations = sink_names("annotations")
        kinds = [find_sink("annotations" if name in annotations else "objects", name) for name in case.files]
        files = partial(Objects, folder.path, info, raw, kinds, simplify_um=case.simplify_um)
        sink = files() if kinds else ObjectCounts(info)
        folder.add(sink)
        for top in range(0, height, ROWS):
            rows = np.frombuffer(file.read(width * ROWS), np.uint8).reshape(-1, width)
            start = time.process_time()
            sink.write(LabelRows(0, top, rows))
            seconds += time.process_time() - start
        start = time.process_time()
        folder.finish()
        end_s = time.process_time() - start
    total = seconds + end_s
    counts = [sink.counter.count(label) for label in range(len(classes))]
    count = sum(entry.objects for entry in counts if entry is not None)
    return {
        "width": width,
        "height": height,
        "mpx": round(width * height / 1e6, 1),
        "objects": count,
        "seconds": round(total, 2),
        "seconds_beside": round(seconds, 2),
        "seconds_at_end": round(end_s, 2),
        "objects_per_s": round(count / total),
        "mpx_per_s": round(width * height / 1e6 / total, 1),
        "megabytes": {
            p.name: round(p.stat().st_size / 1e6, 1) for p in sorted(folder.path.iterdir()) if p.name != "run.json"
        },
        "peak_mib": peak_memory_mib(),
        "peak_mib_before": before,
    }


def centroids(folder: Path) -> Points:
    """Read the centroids of objects.csv, in px."""
    with (folder / "objects.csv").open(encoding="utf-8", newline="") as file:
        points = [(float(line["x_px"]), float(line["y_px"])) for line in csv.DictReader(file)]
    return np.array(points).reshape(-1, 2)


def groups(nuclei: NDArray[np.float64], apart_px: float) -> NDArray[np.int64]:
    """Group nuclei that are nearer to each other than a distance; return the first of the group of each.

    Nuclei are treated as ellipses, enlarged by half of the distance.
    """
    import shapely

    turn = np.linspace(0, 2 * np.pi, 33)[:-1]
    x, y, major, minor, angle = (column[:, None] for column in nuclei.T)
    u, v = (major + apart_px) / 2 * np.cos(turn), (minor + apart_px) / 2 * np.sin(turn)
    outline = np.stack([x + u * np.cos(angle) - v * np.sin(angle), y + u * np.sin(angle) + v * np.cos(angle)], -1)
    ellipses = shapely.polygons(outline)
    a, b = shapely.STRtree(ellipses).query(ellipses, predicate="intersects")
    return connected(len(ellipses), a, b)


def centers(nuclei: NDArray[np.float64], group: NDArray[np.int64]) -> Points:
    """Return the centroid of each group, weighted by the areas of its nuclei."""
    area = nuclei[:, 2] * nuclei[:, 3]
    x, y, total = (np.bincount(group, area * w) for w in (*nuclei[:, :2].T, np.ones(len(area))))
    first = np.unique(group)
    return np.stack([x[first], y[first]], axis=1) / total[first, None]


def match(predicted: Points, known: Points, within: float) -> dict[str, Any]:
    """Match points that are each other's nearest, and not further apart than ``within``."""
    from scipy.spatial import cKDTree

    apart, nearest = cKDTree(known).query(predicted)
    _, back = cKDTree(predicted).query(known)
    pairs = (back[nearest] == np.arange(len(predicted))) & (apart <= within)
    matched = int(pairs.sum())
    return {
        "objects": len(predicted),
        "known": len(known),
        "matched": matched,
        "precision": round(matched / len(predicted), 4),
        "recall": round(matched / len(known), 4),
        "f1": round(2 * matched / (len(predicted) + len(known)), 4),
        "median_distance_um": round(float(np.median(apart[pairs])) * SLIDE.mpp, 3),
    }


def scores(slide: SyntheticSlide, folder: Path) -> dict[str, Any]:
    """Compare objects.csv with the nuclei that were drawn."""
    from scipy.spatial import cKDTree

    predicted = centroids(folder)
    nuclei = slide.nuclei(0, 0, slide.width, slide.height)
    within = MATCH_UM / slide.mpp
    near = groups(nuclei, WOBBLE_UM / slide.mpp)
    far = groups(nuclei, ALONE_UM / slide.mpp)
    alone = np.bincount(far, minlength=len(far))[far] == 1
    _, nearest = cKDTree(nuclei[:, :2]).query(predicted)
    return {
        "nuclei": match(predicted, nuclei[:, :2], within),
        "nuclei_that_touch_as_one": match(predicted, centers(nuclei, near), within),
        # Of objects those whose nearest nucleus is alone.
        "nuclei_alone": match(predicted[alone[nearest]], nuclei[alone, :2], within),
    }


def inferred(folder: Path) -> dict[str, Any]:
    """Run the shipped model."""
    path = folder / "inferred.tif"
    INFERRED.write(path)
    engine = open_engine(default_bundle(), backend="cpu", threads=1)
    options = Options(tissue=False, annotations=("qupath",), objects=("csv",), min_area_um2=8)  # as the card says
    with_objects = segment_slide(path, engine, folder / "out", options)
    engine.close()
    run = to_json(with_objects.run)
    return {
        "width": INFERRED.width,
        "height": INFERRED.height,
        "engine": engine.name,
        "min_area_um2": options.min_area_um2,
        "seconds": run["seconds"],
        **scores(INFERRED, with_objects.folder),
    }


@click.command(context_settings={"show_default": True})
@click.option("--infer/--no-infer", default=True, help="Run the shipped model too.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON to write.")
def main(infer: bool, out: Path) -> None:
    """Measure how long objects take, and compare them with the nuclei that were drawn."""
    bench = json.loads(BENCH.read_text())["runs"][0]
    rate = bench["stages"]["end_to_end"]["mpx_per_s"]
    runs: dict[str, Any] = {}
    result: dict[str, Any] = {
        "hardware": hardware(),
        "load_before": round(os.getloadavg()[0], 2),
        "threads": 1,
        "inference": {"mpx_per_s": rate, "engine": bench["engine"], "of": BENCH.name},
        "match_um": MATCH_UM,
        "runs": runs,
    }
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, (width, height, rows) in MAPS.items():
            raw = folder / "labels"
            with raw.open("wb") as file:
                for part in rows():
                    file.write(part.tobytes())
            for title, case in ((t, c) for t, c in CASES.items() if c.labels == kind):
                case_folder = folder / title.replace(" ", "-")
                with ProcessPoolExecutor(1, context) as pool:
                    measured = pool.submit(export, raw, (width, height), case, case_folder).result()
                measured["inference_seconds"] = round(measured["mpx"] / rate, 1)
                measured["share_of_inference"] = round(measured["seconds"] * rate / measured["mpx"], 4)
                runs[title] = measured
                click.echo(f"{title}: {measured}")
                if kind == "synthetic" and "csv" in case.files and not case.simplify_um:
                    result["true_labels"] = scores(SLIDE, case_folder / "slide")
                    click.echo(result["true_labels"])
        if infer:
            result["inferred"] = inferred(folder)
            click.echo(result["inferred"])
    write_result(out, result)


if __name__ == "__main__":
    main()
