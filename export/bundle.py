"""Write a network as a model bundle: every precision is compared with the reference first."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from histostream.export.convert.fp16 import fp32_islands, multiply_accumulates, name_nodes, to_fp16
from histostream.export.convert.freeze import freeze_statistics
from histostream.export.convert.int8 import Quantizer
from histostream.export.convert.mixed_precision import find_mixed_precision, node_groups
from histostream.export.graph.model import opset_of
from histostream.export.object_rules import parse_rules, with_object_rules
from histostream.export.parity import LIMITS, Judge, ParityError, ParityReport, run_graph
from histostream.export.receptive_field.measure import MEASURED, ReceptiveField, label, receptive_field
from histostream.export.receptive_field.perturbation import receptive_field_of
from histostream.export.tiles import IMAGE_SUFFIXES, Tiles, collect_tiles
from histostream.export.trial_run import run_on_two_tiles
from histostream.export.triton import write_triton
from histostream.runtime.bundle.card import ENGINES, ModelCard, write_card
from histostream.runtime.choices import PRECISIONS
from histostream.runtime.engines.tensorrt import build as tensorrt
from histostream.runtime.engines.tensorrt.file import read_engine
from histostream.runtime.engines.tensorrt.library import Library, find_library
from histostream.runtime.errors import EngineError
from histostream.wsi.errors import HistoError, OutputError
from histostream.wsi.outputs.label_rows import ClassInfo
from histostream.wsi.slides.reader import open_slide

TILE_PX = 512
TILES = 8  # to compare on, and as many to calibrate on
QUICK_TILES = 3  # to compare on during the search for the nodes that must stay in FP32
MAX_MULTIPLY_ACCUMULATES = 200e9  # of one pass over the tiles; large networks get fewer tiles

Say = Callable[[str], None]
Convert = Callable[[Collection[str]], onnx.ModelProto]  # names of nodes that stay in FP32 -> the converted graph


@dataclass(frozen=True, slots=True)
class Options:
    """How a network is exported; ``histo-export`` has an option for each.

    Attributes
    ----------
    precisions
        Precisions to write: fp32, fp16, int8. fp32 is always written.
    tensorrt
        "auto" builds an engine if a TensorRT is installed; "tensorrt" or "rtx" requires that one; "off" builds none.
    targets
        Compute capabilities to build for ("sm86", ...); empty: all that the library supports.
    tile_px
        Side of the network's input; None: the one that the network is built for, else 512.
    calibrate
        Slide or folder whose tiles calibrate INT8 and check parity; None: the synthetic slide.
    freeze
        Slide or folder over which the statistics of normalisation layers are estimated; they become constants.
    triton
        Triton model repository to write as well.
    object_rules
        Which regions of some classes are objects, as ``("nucleus=8,touching", "stroma=no")``; see `parse_rules`.
    """

    precisions: tuple[str, ...] = tuple(PRECISIONS)
    tensorrt: str = "auto"
    targets: tuple[str, ...] = ()
    tile_px: int | None = None
    calibrate: Path | None = None
    freeze: Path | None = None
    triton: Path | None = None
    object_rules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        parse_rules(self.object_rules)
        for name in self.precisions:
            if name not in PRECISIONS:
                raise OptionError(f"precision {name!r} does not exist: use {', '.join(PRECISIONS)}")
        if self.tensorrt not in ("auto", "tensorrt", "rtx", "off"):
            raise OptionError(f"tensorrt={self.tensorrt!r}: use auto, tensorrt, rtx or off")
        if self.tile_px is not None and self.tile_px < 1:
            raise OptionError(f"tile_px={self.tile_px}: use 1 or more")
        for path in (self.calibrate, self.freeze):
            if path is not None and not path.exists():
                raise OptionError(f"{path}: does not exist; check the path")


class OptionError(HistoError, ValueError):
    """An option has a value that cannot work."""


@dataclass(frozen=True, slots=True)
class Network:
    """A graph that keeps the tile contract, and the reference that it has to reproduce.

    Attributes
    ----------
    model
        The graph in FP32.
    reference
        Maps tiles (N, H, W, C) uint8 to scores (N, K, H, W) float32, not rounded, without using the graph.
    method, classes, mpp, channels, tile_px, score_kind, training, note, channel_names, border_px
        As in `ModelCard`.
    """

    model: onnx.ModelProto
    reference: Callable[[NDArray[np.uint8]], NDArray[np.float32]]
    method: str
    classes: tuple[ClassInfo, ...]
    mpp: float
    channels: int
    tile_px: int
    score_kind: str
    training: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    channel_names: tuple[str, ...] = ()
    border_px: int = 0


@dataclass(frozen=True, slots=True)
class Export:
    """The result of an export.

    Attributes
    ----------
    card
        Card of the bundle.
    failures
        Requested artefacts that are not in the bundle, each with the reason.
    """

    card: ModelCard
    failures: tuple[str, ...]


def check_options(out: Path, options: Options) -> None:
    """Refuse options that cannot work, before the export begins.

    Raises
    ------
    OutputError
        If ``out`` exists and is not a model bundle.
    EngineError
        If TensorRT is required but not usable, or does not support the target.
    SlideError
        If the slide to calibrate on cannot be opened.
    """
    if out.exists() and not (out.is_dir() and ((out / "card.json").exists() or not any(out.iterdir()))):
        raise OutputError(f"{out}: exists and is not a model bundle; choose another folder")
    _find_library(options, lambda text: None)
    for source in (options.calibrate, options.freeze):
        if source is not None and source.is_file() and source.suffix not in IMAGE_SUFFIXES:
            open_slide(source).close()


def write_bundle(network: Network, out: Path, options: Options, *, say: Say = lambda text: None) -> Export:
    """Write a network to the bundle ``out``, in every precision that holds parity.

    Parameters
    ----------
    network
        The network.
    out
        Folder to write; an existing bundle there is replaced once the new one is whole.
    options
        How to export it.
    say
        Called with each line of progress.

    Raises
    ------
    RuleError
        If a rule of objects is of a class that the network does not have.
    GraphError, ParityError
        If the graph may not be deployed, or does not compute the same as the reference.
    TrialError
        If the bundle does not run on a slide of two tiles.
    TilesError, SlideError
        If the tiles to calibrate on cannot be read.
    EngineError
        If TensorRT is required but not usable, or does not support the target.
    OutputError
        If ``out`` exists and is not a bundle, or cannot be written.
    """
    check_options(out, options)
    network = replace(network, classes=with_object_rules(network.classes, parse_rules(options.object_rules)))
    library = _find_library(options, say)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror}); check its permissions and room") from error
    try:
        writer = _BundleWriter(network, part, options, say)
        writer.write_fp32()
        if "fp16" in options.precisions:
            writer.write_fp16()
        if "int8" in options.precisions:
            writer.write_int8()
        if library is not None:
            writer.write_engine(library)
        run_on_two_tiles(part, writer.judge.tiles.gate[0])
        _move_into_place(part, out)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror}); check its permissions and room") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if options.triton is not None:
        _write_triton(out, writer.card, options.triton, say)
    return Export(writer.card, tuple(writer.failures))


class _BundleWriter:
    """One export: the bundle's folder while it fills, and its card."""

    def __init__(self, network: Network, folder: Path, options: Options, say: Say) -> None:
        self.network = network
        self.folder = folder
        self.options = options
        self.say = say
        self.failures: list[str] = []
        self.model = network.model
        name_nodes(self.model)
        count = int(min(max(MAX_MULTIPLY_ACCUMULATES // max(multiply_accumulates(self.model), 1), 1), TILES))
        tiles = self._collect_tiles(options.calibrate, count)
        self.judge = Judge(tiles, network.reference(tiles.gate))
        precision = {} if options.freeze is None else self._freeze(options.freeze, count)
        self.quick_judge = self.judge.first(QUICK_TILES)
        receptive = receptive_field_of(self.model, network.border_px)
        self._say_unknown(receptive)
        self.card = ModelCard(
            method=network.method,
            classes=network.classes,
            mpp=network.mpp,
            channels=network.channels,
            tile_px=network.tile_px,
            align_px=receptive.align_px,
            halo_px=max(receptive.halo_px, network.border_px),
            halo_source=receptive.source,
            tile_statistics=not receptive.is_local,
            score_kind=network.score_kind,
            files={},
            opset=opset_of(self.model),
            precision=precision,
            training=network.training,
            note=network.note,
            channel_names=network.channel_names,
            border_px=network.border_px,
        )

    def write_fp32(self) -> None:
        """Write the graph as it is; it has to agree with the reference."""
        self._write_graph("fp32", self.model, self._checked_fp32())

    def write_fp16(self) -> None:
        """Write the graph in half precision, with the nodes in FP32 that parity needs."""

        def emulated(fp32_nodes: Collection[str]) -> onnx.ModelProto:
            return to_fp16(self.model, fp32_nodes, emulate=True)

        self._write_converted("fp16", emulated, lambda fp32_nodes: to_fp16(self.model, fp32_nodes))

    def write_int8(self) -> None:
        """Write the graph in eight-bit integers, with the nodes in FP32 that parity needs."""
        with Quantizer(self.model, self.judge.tiles.calibration) as quantizer:
            self._write_converted("int8", quantizer.quantize, quantizer.quantize)

    def write_engine(self, library: Library) -> None:
        """Build a TensorRT engine of the half-precision graph, or of the FP32 graph if there is none."""
        precision = "fp16" if "fp16" in self.card.precisions else "fp32"
        name = f"{ENGINES}/{tensorrt.engine_name(precision, library)}"
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        try:
            header = tensorrt.build_engine(
                self.folder, self.card, precision, library=library, targets=self.options.targets or None, out=path
            )
        except EngineError as error:
            self.failures.append(f"engine: {error}")
            return
        record = {
            "library": str(library),
            "targets": list(header.targets),
            "parity": "not compared: an engine runs on a GPU only",
        }
        self._add_file(name, path.read_bytes(), record)
        self.say(f"engine: {precision} by {library} for {', '.join(header.targets)}")

    def _collect_tiles(self, source: Path | None, count: int) -> Tiles:
        return collect_tiles(
            source,
            tile_px=self.network.tile_px,
            channels=self.network.channels,
            mpp=self.network.mpp,
            classes=tuple(c.name for c in self.network.classes),
            count=count,
        )

    def _checked_fp32(self) -> ParityReport:
        """Compare the FP32 graph with the reference, and refuse it if it fails."""
        report = self.judge.judge(self.model)
        if not report.meets(LIMITS["fp32"]):
            raise ParityError(f"fp32: {report}; nothing was written: report it, with the model")
        return report

    def _say_unknown(self, field: ReceptiveField) -> None:
        if field.source != MEASURED:
            return
        kinds = {node.op_type for node in self.model.graph.node if label(node) in field.unknown}
        least = "at least " if not field.is_local else ""
        self.say(
            f"no rule says what {', '.join(sorted(kinds)) or 'a node'} depends on: halo unknown, "
            f"measured by perturbation as {least}{field.halo_px} px"
        )

    def _freeze(self, source: Path, count: int) -> dict[str, Any]:
        """Make tile statistics constants, after checking the live graph; return the record for the card."""
        if receptive_field(self.model).is_local:
            self.say("the network has no statistics of the tile: there is nothing to freeze")
            return {}
        live = self._checked_fp32()
        tiles = self._collect_tiles(source, count)
        # Both halves, because parity is checked on other tiles than those that the statistics are estimated over.
        pixels = np.concatenate([tiles.gate, tiles.calibration])
        self.model = freeze_statistics(self.model, pixels)
        name_nodes(self.model)
        cost = self.judge.judge(self.model)
        self.say(f"statistics frozen over {len(pixels)} tiles of {tiles.source}; {cost}")
        self.judge = Judge(self.judge.tiles, run_graph(self.model, self.judge.tiles.gate).unrounded)
        return {
            "fp32": {
                "statistics_frozen_over": tiles.source,
                "tiles": len(pixels),
                "live_graph_against_reference": live.as_dict(),
                "frozen_against_live": cost.as_dict(),
            }
        }

    def _write_converted(self, precision: str, trial: Convert, convert: Convert) -> None:
        """Find the nodes to keep in FP32, and write the conversion if it holds parity.

        ``trial`` makes the graphs that are compared during the search, ``convert`` the graph that is written.
        """

        def judge(fp32_nodes: Collection[str], *, quick: bool) -> ParityReport:
            return (self.quick_judge if quick else self.judge).judge(trial(fp32_nodes))

        name, islands = PRECISIONS[precision], fp32_islands(self.model)
        if not node_groups(self.model, islands):
            self.say(f"{precision}: {name} is left out: no layer of the network can be in lower precision")
            return
        conversion = find_mixed_precision(
            self.model,
            judge,
            LIMITS[precision],
            islands,
            say=lambda text: self.say(f"{precision}: {text}"),
        )
        if not conversion.passed:
            self.failures.append(
                f"{precision}: {conversion.report}; no choice of FP32 nodes meets the limits; {name} was not written"
            )
            return
        if conversion.added:
            self.say(f"{precision}: passes with {len(conversion.added)} more nodes in FP32")
        model = convert(conversion.fp32_nodes)
        deployed = self.judge.judge(model)  # until here FP16 was compared by its emulation
        if not deployed.meets(LIMITS[precision]):
            self.failures.append(f"{precision}: {deployed}; {name} was not written")
            return
        self.card = replace(self.card, precision={**self.card.precision, precision: conversion.as_dict()})
        self._write_graph(precision, model, max(deployed, conversion.report, key=lambda report: report.error))

    def _write_graph(self, precision: str, model: onnx.ModelProto, report: ParityReport) -> None:
        name = PRECISIONS[precision]
        content = model.SerializeToString(deterministic=True)
        (self.folder / name).write_bytes(content)
        self._add_file(name, content, report.as_dict())
        self.say(f"{precision}: {report}")

    def _add_file(self, name: str, content: bytes, parity: dict[str, Any]) -> None:
        """Add a file to the card, and write the card."""
        self.card = replace(
            self.card,
            files={**self.card.files, name: hashlib.sha256(content).hexdigest()},
            parity={**self.card.parity, name: parity},
        )
        write_card(self.card, self.folder)


def _find_library(options: Options, say: Say) -> Library | None:
    """Find the TensorRT to build with; None if none is wanted or installed."""
    if options.tensorrt == "off":
        return None
    try:
        library = find_library(options.tensorrt)
    except EngineError as error:
        if options.tensorrt != "auto":
            raise
        say(f"no engine: {error}")
        return None
    tensorrt.choose_targets(library, options.targets or None)
    return library


def _write_triton(bundle: Path, card: ModelCard, repository: Path, say: Say) -> None:
    """Write the ONNX files for Triton, and the native TensorRT plan if one was built."""
    native = [f for f in card.files if f.startswith(ENGINES) and f.endswith(".trt.engine")]
    plan: dict[str, Any] = {}
    if native:
        header, content = read_engine(bundle / native[0])
        plan = {"plan": content, "max_batch": header.profile.max_batch}
    for path in write_triton(bundle, card, repository, **plan):
        say(f"triton: {path}")


def _move_into_place(part: Path, out: Path) -> None:
    """Rename a complete bundle to its final name; an older bundle there is deleted."""
    part.chmod(0o755)  # mkdtemp makes it private
    if out.exists():
        old = part.with_name(f"{part.name}.old")
        out.rename(old)
        part.rename(out)
        shutil.rmtree(old)
    else:
        part.rename(out)
