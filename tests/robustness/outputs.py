"""Write every output of a run, and open each with the library that it is written for.

::

    python -m tests.robustness.outputs slide.svs --out tests/robustness/results/outputs-cpu.json
    python -m tests.robustness.outputs --synthetic 20000x20000 --out ...   # adds F1 scores

``histo-infer`` runs with every output. Then each file is opened with another project's library, and its content is
compared with the label map as tifffile reads it: pixel by pixel in boxes all over the slide, and all objects.
"""

from __future__ import annotations

import gzip
import html.parser
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from histostream.benchmarks.objects import scores
from histostream.runtime.hardware import hardware
from histostream.runtime.result import SlideResult
from histostream.wsi.outputs.folder import RUN_FILE
from histostream.wsi.outputs.label_rows import NOT_ANALYSED
from histostream.wsi.outputs.sinks.tiff import NOT_ANALYSED_COLOR
from histostream.wsi.records import to_json
from histostream.wsi.synthetic import SyntheticSlide

Labels = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # x, y, width, height

BOX_PX, BOXES = 1024, 24
LABELS = np.arange(256, dtype=np.uint8)  # a reader that returns labels unchanged
EVERYTHING = (
    "--geojson",
    "--annotations",
    "dsa",
    "--objects",
    "csv,parquet",
    "--min-area",
    "8",
    "--rasters",
    "ome-tiff,ome-tiff-rgb,ome-zarr,dicom-seg",
    "--probabilities",
)


class Truth:
    """The label map, as tifffile reads it.

    Parameters
    ----------
    result
        Result of the run.
    """

    def __init__(self, result: SlideResult) -> None:
        import tifffile
        import zarr

        with tifffile.imread(result.folder / "labels.tif", aszarr=True, level=0) as store:
            self.labels: Labels = np.asarray(zarr.open_array(store, mode="r"))
        self.result, self.folder = result, result.folder
        self.mpp, self.classes = result.mpp, result.classes
        palette = np.full((256, 3), 128, np.uint8)
        palette[: len(self.classes)] = [entry.color for entry in self.classes]
        palette[NOT_ANALYSED] = NOT_ANALYSED_COLOR
        self.palette = palette

    def boxes(self) -> Iterator[Box]:
        """Yield boxes all over the slide, its first and last pixel included."""
        height, width = self.labels.shape
        wide, high = min(BOX_PX, width), min(BOX_PX, height)
        for i in range(BOXES):
            x = round((width - wide) * ((i * 7) % BOXES) / (BOXES - 1))
            yield x, round((height - high) * i / (BOXES - 1)), wide, high

    def agreement(
        self, read: Callable[[int, int, int, int], NDArray[Any]], expected: NDArray[np.uint8]
    ) -> dict[str, int]:
        """Compare the pixels that a reader returns with those expected for each label, (256[, 3])."""
        compared = differing = 0
        for x, y, width, height in self.boxes():
            wanted = expected[self.labels[y : y + height, x : x + width]]
            found = np.asarray(read(x, y, width, height))
            if wanted.ndim == 3:
                differ = (found[..., :3] != wanted).any(axis=2)
            else:
                differ = found.reshape(wanted.shape) != wanted
            compared, differing = compared + differ.size, differing + int(differ.sum())
        return {"pixels_compared": compared, "pixels_differing": differing}


def reading(array: Any) -> Callable[[int, int, int, int], NDArray[Any]]:
    """Read boxes of a zarr array."""
    return lambda x, y, width, height: np.asarray(array[y : y + height, x : x + width])


def by_openslide(truth: Truth, path: Path) -> dict[str, Any]:
    """Open a TIFF as OpenSlide's users do."""
    import openslide

    with openslide.OpenSlide(path) as slide:
        return {
            "levels": slide.level_count,
            "mpp": float(slide.properties["openslide.mpp-x"]),
            **truth.agreement(lambda x, y, w, h: np.asarray(slide.read_region((x, y), 0, (w, h))), truth.palette),
        }


def by_large_image(truth: Truth, path: Path) -> dict[str, Any]:
    """Open a file as the Digital Slide Archive does."""
    import large_image

    source = large_image.open(str(path))
    metadata = source.getMetadata()

    def read(x: int, y: int, width: int, height: int) -> NDArray[Any]:
        region = {"left": x, "top": y, "width": width, "height": height, "units": "base_pixels"}
        pixels: NDArray[Any] = source.getRegion(region=region, format="numpy")[0]
        return pixels

    labels = read(0, 0, 8, 8).shape[2] == 1
    return {
        "source": source.name,
        "levels": metadata["levels"],
        "mpp": None if metadata["mm_x"] is None else round(1000 * metadata["mm_x"], 6),
        **truth.agreement(read, LABELS if labels else truth.palette),
    }


def by_tifffile(truth: Truth, path: Path) -> dict[str, Any]:
    """Open an OME-TIFF as napari and scripts do."""
    import tifffile
    import zarr

    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        store = zarr.open_array(series.aszarr(level=0), mode="r")
        return {"ome": bool(file.is_ome), "levels": len(series.levels), **truth.agreement(reading(store), LABELS)}


