"""TensorRT engines: build one from a bundle's ONNX graph; find one that fits, or build it again.

One code path for NVIDIA's three libraries. TensorRT 11 and TensorRT-RTX know only strongly typed
networks, where the precision is in the graph; TensorRT 10 is told to do the same. TensorRT-RTX
needs no GPU to build, and one engine of it serves several architectures; TensorRT builds on the
GPU that it builds for.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histostream.runtime.bundle.card import ENGINES, ModelCard, read_card
from histostream.runtime.bundle.onnx_check import read_graph
from histostream.runtime.choices import PRECISIONS
from histostream.runtime.engines.base import EngineError
from histostream.runtime.engines.tensorrt.file import (
    EngineFileError,
    EngineHeader,
    Profile,
    read_engine,
    write_engine,
)
from histostream.wsi.files import locked, remove_leftovers, write_whole, writing
from histostream.wsi.optional import install_command

OPT_BATCH = 8  # not measured yet, as ONNX Runtime's GPU_BATCH
MAX_BATCH = 16  # not measured yet; the device memory that an engine takes grows with it
AMPERE = 80  # compute capability 8.0
TURING = "sm75"
EXTRAS = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}  # extras of HistoStream
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
SHORT = {"tensorrt": "trt", "tensorrt-rtx": "rtx"}  # in file names
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_* of cuda.h
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Library:
    """A TensorRT that is installed here.

    Attributes
    ----------
    name
        "tensorrt" or "tensorrt-rtx".
    version
        All parts of its version.
    module
        The imported Python module.
    """

    name: str
    version: str
    module: Any

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def targets(self) -> tuple[str, ...]:
        """GPUs that it can be told to build for, as "sm86"; none for "tensorrt"."""
        if self.name == "tensorrt":
            return ()
        names = self.module.ComputeCapability.__members__
        return _ordered(name.lower() for name in names if name.startswith("SM"))


def find_library(wanted: str = "auto") -> Library:
    """Find the TensorRT to use.

    Parameters
    ----------
    wanted
        "tensorrt", "rtx", or "auto": TensorRT where it is installed and a GPU is here, else
        TensorRT-RTX.

    Raises
    ------
    EngineError
        If it is not installed or does not load.
    """
    if wanted not in ("auto", "tensorrt", "rtx"):
        raise EngineError(f"no TensorRT is called {wanted!r}: use auto, tensorrt, rtx")
    if wanted != "auto":
        return _load("tensorrt" if wanted == "tensorrt" else "tensorrt-rtx")
    reasons = []
    for name in ("tensorrt", "tensorrt-rtx") if gpu_sm() else ("tensorrt-rtx",):
        try:
            return _load(name)
        except EngineError as error:
            reasons.append(str(error))
    raise EngineError(
        f"no TensorRT is usable here ({'; '.join(reasons)}): {install_command('rtx')} for GeForce "
        f"and RTX cards, {install_command('tensorrt')} for any NVIDIA GPU, on its own machine"
    )


def gpu_sm(index: int = 0) -> str | None:
    """Architecture of a GPU as the driver says it, as "sm86"; None where there is none."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if hasattr(ctypes, "WinDLL") else "libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), index)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), CAPABILITY_MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), CAPABILITY_MINOR, device)
    ):
        return None
    return f"sm{major.value}{minor.value}"


def default_profile(card: ModelCard, *, max_batch: int = MAX_BATCH) -> Profile:
    """Return the profile for a card's tiles: from 1 tile to ``max_batch``."""
    opt_batch = min(OPT_BATCH, max_batch)
    return Profile(1, opt_batch, max_batch, card.tile_px, card.tile_px, card.channels)


def choose_targets(library: Library, targets: Sequence[str] | None) -> tuple[tuple[str, ...], str]:
    """Check the GPUs to build for, without building anything.

    TensorRT-RTX's default is what it can do from Ampere on, which is NVIDIA's own default. Turing
    has to be asked for, and is better asked for alone: in version 1.7.1 an engine for Turing and
    others is Turing's, for all of them.

    Parameters
    ----------
    library
        The library that will build.
    targets
        Names as "sm86"; None for the default: of TensorRT, the GPU that is here.

    Returns
    -------
    targets
        In ascending order, each once.
    compatibility
        "ampere_plus" if TensorRT has to make an engine for every GPU from Ampere on, else "none".

    Raises
    ------
    EngineError
        If the library cannot build for one of them here.
    """
    if targets is not None and not targets:
        raise EngineError("no target to build for: name at least one, as sm86")
    if library.name == "tensorrt":
        return _native_targets(library, targets)
    if targets is None:
        return tuple(t for t in library.targets if _number(t) >= AMPERE), "none"
    chosen = _ordered(targets)
    unknown = [target for target in chosen if target not in library.targets]
    if unknown:
        raise EngineError(
            f"{library} cannot build for {', '.join(unknown)}: it has {', '.join(library.targets)}."
            " Data-centre cards of Hopper and Ampere need tensorrt, on a machine with such a card: "
            f"{install_command('tensorrt')}"
        )
    if TURING in chosen and len(chosen) > 1:
        log.warning("an engine for %s and others is slower on the others: build it alone", TURING)
    return chosen, "none"


