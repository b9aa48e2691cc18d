"""What ``histo-bench doctor`` does: what this machine can run, and what to install for the rest.

What only a GPU could use is looked for where there is a GPU. The last line is the verdict.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from histostream.benchmarks.hardware import find_gpus, hardware, usable_cores
from histostream.benchmarks.sessions import first_line, open_session
from histostream.runtime.engines.tensorrt.build import cache_folder
from histostream.wsi.errors import HistoError
from histostream.wsi.optional import either_engine, engine_command, install_command
from histostream.wsi.slides.reader import open_slide
from histostream.wsi.slides.resolution import at_mpp
from histostream.wsi.synthetic import SyntheticSlide
from histostream.wsi.tiling.grid import TileGrid
from histostream.wsi.tiling.strips import read_strips

OK, ABSENT, MISSING, BROKEN = "ok", "none", "missing", "broken"
# A convolution of one channel by 2, as ONNX: this command runs where the package onnx is not.
TINY_MODEL = bytes.fromhex(
    "080812003a630a0f0a01780a01771201792204436f6e761201742a130801080108010801100142017"
    "74a04000000405a1b0a017812160a14080112100a0208010a0208010a0208040a020804621b0a0179"
    "12160a14080112100a0208010a0208010a0208040a02080442040a001011"
)
DRIVER, GPU_PROVIDER = "NVIDIA driver", "CUDAExecutionProvider"
LOWEST_FREE_GB = 5.0
DECODE_PX = 1024  # side of the slide that is decoded
# Libraries that ONNX Runtime's CUDA provider loads; the extra cuda brings them.
CUDA_LIBRARIES = ("cudart", "cublas", "cublasLt", "cufft", "curand", "nvrtc", "cudnn")
VERSIONS = {"cudnn": (9, 8), "cufft": (12, 11), "curand": (10,)}
CUDA_VERSIONS = (13, 12)
WANTED_SOURCES = {"tiff", "openslide", "pil", "dicom"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes
    ----------
    name
        What was looked for.
    status
        "ok"; "none", for what this machine does not have; "missing", for what can be installed
        and done without; "broken", for what cannot be done without.
    said
        What was found, or why not.
    advice
        What to do; "" if nothing.
    """

    name: str
    status: str
    said: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.status:8}{self.name}: {self.said}{f'; {self.advice}' if self.advice else ''}"


def examine() -> list[Finding]:
    """Look at everything that a run may need; nothing is installed or changed.

    Returns
    -------
    The findings in their order; the last one is the verdict.
    """
    found = [*_guarded(_machine), *_guarded(_gpus)]
    looks: list[Callable[[], Iterator[Finding]]] = [_onnxruntime, _openvino, _extras, _slides]
    if any(finding.name == DRIVER and finding.status == OK for finding in found):
        looks = [_cuda_libraries, _cuda_provider, _tensorrt, _bindings, *looks]
    for look in (*looks, _disk, _decoding, _cache):
        found += _guarded(look)
    return [*found, verdict(found)]


def verdict(findings: Sequence[Finding]) -> Finding:
    """Sum up what this machine is ready for, and what to install for more."""
    by_name = {finding.name: finding for finding in findings}
    broken = [finding.name for finding in findings if finding.status == BROKEN]
    if broken:
        return Finding("verdict", BROKEN, f"not ready: {', '.join(broken)}", "see the lines above")
    ready = ["CPU"]
    advice = "for an NVIDIA GPU, where there is one, " + engine_command("cuda")
    if by_name[DRIVER].status == OK:
        provider = by_name.get(GPU_PROVIDER)
        usable = provider is not None and provider.status == OK
        ready = ["CPU", "GPU"] if usable else ready
        advice = "" if usable else f"for the GPU: {engine_command('cuda')}"
    return Finding("verdict", OK, f"ready: {' and '.join(ready)}", advice)


