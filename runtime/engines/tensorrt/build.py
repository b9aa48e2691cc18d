"""Find the TensorRT engine of a bundle that fits this machine, or build it from the ONNX graph.

One code path serves NVIDIA's three libraries. TensorRT 11 and TensorRT-RTX have only strongly typed
networks, where the graph sets the precision; TensorRT 10 is told to do the same. TensorRT-RTX
builds without a GPU, and one engine of it serves several architectures; TensorRT builds on the GPU
that the engine is for.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from histostream.runtime.bundle.card import ENGINES, ModelCard, read_card
from histostream.runtime.bundle.onnx_check import read_graph
from histostream.runtime.cache import cache_folder
from histostream.runtime.choices import PRECISIONS
from histostream.runtime.cuda import driver
from histostream.runtime.engines.tensorrt.file import (
    EngineFileError,
    EngineHeader,
    Profile,
    read_engine,
    write_engine,
)
from histostream.runtime.engines.tensorrt.library import Library, joined, messages, ordered, sm_number
from histostream.runtime.errors import EngineError
from histostream.wsi.files import locked, remove_leftovers, write_whole, writing
from histostream.wsi.optional import install_command

OPT_BATCH = 8  # not measured yet; as BATCH of the engine 'cuda'
MAX_BATCH = 16  # not measured yet; the device memory that an engine takes grows with it
AMPERE = 80  # compute capability 8.0
TURING = "sm75"
SHORT = {"tensorrt": "trt", "tensorrt-rtx": "rtx"}  # in file names
log = logging.getLogger(__name__)


def default_profile(card: ModelCard) -> Profile:
    """Return the profile for a card's tiles."""
    return Profile(1, OPT_BATCH, MAX_BATCH, card.tile_px, card.tile_px, card.channels)


def choose_targets(library: Library, targets: Sequence[str] | None) -> tuple[tuple[str, ...], str]:
    """Choose and check the GPUs to build for, without building anything.

    The default is, for TensorRT-RTX, all that it supports from Ampere on (NVIDIA's own default),
    and for TensorRT, the GPU of this machine. Turing is better built for alone: in TensorRT-RTX
    1.7.1 an engine for Turing and others is Turing's, on all of them.

    Parameters
    ----------
    library
        The library that will build.
    targets
        Names as "sm86"; None for the default.

    Returns
    -------
    targets
        In ascending order, without duplicates.
    compatibility
        "ampere_plus" if TensorRT has to build for every GPU from Ampere on, else "none".

    Raises
    ------
    EngineError
        If the library cannot build for one of them here.
    """
    if targets is not None and not targets:
        raise EngineError("no target to build for: name at least one, such as sm86")
    if library.name == "tensorrt":
        return _native_targets(library, targets)
    if targets is None:
        return tuple(t for t in library.targets if sm_number(t) >= AMPERE), "none"
    chosen = ordered(targets)
    unknown = [target for target in chosen if target not in library.targets]
    if unknown:
        raise EngineError(
            f"{library} cannot build for {', '.join(unknown)}: it has {', '.join(library.targets)}."
            " Data-centre cards of Hopper and Ampere need tensorrt, on a machine with such a card: "
            f"{install_command('tensorrt')}"
        )
    if TURING in chosen and len(chosen) > 1:
        log.warning("an engine for %s and others is slow on the others: build it alone", TURING)
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

    TF32, which TensorRT would use for single precision from Ampere on, is off.

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
        Name of the network, stored in the plan; at most 4095 characters.

    Raises
    ------
    EngineError
        If the library cannot build for the targets, or refuses the graph; the message names the node.
    """
    chosen, compatibility = choose_targets(library, targets)
    trt = library.module
    logger = messages(trt)
    builder = trt.Builder(logger)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx):
        raise EngineError(f"{library} refuses the graph: {_parser_errors(parser, logger)}; use --backend cuda or cpu")
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
    """Build the engine of a bundle in one precision, and write it to a file.

    If ``out`` already is an engine of the same graph, library, targets and profile, it is kept: of
    two processes that build at the same time, the second uses the engine of the first.

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
        The file to write; its folder is created.

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
            kept = _valid_header(out)
            if kept is not None and kept.identity == header.identity:
                log.info("%s: already built", out)
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
    header: EngineHeader, card: ModelCard, precision: str, *, library: Library, device_sm: str | None = None
) -> list[str]:
    """Return why an engine does not fit; an empty list if it does.

    Parameters
    ----------
    header
        Header of the engine's file.
    card
        Card of the bundle that is to run.
    precision
        The precision that is to run.
    library
        The library that is to run it.
    device_sm
        The GPU, as "sm86"; None: any.
    """
    onnx_sha256 = card.files.get(_graph(precision), "")
    built, wanted = header.profile, default_profile(card)
    built_by = f"{header.library} {header.library_version}"
    checks = (
        (header.card == card.digest(), f"built for card {header.card[:8]}..., this bundle's is {card.digest()[:8]}..."),
        (header.precision == precision, f"built in {header.precision}, {precision} is requested"),
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
        (built.tile == wanted.tile, f"built for tiles of {built.tile}, {wanted.tile} are requested"),
    )
    return [problem for fits, problem in checks if not fits]


