"""Run large slides within a memory limit, and check that memory does not depend on the height.

::

    python -m tests.robustness.size --out tests/robustness/results/size-cpu.json

``histo-infer --max-memory 1GiB`` runs on each slide in a process of its own, whose memory is read from the system while
it runs (Linux only):

- 200 000 x 200 000 px, mostly glass, through an untrained network of base width 4;
- 100 000 x 20 000 px, all tissue, through a network that returns the pixels, so that every label is known and the cost
of
  the stream itself is measured; with ``--case tissue-base4`` also through the network of base width 4;
- 20 000 px wide and 10 000, 20 000 and 40 000 px high, all tissue.

The slides are mosaics (`tests.robustness.mosaic`) of ordinary JPEG tiles, few of which differ. A wrong result ends the
program with an error, after the file is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import openslide
import tifffile
from numpy.typing import NDArray
from onnx import TensorProto, helper

from histostream.benchmarks.memory import base_4_bundle
from histostream.export.graph.from_torch import write_model
from histostream.runtime.bundle.card import ModelCard, write_card
from histostream.runtime.hardware import hardware
from histostream.wsi.outputs.label_rows import NOT_ANALYSED, ClassInfo
from histostream.wsi.outputs.sinks.tiff import NOT_ANALYSED_COLOR
from histostream.wsi.slides.reader import open_slide
from tests.robustness.mosaic import PATCH_PX, Mosaic

MAX_MEMORY, MAX_MEMORY_MIB = "1GiB", 1024
SAMPLE_S = 0.25  # between two readings of a process's memory
SAMPLES_KEPT = 60
LEAST_TISSUE = 0.8  # share of a patch of tissue that is analysed: it has holes, which are glass
CHECKED_LEVEL = 6  # of labels.tif, where it has so many: every 64th pixel
CHECKED_BOXES, BOX_PX = 40, 700  # boxes cross tiles of any size, and rows of them
FLAT = 1.15  # highest over lowest peak of slides of one width; a strip, of 3 or 4 at a time, is 8 %
PRIMARIES = tuple(
    ClassInfo(name, color) for name, color in (("red", (255, 0, 0)), ("green", (0, 255, 0)), ("blue", (0, 0, 255)))
)


@dataclass(frozen=True, slots=True)
class Case:
    """A slide and its network, "base-4" or "identity"."""

    slide: Mosaic
    network: str
    by_default: bool = True


CASES = {
    "glass": Case(Mosaic(200_000, 200_000, tissue=0.01), "base-4"),
    "tissue": Case(Mosaic(100_000, 20_000), "identity"),
    "height-1": Case(Mosaic(20_000, 10_000), "identity"),
    "height-2": Case(Mosaic(20_000, 20_000), "identity"),
    "height-4": Case(Mosaic(20_000, 40_000), "identity"),
    "tissue-base4": Case(Mosaic(100_000, 20_000), "base-4", by_default=False),
}


def identity_bundle(folder: Path) -> Path:
    """Write a model whose scores are the pixels' red, green and blue, divided by 256."""
    tile_px = 512
    shape: list[str | int | None] = ["n", tile_px, tile_px, 3]
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["tiles"], ["values"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["values"], ["planes"], perm=[0, 3, 1, 2]),
            helper.make_node("Mul", ["planes", "step"], ["parts"]),
            helper.make_node("Cast", ["parts"], ["scores"], to=TensorProto.FLOAT16),
        ],
        "identity",
        [helper.make_tensor_value_info("tiles", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT16, ["n", 3, tile_px, tile_px])],
        [helper.make_tensor("step", TensorProto.FLOAT, [], [1 / 256])],
    )
    opset = 18
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    bundle = folder / "identity"
    bundle.mkdir()
    write_model(model, bundle / "model.onnx")
    digest = hashlib.sha256((bundle / "model.onnx").read_bytes()).hexdigest()
    card = ModelCard(
        method="identity",
        classes=PRIMARIES,
        mpp=0.5,
        channels=3,
        tile_px=tile_px,
        align_px=1,
        halo_px=0,
        tile_statistics=False,
        score_kind="probability",
        files={"model.onnx": digest},
        opset=opset,
    )
    write_card(card, bundle)
    return bundle


BUNDLES: dict[str, Callable[[Path], Path]] = {"base-4": base_4_bundle, "identity": identity_bundle}


@dataclass(frozen=True, slots=True)
class Watched:
    """A process that has ended.

    Attributes
    ----------
    status
        Its exit status.
    peak_mib
        Most memory that it held, as the system counts it (VmHWM), MiB.
    resident_mib
        (seconds since its start, MiB held then), in order.
    """

    status: int
    peak_mib: float
    resident_mib: tuple[tuple[float, float], ...]


