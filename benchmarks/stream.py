"""End to end against the bare engine: what reading, blending and writing cost on the CPU.

::

    python -m histostream.benchmarks.stream --out benchmarks/results/stream-cpu.json

A synthetic JPEG slide, every tile of it inferred; the bare engine gets the same number of tiles,
cut beforehand, in the same batches. The two alternate, and the figure is the ratio of the medians,
so that a noisy machine disturbs both alike.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import click
import numpy as np

from histostream.benchmarks.hardware import hardware
from histostream.runtime import Engine, Options, default_bundle, open_engine, segment_slide
from histostream.wsi.synthetic import SyntheticSlide

TARGET = 1.10  # design.md section 6


def bare_seconds(engine: Engine, tiles: np.ndarray, count: int, batch: int) -> float:
    """Seconds that the engine takes for ``count`` tiles, taken in turn from ``tiles``."""
    start = time.perf_counter()
    for first in range(0, count, batch):
        which = np.arange(first, min(first + batch, count)) % len(tiles)
        engine.infer(tiles[which])
    return time.perf_counter() - start


@click.command(context_settings={"show_default": True})
@click.option("--model", "bundle", type=click.Path(path_type=Path), help="Default: the shipped.")
@click.option("--backend", default="cpu")
@click.option("--size", default=3000, help="Side of the synthetic slide, px.")
@click.option("--batch", default=1)
@click.option("--repeats", default=3)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON to write.")
def main(bundle: Path | None, backend: str, size: int, batch: int, repeats: int, out: Path) -> None:
    """Compare histo-infer with the bare engine."""
    machine = hardware()
    engine = open_engine(bundle or default_bundle(), backend=backend)
    side = engine.card.tile_px
    options = Options(tissue=False, batch=batch)
    ends, bares, runs = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slide.tif"
        slide = SyntheticSlide(size, size, mpp=engine.card.mpp)
        slide.write(path)
        tiles = np.stack([slide.region(k * 200, k * 150, side, side)[0] for k in range(8)])
        engine.infer(tiles[:batch])  # warm up
        for _ in range(repeats):
            result = segment_slide(path, engine, Path(folder) / "out", options)
            ends.append(result.run["seconds"]["total"])
            runs.append(result.run)
            count = result.run["grid"]["tiles_inferred"]
            bares.append(bare_seconds(engine, tiles, count, batch))
    ratio = statistics.median(ends) / statistics.median(bares)
    said = {
        "hardware": machine,
        "engine": engine.name,
        "slide_px": [size, size],
        "tiles": count,
        "tile_px": side,
        "overlap_px": runs[0]["grid"]["overlap_px"],
        "batch": batch,
        "end_to_end_s": ends,
        "bare_engine_s": bares,
        "ratio": round(ratio, 3),
        "target": TARGET,
        "stages_s": runs[-1]["seconds"],
        "mpx_per_s_end_to_end": round(size * size / 1e6 / statistics.median(ends), 2),
        "tiles_in_grid": runs[0]["grid"]["tiles"],
        "tiles_inferred": runs[0]["grid"]["tiles_inferred"],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(said, indent=1) + "\n")
    click.echo(f"end to end {ratio:.3f} x the bare engine (target {TARGET} x)")


if __name__ == "__main__":
    main()
