"""End to end against the bare engine: what reading, blending and writing cost on the CPU.

::

    python -m histostream.benchmarks.stream --out benchmarks/results/stream-cpu.json

A synthetic JPEG slide, every tile of it inferred; the bare engine gets the same tiles, cut
beforehand, in the same batches. The two alternate, so that a noisy machine disturbs both alike;
the figure is the median of the ratios of the pairs.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np

from histostream.runtime import Engine, Options, default_bundle, open_engine, segment_slide
from histostream.runtime.hardware import hardware
from histostream.runtime.layout import plan_grid
from histostream.wsi import at_mpp, cut, open_slide, read_strips
from histostream.wsi.records import to_json
from histostream.wsi.synthetic import SyntheticSlide

TARGET = 1.10  # design.md section 6


def bare(engine: Engine, tiles: np.ndarray, batch: int) -> None:
    """Run the engine on tiles (N, H, W, C), and drop what it gives."""
    for first in range(0, len(tiles), batch):
        engine.infer(tiles[first : first + batch])


def tiles_of(path: Path, engine: Engine, options: Options) -> np.ndarray:
    """Return every tile that a run would infer, (N, H, W, C)."""
    with open_slide(path) as slide:
        view = at_mpp(slide, engine.card.mpp)
        grid, _ = plan_grid(view, engine.card, options)
        return np.stack(
            [
                cut(strip, tile, width=grid.width, height=grid.height)
                for tiles, strip in read_strips(view, grid)
                for tile in tiles
            ]
        )


@contextmanager
def timed(wall: list[float], cpu: list[float]) -> Iterator[None]:
    """Append the wall seconds of the block, and the processor seconds of the process."""
    start, start_cpu = time.perf_counter(), time.process_time()
    yield
    wall.append(round(time.perf_counter() - start, 3))
    cpu.append(round(time.process_time() - start_cpu, 3))


def ratio(of: list[float], to: list[float]) -> float:
    """Median of the ratios of the pairs."""
    return round(statistics.median(a / b for a, b in zip(of, to, strict=True)), 3)


@click.command(context_settings={"show_default": True})
@click.option("--model", "bundle", type=click.Path(path_type=Path), help="Default: the shipped.")
@click.option("--backend", default="cpu")
@click.option("--size", default=4096, help="Side of the synthetic slide, px.")
@click.option("--batch", default=1)
@click.option("--repeats", default=5)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON to write.")
def main(bundle: Path | None, backend: str, size: int, batch: int, repeats: int, out: Path) -> None:
    """Compare histo-infer with the bare engine."""
    machine = hardware()
    engine = open_engine(bundle or default_bundle(), backend=backend)
    side = engine.card.tile_px
    options = Options(tissue=False, batch=batch)
    end_s: list[float] = []
    end_cpu_s: list[float] = []
    bare_s: list[float] = []
    bare_cpu_s: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slide.tif"
        SyntheticSlide(size, size, mpp=engine.card.mpp).write(path)
        tiles = tiles_of(path, engine, options)
        engine.infer(tiles[:batch])  # warm up
        for _ in range(repeats):
            with timed(end_s, end_cpu_s):
                run = to_json(segment_slide(path, engine, Path(folder) / "out", options).run)
            with timed(bare_s, bare_cpu_s):
                bare(engine, tiles, batch)
    said = {
        "hardware": machine,
        "engine": engine.name,
        "slide_px": [size, size],
        "tile_px": side,
        "overlap_px": run["grid"]["overlap_px"],
        "batch": batch,
        "end_to_end_s": end_s,
        "bare_engine_s": bare_s,
        "ratio": ratio(end_s, bare_s),
        "end_to_end_processor_s": end_cpu_s,
        "bare_engine_processor_s": bare_cpu_s,
        "processor_ratio": ratio(end_cpu_s, bare_cpu_s),
        "target": TARGET,
        "stages_s": run["seconds"],
        "mpx_per_s_end_to_end": round(size * size / 1e6 / statistics.median(end_s), 2),
        "tiles_in_grid": run["grid"]["tiles"],
        "tiles_inferred": run["grid"]["tiles_inferred"],
        "source_blocks_decoded": run["source_blocks_decoded"],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(said, indent=1) + "\n")
    click.echo(
        f"end to end against the bare engine: {said['ratio']} x the seconds, "
        f"{said['processor_ratio']} x the processor seconds (target {TARGET})"
    )


if __name__ == "__main__":
    main()
