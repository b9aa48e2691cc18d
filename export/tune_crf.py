"""Parameters of the dense CRF, learnt for a model from annotated images, and kept in its card.

::

    histo-export tune-crf bundles/mine --data DIR

Give it images that the model was not trained on: its validation images.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histostream.export.trained import find_checkpoint
from histostream.runtime import Engine, open_engine
from histostream.runtime.bundle.card import read_card, write_card
from histostream.runtime.crf import CrfParams, dense_crf
from histostream.runtime.crf.options import read_params
from histostream.runtime.crf.stage import to_probabilities
from histostream.runtime.slide_run import score_pixels
from histostream.training import batches, checkpoint, datasets
from histostream.training.augment import zoom
from histostream.training.data import Sample
from histostream.training.metrics import Confusion
from histostream.training.schedule import Schedule
from histostream.wsi.errors import HistoError, OutputError

# What is tried of each parameter; a search goes along one after the other.
AXES: dict[str, tuple[float, ...]] = {
    "w1": (0.0, 1.0, 2.0, 5.0, 10.0),
    "theta_alpha": (3.0, 6.0, 12.0, 25.0, 50.0),
    "theta_beta": (4.0, 8.0, 16.0, 32.0),
    "w2": (0.0, 1.0, 3.0, 6.0),
    "theta_gamma": (1.0, 2.0, 4.0),
}
ROUNDS = 2
START = CrfParams(w1=2.0, theta_alpha=6.0, theta_beta=16.0, w2=1.0, theta_gamma=2.0)


class TuneError(HistoError, ValueError):
    """Images and a model from which nothing can be learnt."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """What a search found.

    Attributes
    ----------
    params
        The best parameters; None where no CRF is better than none.
    dice, without
        Mean Dice over the classes but the first, pooled over the images; with them and without.
    tried
        Number of parameter sets.
    """

    params: CrfParams | None
    dice: float
    without: float
    tried: int


Scored = tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]  # image, p, truth


def tune_crf(
    bundle: Path,
    samples: Sequence[Sample],
    mpp: float | None,
    *,
    backend: str = "auto",
    say: Callable[[str], None] = lambda _: None,
) -> Tuned:
    """Search parameters that raise Dice, and write them into the bundle's card.

    Each parameter in turn is set to the best of its values, the others held, twice over. A card
    that has parameters keeps them unless better ones are found.

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
        Told of each improvement.

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
        raise TuneError("no annotated image to learn from: name a set with labels, --data")
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


def samples_of(source: str, part: str, run: Path | None = None) -> tuple[tuple[Sample, ...], float | None]:
    """Open a set and choose images of it.

    Parameters
    ----------
    source
        As of `datasets.open_dataset`.
    part
        "validation", "test", "train" or "all"; all where the set has no such part.
    run
        A training run on this set, which then says what the parts are.

    Returns
    -------
    The images, and their resolution, None if not known.

    Raises
    ------
    DataError, CheckpointError
        If the set or the run cannot be used.
    """
    found = datasets.open_dataset(source)
    every = (*found.train, *found.validation, *found.test)
    if part == "all":
        return every, found.mpp
    if run is None:
        return batches.parts_of(found)[part] or every, found.mpp
    recipe = checkpoint.read(find_checkpoint(run)).record["recipe"]
    return batches.parts_of(found, Schedule(**recipe["schedule"]))[part], found.mpp


def search(
    scored: Sequence[Scored],
    *,
    start: CrfParams = START,
    say: Callable[[str], None] = lambda _: None,
) -> Tuned:
    """Search parameters for images whose scores are known; see `tune_crf`.

    Parameters
    ----------
    scored
        Image (H, W, C) uint8, probabilities (K, H, W) and true labels (H, W) of each.
    start, say
        Where the search begins, and who is told of improvements.
    """
    classes = len(scored[0][1])
    without = _dice(((p.argmax(axis=0), truth) for _, p, truth in scored), classes)
    known: dict[CrfParams, float] = {}

    def dice(params: CrfParams) -> float:
        if params not in known:
            refined = ((dense_crf(image, p, params).argmax(axis=0), truth) for image, p, truth in scored)
            known[params] = _dice(refined, classes)
        return known[params]

    best = start
    for _ in range(ROUNDS):
        before = best
        for name, values in AXES.items():
            for value in values:
                one = CrfParams(**{**asdict(best), name: value})
                if dice(one) > dice(best):
                    best = one
                    say(f"{name}={value:g}: Dice {dice(best):.4f} ({without:.4f} without CRF)")
        if best == before:
            break
    found = dice(best)
    return Tuned(best if found > without else None, found, without, len(known))


def _dice(pairs: Iterable[tuple[NDArray[np.integer], NDArray[np.uint8]]], classes: int) -> float:
    """Mean Dice over the classes but the first, pooled over images."""
    pooled = Confusion(classes)
    for found, truth in pairs:
        pooled.add(found, truth)
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
    """Write parameters into a bundle's card, which is replaced when the new one is whole.

    Raises
    ------
    CardError
        If there is no card to write them into.
    OutputError
        If it cannot be written.
    """
    card = replace(read_card(bundle), crf=asdict(params))
    try:
        with tempfile.TemporaryDirectory(dir=bundle) as scratch:
            write_card(card, Path(scratch))
            (Path(scratch) / "card.json").replace(bundle / "card.json")
    except OSError as error:
        raise OutputError(f"{bundle}: its card cannot be written ({error.strerror}); check its permissions") from error