def build_plan(
    onnx: bytes,
    *,
    library: Library,
    targets: Sequence[str] | None = None,
    profile: Profile,
    name: str,
) -> bytes:
    """Build a plan from an ONNX graph that keeps the tile contract.

    Single precision is single: TF32, which TensorRT would use from Ampere on, is off.

    Parameters
    ----------
    onnx
        The ONNX file's content.
    library
        The library that builds.
    targets
        GPUs to build for, as in `choose_targets`.
    profile
        Shapes of the input.
    name
        Name of the network; it is kept in the plan. At most 4095 characters.

    Raises
    ------
    EngineError
        If the library cannot build for the targets, or cannot take the graph; names the node.
    """
    chosen, compatibility = choose_targets(library, targets)
    trt = library.module
    logger = messages(trt)
    builder = trt.Builder(logger)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx):
        raise EngineError(
            f"{library} cannot take the graph: {_parser_errors(parser, logger)}; use --backend cuda or cpu"
        )
    _check_input(network, profile, library)
    network.name = name
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    _add_profile(builder, config, network.get_input(0).name, profile)
    if library.name == "tensorrt":
        if compatibility == "ampere_plus":
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        timings = _timings_path(library)
        _load_timings(config, timings)
        plan = builder.build_serialized_network(network, config)
        if plan is not None:
            _save_timings(config, timings)
    else:
        config.num_compute_capabilities = len(chosen)
        for index, target in enumerate(chosen):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"{library} cannot build the engine: {joined(logger.errors)}; use --backend cuda or cpu")
    return bytes(plan)


def build_engine(
    bundle: Path,
    card: ModelCard,
    precision: str,
    *,
    library: Library,
    targets: Sequence[str] | None = None,
    profile: Profile | None = None,
    out: Path,
) -> EngineHeader:
    """Build the engine of a bundle in one precision, and write it whole or not at all.

    If ``out`` is already an engine of the very same graph, library, targets and profile, it is
    kept: this is how of two processes that build at once the second uses what the first built.

    Parameters
    ----------
    bundle, card
        The model.
    precision
        "fp32", "fp16" or "int8": which of the bundle's graphs.
    library
        The library that builds.
    targets
        GPUs to build for, as in `choose_targets`.
    profile
        Shapes of the input; None for `default_profile`.
    out
        The file to write; its folder is made.

    Raises
    ------
    CardError
        If the bundle has no graph of this precision, or it is damaged.
    EngineError
        If it cannot be built.
    OutputError
        If ``out`` cannot be written.
    """
    chosen, compatibility = choose_targets(library, targets)
    converted = card.precision.get(precision, {})
    header = EngineHeader(
        card=card.digest(),
        onnx=_graph(precision),
        onnx_sha256=card.files.get(_graph(precision), "0" * 64),
        precision=precision,
        library=library.name,
        library_version=library.version,
        targets=chosen,
        compatibility=compatibility,
        profile=profile or default_profile(card),
        precision_map=converted if isinstance(converted, dict) else {precision: converted},
    )
    onnx = read_graph(bundle, card, header.onnx)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(out):
            kept = _whole(out)
            if kept is not None and kept.identity == header.identity:
                log.info("%s: is already this engine", out)
                return kept
            remove_leftovers(out)
            try:
                plan = build_plan(
                    onnx,
                    library=library,
                    targets=chosen,
                    profile=header.profile,
                    name=header.identity,
                )
            except EngineError as error:
                raise EngineError(f"{bundle / header.onnx}: {error}") from error
            return write_engine(out, header, plan)


