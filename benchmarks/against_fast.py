r"""Compare a slide end to end with FAST, which has OpenVINO: the same network, tiles and overlap.

::

    python3 -m venv fastvenv && fastvenv/bin/pip install pyfast     # and its system libraries
    python -m histostream.benchmarks.against_fast --fast-python "xvfb-run -a fastvenv/bin/python" \
        --out benchmarks/results/fast-cpu.json

FAST (Smistad et al., https://fast-imaging.github.io) runs the shipped nucleus model's generator on
all of a synthetic slide in tiles of 512 px that overlap by an eighth, and writes a TIFF pyramid;
`segment_slide` does the same, with blending where FAST crops. In turns, so that other load on the
machine meets both. FAST leaves the precision to OpenVINO, which computes in bfloat16 on CPUs that
can: there, our bf16 is the like of it.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import tifffile
import torch
from torch import Tensor, nn

from histostream.benchmarks.hardware import hardware
from histostream.export.trained import shipped_checkpoint
from histostream.runtime import Options, default_bundle, open_engine, segment_slide
from histostream.training import checkpoint
from histostream.training.methods import imems
from histostream.wsi.synthetic import SyntheticSlide

TILE_PX, OVERLAP_PX = 512, 64
OURS = (
    ("cpu", "fp32"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("cpu", "int8"),
    ("openvino", "int8"),
)


class Generator(nn.Module):
    """The shipped generator as FAST wants it: (1, 3, H, W) in 0..1 to (1, 2, H, W) in 0..1."""

    def __init__(self) -> None:
        super().__init__()
        folder = shipped_checkpoint("imems")
        said = checkpoint.read(folder)
        state = imems.build(imems.Config(**said.config), len(said.classes))
        checkpoint.load(folder, state)
        self.generator = state.modules["generator"]

    def forward(self, x: Tensor) -> Tensor:
        """Run the generator, which works in -1..1."""
        return torch.clamp((self.generator(x * 2 - 1) + 1) / 2, 0, 1)


def run_fast(python: str, folder: Path, out: Path) -> float:
    """Seconds that FAST takes, from opening the slide to the written pyramid."""
    script = Path(__file__).with_name("fast_pipeline.py")
    words = [folder / "slide.tif", folder / "net.onnx", out, TILE_PX, OVERLAP_PX / TILE_PX]
    command = [*shlex.split(python), "-P", str(script), *map(str, words)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise click.ClickException(
            f"FAST failed: {done.stderr[-500:] or done.stdout[-500:]}; check its installation"
        )
    return float(done.stdout.rsplit("seconds ", 1)[1].split()[0])


@click.command()
@click.option("--fast-python", required=True, help="Interpreter that has pyfast, as a command.")
@click.option("--size", default=4096, show_default=True, help="Side of the synthetic slide.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON to write.")
def main(fast_python: str, size: int, repeats: int, out: Path) -> None:
    """Time FAST and us in turns."""
    seconds: dict[str, list[float]] = {"FAST openvino": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        SyntheticSlide(size, size, mpp=0.5, seed=1).write(folder / "slide.tif")
        torch.onnx.export(
            Generator().eval(), (torch.zeros(1, 3, TILE_PX, TILE_PX),), folder / "net.onnx",
            dynamo=True, opset_version=18, external_data=False,
        )  # fmt: skip
        for _ in range(repeats):
            took = run_fast(fast_python, folder, folder / "fast.tiff")
            seconds["FAST openvino"].append(took)
            for backend, precision in OURS:
                engine = open_engine(default_bundle(), backend=backend, precision=precision)
                options = Options(tissue=False, overlap_px=OVERLAP_PX)
                where = folder / f"{backend}-{precision}"
                result = segment_slide(folder / "slide.tif", engine, where, options)
                name = f"HistoStream {backend} {precision}"
                seconds.setdefault(name, []).append(result.run["seconds"]["total"])
        theirs = tifffile.imread(folder / "fast.tiff").reshape(size, size, -1)[..., 0]
        labels = tifffile.imread(folder / "cpu-fp32" / "slide" / "labels.tif")
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    said: dict[str, Any] = {
        "hardware": hardware(),
        "slide_px": size,
        "tile_px": TILE_PX,
        "overlap_px": OVERLAP_PX,
        "seconds": seconds,
        "median_seconds": median,
        "speed_against_fast": {
            name: round(median["FAST openvino"] / value, 3) for name, value in median.items()
        },
        "labels_that_agree_with_fast": round(float((theirs == labels).mean()), 6),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(said, indent=1) + "\n")
    click.echo(json.dumps(said["speed_against_fast"]))


if __name__ == "__main__":
    main()
