"""Tune the parameters of the dense CRF for a model on annotated images, and store them in its card.

::

    histo-export tune-crf bundles/mine --data DIR

Use images that the model was not trained on, such as its validation images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histostream.export.trained import find_checkpoint
from histostream.runtime import Engine, open_engine
from histostream.runtime.bundle.card import read_card, write_card
from histostream.runtime.crf import CrfParams, dense_crf
from histostream.runtime.crf.options import read_params
from histostream.runtime.crf.stage import to_probabilities
from histostream.runtime.pixels import score_pixels
from histostream.training import batches, checkpoint, datasets
from histostream.training.augment import zoom
from histostream.training.data import Sample
from histostream.training.metrics import Confusion
from histostream.training.schedule import Schedule
from histostream.wsi.errors import HistoError

# Values to try for each parameter, one parameter after the other.
CANDIDATES: dict[str, tuple[float, ...]] = {
    "w1": (0.0, 1.0, 2.0, 5.0, 10.0),
    "theta_alpha": (3.0, 6.0, 12.0, 25.0, 50.0),
    "theta_beta": (4.0, 8.0, 16.0, 32.0),
    "w2": (0.0, 1.0, 3.0, 6.0),
    "theta_gamma": (1.0, 2.0, 4.0),
}
ROUNDS = 2
START = CrfParams(w1=2.0, theta_alpha=6.0, theta_beta=16.0, w2=1.0, theta_gamma=2.0)


class TuneError(HistoError, ValueError):
    """Parameters cannot be tuned with these images and this model."""


@dataclass(frozen=True, slots=True)
class TuningResult:
    """The result of a search.

    Attributes
    ----------
    params
        The best parameters; None if no CRF is better than none.
    dice, dice_without
        Mean Dice over all classes but the first, pooled over the images: with these parameters, and without a CRF.
    tried
        Number of parameter sets that were tried.
    """

    params: CrfParams | None
    dice: float
    dice_without: float
    tried: int


Scored = tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]  # image, p, truth


def tune_crf(
    bundle: Path,
    samples: Sequence[Sample],
    mpp: float | None,
    *,
    backend: str = "auto",
    say: Callable[[str], None] = lambda _: None,
) -> TuningResult:
    """Search the parameters that raise Dice, and write them into the bundle's card.

    Each parameter in turn is set to the best of its values while the others stay fixed; this is done twice. A card that
    has parameters already keeps them unless better ones are found.

    Parameters
    ----------
    bundle
        The model.
    samples
        Annotated images.
    mpp
        Their resolution; None: that of the model.
    backend
        As `open_engine`.
    say
        Called with a line for each improvement.

    Raises
    ------
    TuneError
        If there are no images, or their classes are not the model's.
    CardError, EngineError
        If the bundle cannot be used.
    OutputError
        If the card cannot be written.
    """
    if not samples:
        raise TuneError("no annotated images; pass a set with labels to --data")
    card = read_card(bundle)
    engine = open_engine(bundle, backend=backend)
    try:
        scored = [_scored(sample, engine, mpp) for sample in samples]
    finally:
        engine.close()
    tuned = search(scored, start=read_params("", card.crf, mpp=card.mpp) if card.crf else START, say=say)
    if tuned.params is not None:
        keep_params(bundle, tuned.params)
    return tuned


def choose_samples(source: str, part: str, run: Path | None = None) -> tuple[tuple[Sample, ...], float | None]:
    """Open a data set and choose images of it.

    Parameters
    ----------
    source
        As `datasets.open_dataset`.
    part
        "validation", "test", "train" or "all"; all if the set has no such part.
    run
        A training run on this set; its schedule defines the parts.

    Returns
    -------
    The images, and their resolution; None if it is not known.

    Raises
    ------
    DataError, CheckpointError
        If the set or the run cannot be used.
    """
    data_set = datasets.open_dataset(source)
    all_samples = (*data_set.train, *data_set.validation, *data_set.test)
    if part == "all":
        return all_samples, data_set.mpp
    if run is None:
        return batches.parts_of(data_set)[part] or all_samples, data_set.mpp
    recipe = checkpoint.read(find_checkpoint(run)).record["recipe"]
    return batches.parts_of(data_set, Schedule(**recipe["schedule"]))[part], data_set.mpp


def search(
    scored: Sequence[Scored],
    *,
    start: CrfParams = START,
    say: Callable[[str], None] = lambda _: None,
) -> TuningResult:
    """Search the parameters for images whose scores are known; see `tune_crf`.

    Parameters
    ----------
    scored
        For each image: pixels (H, W, C) uint8, probabilities (K, H, W) and true labels (H, W).
    start
        Parameters with which the search begins.
    say
        Called with a line for each improvement.
    """
    classes = len(scored[0][1])
    dice_without = _mean_dice(((p.argmax(axis=0), truth) for _, p, truth in scored), classes)

    @cache
    def dice(params: CrfParams) -> float:
        refined = ((dense_crf(image, p, params).argmax(axis=0), truth) for image, p, truth in scored)
        return _mean_dice(refined, classes)

    best = start
    for _ in range(ROUNDS):
        before = best
        for name, values in CANDIDATES.items():
            for value in values:
                candidate = CrfParams(**{**asdict(best), name: value})
                if dice(candidate) > dice(best):
                    best = candidate
                    say(f"{name}={value:g}: Dice {dice(best):.4f} ({dice_without:.4f} without CRF)")
        if best == before:
            break
    best_dice = dice(best)
    params = best if best_dice > dice_without else None
    return TuningResult(params, best_dice, dice_without, dice.cache_info().currsize)


def _mean_dice(pairs: Iterable[tuple[NDArray[np.integer], NDArray[np.uint8]]], classes: int) -> float:
    """Return the mean Dice over all classes but the first, pooled over images."""
    pooled = Confusion(classes)
    for labels, truth in pairs:
        pooled.add(labels, truth)
    return float(np.nanmean(pooled.dice()[1:]))


def _scored(sample: Sample, engine: Engine, mpp: float | None) -> Scored:
    card = engine.card
    image, truth = zoom(sample.image, sample.labels, 1.0 if mpp is None else mpp / card.mpp)
    if image.shape[2] != card.channels:
        raise TuneError(
            f"{sample.name}: {image.shape[2]} channels; the model takes {card.channels}: convert the images"
        )
    if truth.max() >= len(card.classes):
        raise TuneError(
            f"{sample.name}: label {truth.max()}; the model has {len(card.classes)} classes: "
            "use data of the same classes"
        )
    scores = score_pixels(image, engine)
    return image, to_probabilities(scores, np.zeros(truth.shape, bool)), truth


def keep_params(bundle: Path, params: CrfParams) -> None:
    """Write parameters into a bundle's card, which is replaced once the new one is complete.

    Raises
    ------
    CardError
        If the bundle has no card.
    OutputError
        If the card cannot be written.
    """
    write_card(replace(read_card(bundle), crf=asdict(params)), bundle)