def by_ngff(truth: Truth, path: Path) -> dict[str, Any]:
    """Validate an OME-Zarr, image and label image, and read it by zarr."""
    import zarr
    from ome_zarr_models.v04 import Image, ImageLabel

    Image.from_zarr(zarr.open_group(path, mode="r"))
    said: Any = zarr.open_group(path / "labels", mode="r").attrs["labels"]
    names = list(map(str, said))
    labels = ImageLabel.from_zarr(zarr.open_group(path / "labels" / names[0], mode="r"))
    finest = labels.attributes.multiscales[0].datasets[0].path
    array = zarr.open_array(path / "labels" / names[0] / finest, mode="r")
    return {
        "labels": names,
        "levels": len(labels.attributes.multiscales[0].datasets),
        **truth.agreement(reading(array), LABELS),
    }


def by_highdicom(truth: Truth, path: Path) -> dict[str, Any]:
    """Open a DICOM segmentation by highdicom's reader."""
    import highdicom

    found = highdicom.seg.segread(path, lazy_frame_retrieval=True)
    spacing = found.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing

    def read(x: int, y: int, width: int, height: int) -> NDArray[Any]:
        pixels: NDArray[Any] = found.get_total_pixel_matrix(
            row_start=y + 1,
            row_end=y + height + 1,
            column_start=x + 1,
            column_end=x + width + 1,
            combine_segments=True,
            relabel=False,
        )
        return pixels

    number_of = dicom_numbers(found, truth)
    known = np.zeros(256, np.uint8)
    for label, number in number_of.items():
        known[label] = number
    return {
        "type": str(found.SegmentationType),
        "organization": str(found.DimensionOrganizationType),
        "frames": int(found.NumberOfFrames),
        "mpp": round(1000 * float(spacing[0]), 6),
        "segments": [str(s.SegmentLabel) for s in found.SegmentSequence],
        **truth.agreement(read, known),
    }


def dicom_numbers(found: Any, truth: Truth) -> dict[int, int]:
    """Return the segment number of each label that is a segment; the others are no segment, 0."""
    by_name = {str(s.SegmentLabel): int(s.SegmentNumber) for s in found.SegmentSequence}
    return {label: by_name[entry.name] for label, entry in enumerate(truth.classes) if entry.name in by_name}


def by_shapely(truth: Truth, path: Path) -> dict[str, Any]:
    """Read each polygon; their areas are those of the pixels of objects that are large enough."""
    import shapely

    count, invalid, worst = 0, 0, 0.0
    by_class: Counter[str] = Counter()
    um2 = truth.mpp**2
    scale = (truth.result.run.slide.mpp or truth.mpp) / truth.mpp  # full size to label map
    with gzip.open(path, "rt") as file:
        for line in file:
            if not line.startswith('{"type":"Feature",'):
                continue
            feature = json.loads(line.rstrip().rstrip(","))
            shape = shapely.geometry.shape(feature["geometry"])
            count, invalid = count + 1, invalid + (not shape.is_valid)
            by_class[feature["properties"]["classification"]["name"]] += 1
            measured = feature["properties"]["measurements"]["Area µm^2"]
            worst = max(worst, abs(shape.area * scale**2 * um2 / measured - 1))
    return {
        "objects": count,
        "by_class": dict(by_class),
        "invalid": invalid,
        "largest_relative_error_of_area": float(f"{worst:.3g}"),
    }


def by_json(_: Truth, path: Path) -> dict[str, Any]:
    """Count the elements of an annotation."""
    elements = json.loads(path.read_text())["elements"]
    return {"objects": len(elements), "types": dict(Counter(e["type"] for e in elements))}


def by_csv(_: Truth, path: Path) -> dict[str, Any]:
    """Count the lines of a table."""
    import csv

    with path.open(encoding="utf-8", newline="") as file:
        return {"objects": sum(1 for _ in csv.DictReader(file))}


def by_pyarrow(_: Truth, path: Path) -> dict[str, Any]:
    """Count the lines of a table."""
    import pyarrow.parquet

    return {"objects": pyarrow.parquet.ParquetFile(path).metadata.num_rows}


def by_argmax(truth: Truth, path: Path) -> dict[str, Any]:
    """Compare the class of the highest score with the label, where anything was analysed."""
    import tifffile
    import zarr

    scores_of = zarr.open_array(tifffile.imread(path, aszarr=True, level=0), mode="r")
    compared = differing = 0
    for x, y, width, height in truth.boxes():
        wanted = truth.labels[y : y + height, x : x + width]
        best = np.asarray(scores_of[y : y + height, x : x + width])
        inside = wanted != NOT_ANALYSED
        # Of classes with equal bytes either may have been the higher one before rounding.
        lost = np.take_along_axis(best, np.where(inside, wanted, 0)[..., None], 2)[..., 0]
        differ = (lost < best.max(axis=2)) & inside
        compared, differing = compared + int(inside.sum()), differing + int(differ.sum())
    return {"pixels_compared": compared, "pixels_differing": differing}