def _guarded(look: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """Report an error that nobody foresaw as a finding: the other lines are still wanted."""
    found = []
    try:
        for finding in look():
            found.append(finding)
    except Exception as error:
        name = look.__name__.strip("_").replace("_", " ")
        found.append(Finding(name, BROKEN, f"{type(error).__name__}: {first_line(error)}"))
    return found


def _machine() -> Iterator[Finding]:
    found = hardware()
    python = sys.version_info
    yield Finding(
        "Python",
        OK if python >= (3, 11) else BROKEN,
        platform.python_version(),
        "" if python >= (3, 11) else "use 3.11 or newer",
    )
    yield Finding("system", OK, str(found["system"]))
    yield Finding("processor", OK, f"{found['cpu']}, {usable_cores()} usable cores")
    if found["memory"]:
        yield Finding("memory", OK, f"{int(str(found['memory']).split()[0]) / 2**20:.1f} GiB")


def _gpus() -> Iterator[Finding]:
    gpus = find_gpus()
    if gpus.cuda is None:
        yield Finding(
            DRIVER,
            ABSENT,
            gpus.why_none,
            "if there is a GPU, install its driver; in a container pass it in (--gpus all)",
        )
        return
    yield Finding(DRIVER, OK, f"{gpus.driver or 'version unknown'}, CUDA {gpus.cuda}")
    if gpus.why_none:
        yield Finding("GPU", MISSING, gpus.why_none, "see whether nvidia-smi lists it, and CUDA_VISIBLE_DEVICES")
    for index, gpu in enumerate(gpus.found):
        yield Finding(
            f"GPU {index}", OK, f"{gpu.name}, {gpu.memory_mib / 1024:.1f} GiB, compute capability {gpu.capability}"
        )


def _cuda_libraries() -> Iterator[Finding]:
    versions = {name: find_cuda_library(name) for name in CUDA_LIBRARIES}
    found = [version for version in versions.values() if version]
    missing = [name for name, version in versions.items() if not version]
    if missing:
        said = f"no {', '.join(missing)}" + (f"; found {', '.join(found)}" if found else "")
        yield Finding("CUDA libraries", MISSING, said, install_command("cuda"))
    else:
        yield Finding("CUDA libraries", OK, ", ".join(found))


def _cuda_provider() -> Iterator[Finding]:
    try:
        runtime: Any = importlib.import_module("onnxruntime")
    except (ImportError, OSError):
        return  # `_onnxruntime` says so
    if GPU_PROVIDER in runtime.get_available_providers():
        yield _provider(GPU_PROVIDER, MISSING, install_command("cuda"))
    else:
        said = "not in the installed ONNX Runtime"
        yield Finding(GPU_PROVIDER, MISSING, said, engine_command("cuda"))


def _bindings() -> Iterator[Finding]:
    yield _module("cuda-python", "cuda.bindings", install_command("cuda"))


def find_cuda_library(name: str) -> str | None:
    """Find one of NVIDIA's libraries as ONNX Runtime does: in pip's packages, then the system's.

    Returns
    -------
    Its file's name, and where it is from; None if it is not here.
    """
    for folder in map(Path, sys.path):
        for file in sorted((folder / "nvidia").glob(f"*/lib/lib{name}.so.*")):
            return f"{file.name} (pip)"
        for file in sorted((folder / "nvidia").glob(f"*/bin/**/{name}64_*.dll")):
            return f"{file.name} (pip)"
    for version in VERSIONS.get(name, CUDA_VERSIONS):
        file_name = f"{name}64_{version}.dll" if os.name == "nt" else f"lib{name}.so.{version}"
        try:
            ctypes.CDLL(file_name)
        except OSError:
            continue
        return file_name
    return None


def _tensorrt() -> Iterator[Finding]:
    for title, module, extra in (
        ("TensorRT", "tensorrt", f"for data-centre GPUs: {install_command('tensorrt')}"),
        ("TensorRT-RTX", "tensorrt_rtx", f"for RTX cards: {install_command('rtx')}"),
    ):
        yield _module(title, module, extra)


def _module(title: str, module: str, advice: str) -> Finding:
    """Say whether a module can be imported, and its version."""
    try:
        version = getattr(importlib.import_module(module), "__version__", "version unknown")
    except ModuleNotFoundError:
        return Finding(title, MISSING, "not installed", advice)
    except (ImportError, OSError) as error:  # the package is here, its libraries are not
        return Finding(title, MISSING, f"cannot be loaded ({first_line(error)})", advice)
    return Finding(title, OK, str(version))


def _onnxruntime() -> Iterator[Finding]:
    packages = {name: _version(name) for name in ("onnxruntime", "onnxruntime-gpu")}
    installed = [f"{name} {version}" for name, version in packages.items() if version]
    again = engine_command("cpu")
    try:
        runtime: Any = importlib.import_module("onnxruntime")
        version = runtime.__version__
    except ModuleNotFoundError:
        yield Finding("ONNX Runtime", BROKEN, "not installed", either_engine())
        return
    except (ImportError, OSError, AttributeError) as error:
        yield Finding("ONNX Runtime", BROKEN, f"cannot be loaded ({first_line(error)})", again)
        return
    if len(installed) > 1:
        yield Finding(
            "ONNX Runtime",
            BROKEN,
            f"{' and '.join(installed)} are both installed and overwrite each other's files",
            again,
        )
    else:
        yield Finding("ONNX Runtime", OK, installed[0] if installed else version)
    yield _provider("CPUExecutionProvider", BROKEN, again)


def _provider(provider: str, otherwise: str, advice: str) -> Finding:
    """Run a tiny graph: that a provider is available only says that it was compiled in."""
    pixels = np.ones((1, 1, 4, 4), np.float32)
    try:
        session = open_session(TINY_MODEL, provider)
        (out,) = session.run(None, {"x": pixels})
    except Exception as error:  # ONNX Runtime's own exceptions have no common base
        return Finding(provider, otherwise, first_line(error).removeprefix(f"{provider}: "), advice)
    if not np.array_equal(out, 2 * pixels):
        return Finding(provider, BROKEN, "computes 1 x 2 wrongly", advice)
    return Finding(provider, OK, "ran a graph")


def _openvino() -> Iterator[Finding]:
    advice = f"for INT8 on CPUs: {install_command('openvino')}"
    found = _module("OpenVINO", "openvino", advice)
    if found.status != OK:
        yield found
        return
    core: Any = importlib.import_module("openvino").Core()
    devices = [f"{d} ({core.get_property(d, 'FULL_DEVICE_NAME')})" for d in core.available_devices]
    yield Finding("OpenVINO", OK, f"{found.said.split('-')[0]}, on {', '.join(devices)}")


def _extras() -> Iterator[Finding]:
    yield _module("torch", "torch", f"to train and export: {install_command('export')}")
    yield _module("onnx", "onnx", f"to export and measure: {install_command('export')}")
    yield _module("matplotlib", "matplotlib", f"to measure: {install_command('bench')}")


def _slides() -> Iterator[Finding]:
    advice = install_command()
    try:
        tilesource: Any = importlib.import_module("large_image.tilesource")
    except (ImportError, OSError) as error:
        yield Finding("large-image", BROKEN, f"cannot be loaded ({first_line(error)})", advice)
        return
    tilesource.loadTileSources()
    found = list(tilesource.AvailableTileSources)
    version = _version("large-image") or "version unknown"
    if found:
        yield Finding("large-image", OK, f"{version}, sources {', '.join(sorted(found))}")
    else:
        yield Finding("large-image", BROKEN, f"{version} without any source", advice)
    if missing := sorted(WANTED_SOURCES - set(found)):
        needed = " ".join(f"large-image-source-{name}" for name in missing)
        yield Finding("large-image sources", MISSING, f"no {', '.join(missing)}", f"pip install {needed}")


def _disk() -> Iterator[Finding]:
    places = {"this folder": Path.cwd(), "temporary files": Path(tempfile.gettempdir())}
    for name, folder in places.items():
        free = shutil.disk_usage(folder).free / 1e9
        little = free < LOWEST_FREE_GB
        yield Finding(
            f"free disk, {name}",
            MISSING if little else OK,
            f"{free:.1f} GB at {folder}",
            f"results of large slides take up to {LOWEST_FREE_GB:.0f} GB" if little else "",
        )


def _decoding() -> Iterator[Finding]:
    with tempfile.TemporaryDirectory(prefix="histo-doctor-") as folder:
        path = Path(folder) / "slide.tif"
        SyntheticSlide(DECODE_PX, DECODE_PX).write(path)
        try:
            rate, reader = decode_rate(path)
        except HistoError as error:
            yield Finding("decoding", BROKEN, str(error), install_command())
            return
    yield Finding("decoding", OK, f"{rate:.0f} Mpx/s of JPEG with the {reader} reader, 2 threads")


def decode_rate(path: Path, repeats: int = 3) -> tuple[float, str]:
    """Read a slide as a run does; return Mpx/s, the best of some, and the reader's name."""
    best = 0.0
    for _ in range(repeats):
        with open_slide(path) as slide:
            view = at_mpp(slide, slide.mpp or 0.5)
            grid = TileGrid.cover(view.width, view.height, tile_px=512, overlap_px=64)
            start = time.perf_counter()
            with closing(read_strips(view, grid)) as strips:
                for _strip in strips:
                    pass
            seconds = time.perf_counter() - start
            best = max(best, view.width * view.height / 1e6 / seconds)
    return best, slide.name


def _cache() -> Iterator[Finding]:
    folder = cache_folder()
    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    if nearest.is_dir() and os.access(nearest, os.W_OK):
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6
        yield Finding("cache folder", OK, f"{folder}, {size:.1f} MB in it")
    else:
        yield Finding(
            "cache folder",
            MISSING,
            f"{folder} cannot be written",
            "set XDG_CACHE_HOME, or engines are built again for every run",
        )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