def check_engine(
    header: EngineHeader,
    card: ModelCard,
    precision: str,
    *,
    library: Library,
    device_sm: str | None = None,
    profile: Profile | None = None,
) -> list[str]:
    """Say why an engine does not fit; an empty list if it does.

    Parameters
    ----------
    header
        Of the engine.
    card
        Of the bundle that is to run.
    precision
        The precision that is asked for.
    library
        The library that is to run it.
    device_sm
        The GPU, as "sm86"; None if there is none to compare with.
    profile
        The shapes that are to be run; None asks only for the card's tile size.
    """
    onnx_sha256 = card.files.get(_graph(precision), "")
    built, wanted = header.profile, profile or default_profile(card)
    batch = built if profile is None else profile
    built_by = f"{header.library} {header.library_version}"
    checks = (
        (header.card == card.digest(), f"built for card {header.card[:8]}..., this bundle's is {card.digest()[:8]}..."),
        (header.precision == precision, f"built in {header.precision}, {precision} is asked for"),
        (
            header.onnx_sha256 == onnx_sha256,
            f"built from {header.onnx} {header.onnx_sha256[:8]}..., "
            f"this bundle's {_graph(precision)} is {onnx_sha256[:8] or 'missing'}...",
        ),
        (built_by == str(library), f"built by {built_by}, this is {library}"),
        (
            device_sm is None or _runs_on(header, device_sm),
            f"built for {', '.join(header.targets)}, this GPU is {device_sm}",
        ),
        (built.tile == wanted.tile, f"built for tiles of {built.tile}, {wanted.tile} are asked for"),
        (
            built.min_batch <= batch.min_batch and batch.max_batch <= built.max_batch,
            f"built for {built.min_batch} to {built.max_batch} tiles at once, "
            f"{batch.min_batch} to {batch.max_batch} are asked for",
        ),
    )
    return [problem for fits, problem in checks if not fits]


def engine_name(precision: str, library: Library) -> str:
    """Name of an engine's file, as "model.fp16.rtx.engine"."""
    return f"model.{precision}.{SHORT[library.name]}.engine"


def engine_places(bundle: Path, card: ModelCard, precision: str, library: Library) -> list[Path]:
    """Where an engine of a bundle may be: in the bundle, or in the user's cache folder."""
    name = engine_name(precision, library)
    return [bundle / ENGINES / name, cache_folder() / ENGINES / card.digest()[:16] / name]


def fitting_engine(
    bundle: Path,
    precision: str,
    *,
    library: Library,
    device_sm: str | None = None,
    profile: Profile | None = None,
    rebuild: bool = True,
) -> Path:
    """Find the engine of a bundle that fits here; build it if there is none.

    It is looked for in the bundle and in the user's cache folder. A new one goes into the bundle,
    or, where that cannot be written, into the cache folder.

    Parameters
    ----------
    bundle
        Folder of the model.
    precision
        "fp32", "fp16" or "int8".
    library
        The library that is to run it.
    device_sm
        The GPU that is to run it, as "sm86"; None if there is none to compare with.
    profile
        The shapes that it has to take; None asks only for the card's tile size.
    rebuild
        False makes it an error that none fits.

    Raises
    ------
    CardError
        If the bundle is damaged or has no graph of this precision.
    EngineError
        If none fits and it may not or cannot be built.
    OutputError
        If the engine cannot be written to either place.
    """
    card = read_card(bundle)
    places = engine_places(bundle, card, precision, library)
    reasons = []
    for path in places:
        problems = _problems(path, card, precision, library, device_sm, profile)
        if problems == []:
            return path
        reasons += [f"{path}: {problem}" for problem in problems or ()]
    if not rebuild:
        why = "; ".join(reasons) or "there is none"
        raise EngineError(f"{bundle}: no {precision} engine for {library} fits ({why}): build one")
    targets, _ = choose_targets(library, None)
    if device_sm is not None and device_sm not in targets:
        targets, _ = choose_targets(library, (device_sm,))
    for reason in reasons:
        log.warning("%s: building it again", reason)
    out = next((path for path in places if _can_write(path.parent)), places[-1])
    build_engine(bundle, card, precision, library=library, targets=targets, profile=profile, out=out)
    return out


