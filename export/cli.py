"""``histo-export``: a checkpoint in, a model bundle out."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from histostream.wsi.errors import HistoError


@click.command(context_settings={"show_default": True})
@click.version_option(package_name="histostream")
@click.option("--method", "method_name", required=True, help="Which paper the model is of.")
@click.option(
    "--checkpoint", "run", type=click.Path(path_type=Path),
    help="Folder of a training run or checkpoint; default: the weights that ship.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path), help="Bundle to write.  [default: bundles/METHOD]"
)
def main(method_name: str, run: Path | None, out: Path | None) -> None:
    """Export a trained model to a bundle that histo-infer runs."""
    try:
        from histostream.export.bundle import export_bundle
    except ImportError as error:
        click.echo(
            f"histo-export: {error.name} is not installed: pip install 'histostream[export]'",
            err=True,
        )
        sys.exit(1)
    out = out or Path("bundles") / method_name
    try:
        card = export_bundle(method_name, run, out)
    except HistoError as error:
        click.echo(f"histo-export: {error}", err=True)
        sys.exit(1)
    for name, parity in card.parity.items():
        click.echo(
            f"{out / name}: labels agree with torch on {parity['label_agreement']:.4%} of "
            f"{parity['pixels'] / 1e6:.1f} Mpx (largest score difference "
            f"{parity['max_difference']}/255)"
        )
    click.echo(f"{out}: {card.tile_px} px tiles at {card.mpp:g} um/px, halo {card.halo_px} px")


if __name__ == "__main__":
    main()
