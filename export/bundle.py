"""From a network to a model bundle: each precision judged; written whole or not at all."""

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
from histostream.export.convert.mixed_precision import Conversion, heal
from histostream.export.parity import LIMITS, Judge, ParityError, ParityReport, run_graph
from histostream.export.receptive_field.measure import reach
from histostream.export.tiles import PLAIN_SUFFIXES, Tiles, collect_tiles
from histostream.export.triton import write_triton
from histostream.runtime.bundle.card import ENGINES, ModelCard, write_card
from histostream.runtime.choices import PRECISIONS
from histostream.runtime.engines.base import EngineError, open_engine
from histostream.runtime.engines.tensorrt import build as tensorrt
from histostream.runtime.engines.tensorrt.file import read_engine
from histostream.wsi.errors import HistoError, OutputError
from histostream.wsi.outputs.label_rows import ClassInfo
from histostream.wsi.slides.reader import open_slide

TILE_PX = 512
TILES = 8  # to judge on, and as many to calibrate on
QUICK_TILES = 3  # while looking for what must stay in FP32
# Multiply-accumulates that one pass over the tiles may take; large networks get fewer tiles.
WORK = 200e9

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    """How a network is exported; ``histo-export`` has an option for each.

    Attributes
    ----------
    precisions
        Which of fp32, fp16 and int8 to write; fp32 is always written.
    tensorrt
        "auto" builds an engine where a TensorRT is installed; "tensorrt" or "rtx" demands one;
        "off" builds none.
    targets
        Compute capabilities to build for ("sm86", ...); empty: all that the library has.
    tile_px
        Side of the network's input; None: the one that the network is built for, else 512.
    calibrate
        Slide or folder whose tiles calibrate INT8 and judge parity; None: the synthetic slide.
    freeze
        Slide or folder over which tile statistics are estimated and made constants.
    triton
        Triton model repository to write too.
    """

    precisions: tuple[str, ...] = tuple(PRECISIONS)
    tensorrt: str = "auto"
    targets: tuple[str, ...] = ()
    tile_px: int | None = None
    calibrate: Path | None = None
    freeze: Path | None = None
    triton: Path | None = None

    def __post_init__(self) -> None:
        for name in self.precisions:
            if name not in PRECISIONS:
                raise OptionError(f"no precision is called {name!r}: use {', '.join(PRECISIONS)}")
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
    """What is exported: a graph that keeps the tile contract, and what it has to reproduce.

    Attributes
    ----------
    model
        The graph in FP32.
    reference
        Maps tiles (N, H, W, C) uint8 to scores (N, K, H, W) uint8, by other means than the graph.
    method, classes, mpp, channels, tile_px, score_kind, training, note
        As in the card.
    """

    model: onnx.ModelProto
    reference: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
    method: str
    classes: tuple[ClassInfo, ...]
    mpp: float
    channels: int
    tile_px: int
    score_kind: str
    training: dict[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, slots=True)
class Export:
    """What an export wrote.

    Attributes
    ----------
    card
        The card of the bundle.
    failures
        Artefacts that were asked for and are not in the bundle, each with the reason.
    """

    card: ModelCard
    failures: tuple[str, ...]


def check(out: Path, options: Options) -> None:
    """Refuse what cannot work, before any work is done.

    Raises
    ------
    OutputError
        If ``out`` exists and is not a model bundle.
    EngineError
        If TensorRT was demanded and is not usable, or has not the target.
    SlideError
        If the slide to calibrate on cannot be opened.
    """
    if out.exists() and not (out.is_dir() and ((out / "card.json").exists() or not any(out.iterdir()))):
        raise OutputError(f"{out}: exists and is not a model bundle; choose another folder")
    _find_library(options, lambda text: None)
    for source in (options.calibrate, options.freeze):
        if source is not None and source.is_file() and source.suffix not in PLAIN_SUFFIXES:
            open_slide(source).close()


