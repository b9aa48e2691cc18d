r"""Time training steps in each precision, compiled and not, in turns.

::

    python -m histostream.benchmarks.training --out benchmarks/results/training-cpu.json \
        --width 16 --crop 128 --batch 4 --compile

Complete steps of iMEMS (both networks, both optimisers) run on synthetic textures that are drawn beforehand. Ratios are
to FP32 in the same call.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from histostream.benchmarks.report import write_result
from histostream.benchmarks.timing import time_in_turns
from histostream.runtime.hardware import hardware
from histostream.training import device as compute
from histostream.training import synthetic
from histostream.training.augment import Augmentation
from histostream.training.batches import Batches, divide
from histostream.training.device import Compute
from histostream.training.methods.imems import method as imems
from histostream.training.schedule import Schedule
from histostream.training.state import Batch

WARM_UP_STEPS = 3


def _training_steps(settings: Compute, width: int, batch: Batch, steps: int) -> Callable[[], None]:
    """Return a function that runs some training steps and waits for them; it is warm."""
    device = compute.open_device(settings)
    torch.manual_seed(0)
    state = imems.build(imems.Config(base_width=width, discriminator_width=width), 3)
    compute.prepare(state, device, settings)
    on_device = Batch(batch.images.to(device), batch.labels.to(device))

    def run(count: int) -> None:
        for _ in range(count):
            float(imems.step(state, on_device)["l1"])  # reading a number waits for the step

    run(WARM_UP_STEPS)
    return lambda: run(steps)


def measure(
    *, device: str, width: int, crop: int, batch: int, compiled: bool, repeats: int, steps: int
) -> dict[str, Any]:
    """Time steps in turns; return the median crops a second, and ratios to FP32."""
    data_set = synthetic.textures(8, 2, side_px=crop)
    schedule = Schedule(batch=batch, crop_px=crop, steps=1)
    draw = Batches(divide(data_set, schedule), schedule, Augmentation(flips=True), (), align_px=16)
    drawn = next(iter(draw(0, 1)))
    modes = {"fp32": Compute(device), "bf16": Compute(device, "bf16")}
    if compiled:
        modes["bf16 compiled"] = Compute(device, "bf16", compiled=True)
    calls = {name: _training_steps(mode, width, drawn, steps) for name, mode in modes.items()}
    timings = time_in_turns(calls, repeats)
    medians = {name: statistics.median(seconds) / steps for name, seconds in timings.wall.items()}
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
def main(threads: int | None, out: Path, **options: Any) -> None:
    """Time training steps."""
    if threads:
        torch.set_num_threads(threads)
    result = measure(**options)
    write_result(out, result)
    click.echo(f"crops a second: {result['crops_a_second']}, ratios {result['ratio_to_fp32']}")


if __name__ == "__main__":
    main()
