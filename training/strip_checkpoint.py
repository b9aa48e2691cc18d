"""Make a run's best checkpoint small enough to ship: the deployed network only, in half precision.

::

    python -m histostream.training.strip_checkpoint runs/nuclei training/weights/imems

Weights are rounded to float16 and stay so rounded in every export of them, so that the checkpoint
and the bundle that ship hold the same numbers. ``checkpoint.load`` returns them to float32.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import click
import torch

from histostream.training import checkpoint, methods
from histostream.wsi.errors import HistoError


def publish(run: Path, out: Path) -> None:
    """Write the networks of ``run/best`` that are deployed to ``out``, in half precision.

    Raises
    ------
    CheckpointError
        If the run has no checkpoint, or it is damaged.
    """
    said = checkpoint.read(run / "best")
    method = methods.load(said.method)
    state = method.build(method.Config(**said.config), len(said.classes), said.channels)
    checkpoint.load(run / "best", state)
    deployed = {name: state.modules[name].to(torch.float16) for name in state.needed}
    small = replace(state, modules=deployed, optimizers={})
    record = {**said.record, "weights": "rounded to float16 after training"}
    checkpoint.save(out, replace(said, record=record), small)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def main(run: Path, out: Path) -> None:
    """Make the best checkpoint of RUN small enough to ship, in folder OUT."""
    try:
        publish(run, out)
    except HistoError as error:
        click.echo(f"publish: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
