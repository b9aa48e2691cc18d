"""``histo-train``: annotated images in, a checkpoint out.

This module defines the options; libraries that are slow to import are loaded once they are parsed.
"""

from __future__ import annotations

from pathlib import Path

import click

from histostream.training.choices import PRECISIONS
from histostream.wsi.console import one_line_errors, show_only_our_warnings
from histostream.wsi.option_types import DEVICE_METAVAR, Device

COMMAND = "histo-train"

_one_line_errors = one_line_errors(
    COMMAND,
    out_of_memory="set schedule.batch or schedule.crop_px lower",
    stopped="the same command goes on where it was",
    extra="train",
    extras={"nibabel": "nifti"},
)


@click.group(invoke_without_command=True, context_settings={"show_default": True})
@click.version_option(package_name="histostream")
@click.option("--method", "method_name", default="imems", help="Method to train, as imems.")
@click.option(
    "--data",
    "source",
    metavar="SET",
    help="A folder with images/ and labels/ or labels_instance/, or a known set as glas:PATH (docs/data.md).",
)
@click.option(
    "--pool",
    "pools",
    multiple=True,
    metavar="NAME=SET",
    help="More images without labels, as target=monuseg:PATH; may be repeated.",
)
@click.option(
    "--validation",
    "validation_set",
    metavar="SET",
    help="Choose the checkpoint by this set's validation or training images, not by held-out ones.",
)
@click.option("--test", "test_set", metavar="SET", help="Score on this set's test part, or on all of it.")
@click.option("--out", "run", type=click.Path(path_type=Path), help="Folder of the run.")
@click.option(
    "--config",
    "configs",
    multiple=True,
    help="A recipe: a TOML file, or the name of a shipped one (nuclei, unet-c-single, ...); may "
    "be repeated, later ones add to earlier ones.",
)
@click.option(
    "--from",
    "start",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Start from the weights of a run, of a checkpoint, or of a method whose weights ship (imems), as far "
    "as they fit by name and shape.",
)
@click.option("--mpp", type=float, help="Resolution to train at, um per pixel; default: the set's own.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change the recipe, e.g. schedule.steps=900 or method.base_width=32; may be repeated.",
)
@click.option("--device", default="auto", type=Device(), metavar=DEVICE_METAVAR, help="What runs the networks.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", help="Of the networks in training.")
@click.option("--compile", "compiled", is_flag=True, help="Compile the networks (torch.compile).")
@click.option("--deterministic", is_flag=True, help="The same bits again on a GPU; slower.")
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=1,
    help="Processes that share each batch, one a GPU (or torchrun's own).",
)
@click.option("--tensorboard", is_flag=True, help="Write event files for TensorBoard into tensorboard/ of the run.")
@click.pass_context
@_one_line_errors
def main(
    context: click.Context,
    method_name: str,
    source: str | None,
    pools: tuple[str, ...],
    validation_set: str | None,
    test_set: str | None,
    run: Path | None,
    configs: tuple[str, ...],
    start: Path | None,
    mpp: float | None,
    settings: tuple[str, ...],
    device: str,
    precision: str,
    compiled: bool,
    deterministic: bool,
    processes: int,
    tensorboard: bool,
) -> None:
    """Train a method; the same command again goes on where a stopped run was.

    A finished run gets more steps by the same command with a higher schedule.steps.
    """
    show_only_our_warnings(COMMAND)
    if context.invoked_subcommand is not None:
        return
    if source is None or run is None:
        raise click.UsageError("--data and --out are needed; or use sample (--help shows it)")
    from histostream.training.command import RunOptions, run_training
    from histostream.training.device import Compute

    options = RunOptions(
        method=method_name,
        data=source,
        out=run,
        pools=pools,
        validation=validation_set,
        test=test_set,
        configs=configs,
        settings=settings,
        mpp=mpp,
        compute=Compute(device, precision, compiled, deterministic),
        processes=processes,
        start=start,
        tensorboard=tensorboard,
    )
    run_training(options)


@main.command("sample")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--data",
    "source",
    required=True,
    metavar="SET",
    help="Whose label maps are painted, as of histo-train.",
)
@click.option("--per-mask", type=click.IntRange(1), default=1, help="Images of each label map.")
@click.option("--masks", type=click.IntRange(0), default=0, help="Label maps, the first of the set; 0: all.")
@click.option("--swap", default="", metavar="A=B", help="Exchange two classes, by name or number.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Another seed, other images.")
@click.option("--device", default="auto", type=Device(), metavar=DEVICE_METAVAR, help="What runs the networks.")
@one_line_errors(
    COMMAND,
    out_of_memory="paint smaller images, or --device cpu",
    stopped="nothing was written",
    extra="train",
    extras={},
)
def paint_samples(
    run: Path,
    out: Path,
    source: str,
    per_mask: int,
    masks: int,
    swap: str,
    seed: int,
    device: str,
) -> None:
    """Paint the label maps of a set with the generators of RUN; write a data set to folder OUT.

    RUN is a run of the pyramid GAN.
    """
    from histostream.training import datasets
    from histostream.training import device as devices
    from histostream.training.methods.pyramid_gan import sample

    painter = sample.open_painter(run, devices.open_device(devices.Compute(device)))
    data = datasets.open_dataset(source)
    count = sample.sample(painter, data, out, per_mask=per_mask, masks=masks, swap=swap, seed=seed)
    click.echo(f"{count} images and their labels: {out}; to look at: {out / 'sheet.png'}")


if __name__ == "__main__":
    main()