def write_bundle(network: Network, out: Path, options: Options, *, say: Say = lambda text: None) -> Export:
    """Write a network to the bundle ``out``, in every precision that holds parity.

    Parameters
    ----------
    network
        What to export.
    out
        Folder to write; an existing bundle there is replaced once the new one is whole.
    options
        How.
    say
        Told what is done, one line at a time.

    Raises
    ------
    GraphError, ParityError
        If the graph may not be deployed, or does not compute the same in FP32.
    TilesError, SlideError
        If the tiles to calibrate on cannot be read.
    EngineError
        If TensorRT was demanded and is not usable, or has not the target.
    OutputError
        If ``out`` is something else than a bundle, or cannot be written.
    """
    check(out, options)
    library = _find_library(options, say)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror}); check its permissions and room") from error
    try:
        writer = _Writer(network, part, options, say)
        writer.write_fp32()
        if "fp16" in options.precisions:
            writer.write_fp16()
        if "int8" in options.precisions:
            writer.write_int8()
        if library is not None:
            writer.write_engine(library)
        _publish(part, out)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror}); check its permissions and room") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if options.triton is not None:
        _write_triton(out, writer.card, options.triton, say)
    return Export(writer.card, tuple(writer.failures))


class _Writer:
    """One export: the bundle's folder as it fills, and its card."""

    def __init__(self, network: Network, part: Path, options: Options, say: Say) -> None:
        self.network = network
        self.part = part
        self.options = options
        self.say = say
        self.failures: list[str] = []
        self.model = network.model
        name_nodes(self.model)
        work = max(multiply_accumulates(self.model), 1)
        count = int(min(max(WORK // work, 1), TILES))
        self.tiles = self._collect(options.calibrate, count)
        self.judge = Judge(self.tiles, network.reference(self.tiles.gate))
        self.quick = Judge(
            replace(
                self.tiles,
                gate=self.tiles.gate[:QUICK_TILES],
                truth=None if self.tiles.truth is None else self.tiles.truth[:QUICK_TILES],
            ),
            self.judge.reference[:QUICK_TILES],
        )
        frozen = {} if options.freeze is None else self._freeze(options.freeze, count)
        found = reach(self.model)
        self.card = ModelCard(
            method=network.method,
            classes=network.classes,
            mpp=network.mpp,
            channels=network.channels,
            tile_px=network.tile_px,
            align_px=found.align_px,
            halo_px=found.halo_px,
            tile_statistics=bool(found.whole_tile),
            score_kind=network.score_kind,
            files={},
            opset=max(o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx")),
            precision=frozen,
            training=network.training,
            note=network.note,
        )

    def write_fp32(self) -> None:
        """Write the graph as it is; it has to agree with the reference."""
        report = self.judge.judge(self.model)
        if not report.meets(LIMITS["fp32"]):
            raise ParityError(f"fp32: {report}; nothing was written: report it, with the model")
        self._add("fp32", self.model, report)

    def write_fp16(self) -> None:
        """Write the graph in half precision, as much of it as holds parity."""

        def judge(fp32_nodes: Collection[str], *, quick: bool) -> ParityReport:
            rounded = to_fp16(self.model, fp32_nodes, emulate=True)
            return (self.quick if quick else self.judge).judge(rounded)

        found = heal(self.model, judge, LIMITS["fp16"], fp32_islands(self.model), say=self._of("fp16"))
        self._add_conversion("fp16", found, lambda: to_fp16(self.model, found.fp32_nodes))

    def write_int8(self) -> None:
        """Write the graph in eight-bit integers, as much of it as holds parity."""
        with Quantizer(self.model, self.tiles.calibration) as quantizer:

            def judge(fp32_nodes: Collection[str], *, quick: bool) -> ParityReport:
                return (self.quick if quick else self.judge).judge(quantizer.quantize(fp32_nodes))

            found = heal(self.model, judge, LIMITS["int8"], fp32_islands(self.model), say=self._of("int8"))
            self._add_conversion("int8", found, lambda: quantizer.quantize(found.fp32_nodes))

    def write_engine(self, library: tensorrt.Library) -> None:
        """Build a TensorRT engine of the half-precision graph, or of FP32 for want of one."""
        precision = "fp16" if "fp16" in self.card.precisions else "fp32"
        name = f"{ENGINES}/{tensorrt.engine_name(precision, library)}"
        path = self.part / name
        path.parent.mkdir(exist_ok=True)
        try:
            header = tensorrt.build_engine(
                self.part, self.card, precision, library=library, targets=self.options.targets or None, out=path
            )
        except EngineError as error:
            self.failures.append(f"engine: {error}")
            return
        built = {
            "library": str(library),
            "targets": list(header.targets),
            "parity": "not compared: an engine runs on a GPU only",
        }
        self._record(name, path.read_bytes(), built)
        self.say(f"engine: {precision} by {built['library']} for {', '.join(header.targets)}")

    def _collect(self, source: Path | None, count: int) -> Tiles:
        return collect_tiles(
            source,
            tile_px=self.network.tile_px,
            channels=self.network.channels,
            mpp=self.network.mpp,
            classes=tuple(c.name for c in self.network.classes),
            count=count,
        )

    def _freeze(self, source: Path, count: int) -> dict[str, Any]:
        """Make tile statistics constants; what was exported before is judged first."""
        if not reach(self.model).whole_tile:
            self.say("the network has no statistics of the tile: there is nothing to freeze")
            return {}
        live = self.judge.judge(self.model)
        if not live.meets(LIMITS["fp32"]):
            raise ParityError(f"fp32: {live}; nothing was written: report it, with the model")
        tiles = self._collect(source, count)
        # Both halves: nothing is judged on what the statistics are estimated over.
        over = np.concatenate([tiles.gate, tiles.calibration])
        self.model = freeze_statistics(self.model, over)
        name_nodes(self.model)
        cost = self.judge.judge(self.model)
        self.say(f"statistics frozen over {len(over)} tiles of {tiles.source}; {cost}")
        scores, _ = run_graph(self.model, self.judge.tiles.gate)
        self.judge = Judge(self.judge.tiles, scores)
        self.quick = Judge(self.quick.tiles, scores[:QUICK_TILES])
        return {
            "fp32": {
                "statistics_frozen_over": tiles.source,
                "tiles": len(over),
                "live_graph_against_reference": live.as_dict(),
                "frozen_against_live": cost.as_dict(),
            }
        }

    def _add_conversion(self, precision: str, found: Conversion, convert: Callable[[], onnx.ModelProto]) -> None:
        record = {**self.card.precision, precision: found.as_dict()}
        if not found.passed:
            self.failures.append(
                f"{precision}: {found.report}; no choice of FP32 nodes meets the limits; "
                f"{PRECISIONS[precision]} was not written"
            )
            return
        if found.healed:
            self.say(f"{precision}: healed with {len(found.healed)} more nodes in FP32")
        model = convert()
        deployed = self.judge.judge(model)  # FP16 was judged by its emulation till here
        if not deployed.meets(LIMITS[precision]):
            self.failures.append(f"{precision}: {deployed}; {PRECISIONS[precision]} was not written")
            return
        self.card = replace(self.card, precision=record)
        self._add(precision, model, max(deployed, found.report, key=lambda r: r.damage))

    def _add(self, precision: str, model: onnx.ModelProto, report: ParityReport) -> None:
        name = PRECISIONS[precision]
        content = model.SerializeToString(deterministic=True)
        (self.part / name).write_bytes(content)
        self._record(name, content, report.as_dict())
        open_engine(self.part, backend="cpu", precision=precision).close()  # it keeps the contract
        self.say(f"{precision}: {report}")

    def _record(self, name: str, content: bytes, parity: dict[str, Any]) -> None:
        self.card = replace(
            self.card,
            files={**self.card.files, name: hashlib.sha256(content).hexdigest()},
            parity={**self.card.parity, name: parity},
        )
        write_card(self.card, self.part)

    def _of(self, precision: str) -> Say:
        return lambda text: self.say(f"{precision}: {text}")


def _find_library(options: Options, say: Say) -> tensorrt.Library | None:
    """Find the TensorRT to build with, before any work; None where none is wanted or installed."""
    if options.tensorrt == "off":
        return None
    try:
        library = tensorrt.find_library(options.tensorrt)
    except EngineError as error:
        if options.tensorrt != "auto":
            raise
        say(f"no engine: {error}")
        return None
    tensorrt.choose_targets(library, options.targets or None)
    return library


def _write_triton(bundle: Path, card: ModelCard, repository: Path, say: Say) -> None:
    """Write the ONNX files, and a native TensorRT plan where one was built, for Triton."""
    native = [f for f in card.files if f.startswith(ENGINES) and f.endswith(".trt.engine")]
    most: dict[str, Any] = {}
    if native:
        header, plan = read_engine(bundle / native[0])
        most = {"plan": plan, "max_batch": header.profile.max_batch}
    for path in write_triton(bundle, card, repository, **most):
        say(f"triton: {path}")


def _publish(part: Path, out: Path) -> None:
    part.chmod(0o755)  # mkdtemp makes it private
    if out.exists():
        old = part.with_name(f"{part.name}.old")
        out.rename(old)
        part.rename(out)
        shutil.rmtree(old)
    else:
        part.rename(out)
