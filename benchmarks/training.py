r"""How fast training steps run, in each precision, compiled and not, in turns.

::

    python -m histostream.benchmarks.training --out benchmarks/results/training-cpu.json \
        --width 16 --crop 128 --batch 4 --compile

Whole steps of iMEMS (both networks, both optimisers) on synthetic textures that are drawn before.
Ratios are against FP32 in the same call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from histostream.runtime.hardware import hardware
from histostream.training import device as compute
from histostream.training import synthetic
from histostream.training.augment import Augmentation
from histostream.training.batches import Batches, divide
from histostream.training.device import Compute
from histostream.training.methods.imems import method as imems
from histostream.training.schedule import Schedule
from histostream.training.state import Batch
from histostream.wsi.files import json_text

WARM_UP = 3  # steps before the clock runs


def _stepper(how: Compute, width: int, batch: Batch) -> Callable[[], None]:
    """Make a function that runs one training step and waits for it."""
    device = compute.open_device(how)
    torch.manual_seed(0)
    state = imems.build(imems.Config(base_width=width, discriminator_width=width), 3)
    compute.prepare(state, device, how)
    there = Batch(batch.images.to(device), batch.labels.to(device))

    def step() -> None:
        float(imems.step(state, there)["l1"])  # a number on the host: the step is over

    for _ in range(WARM_UP):
        step()
    return step


def measure(
    *, device: str, width: int, crop: int, batch: int, compiled: bool, repeats: int, steps: int
) -> dict[str, Any]:
    """Time steps in turns; returns median crops a second, and ratios to FP32."""
    found = synthetic.textures(8, 2, side_px=crop)
    schedule = Schedule(batch=batch, crop_px=crop, steps=1)
    draw = Batches(divide(found, schedule), schedule, Augmentation(flips=True), (), align_px=16)
    drawn = next(iter(draw(0, 1)))
    ways = {"fp32": Compute(device), "bf16": Compute(device, "bf16")}
    if compiled:
        ways["bf16 compiled"] = Compute(device, "bf16", compiled=True)
    steppers = {name: _stepper(how, width, drawn) for name, how in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(repeats):
        for name, step in steppers.items():
            start = time.perf_counter()
            for _ in range(steps):
                step()
            seconds[name].append((time.perf_counter() - start) / steps)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    return {
        "hardware": hardware(),
        "torch": torch.__version__,
        "device": str(compute.open_device(Compute(device))),
        "width": width,
        "crop_px": crop,
        "batch": batch,
        "seconds_a_step": {name: round(s, 5) for name, s in medians.items()},
        "crops_a_second": {name: round(batch / s, 2) for name, s in medians.items()},
        "ratio_to_fp32": {name: round(medians["fp32"] / s, 3) for name, s in medians.items()},
    }


@click.command()
@click.option("--device", default="auto", show_default=True)
@click.option("--width", default=64, show_default=True, help="Of the networks' finest stage.")
@click.option("--crop", default=512, show_default=True, help="Side of a crop.")
@click.option("--batch", default=4, show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Time torch.compile too.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--steps", default=5, show_default=True, help="Steps of each turn.")
@click.option("--threads", type=int, help="CPU threads; default: all cores.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON to write.")
def main(threads: int | None, out: Path, **how: Any) -> None:
    """Time training steps."""
    if threads:
        torch.set_num_threads(threads)
    said = measure(**how)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json_text(said))
    click.echo(f"crops a second: {said['crops_a_second']}, ratios {said['ratio_to_fp32']}")


if __name__ == "__main__":
    main()