def cache_folder() -> Path:
    """Return the user's cache folder of HistoStream."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "histostream"


def _load(name: str) -> Library:
    try:
        module = importlib.import_module(MODULES[name])
    except (ImportError, OSError) as error:  # OSError: the package is here, its libraries are not
        raise EngineError(f"{name} cannot be loaded ({error}): {install_command(EXTRAS[name])}") from error
    return Library(name, str(module.__version__), module)


def _native_targets(library: Library, targets: Sequence[str] | None) -> tuple[tuple[str, ...], str]:
    here = gpu_sm()
    if here is None:
        raise EngineError(
            f"{library} builds on the GPU that it builds for, and none is usable here; "
            f"{install_command('rtx')} brings one that builds without"
        )
    chosen = (here,) if targets is None else _ordered(targets)
    if here not in chosen:
        raise EngineError(
            f"{library} builds for the GPU at hand, which is {here}, not for {', '.join(chosen)}: "
            "build on a machine with such a GPU"
        )
    if len(chosen) == 1:
        return chosen, "none"
    if _number(chosen[0]) < AMPERE:
        raise EngineError(
            f"{library} cannot build one engine for {', '.join(chosen)}: only for GPUs from Ampere "
            "(sm80) on; build one on each machine"
        )
    if not hasattr(library.module, "HardwareCompatibilityLevel"):
        raise EngineError(f"{library} builds for one kind of GPU: build one on each machine")
    return chosen, "ampere_plus"


def messages(trt: Any) -> Any:
    """Make a logger that keeps the errors in a list, ``errors``, instead of printing everything."""

    class Messages(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                log.debug("%s: %s", trt.__name__, message)

    return Messages()


def _parser_errors(parser: Any, logger: Any) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return joined(
        [f"node {e.node_name()!r} ({e.node_operator()}): {e.desc()}" if e.node_name() else e.desc() for e in errors]
        or logger.errors
    )


def joined(messages: list[str]) -> str:
    """Make one line of the library's messages, the first three of them."""
    lines = [" ".join(message.split())[:400] for message in dict.fromkeys(messages)]
    return "; ".join(lines[:3]) or "it does not say why"


def _check_input(network: Any, profile: Profile, library: Library) -> None:
    shapes = [tuple(network.get_input(index).shape) for index in range(network.num_inputs)]
    wanted = (-1, profile.height, profile.width, profile.channels)
    if shapes != [wanted]:
        raise EngineError(f"{library}: the graph takes {shapes}, the profile is for [{wanted}]; export the model again")


def _add_profile(builder: Any, config: Any, name: str, profile: Profile) -> None:
    tile = (profile.height, profile.width, profile.channels)
    shapes = builder.create_optimization_profile()
    batches = (profile.min_batch, profile.opt_batch, profile.max_batch)
    shapes.set_shape(name, *((batch, *tile) for batch in batches))
    config.add_optimization_profile(shapes)


def _timings_path(library: Library) -> Path:
    return cache_folder() / f"timing-{library.version}-{gpu_sm()}.cache"


def _load_timings(config: Any, path: Path) -> None:
    """Give the builder the timings of earlier builds: it then need not measure them again."""
    try:
        content = path.read_bytes()
    except OSError:
        content = b""
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        log.warning("%s: not usable here, measuring again", path)
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _save_timings(config: Any, path: Path) -> None:
    """Keep the timings, with those that another build has kept in the meantime."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            cache = config.get_timing_cache()
            if path.exists():
                others = config.create_timing_cache(path.read_bytes())
                if others is not None:
                    cache.combine(others, False)
            remove_leftovers(path)
            write_whole(path, bytes(cache.serialize()))
    except OSError as error:
        log.warning("the timings are not kept: %s", error)


def _problems(
    path: Path,
    card: ModelCard,
    precision: str,
    library: Library,
    device_sm: str | None,
    profile: Profile | None,
) -> list[str] | None:
    """Say why the engine at a path does not fit; None if there is none."""
    if not path.exists():
        return None
    try:
        header, _ = read_engine(path)
    except EngineFileError as error:
        return [str(error).removeprefix(f"{path}: ")]
    return check_engine(header, card, precision, library=library, device_sm=device_sm, profile=profile)


def _runs_on(header: EngineHeader, device_sm: str) -> bool:
    if header.compatibility == "ampere_plus" and _number(device_sm) >= AMPERE:
        return True
    return device_sm in header.targets


def _whole(path: Path) -> EngineHeader | None:
    try:
        return read_engine(path)[0]
    except EngineFileError:
        return None


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _graph(precision: str) -> str:
    if precision not in PRECISIONS:
        raise EngineError(f"no precision is called {precision!r}: use {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def _ordered(targets: Any) -> tuple[str, ...]:
    return tuple(sorted(set(targets), key=lambda target: (_number(target), target)))


def _number(target: str) -> int:
    digits = target.removeprefix("sm")
    return int(digits) if digits.isascii() and digits.isdigit() else 0
