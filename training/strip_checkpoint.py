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

from histostream.training import checkpoint
from histostream.training.methods import load_method
from histostream.wsi.errors import HistoError


def strip_checkpoint(run: Path, out: Path) -> None:
    """Write the networks of ``run/best`` that are deployed to ``out``, in half precision.

    Raises
    ------
    CheckpointError
        If the run has no checkpoint, or it is damaged.
    """
    saved = checkpoint.read(run / "best")
    method = load_method(saved.method)
    state = method.build(method.Config(**saved.config), len(saved.classes), saved.channels)
    checkpoint.load(run / "best", state)
    deployed = {name: state.modules[name].to(torch.float16) for name in state.needed}
    small = replace(state, modules=deployed, optimizers={})
    record = {**saved.record, "weights": "rounded to float16 after training"}
    checkpoint.save(out, replace(saved, record=record), small)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def main(run: Path, out: Path) -> None:
    """Make the best checkpoint of RUN small enough to ship, in folder OUT."""
    try:
        strip_checkpoint(run, out)
    except HistoError as error:
        click.echo(f"strip_checkpoint: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