class _References(html.parser.HTMLParser):
    """What a page asks for from elsewhere, and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.outside += [
            str(value) for name, value in attrs if name in ("src", "srcset") and not str(value).startswith("data:")
        ]


def by_html(_: Truth, path: Path) -> dict[str, Any]:
    """Read a report."""
    page = _References()
    page.feed(path.read_text(encoding="utf-8"))
    return {
        "images": page.tags["img"],
        "tables": page.tags["table"],
        "plots": page.tags["svg"],
        "scripts": page.tags["script"],
        "asks_for_from_elsewhere": page.outside,
    }


READERS: dict[str, dict[str, Callable[[Truth, Path], dict[str, Any]]]] = {
    "labels.tif": {"OpenSlide": by_openslide, "large-image": by_large_image},
    "labels.ome.tif": {"tifffile": by_tifffile},
    "labels.rgb.ome.tif": {"large-image": by_large_image},
    "labels.ome.zarr": {"ome-zarr-models, zarr": by_ngff},
    "labels.dcm": {"highdicom": by_highdicom},
    "probabilities.tif": {"tifffile": by_argmax},
    "objects.geojson.gz": {"shapely": by_shapely},
    "annotations.json": {"json": by_json},
    "objects.csv": {"csv": by_csv},
    "objects.parquet": {"pyarrow": by_pyarrow},
    "report.html": {"html.parser": by_html},
}


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


def opened(truth: Truth) -> dict[str, Any]:
    """Open every file with every reader."""
    said: dict[str, Any] = {}
    for name, readers in READERS.items():
        path = truth.folder / name
        said[name] = {"megabytes": round(size_of(path) / 1e6, 3)}
        for reader, read in readers.items():
            start = time.perf_counter()
            said[name][reader] = read(truth, path)
            said[name][reader]["seconds"] = round(time.perf_counter() - start, 2)
            click.echo(f"{name}, {reader}: {said[name][reader]}")
    return said


def wrong(files: dict[str, Any]) -> list[str]:
    """Say what does not agree."""
    found = []
    for name, readers in files.items():
        for reader, said in readers.items():
            if reader == "megabytes":
                continue
            if any(said.get(key) for key in ("pixels_differing", "invalid", "scripts")):
                found.append(f"{name} by {reader}: {said}")
            if said.get("asks_for_from_elsewhere"):
                found.append(f"{name} asks for {said['asks_for_from_elsewhere']}")
    counts = {
        f"{name} by {reader}": said["objects"]
        for name, readers in files.items()
        for reader, said in readers.items()
        if reader != "megabytes" and "objects" in said
    }
    if len(set(counts.values())) > 1:
        found.append(f"numbers of objects differ: {counts}")
    return found


@click.command(context_settings={"show_default": True})
@click.argument("slide", required=False, type=click.Path(path_type=Path, exists=True))
@click.option("--synthetic", "size", metavar="WxH", help="Make this slide instead.")
@click.option("--seed", default=1, help="Of the synthetic slide.")
@click.option("--precision", default="int8", help="As of histo-infer.")
@click.option("--keep", type=click.Path(path_type=Path), help="Folder to keep the results in.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON to add to.")
def main(
    slide: Path | None,
    size: str | None,
    seed: int,
    precision: str,
    keep: Path | None,
    out: Path,
) -> None:
    """Write everything that a run can write, and open all of it."""
    if (slide is None) == (size is None):
        raise click.UsageError("name a slide, or --synthetic WxH")
    with tempfile.TemporaryDirectory() as name:
        place = Path(keep or name)
        drawn = None
        if size is not None:
            width, height = map(int, size.split("x"))
            drawn = SyntheticSlide(width, height, seed=seed)
            slide = place / "synthetic.tif"
            slide.parent.mkdir(parents=True, exist_ok=True)
            if not slide.exists():
                drawn.write(slide)
        assert slide is not None
        folder = place / "out"
        command = [
            sys.executable,
            "-m",
            "histostream.runtime.cli",
            str(slide),
            "--out",
            str(folder),
            "--precision",
            precision,
            *EVERYTHING,
        ]
        subprocess.run(command, check=True)
        (run,) = folder.glob(f"*/{RUN_FILE}")
        truth = Truth(SlideResult.read(run.parent))
        files = opened(truth)
        record = to_json(truth.result.run)
        found = {
            "hardware": hardware(),
            "command": ["histo-infer", slide.name, *command[4:]],
            "width": truth.labels.shape[1],
            "height": truth.labels.shape[0],
            "engine": record["model"]["engine"],
            "run_seconds": record["seconds"],
            "peak_memory_mib": record["peak_memory_mib"],
            "files": files,
            "wrong": wrong(files),
            **({"nuclei": scores(drawn, truth.folder)} if drawn else {}),
        }
    everything = json.loads(out.read_text()) if out.exists() else {}
    everything[slide.name] = found
    out.write_text(json.dumps(everything, indent=1) + "\n")
    if found["wrong"]:
        raise click.ClickException("; ".join(found["wrong"]))


if __name__ == "__main__":
    main()
