r"""Score a nucleus model on annotated images that it was not trained on.

::

    python -m histostream.benchmarks.accuracy.nuclei --data ../shared/data \
        --out benchmarks/results/accuracy-nuclei.json

TNBC (Naylor et al. 2018, 50 images) and the MoNuSeg test set (14 images), both at 0.25 um per
pixel. Images are averaged down to the model's resolution; labels are taken at the pixel centres.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
import numpy as np
from PIL import Image

from histostream.benchmarks.accuracy.score import segment_with_crf
from histostream.benchmarks.report import write_result
from histostream.runtime import Engine, default_bundle, open_engine, segment_pixels
from histostream.runtime.bundle.card import read_card
from histostream.runtime.crf import CrfParams
from histostream.runtime.crf.options import read_params
from histostream.training.augment import zoom
from histostream.training.data import Sample
from histostream.training.datasets.folder import read_folder
from histostream.training.metrics import Confusion

SETS = {"tnbc": "nuclei-tnbc", "monuseg-test": "nuclei-monuseg/test"}
CRF_ROW = "fp32, CRF"  # of the result file
SOURCE_MPP = 0.25  # both sets: 40x


def score(
    samples: list[Sample],
    engine: Engine,
    sheet: Path | None = None,
    crf: CrfParams | None = None,
) -> dict[str, object]:
    """Score a model on images at `SOURCE_MPP`.

    Parameters
    ----------
    samples, engine
        The images, and the model.
    sheet
        Folder for the images with the segmented nuclei outlined.
    crf
        Dense CRF that refines the labels; None: none.

    Returns
    -------
    Pooled pixel accuracy and Dice (F-score) of the nuclei, and their mean over images.
    """
    pooled = Confusion(len(engine.card.classes))
    per_image = {}
    for sample in samples:
        image, truth = zoom(sample.image, sample.labels, SOURCE_MPP / engine.card.mpp)
        labels = segment_pixels(image, engine) if crf is None else segment_with_crf(image, engine, crf)
        one = Confusion(len(engine.card.classes))
        one.add(labels, truth)
        pooled.counts += one.counts
        per_image[sample.name] = round(float(one.dice()[1]), 4)
        if sheet:
            sheet.mkdir(parents=True, exist_ok=True)
            Image.fromarray(outlined(image, labels)).save(sheet / f"{Path(sample.name).stem}.png")
    return {
        "images": len(samples),
        "pixel_accuracy": round(pooled.accuracy(), 4),
        "dice_pooled": round(float(pooled.dice()[1]), 4),
        "dice_mean_over_images": round(float(np.mean(list(per_image.values()))), 4),
        "dice_worst_image": min(per_image.values()),
        "dice_per_image": per_image,
    }


def outlined(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Draw the borders of label 1 in green on a copy of an image (H, W, 3)."""
    inside = labels == 1
    core = inside.copy()
    for axis in (0, 1):
        for shift in (1, -1):
            core &= np.roll(inside, shift, axis=axis)
    drawn = image.copy()
    drawn[inside & ~core] = (0, 255, 0)
    return drawn


@click.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="[NAME=]BUNDLE",
    help="Default: the shipped. Several have names.",
)
@click.option("--data", "data_dir", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON to write.")
@click.option("--sheets", type=click.Path(path_type=Path), help="Folder for outlined images.")
def main(models: tuple[str, ...], data_dir: Path, out: Path, sheets: Path | None) -> None:
    """Score nucleus models on TNBC and the MoNuSeg test set, in every precision that they have."""
    samples = {name: read_folder(data_dir / folder) for name, folder in SETS.items()}
    if len(models) < 2 and "=" not in "".join(models):
        result: dict[str, object] = score_bundle(Path(*models) if models else default_bundle(), samples, sheets)
    else:
        named = dict(_named(text) for text in models)
        result = {
            "models": {
                name: score_bundle(bundle, samples, sheets / name if sheets else None) for name, bundle in named.items()
            }
        }
    write_result(out, result)


def _named(text: str) -> tuple[str, Path]:
    name, equals, bundle = text.partition("=")
    if not (name and equals and bundle):
        raise click.BadParameter(f"--model {text!r}: several models have names, write NAME=BUNDLE")
    return name, Path(bundle)


def score_bundle(bundle: Path, sets: dict[str, list[Sample]], sheets: Path | None = None) -> dict[str, object]:
    """Score a model in every precision that it has, and with its CRF; see `score`."""
    card = read_card(bundle)
    scores: dict[str, object] = {}

    def score_sets(engine: Engine, folder: str, title: str, crf: CrfParams | None = None) -> dict[str, object]:
        figures = {}
        for name, samples in sets.items():
            figures[name] = score(samples, engine, sheets / folder / name if sheets else None, crf)
            click.echo(
                f"{bundle} {title} {name}: Dice {figures[name]['dice_pooled']} pooled, "
                f"{figures[name]['dice_mean_over_images']} mean over {figures[name]['images']} images"
            )
        return {"engine": engine.name, **({"crf": asdict(crf)} if crf else {}), **figures}

    for precision in card.precisions:
        engine = open_engine(bundle, backend="cpu", precision=precision)
        scores[precision] = score_sets(engine, precision, precision)
        if card.crf and precision == "fp32":
            crf = read_params("", card.crf, mpp=card.mpp)
            scores[CRF_ROW] = score_sets(engine, "crf", f"{precision} with CRF", crf)
    return {
        "model_sha256": card.files,
        "mpp": card.mpp,
        "training": {k: v for k, v in card.training.items() if k in ("recipe", "commit", "step")},
        "scores": scores,
    }


if __name__ == "__main__":
    main()
