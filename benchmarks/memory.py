"""Measure the peak memory of a run, and that it does not depend on the slide's height.

::

    python -m histostream.benchmarks.memory --out benchmarks/results/memory-cpu.json

The slides have 16384 x 16384 and 16384 x 65536 pixels and repeat one synthetic patch, because only their size matters;
the network has base width 4. Each run is a process of its own, whose peak the system reports.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from histostream.benchmarks.inputs import TILE_PX, save_untrained, write_repeated
from histostream.benchmarks.report import write_result
from histostream.export import Options, export_checkpoint
from histostream.runtime.hardware import hardware
from histostream.training.methods.imems import method as imems

WIDTH = 16384
HEIGHTS = (16384, 65536)
TARGET_MIB = 500


def base_4_bundle(folder: Path) -> Path:
    """Export an untrained network of base width 4."""
    save_untrained(folder / "checkpoint", imems.Config(base_width=4, discriminator_width=4))
    only_fp32 = Options(precisions=("fp32",), tensorrt="off")
    export_checkpoint("imems", folder / "checkpoint", folder / "base4", only_fp32)
    return folder / "base4"


@click.command(context_settings={"show_default": True})
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON to write.")
def main(out: Path) -> None:
    """Measure the peak memory of histo-infer on tall slides."""
    runs: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "hardware": hardware(),
        "network": "base-4 U-Net, 512 px tiles, overlap 64",
        "target_mib": TARGET_MIB,
        "runs": runs,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = base_4_bundle(folder)
        for height in HEIGHTS:
            slide = folder / f"{WIDTH}x{height}.tif"
            write_repeated(slide, WIDTH, height)
            command = [sys.executable, "-m", "histostream.runtime.cli", str(slide), "--model", str(bundle)]
            command += ["--out", str(folder / "out"), "--no-tissue", "--backend", "cpu"]
            subprocess.run(command, check=True)
            run = json.loads((folder / "out" / slide.stem / "run.json").read_text())
            runs.append(
                {
                    "width": WIDTH,
                    "height": height,
                    "peak_memory_mib": run["peak_memory_mib"],
                    "mpx_per_s": run["mpx_per_s"],
                    "seconds": run["seconds"],
                    "source_blocks": (WIDTH // TILE_PX) * (height // TILE_PX),
                    # The overview, made before the stream, decodes the slide too: it has one level.
                    "source_blocks_decoded": run["source_blocks_decoded"],
                    "tiles": run["grid"]["tiles"],
                    "tiles_inferred": run["grid"]["tiles_inferred"],
                }
            )
            click.echo(f"{slide.stem}: peak {run['peak_memory_mib']} MiB")
            write_result(out, result)


if __name__ == "__main__":
    main()
