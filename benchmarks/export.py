r"""What an export gives and costs: parity and speed of each artefact; seconds and memory.

::

    python -m histostream.benchmarks.export --data ../shared/data \
        --out benchmarks/results/export-cpu.json

The shipped nucleus model is exported with INT8 calibrated on a synthetic slide, on a real slide
and on annotated images; each artefact is compared with torch on tiles that it was not calibrated
on, and timed against FP32 in turns. A U-Net of 34.5 M parameters, untrained, is exported in a
process of its own for seconds and peak memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import torch

from histostream.export.bundle import Options
from histostream.export.tiles import collect_tiles
from histostream.export.trained import export_checkpoint
from histostream.runtime.bundle.card import ModelCard
from histostream.runtime.choices import PRECISIONS
from histostream.runtime.engines.base import Engine
from histostream.runtime.engines.opener import open_engine
from histostream.runtime.errors import EngineError
from histostream.runtime.hardware import hardware
from histostream.runtime.process_memory import peak_memory_mib, return_buffers_at_once
from histostream.training import checkpoint
from histostream.training.checkpoint import Checkpoint
from histostream.training.methods.imems import method as imems
from histostream.training.networks.unet import UNet

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
    "dice",
    "dice_change",
    "not_finite",
)


def artefacts(card: ModelCard, bundle: Path, tiles: np.ndarray) -> dict[str, Any]:
    """Parity, size and speed of each graph of a bundle."""
    seconds = timed(bundle, card, tiles)
    rows = {}
    for precision in card.precisions:
        file = PRECISIONS[precision]
        healed = card.precision.get(precision, {}).get("healed", [])
        rows[precision] = {
            **{name: card.parity[file][name] for name in FIGURES},
            "nodes_healed": len(healed),
            "megabytes": round((bundle / file).stat().st_size / 1e6, 2),
            "speed_against_fp32": {
                backend: round(times["cpu fp32"] / times[f"{backend} {precision}"], 2)
                for times in (seconds,)
                for backend in ("cpu", "openvino")
                if f"{backend} {precision}" in times
            },
        }
    for name in card.files:
        if name.startswith("engines/"):
            rows[name] = {**card.parity[name], "megabytes": (bundle / name).stat().st_size / 1e6}
    return rows


def timed(bundle: Path, card: ModelCard, tiles: np.ndarray) -> dict[str, float]:
    """Median seconds per tile of each backend and precision, all of them in turns."""
    engines: dict[str, Engine] = {}
    for backend in ("cpu", "openvino"):
        for precision in card.precisions:
            try:
                engine = open_engine(bundle, backend=backend, precision=precision)
            except EngineError as error:
                click.echo(f"{backend} {precision}: {error}")
                continue
            engine.infer(tiles[:1])
            engines[f"{backend} {precision}"] = engine
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(REPEATS):
        for name, engine in engines.items():
            for tile in tiles:
                start = time.perf_counter()
                engine.infer(tile[None])
                seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def export_large(folder: Path) -> dict[str, Any]:
    """Export an untrained U-Net of 34.5 M parameters in a process of its own."""
    torch.manual_seed(0)
    state = imems.build(LARGE, 2)
    generator = cast(UNet, state.modules["generator"])
    with torch.no_grad():  # untrained, its classes are all but equal everywhere: nothing to judge
        generator.head.weight.mul_(8)
    classes = [("background", (255, 255, 255)), ("nucleus", (30, 100, 220))]
    said = Checkpoint("imems", asdict(LARGE), classes, 3, 0.5, 0, {})
    checkpoint.save(folder / "large", said, state)
    command = [sys.executable, "-m", "histostream.benchmarks.export", "--large", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    parameters = sum(p.numel() for p in generator.parameters())
    return {"parameters": parameters, **json.loads(done.stdout.splitlines()[-1])}


def run_large(folder: Path) -> None:
    """Export and print seconds and peak memory; runs in its own process."""
    return_buffers_at_once()
    start = time.perf_counter()
    export = export_checkpoint("imems", folder / "large", folder / "bundle", say=click.echo)
    said = {
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_mib": peak_memory_mib(),
        "files": list(export.card.files),
        "failures": list(export.failures),
    }
    click.echo(json.dumps(said))


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
    found: dict[str, Any] = {"hardware": hardware(), "nuclei": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        found["large"] = export_large(folder)
        click.echo(json.dumps(found["large"]))
        for name, source in sources.items():
            start = time.perf_counter()
            options = Options(calibrate=source)
            card = export_checkpoint("imems", None, folder / "nuclei", options).card
            seconds = time.perf_counter() - start
            tiles = collect_tiles(
                source, tile_px=card.tile_px, channels=card.channels, mpp=card.mpp, classes=(), count=4
            ).gate
            rows = artefacts(card, folder / "nuclei", tiles)
            found["nuclei"][name] = {"seconds": round(seconds, 1), "artefacts": rows}
            click.echo(f"{name}: {json.dumps(rows)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
