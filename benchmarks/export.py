r"""Measure an export: parity, size and speed of each artefact, and the seconds and memory that it takes.

::

    python -m histostream.benchmarks.export --data ../shared/data \
        --out benchmarks/results/export-cpu.json

The shipped nucleus model is exported with INT8 calibrated on a synthetic slide, on a real slide and on annotated
images. Each artefact is compared with torch on other tiles, and timed against FP32 in turns. An untrained U-Net of 34.5
M parameters is exported in a separate process to measure seconds and peak memory; without INT8, since the classes of an
untrained network are so close that the search for nodes to keep in FP32 would be measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from histostream.benchmarks.inputs import save_untrained
from histostream.benchmarks.report import write_result
from histostream.benchmarks.timing import time_in_turns
from histostream.export import Options, export_checkpoint
from histostream.export.tiles import collect_tiles
from histostream.runtime.bundle.card import ModelCard
from histostream.runtime.choices import PRECISIONS
from histostream.runtime.engines.base import Engine
from histostream.runtime.engines.opener import open_engine
from histostream.runtime.errors import EngineError
from histostream.runtime.hardware import hardware
from histostream.runtime.process_memory import peak_memory_mib, return_buffers_at_once
from histostream.training.methods.imems import method as imems

REPEATS = 5
LARGE = imems.Config(base_width=64, adversarial=False)
FIGURES = (
    "source",
    "tiles",
    "truth",
    "max_difference",
    "mean_difference",
    "label_agreement",
    "dark_label_agreement",
    "moved_by_rounding",
    "dice",
    "dice_change",
    "not_finite",
)


def artefacts(card: ModelCard, bundle: Path, tiles: np.ndarray) -> dict[str, Any]:
    """Return parity, size and speed of each artefact of a bundle."""
    seconds = timed(bundle, card, tiles)
    rows = {}
    for precision in card.precisions:
        file = PRECISIONS[precision]
        rows[precision] = {
            **{name: card.parity[file][name] for name in FIGURES},
            "nodes_healed": len(card.precision.get(precision, {}).get("healed", [])),
            "megabytes": round((bundle / file).stat().st_size / 1e6, 2),
            "speed_against_fp32": {
                backend: round(seconds["cpu fp32"] / seconds[f"{backend} {precision}"], 2)
                for backend in ("cpu", "openvino")
                if f"{backend} {precision}" in seconds
            },
        }
    for name in card.files:
        if name.startswith("engines/"):
            rows[name] = {**card.parity[name], "megabytes": (bundle / name).stat().st_size / 1e6}
    return rows


def timed(bundle: Path, card: ModelCard, tiles: np.ndarray) -> dict[str, float]:
    """Return the median seconds per tile of each backend and precision."""
    calls: dict[str, Callable[[], object]] = {}
    for backend in ("cpu", "openvino"):
        for precision in card.precisions:
            try:
                engine = open_engine(bundle, backend=backend, precision=precision)
            except EngineError as error:
                click.echo(f"{backend} {precision}: {error}")
                continue
            engine.infer(tiles[:1])
            calls[f"{backend} {precision}"] = partial(_infer_each, engine, tiles)
    timings = time_in_turns(calls, REPEATS)
    return {name: float(np.median(seconds)) / len(tiles) for name, seconds in timings.wall.items()}


def _infer_each(engine: Engine, tiles: np.ndarray) -> None:
    for tile in tiles:
        engine.infer(tile[None])


def export_large(folder: Path) -> dict[str, Any]:
    """Export an untrained U-Net of 34.5 M parameters in a process of its own."""
    parameters = save_untrained(folder / "large", LARGE, head_gain=8)
    command = [sys.executable, "-m", "histostream.benchmarks.export", "--large", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"parameters": parameters, **json.loads(done.stdout.splitlines()[-1])}


def run_large(folder: Path) -> None:
    """Export, and print seconds and peak memory; this runs in a separate process."""
    return_buffers_at_once()
    options = Options(precisions=("fp32", "fp16"))
    start = time.perf_counter()
    export = export_checkpoint("imems", folder / "large", folder / "bundle", options, say=click.echo)
    result = {
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_mib": peak_memory_mib(),
        "files": list(export.card.files),
        "failures": list(export.failures),
    }
    click.echo(json.dumps(result))


@click.command()
@click.option("--data", "data_dir", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), help="JSON to write.")
@click.option("--large", type=click.Path(path_type=Path), hidden=True)
def main(data_dir: Path | None, out: Path | None, large: Path | None) -> None:
    """Export, compare, time."""
    if large is not None:
        run_large(large)
        return
    if data_dir is None or out is None:
        raise click.UsageError("--data and --out are needed")
    sources = {
        "synthetic slide": None,
        "CMU-1-Small-Region.svs": data_dir / "wsi-slides" / "CMU-1-Small-Region.svs",
        "dsb2018 brightfield": data_dir / "nuclei-dsb2018" / "brightfield",
    }
    result: dict[str, Any] = {"hardware": hardware(), "nuclei": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        result["large"] = export_large(folder)
        click.echo(json.dumps(result["large"]))
        for name, source in sources.items():
            start = time.perf_counter()
            options = Options(calibrate=source)
            card = export_checkpoint("imems", None, folder / "nuclei", options).card
            seconds = time.perf_counter() - start
            tiles = collect_tiles(
                source, tile_px=card.tile_px, channels=card.channels, mpp=card.mpp, classes=(), count=4
            ).gate
            rows = artefacts(card, folder / "nuclei", tiles)
            result["nuclei"][name] = {"seconds": round(seconds, 1), "artefacts": rows}
            click.echo(f"{name}: {json.dumps(rows)}")
    write_result(out, result)


if __name__ == "__main__":
    main()