def engine_name(precision: str, library: Library) -> str:
    """Return the name of an engine's file, as "model.fp16.rtx.engine"."""
    return f"model.{precision}.{SHORT[library.name]}.engine"


def engine_paths(bundle: Path, card: ModelCard, precision: str, library: Library) -> list[Path]:
    """Return the paths where an engine of a bundle may be: in the bundle, and in the user's cache folder."""
    name = engine_name(precision, library)
    return [bundle / ENGINES / name, cache_folder() / ENGINES / card.digest()[:16] / name]


def fitting_engine(bundle: Path, precision: str, *, library: Library, device_sm: str | None = None) -> Path:
    """Find the engine of a bundle that fits here; build it if there is none.

    A new engine is written into the bundle or, where that is read-only, into the user's cache
    folder.

    Parameters
    ----------
    bundle
        Folder of the model.
    precision
        "fp32", "fp16" or "int8".
    library
        The library that is to run it.
    device_sm
        The GPU that is to run it, as "sm86"; None: any.

    Raises
    ------
    CardError
        If the bundle is damaged or has no graph of this precision.
    EngineError
        If none fits and none can be built.
    OutputError
        If the engine can be written to neither folder.
    """
    card = read_card(bundle)
    paths = engine_paths(bundle, card, precision, library)
    reasons = []
    for path in paths:
        if not path.exists():
            continue
        try:
            header, _ = read_engine(path)
        except EngineFileError as error:
            problems = [str(error).removeprefix(f"{path}: ")]
        else:
            problems = check_engine(header, card, precision, library=library, device_sm=device_sm)
        if not problems:
            return path
        reasons += [f"{path}: {problem}" for problem in problems]
    targets, _ = choose_targets(library, None)
    if device_sm is not None and device_sm not in targets:
        targets, _ = choose_targets(library, (device_sm,))
    for reason in reasons:
        log.warning("%s: building it again", reason)
    out = next((path for path in paths if _is_writable(path.parent)), paths[-1])
    build_engine(bundle, card, precision, library=library, targets=targets, out=out)
    return out


def _native_targets(library: Library, targets: Sequence[str] | None) -> tuple[tuple[str, ...], str]:
    here = driver.gpu_sm()
    if here is None:
        raise EngineError(
            f"{library} builds on the GPU that the engine is for, and none is usable here; "
            f"{install_command('rtx')} installs a TensorRT that builds without a GPU"
        )
    chosen = (here,) if targets is None else ordered(targets)
    if here not in chosen:
        raise EngineError(
            f"{library} builds for the GPU of this machine, which is {here}, not for {', '.join(chosen)}: "
            "build on a machine with such a GPU"
        )
    if len(chosen) == 1:
        return chosen, "none"
    if sm_number(chosen[0]) < AMPERE:
        raise EngineError(
            f"{library} cannot build one engine for {', '.join(chosen)}: only for GPUs from Ampere "
            "(sm80) on; build one engine on each machine"
        )
    if not hasattr(library.module, "HardwareCompatibilityLevel"):
        raise EngineError(f"{library} builds for one kind of GPU: build one engine on each machine")
    return chosen, "ampere_plus"


def _parser_errors(parser: Any, logger: Any) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return joined(
        [f"node {e.node_name()!r} ({e.node_operator()}): {e.desc()}" if e.node_name() else e.desc() for e in errors]
        or logger.errors
    )


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
    return cache_folder() / f"timing-{library.version}-{driver.gpu_sm()}.cache"


def _load_timings(config: Any, path: Path) -> None:
    """Give the builder the timings of earlier builds, so that it need not measure again."""
    try:
        content = path.read_bytes()
    except OSError:
        content = b""
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        log.warning("%s: cannot be used here, measuring again", path)
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _save_timings(config: Any, path: Path) -> None:
    """Store the timings, merged with those that other builds have stored in the meantime."""
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
        log.warning("the timings are not stored: %s", error)


def _runs_on(header: EngineHeader, device_sm: str) -> bool:
    if header.compatibility == "ampere_plus" and sm_number(device_sm) >= AMPERE:
        return True
    return device_sm in header.targets


def _valid_header(path: Path) -> EngineHeader | None:
    try:
        return read_engine(path)[0]
    except EngineFileError:
        return None


def _is_writable(folder: Path) -> bool:
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
