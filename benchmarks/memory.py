"""Peak memory of a run, and that it does not depend on the slide's height.

::

    python -m histostream.benchmarks.memory --out benchmarks/results/memory-cpu.json

Slides of 16384 x 16384 and 16384 x 65536 pixels, a base-4 network; each run is a process of its
own, and the peak is what the system counts for it. The slides repeat one synthetic patch, because
only their size matters here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click
import imagecodecs
import tifffile
import torch

from histostream.export.bundle import Options
from histostream.export.trained import export_checkpoint
from histostream.runtime.hardware import hardware
from histostream.training import checkpoint
from histostream.training.checkpoint import Checkpoint
from histostream.training.methods.imems import method as imems
from histostream.wsi.synthetic import SyntheticSlide

WIDTH = 16384
HEIGHTS = (16384, 65536)
PATCH_PX = 2048
TILE_PX = 256
TARGET_MIB = 500


def write_repeated(path: Path, width: int, height: int, seed: int = 0) -> None:
    """Write a tiled JPEG TIFF that repeats one synthetic patch; its tiles are coded once."""
    patch = SyntheticSlide(4 * PATCH_PX, 4 * PATCH_PX, seed=seed).region(
        2 * PATCH_PX, 2 * PATCH_PX, PATCH_PX, PATCH_PX
    )[0]
    side = PATCH_PX // TILE_PX
    coded = [
        [
            imagecodecs.jpeg8_encode(patch[y * TILE_PX : (y + 1) * TILE_PX, x * TILE_PX : (x + 1) * TILE_PX], level=85)
            for x in range(side)
        ]
        for y in range(side)
    ]

    def tiles() -> Iterator[bytes]:
        for y in range(height // TILE_PX):
            for x in range(width // TILE_PX):
                yield bytes(coded[y % side][x % side])

    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        tiff.write(
            tiles(),
            shape=(height, width, 3),
            dtype="uint8",
            tile=(TILE_PX, TILE_PX),
            photometric="ycbcr",
            subsampling=(2, 2),
            compression="jpeg",
            resolution=(20000, 20000),
            resolutionunit="CENTIMETER",
        )


def base_4_bundle(folder: Path) -> Path:
    """Export an untrained network of width 4."""
    config = imems.Config(base_width=4, discriminator_width=4)
    torch.manual_seed(0)
    state = imems.build(config, classes=2)
    classes = [("background", (255, 255, 255)), ("nucleus", (30, 100, 220))]
    said = Checkpoint("imems", asdict(config), classes, 3, 0.5, 0, {})
    checkpoint.save(folder / "checkpoint", said, state, optimizers=False)
    only_fp32 = Options(precisions=("fp32",), tensorrt="off")
    export_checkpoint("imems", folder / "checkpoint", folder / "base4", only_fp32)
    return folder / "base4"


@click.command(context_settings={"show_default": True})
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON to write.")
def main(out: Path) -> None:
    """Measure the peak memory of histo-infer on tall slides."""
    said: dict[str, object] = {
        "hardware": hardware(),
        "network": "base-4 U-Net, 512 px tiles, overlap 64",
        "target_mib": TARGET_MIB,
        "runs": (runs := []),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = base_4_bundle(folder)
        for height in HEIGHTS:
            slide = folder / f"{WIDTH}x{height}.tif"
            write_repeated(slide, WIDTH, height)
            command = [
                sys.executable,
                "-m",
                "histostream.runtime.cli",
                slide,
                "--model",
                bundle,
                "--out",
                folder / "out",
                "--no-tissue",
                "--backend",
                "cpu",
            ]
            subprocess.run([str(word) for word in command], check=True)
            run = json.loads((folder / "out" / slide.stem / "run.json").read_text())
            blocks = (WIDTH // TILE_PX) * (height // TILE_PX)
            runs.append(
                {
                    "width": WIDTH,
                    "height": height,
                    "peak_memory_mib": run["peak_memory_mib"],
                    "mpx_per_s": run["mpx_per_s"],
                    "seconds": run["seconds"],
                    "source_blocks": blocks,
                    # The overview, made before the stream, decodes the slide too: it has one level.
                    "source_blocks_decoded": run["source_blocks_decoded"],
                    "tiles": run["grid"]["tiles"],
                    "tiles_inferred": run["grid"]["tiles_inferred"],
                }
            )
            click.echo(f"{slide.stem}: peak {run['peak_memory_mib']} MiB")
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
