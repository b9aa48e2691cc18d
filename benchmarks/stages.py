"""Run the stages of a run, each alone and all together, on the same tiles of the same slide."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.bundle.card import ModelCard, read_card, read_file, write_card
from histostream.runtime.choices import PRECISIONS
from histostream.runtime.cuda.base import Stream
from histostream.runtime.engines.base import Engine, to_channels
from histostream.runtime.engines.device_engine import DeviceEngine
from histostream.runtime.engines.onnxruntime import quiet
from histostream.runtime.engines.opener import open_engine
from histostream.runtime.layout import lay_out
from histostream.runtime.options import Options
from histostream.runtime.slide_run import segment_slide
from histostream.runtime.stream.blend import Blender
from histostream.runtime.stream.device import DeviceStream
from histostream.wsi.errors import HistoError
from histostream.wsi.outputs.folder import OutputFolder
from histostream.wsi.outputs.label_rows import SlideInfo
from histostream.wsi.outputs.sinks.overview import Overview
from histostream.wsi.outputs.sinks.summary import Summary
from histostream.wsi.outputs.sinks.tiff import LabelTiff
from histostream.wsi.records import to_json
from histostream.wsi.slides.reader import open_slide
from histostream.wsi.slides.resolution import at_mpp
from histostream.wsi.tiling.grid import Strip, Tile
from histostream.wsi.tiling.strips import cut, read_strips

Pixels = NDArray[np.uint8]
ALONE = ("decode", "engine", "blend", "write")
STAGES = (*ALONE, "end_to_end")
# Bytes of tiles, and of their scores, that are kept in memory. For a slide with more tiles, tiles spread over it are
# used several times; the content of a tile changes the time of no stage.
HELD_BYTES = 256 << 20


class BenchError(HistoError, ValueError):
    """The requested measurement is not possible."""


@dataclass(frozen=True, slots=True)
class Setup:
    """One way to run the slide.

    Attributes
    ----------
    bundle
        The model.
    backend, precision
        As `open_engine`.
    batch
        Tiles per inference; None: the default of the device.
    tile_px
        Side of a tile; None: as the model was exported.
    """

    bundle: Path
    backend: str = "auto"
    precision: str = "auto"
    batch: int | None = None
    tile_px: int | None = None

    def __str__(self) -> str:
        words = [self.bundle.name, self.backend, self.precision]
        words += [f"tile {self.tile_px}"] if self.tile_px else []
        words += [f"batch {self.batch}"] if self.batch else []
        return " ".join(words)


@dataclass(slots=True)
class Measured:
    """The figures of each repeat.

    Attributes
    ----------
    seconds
        Seconds of each of `STAGES`. If the device blends, "blend" includes the copies to and from it.
    cores
        Processor seconds for each second of the bare engine; fewer than its threads if other programs used the rest.
    inside
        Seconds of the stages in ``run.json`` of each end-to-end run.
    run
        The last ``run.json``.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in STAGES})
    cores: list[float] = field(default_factory=list)
    inside: list[dict[str, float]] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Append the seconds of the block."""
        start = time.perf_counter()
        yield
        self.seconds[stage].append(time.perf_counter() - start)


class Contender:
    """A setup that is ready to be measured: its engine is open and warm, its tiles and scores are in memory.

    Parameters
    ----------
    setup
        What to run.
    slide
        File of the slide.
    options
        How to run it; the batch is that of the setup.
    scratch
        Folder for results, and for a model with other tiles.

    Raises
    ------
    HistoError
        If the setup is not usable here, or no tile is to be analysed.
    """

    def __init__(self, setup: Setup, slide: Path, options: Options, scratch: Path) -> None:
        self.setup = setup
        self.slide = slide
        bundle = setup.bundle
        if setup.tile_px is not None:
            bundle = with_tile_size(bundle, setup.tile_px, scratch / f"{bundle.name}-{setup.tile_px}")
        self.bundle = bundle
        with quiet():
            self.engine: Engine = open_engine(
                bundle, backend=setup.backend, precision=setup.precision, threads=options.threads
            )
        self.batch = setup.batch or self.engine.batch
        self.options = replace(options, batch=self.batch).for_model(self.engine.card)
        self.measured = Measured()
        self._scratch = scratch
        card = self.engine.card
        with open_slide(slide) as opened:
            layout = lay_out(opened, card, self.options)
            view, self.grid = layout.view, layout.grid
            assert view.mpp is not None  # at_mpp sets it
            self._picture = to_channels(layout.overview, 3)
            self._info = SlideInfo(slide.name, view.width, view.height, view.mpp, card.classes)
        if not len(self.grid):
            raise BenchError(f"{slide}: no tile is analysed; pass --no-tissue")
        tile_bytes = card.tile_px**2 * max(card.channels, len(card.classes))
        held = min(len(self.grid), max(HELD_BYTES // tile_bytes, self.batch))
        self.tiles = self._spread(held)
        self.scores = np.concatenate([self.engine.infer(b) for b in self._batches(held)])

    @property
    def tile_count(self) -> int:
        """Return the number of tiles of one run."""
        return len(self.grid)

    @property
    def device(self) -> str:
        """Return where the engine runs: "cpu" or "gpu"."""
        on_cpu = "cpu" in self.engine.name.split() and not self.resident
        return "cpu" if on_cpu else "gpu"

    @property
    def precision(self) -> str:
        """Return the precision that the engine runs in."""
        words = self.engine.name.split()
        return next((word for word in words if word in PRECISIONS), "fp32")

    def measure(self) -> None:
        """Run every stage alone, then all together, once."""
        with self.measured.time("decode"):
            for _ in self._decoded():
                pass
        before = time.process_time()
        with self.measured.time("engine"):
            self._infer_all()
        spent = time.process_time() - before
        self.measured.cores.append(spent / self.measured.seconds["engine"][-1])
        self._blend_and_write()
        with self.measured.time("end_to_end"):
            result = segment_slide(self.slide, self.engine, self._scratch / "out", self.options)
        self.measured.run = to_json(result.run)
        self.measured.inside.append(self.measured.run["seconds"])

    @property
    def resident(self) -> bool:
        """Whether the bare engine runs on tiles in the memory of its device."""
        return isinstance(self.engine, DeviceEngine)

    def close(self) -> None:
        """Release the device."""
        self.engine.close()

    def _decoded(self) -> Iterator[list[Pixels]]:
        """Read the slide; yield the batches that inference would get, as lists of tiles."""
        card, grid = self.engine.card, self.grid
        with open_slide(self.slide) as opened:
            view = at_mpp(opened, card.mpp, slide_mpp=self.options.mpp, force=self.options.force_upsampling)
            threads = self.options.threads or 2  # as segment_slide
            with closing(read_strips(view, grid, threads=threads)) as strips:
                for tiles, strip in strips:
                    for first in range(0, len(tiles), self.batch):
                        yield [
                            cut(strip, tile, width=grid.width, height=grid.height)
                            for tile in tiles[first : first + self.batch]
                        ]

    def _infer_all(self) -> None:
        """Run the bare engine on as many tiles as the slide has, and discard the scores."""
        engine = self.engine
        if not isinstance(engine, DeviceEngine):
            for batch in self._batches(self.tile_count):
                engine.infer(batch)
            return
        # The same batch every time: it has been on the device since the engine was warmed up.
        engine.device.activate()
        size = min(self.batch, engine.max_batch)
        tiles, scores = engine.buffers(size)
        for first in range(0, self.tile_count, size):
            count = min(size, self.tile_count - first)
            engine.infer_device(tiles, scores, count, engine.stream)
        engine.stream.synchronize()

    def _spread(self, count: int) -> Pixels:
        """Return ``count`` of the tiles, spread over the slide; (count, H, W, C)."""
        wanted = {i * self.tile_count // count for i in range(count)}
        tiles = (tile for batch in self._decoded() for tile in batch)
        kept = [tile.copy() for i, tile in enumerate(tiles) if i in wanted]
        return to_channels(np.stack(kept), self.engine.card.channels)

    def _batches(self, count: int) -> Iterator[Pixels]:
        """Yield batches of ``count`` tiles in all; if fewer are in memory, they are used several times."""
        period = max(len(self.tiles) // self.batch * self.batch, 1)
        for first in range(0, count, self.batch):
            at = first if count <= len(self.tiles) else first % period
            yield self.tiles[at : at + min(self.batch, count - first)]

    def _blend_and_write(self) -> None:
        """Blend scores from memory and write the labels; each is timed separately."""
        blend_s = write_s = 0.0
        grid, card = self.grid, self.engine.card
        clock = time.perf_counter
        count = 0
        with OutputFolder(self._scratch / "written", "slide") as folder:
            folder.add(LabelTiff(folder.path / "labels.tif", self._info))
            folder.add(Overview(folder.path / "overview.png", self._info, self._picture))
            folder.add(Summary(folder.path, self._info))
            start = clock()
            blender = Blender(grid, len(card.classes), self.options.blend)
            for row in range(len(grid.ys)):
                tiles: list[Tile] = grid.row(row)
                for tile in tiles:
                    blender.add(tile, self.scores[count % len(self.scores)])
                    count += 1
                part = blender.finish_row(row)
                blended = clock()
                blend_s += blended - start
                folder.write(part)
                start = clock()
                write_s += start - blended
            start = clock()
        if isinstance(self.engine, DeviceEngine):  # a run then blends on the device
            blend_s = self._blend_on_device(self.engine)
        self.measured.seconds["blend"].append(blend_s)
        self.measured.seconds["write"].append(write_s + clock() - start)

    def _blend_on_device(self, engine: DeviceEngine) -> float:
        """Send rows to the device, cut, blend and fetch labels, without a network; return the seconds."""
        grid, card = self.grid, engine.card
        rows = np.zeros((min(grid.tile_px, grid.height), grid.width, card.channels), np.uint8)
        with closing(
            DeviceStream(_NoNetwork(engine), grid, self.options.blend, channels=card.channels, batch=self.batch)
        ) as stream:
            start = time.perf_counter()
            for row in range(len(grid.ys)):
                if tiles := grid.row(row):
                    x, y = tiles[0].read.x, tiles[0].read.y
                    right = min(tiles[-1].read.right, grid.width)
                    strip = Strip(x, y, rows[: grid.height - y, x:right])
                    for _ in stream.feed(strip, tiles):
                        pass
                stream.finish_row(row)
            stream.drain()
            return time.perf_counter() - start


class _NoNetwork:
    """A device engine that skips inference."""

    def __init__(self, engine: DeviceEngine) -> None:
        self.card, self.name, self.batch = engine.card, engine.name, engine.batch
        self.device, self.stream, self.max_batch = engine.device, engine.stream, engine.max_batch
        self.infer, self.buffers, self.close = engine.infer, engine.buffers, engine.close

    def infer_device(self, tiles: int, scores: int, n: int, stream: Stream) -> None:
        """Leave the scores unchanged."""


def with_tile_size(bundle: Path, tile_px: int, out: Path) -> Path:
    """Copy a bundle for another tile size, to measure its speed only.

    The graphs differ only in the size of their input; the labels at another size than the exported one are not checked.

    Raises
    ------
    BenchError
        If the network takes only the size that it was exported for.
    """
    import hashlib

    import onnx

    from histostream.export.graph.model import GraphError
    from histostream.export.graph.shapes import known_shapes, tiles_input, with_shapes

    card = read_card(bundle)
    if tile_px == card.tile_px:
        return bundle
    if tile_px < 1 or tile_px % card.align_px:
        raise BenchError(f"--tile {tile_px}: this model takes multiples of {card.align_px}")
    out.mkdir(parents=True, exist_ok=True)
    files = {}
    for precision in card.precisions:
        name = PRECISIONS[precision]
        model = onnx.load_from_string(read_file(bundle, card, name))
        (tiles,) = (v for v in model.graph.input if v.name == tiles_input(model))
        for dim in tiles.type.tensor_type.shape.dim[1:3]:
            dim.dim_value = tile_px
        try:
            sized = with_shapes(model, 1)
            scores = known_shapes(sized).get(sized.graph.output[0].name)
        except (GraphError, onnx.shape_inference.InferenceError) as error:
            raise _one_size_only(bundle, tile_px, card) from error
        if scores != (1, len(card.classes), tile_px, tile_px):
            raise _one_size_only(bundle, tile_px, card)
        del model.graph.value_info[:]
        for length, dim in zip(scores[2:], model.graph.output[0].type.tensor_type.shape.dim[2:], strict=True):
            dim.dim_value = length
        content = model.SerializeToString()
        (out / name).write_bytes(content)
        files[name] = hashlib.sha256(content).hexdigest()
    write_card(replace(card, tile_px=tile_px, files=files), out)
    return out


def _one_size_only(bundle: Path, tile_px: int, card: ModelCard) -> BenchError:
    return BenchError(
        f"{bundle}: its graph takes tiles of {card.tile_px} px only, not {tile_px}; "
        f"export it again with --tile {tile_px}"
    )