def watch(command: list[str]) -> Watched:
    """Run a command and look at its memory until it ends.

    Raises
    ------
    OSError
        If the system has no /proc.
    """
    start, peak, seen = time.perf_counter(), 0.0, []
    with subprocess.Popen(command) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            said = dict(line.partition(":")[::2] for line in status.read_text().splitlines())
            if "VmHWM" in said:  # a process that has just ended has no memory
                peak, now = (int(said[k].split()[0]) / 1024 for k in ("VmHWM", "VmRSS"))
                seen.append((round(time.perf_counter() - start, 1), round(now, 1)))
            time.sleep(SAMPLE_S)
    step = -(-len(seen) // SAMPLES_KEPT) or 1
    return Watched(process.returncode, peak, tuple(seen[::step]))


def run_case(case: Case, bundle: Path, folder: Path) -> dict[str, Any]:
    """Write a slide, run it within the bound, and say what was found and what is wrong with it.

    Parameters
    ----------
    case
        What to run.
    bundle
        The network.
    folder
        An empty one, for the slide and the results.

    Returns
    -------
    What goes into the result file; ``problems`` is empty where all is well.
    """
    path, out = folder / "slide.tif", folder / "out"
    start = time.perf_counter()
    case.slide.write(path, tile_px=256)
    wrote = time.perf_counter() - start
    command = [
        sys.executable,
        "-m",
        "histostream.runtime.cli",
        str(path),
        "--model",
        str(bundle),
        "--out",
        str(out),
        "--backend",
        "cpu",
        "--max-memory",
        MAX_MEMORY,
    ]
    load, start = os.getloadavg()[0], time.perf_counter()
    watched = watch(command)
    seconds = time.perf_counter() - start
    slide = case.slide
    megapixels = slide.width * slide.height / 1e6
    said: dict[str, Any] = {
        "width": slide.width,
        "height": slide.height,
        "tissue": slide.tissue,
        "network": case.network,
        "load_before": round(load, 2),
        "slide_mb": round(path.stat().st_size / 1e6, 1),
        "slide_written_s": round(wrote, 1),
        "wall_s": round(seconds, 1),
        "peak_mib": round(watched.peak_mib, 1),
        "slide_mpx": round(megapixels, 1),
        "slide_mpx_per_s": round(megapixels / seconds, 1),
        "resident_mib": watched.resident_mib,
    }
    if watched.status:
        return said | {"problems": [f"histo-infer ended with status {watched.status}"]}
    results = out / path.stem
    run = json.loads((results / "run.json").read_text())
    said |= {
        "peak_memory_mib": run["peak_memory_mib"],  # by the process itself
        "seconds": run["seconds"],
        "analysed_mpx": run["mpx"],
        "analysed_mpx_per_s": run["mpx_per_s"],
        "tiles": run["grid"]["tiles"],
        "tiles_inferred": run["grid"]["tiles_inferred"],
        "column_bands": run["grid"]["column_bands"],
        "labels_mb": round((results / "labels.tif").stat().st_size / 1e6, 1),
    }
    return said | {"problems": [*_memory_problems(said), *_result_problems(case, path, results)]}


def _memory_problems(said: dict[str, Any]) -> list[str]:
    peaks = {name: said[name] for name in ("peak_mib", "peak_memory_mib")}
    return [
        f"{name} is {peak} MiB, the bound {MAX_MEMORY_MIB}"
        for name, peak in peaks.items()
        if not 0 < peak <= MAX_MEMORY_MIB
    ]


def _result_problems(case: Case, path: Path, results: Path) -> list[str]:
    """Compare what a run left with what is known of the slide."""
    slide, problems = case.slide, []
    summary = json.loads((results / "summary.json").read_text())
    with tifffile.TiffFile(results / "labels.tif") as file:
        size = file.pages[0].shape[::-1]
        level = min(CHECKED_LEVEL, len(file.pages) - 1)
        labels = file.pages[level].asarray()
    if size != (slide.width, slide.height):
        problems.append(f"labels.tif has {size} px, the slide {slide.width} x {slide.height}")
    found = labels != NOT_ANALYSED
    tissue = slide.patches() >= 0
    missed, strayed = _misplaced(found, tissue, PATCH_PX >> level)
    if missed:
        problems.append(f"{missed} of {tissue.sum()} patches of tissue were not analysed")
    if strayed:
        problems.append(f"{strayed} patches of glass with no tissue beside them were analysed")
    analysed = summary["analysed_mm2"] / summary["slide_mm2"]
    if not LEAST_TISSUE * tissue.mean() < analysed < 2 * tissue.mean():
        problems.append(f"{analysed:.4f} of the slide is analysed, {tissue.mean():.4f} is tissue")
    counted = sum(entry["area_mm2"] for entry in summary["classes"])
    if abs(counted - summary["analysed_mm2"]) > 1e-6 * summary["slide_mm2"]:
        problems.append(f"classes have {counted} mm2 together, not {summary['analysed_mm2']}")
    if abs(analysed - found.mean()) > 0.001:
        problems.append(f"{analysed:.4f} of the slide is analysed, {found.mean():.4f} of labels")
    if case.network == "identity":
        wrong = _wrong_labels(path, results / "labels.tif", slide)
        if wrong:
            problems.append(f"{wrong} labels are not those of the pixels")
    return problems


def _misplaced(found: NDArray[np.bool_], tissue: NDArray[np.bool_], patch_px: int) -> tuple[int, int]:
    """Count patches of tissue whose middle was not found, and of glass far from any that was."""
    middles = [np.arange(n) * patch_px + patch_px // 2 for n in tissue.shape]
    inside = [m < size for m, size in zip(middles, found.shape, strict=True)]
    seen = found[np.ix_(middles[0][inside[0]], middles[1][inside[1]])]
    there = tissue[np.ix_(*inside)]
    wide = np.pad(tissue, 1)
    beside = np.zeros_like(tissue)
    for y in range(3):
        for x in range(3):
            beside |= wide[y : y + tissue.shape[0], x : x + tissue.shape[1]]
    return int((there & ~seen).sum()), int((seen & ~beside[np.ix_(*inside)]).sum())


def _wrong_labels(path: Path, labels: Path, slide: Mosaic) -> int:
    """Count labels, in boxes all over the slide, that are not the brightest colour's.

    A hole in the tissue may have no tile, so `NOT_ANALYSED` is not counted.
    """
    random = np.random.default_rng(0)
    colors = np.array([entry.color for entry in PRIMARIES], np.uint8)
    wrong = 0
    with open_slide(path) as pixels, openslide.OpenSlide(labels) as found:
        for _ in range(CHECKED_BOXES):
            x, y = (int(random.integers(0, n - BOX_PX)) for n in (slide.width, slide.height))
            best = pixels.read(0, x, y, BOX_PX, BOX_PX).argmax(axis=2)
            shown = np.asarray(found.read_region((x, y), 0, (BOX_PX, BOX_PX)))[..., :3]
            inside = (shown != NOT_ANALYSED_COLOR).any(axis=2)
            wrong += int((inside & (shown != colors[best]).any(axis=2)).sum())
    return wrong


def height_problems(runs: dict[str, dict[str, Any]]) -> list[str]:
    """Say where memory grew with the height, and where slides differ in more than that."""
    peaks = {said["height"]: said["peak_mib"] for name, said in runs.items() if "height-" in name}
    if len(peaks) > 1 and max(peaks.values()) > FLAT * min(peaks.values()):
        return [f"memory is not flat in height: {peaks} MiB"]
    return []


@click.command(context_settings={"show_default": True})
@click.option(
    "--case",
    "names",
    multiple=True,
    type=click.Choice(tuple(CASES)),
    default=[name for name, case in CASES.items() if case.by_default],
    help="What to run; again for more. Others that the file has already are kept.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON to write.")
def main(names: tuple[str, ...], out: Path) -> None:
    """Run large slides within 1 GiB and check the results."""
    runs: dict[str, dict[str, Any]] = {}
    if out.exists():
        runs = json.loads(out.read_text())["runs"]
    said = {
        "hardware": hardware(),
        "max_memory": MAX_MEMORY,
        "file_tile_px": 256,
        "network_tile_px": 512,
        "overlap_px": 64,
        "runs": runs,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        bundles: dict[str, Path] = {}
        for name in names:
            case = CASES[name]
            folder = Path(place) / name
            folder.mkdir()
            if case.network not in bundles:
                bundles[case.network] = BUNDLES[case.network](Path(place))
            found = runs[name] = run_case(case, bundles[case.network], folder)
            out.write_text(json.dumps(said, indent=1) + "\n")
            click.echo(
                f"{name}: {found['width']} x {found['height']} px in {found['wall_s']} s, peak {found['peak_mib']} MiB"
            )
    problems = [f"{name}: {text}" for name in names for text in runs[name]["problems"]]
    problems += height_problems(runs)
    if problems:
        raise click.ClickException("; ".join(problems))


if __name__ == "__main__":
    main()
