r"""Score a nucleus model on annotated images that it was not trained on.

::

    python -m histostream.benchmarks.accuracy.nuclei --data ../shared/data \
        --out benchmarks/results/accuracy-nuclei.json

TNBC (Naylor et al. 2018, 50 images) and the MoNuSeg test set (14 images), both at 0.25 um per
pixel. Images are averaged down to the model's resolution, labels are taken at the pixel centres.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np
from PIL import Image

from histostream.runtime import Engine, default_bundle, open_engine, segment_pixels
from histostream.runtime.bundle.card import ModelCard, read_card
from histostream.runtime.crf import CrfParams, dense_crf
from histostream.runtime.crf.options import read_params
from histostream.runtime.crf.stage import to_probabilities
from histostream.runtime.pixels import score_pixels
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
        Folder for the images with what was found outlined.
    crf
        Refines the labels; None: nothing does.

    Returns
    -------
    Pooled pixel accuracy and Dice (F-score) of the nuclei, and their mean over images.
    """
    pooled = Confusion(len(engine.card.classes))
    per_image = {}
    for sample in samples:
        image, truth = zoom(sample.image, sample.labels, SOURCE_MPP / engine.card.mpp)
        found = segment_pixels(image, engine) if crf is None else refined(image, engine, crf)
        one = Confusion(len(engine.card.classes))
        one.add(found, truth)
        pooled.counts += one.counts
        per_image[sample.name] = round(float(one.dice()[1]), 4)
        if sheet:
            sheet.mkdir(parents=True, exist_ok=True)
            Image.fromarray(outlined(image, found)).save(sheet / f"{Path(sample.name).stem}.png")
    return {
        "images": len(samples),
        "pixel_accuracy": round(pooled.accuracy(), 4),
        "dice_pooled": round(float(pooled.dice()[1]), 4),
        "dice_mean_over_images": round(float(np.mean(list(per_image.values()))), 4),
        "dice_worst_image": min(per_image.values()),
        "dice_per_image": per_image,
    }


def refined(image: np.ndarray, engine: Engine, crf: CrfParams) -> np.ndarray:
    """Segment an image, and refine the labels by a dense CRF."""
    p = to_probabilities(score_pixels(image, engine), np.zeros(image.shape[:2], bool))
    return np.asarray(dense_crf(image, p, crf).argmax(axis=0))


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
        said = score_bundle(Path(*models) if models else default_bundle(), samples, sheets)
    else:
        named = dict(_named(text) for text in models)
        said = {
            "models": {
                name: score_bundle(bundle, samples, sheets / name if sheets else None) for name, bundle in named.items()
            }
        }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(said, indent=1) + "\n")


def _named(text: str) -> tuple[str, Path]:
    name, equals, bundle = text.partition("=")
    if not (name and equals and bundle):
        raise click.BadParameter(f"--model {text!r}: several models have names, write NAME=BUNDLE")
    return name, Path(bundle)


def score_bundle(bundle: Path, sets: dict[str, list[Sample]], sheets: Path | None = None) -> dict[str, object]:
    """Score a model in every precision that it has, and with its CRF; see `score`."""
    card = read_card(bundle)
    scores: dict[str, object] = {}
    for precision in card.precisions:
        engine = open_engine(bundle, backend="cpu", precision=precision)
        found = {}
        for name, samples in sets.items():
            sheet = sheets / precision / name if sheets else None
            found[name] = score(samples, engine, sheet)
            _tell(f"{bundle} {precision} {name}", found[name])
        scores[precision] = {"engine": engine.name, **found}
        if card.crf and precision == "fp32":
            crf = read_params("", card.crf, mpp=card.mpp)
            found = {}
            for name, samples in sets.items():
                sheet = sheets / "crf" / name if sheets else None
                found[name] = score(samples, engine, sheet, crf)
                _tell(f"{bundle} {precision} with CRF {name}", found[name])
            scores[CRF_ROW] = {"engine": engine.name, "crf": asdict(crf), **found}
    return {
        "model_sha256": card.files,
        "mpp": card.mpp,
        "training": _record(card),
        "scores": scores,
    }


def _tell(what: str, found: dict[str, object]) -> None:
    click.echo(
        f"{what}: Dice {found['dice_pooled']} pooled, {found['dice_mean_over_images']} mean over "
        f"{found['images']} images"
    )


def _record(card: ModelCard) -> dict[str, object]:
    """Return what the model was trained with, as far as its card says."""
    return {k: v for k, v in card.training.items() if k in ("recipe", "commit", "step")}


if __name__ == "__main__":
    main()
