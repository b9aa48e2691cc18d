"""Check what this machine can run, and what to install for the rest: ``histo-bench doctor``."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import Any

from histostream.runtime.cache import cache_folder
from histostream.runtime.choices import ENGINES
from histostream.runtime.cuda.driver import find_gpus
from histostream.runtime.finding import ABSENT, BROKEN, MISSING, OK, Finding, check_module
from histostream.runtime.hardware import hardware
from histostream.wsi.errors import HistoError, reason
from histostream.wsi.optional import engine_command, install_command
from histostream.wsi.slides.reader import open_slide
from histostream.wsi.slides.resolution import at_mpp
from histostream.wsi.synthetic import SyntheticSlide
from histostream.wsi.tiling.grid import TileGrid
from histostream.wsi.tiling.strips import read_strips

DRIVER, GPU_PROVIDER = "NVIDIA driver", "CUDAExecutionProvider"
MIN_FREE_GB = 5.0  # results of large slides
DECODE_PX = 1024  # side of the slide that is decoded
DECODE_REPEATS = 3
SLIDE_SOURCES = {"tiff", "openslide", "pil", "dicom"}

Check = Callable[[], Iterator[Finding]]


def examine() -> list[Finding]:
    """Check everything that a run may need; nothing is installed or changed.

    Returns
    -------
    The findings in their order; the last one is the verdict.
    """
    checks: list[tuple[str, Check]] = [("machine", _machine), ("gpus", _gpus)]
    checks += [(name, _engine_check(name)) for name in ENGINES.names()]
    checks += [("extras", _extras), ("slides", _slides), ("disk", _disk), ("decoding", _decoding), ("cache", _cache)]
    findings: list[Finding] = []
    for name, check in checks:
        try:
            findings.extend(check())
        except Exception as error:  # an unforeseen error must not hide the other lines
            findings.append(Finding(name, BROKEN, f"{type(error).__name__}: {reason(error)}"))
    return [*findings, verdict(findings)]


def _engine_check(name: str) -> Check:
    def check() -> Iterator[Finding]:
        yield from ENGINES.load(name).check()

    return check


def verdict(findings: Sequence[Finding]) -> Finding:
    """Sum up what this machine is ready for, and what to install for more."""
    by_name = {finding.name: finding for finding in findings}
    broken = [finding.name for finding in findings if finding.status == BROKEN]
    if broken:
        return Finding("verdict", BROKEN, f"not ready: {', '.join(broken)}", "see the lines above")
    if by_name[DRIVER].status != OK:
        return Finding("verdict", OK, "ready: CPU", f"for an NVIDIA GPU, where there is one, {engine_command('cuda')}")
    if GPU_PROVIDER in by_name and by_name[GPU_PROVIDER].status == OK:
        return Finding("verdict", OK, "ready: CPU and GPU")
    return Finding("verdict", OK, "ready: CPU", f"for the GPU: {engine_command('cuda')}")


def _machine() -> Iterator[Finding]:
    machine = hardware()
    supported = sys.version_info >= (3, 11)
    advice = "" if supported else "use 3.11 or newer"
    yield Finding("Python", OK if supported else BROKEN, platform.python_version(), advice)
    yield Finding("system", OK, str(machine["system"]))
    yield Finding("processor", OK, f"{machine['cpu']}, {machine['cores']} usable cores")
    if machine["memory"]:
        yield Finding("memory", OK, f"{int(str(machine['memory']).split()[0]) / 2**20:.1f} GiB")


def _gpus() -> Iterator[Finding]:
    gpus = find_gpus()
    if gpus.cuda is None:
        advice = "if there is a GPU, install its driver; in a container pass it in (--gpus all)"
        yield Finding(DRIVER, ABSENT, gpus.problem, advice)
        return
    yield Finding(DRIVER, OK, f"{gpus.driver or 'version unknown'}, CUDA {gpus.cuda}")
    if gpus.problem:
        yield Finding("GPU", MISSING, gpus.problem, "see whether nvidia-smi lists it, and CUDA_VISIBLE_DEVICES")
    for index, gpu in enumerate(gpus.gpus):
        yield Finding(
            f"GPU {index}", OK, f"{gpu.name}, {gpu.memory_mib / 1024:.1f} GiB, compute capability {gpu.capability}"
        )


def _extras() -> Iterator[Finding]:
    yield check_module("torch", "torch", f"to train and export: {install_command('export')}")
    yield check_module("onnx", "onnx", f"to export and measure: {install_command('export')}")
    yield check_module("matplotlib", "matplotlib", f"to measure: {install_command('bench')}")


def _slides() -> Iterator[Finding]:
    advice = install_command()
    try:
        tilesource: Any = importlib.import_module("large_image.tilesource")
    except (ImportError, OSError) as error:
        yield Finding("large-image", BROKEN, f"cannot be loaded ({reason(error)})", advice)
        return
    tilesource.loadTileSources()
    sources = list(tilesource.AvailableTileSources)
    version = metadata.version("large-image")
    if sources:
        yield Finding("large-image", OK, f"{version}, sources {', '.join(sorted(sources))}")
    else:
        yield Finding("large-image", BROKEN, f"{version} without any source", advice)
    if missing := sorted(SLIDE_SOURCES - set(sources)):
        packages = " ".join(f"large-image-source-{name}" for name in missing)
        yield Finding("large-image sources", MISSING, f"no {', '.join(missing)}", f"pip install {packages}")


def _disk() -> Iterator[Finding]:
    for name, folder in {"this folder": Path.cwd(), "temporary files": Path(tempfile.gettempdir())}.items():
        free_gb = shutil.disk_usage(folder).free / 1e9
        text = f"{free_gb:.1f} GB at {folder}"
        if free_gb < MIN_FREE_GB:
            advice = f"results of large slides take up to {MIN_FREE_GB:.0f} GB"
            yield Finding(f"free disk, {name}", MISSING, text, advice)
        else:
            yield Finding(f"free disk, {name}", OK, text)


def _decoding() -> Iterator[Finding]:
    with tempfile.TemporaryDirectory(prefix="histo-doctor-") as folder:
        path = Path(folder) / "slide.tif"
        SyntheticSlide(DECODE_PX, DECODE_PX).write(path)
        try:
            rate, reader = _decode_rate(path)
        except HistoError as error:
            yield Finding("decoding", BROKEN, str(error), install_command())
            return
    yield Finding("decoding", OK, f"{rate:.0f} Mpx/s of JPEG with the {reader} reader, 2 threads")


def _decode_rate(path: Path) -> tuple[float, str]:
    """Read a slide as a run does; return the best rate of some repeats, in Mpx/s, and the reader's name."""
    best = 0.0
    for _ in range(DECODE_REPEATS):
        with open_slide(path) as slide:
            view = at_mpp(slide, slide.mpp or 0.5)
            grid = TileGrid.cover(view.width, view.height, tile_px=512, overlap_px=64)
            start = time.perf_counter()
            with closing(read_strips(view, grid)) as strips:
                for _strip in strips:
                    pass
            best = max(best, view.width * view.height / 1e6 / (time.perf_counter() - start))
    return best, slide.name


def _cache() -> Iterator[Finding]:
    folder = cache_folder()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if existing.is_dir() and os.access(existing, os.W_OK):
        size_mb = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
        yield Finding("cache folder", OK, f"{folder}, {size_mb:.1f} MB in it")
    else:
        advice = "set XDG_CACHE_HOME, or engines are built again for every run"
        yield Finding("cache folder", MISSING, f"{folder} cannot be written", advice)
