"""Compare a whole run with the bare engine: the cost of reading, blending and writing on the CPU.

::

    python -m histostream.benchmarks.stream --out benchmarks/results/stream-cpu.json

Every tile of a synthetic JPEG slide is inferred; the bare engine gets the same tiles, cut beforehand, in the same
batches. The two take turns, so that other load disturbs both alike; the figure is the median of the ratios of the
pairs.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

from histostream.benchmarks.report import write_result
from histostream.benchmarks.timing import paired_ratio, time_in_turns
from histostream.runtime import Engine, Options, default_bundle, open_engine, segment_slide
from histostream.runtime.hardware import hardware
from histostream.runtime.layout import lay_out
from histostream.wsi import cut, open_slide, read_strips
from histostream.wsi.records import to_json
from histostream.wsi.synthetic import SyntheticSlide

TARGET = 1.10  # a run may take 10 % longer than the bare engine


def slide_tiles(path: Path, engine: Engine, options: Options) -> np.ndarray:
    """Return every tile that a run would infer, (N, H, W, C)."""
    with open_slide(path) as slide:
        layout = lay_out(slide, engine.card, options)
        view, grid = layout.view, layout.grid
        return np.stack(
            [
                cut(strip, tile, width=grid.width, height=grid.height)
                for tiles, strip in read_strips(view, grid)
                for tile in tiles
            ]
        )


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
    options = Options(tissue=False, batch=batch)
    record: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slide.tif"
        SyntheticSlide(size, size, mpp=engine.card.mpp).write(path)
        tiles = slide_tiles(path, engine, options)
        engine.infer(tiles[:batch])  # warm up

        def end_to_end() -> None:
            record.update(to_json(segment_slide(path, engine, Path(folder) / "out", options).run))

        def bare_engine() -> None:
            for first in range(0, len(tiles), batch):
                engine.infer(tiles[first : first + batch])

        timings = time_in_turns({"end_to_end": end_to_end, "bare_engine": bare_engine}, repeats)
    wall, cpu = timings.wall, timings.cpu
    result = {
        "hardware": machine,
        "engine": engine.name,
        "slide_px": [size, size],
        "tile_px": engine.card.tile_px,
        "overlap_px": record["grid"]["overlap_px"],
        "batch": batch,
        "end_to_end_s": [round(s, 3) for s in wall["end_to_end"]],
        "bare_engine_s": [round(s, 3) for s in wall["bare_engine"]],
        "ratio": round(paired_ratio(wall["end_to_end"], wall["bare_engine"]), 3),
        "end_to_end_processor_s": [round(s, 3) for s in cpu["end_to_end"]],
        "bare_engine_processor_s": [round(s, 3) for s in cpu["bare_engine"]],
        "processor_ratio": round(paired_ratio(cpu["end_to_end"], cpu["bare_engine"]), 3),
        "target": TARGET,
        "stages_s": record["seconds"],
        "mpx_per_s_end_to_end": round(size * size / 1e6 / statistics.median(wall["end_to_end"]), 2),
        "tiles_in_grid": record["grid"]["tiles"],
        "tiles_inferred": record["grid"]["tiles_inferred"],
        "source_blocks_decoded": record["source_blocks_decoded"],
    }
    write_result(out, result)
    click.echo(
        f"end to end against the bare engine: {result['ratio']} x the seconds, "
        f"{result['processor_ratio']} x the processor seconds (target {TARGET})"
    )


if __name__ == "__main__":
    main()
