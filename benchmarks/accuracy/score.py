"""Score label maps against a data set: those of a bundle, of a checkpoint, or from a folder.

Scores are at the resolution of the data set: an image is resized to the model's resolution, and the labels are resized
back (nearest), so that models of different resolutions can be compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histostream.benchmarks.accuracy.object_metrics import MIN_GLAND_PX, ObjectScores, instances_from_labels
from histostream.export.bundle import Options
from histostream.export.trained import export_checkpoint, find_checkpoint
from histostream.runtime import Engine, open_engine, segment_pixels
from histostream.runtime.crf import CrfParams, dense_crf
from histostream.runtime.crf.stage import to_probabilities
from histostream.runtime.pixels import score_pixels
from histostream.training import batches, checkpoint, data, datasets, image_files
from histostream.training.augment import zoom
from histostream.training.data import DataError, DataSet, Sample
from histostream.training.metrics import Confusion, PerImage
from histostream.training.schedule import Schedule
from histostream.wsi.errors import HistoError

Labels = NDArray[np.uint8]
Predict = Callable[[Sample], Labels]
NOT_ANALYSED = 255  # in label maps of histo-infer; counts as class 0 here, so that it costs
PARTS = ("auto", "test", "validation", "train", "all")


class ScoreError(HistoError, ValueError):
    """Label maps do not fit the data set."""


def choose(data_set: DataSet, part: str, schedule: Schedule | None = None) -> tuple[Sample, ...]:
    """Return the images to score.

    Parameters
    ----------
    data_set
        The data set.
    part
        One of `PARTS`; "auto": the test part if there is one, else all.
    schedule
        Schedule of the scored run, which defines the images that were held back; None: the official parts.

    Raises
    ------
    ScoreError
        If that part is empty.
    """
    all_samples = (*data_set.train, *data_set.validation, *data_set.test)
    parts = batches.parts_of(data_set, schedule)
    if part == "auto":
        return parts["test"] or all_samples
    chosen = all_samples if part == "all" else parts[part]
    if not chosen:
        raise ScoreError(f"{data_set.name}: has no {part} part; use --part all")
    return chosen


def score_set(
    source: str,
    *,
    bundle: Path | None = None,
    run: Path | None = None,
    labels: Path | None = None,
    part: str = "auto",
    mpp: float | None = None,
    min_object_px: int = MIN_GLAND_PX,
    backend: str = "auto",
    precision: str = "auto",
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Score one of a bundle, a run and a folder of label maps against a data set.

    A run that was trained on this very set is scored, with ``part="auto"``, on the images that it
    held back.

    Raises
    ------
    ScoreError
        If model and set have different classes, or the label maps do not fit.
    HistoError
        If the set, the model or the checkpoint cannot be used.
    """
    data_set = datasets.open_dataset(source)
    mpp = mpp or data_set.mpp
    schedule = _held_back(run, data_set) if run is not None else None
    samples = choose(data_set, part, schedule)
    count = len(data_set.train) + len(data_set.validation) + len(data_set.test)
    if part == "auto":
        part = "all" if len(samples) == count else "test"
    classes = [name for name, _ in data_set.classes]
    with predicting(samples, mpp, bundle=bundle, run=run, labels=labels, backend=backend, precision=precision) as (
        predict,
        model,
    ):
        classes = classes or list(model.get("classes", ()))
        if "classes" in model and len(model["classes"]) != len(classes):
            raise ScoreError(
                f"the model has classes {', '.join(model['classes'])}, {data_set.name} "
                f"{', '.join(classes)}: they do not go together; "
                "use a set of the same classes"
            )
        if not classes:
            count = data.class_count(samples)
            classes = [f"class {k}" for k in range(count)]
        scores = score(samples, predict, classes, min_object_px=min_object_px, say=say)
    return {
        "data": data_set.name,
        "data_sha256": data.checksum(samples),
        "part": f"{part}, as the run divided the set" if schedule else part,
        "mpp": mpp,
        "model": model,
        **scores,
    }


def _held_back(run: Path, data_set: DataSet) -> Schedule | None:
    """Return the schedule of a run if it was trained on this data set, whose parts it then defines."""
    saved = checkpoint.read(find_checkpoint(run))
    record = saved.record
    all_samples = (*data_set.train, *data_set.validation, *data_set.test)
    at = data_set.at_mpp(saved.mpp)
    here = {data.checksum(all_samples), data.checksum((*at.train, *at.validation, *at.test))}
    if record.get("data_sha256") not in here:
        return None
    return Schedule(**record["recipe"]["schedule"])


@contextmanager
def predicting(
    samples: Sequence[Sample],
    mpp: float | None,
    *,
    bundle: Path | None = None,
    run: Path | None = None,
    labels: Path | None = None,
    backend: str = "auto",
    precision: str = "auto",
) -> Iterator[tuple[Predict, dict[str, Any]]]:
    """Open a bundle, a run or a folder of label maps; exactly one must be given.

    Parameters
    ----------
    samples
        Images that will be scored.
    mpp
        Their resolution; None: that of the model.
    bundle
        A model bundle.
    run
        A training run or checkpoint. It is exported first, and its parity is checked on the scored images, so that the
        deployed network is scored.
    labels
        A folder with one label map an image, ``<name>.png`` or ``.tif``, at the set's resolution.
    backend, precision
        As `open_engine`.

    Yields
    ------
    A function from a sample to its labels, and a description of the model.
    """
    if labels is not None:
        yield _from_folder(labels), {"labels": str(labels)}
        return
    path = run or bundle
    assert path is not None
    with engine_for(samples, mpp, bundle=bundle, run=run, backend=backend, precision=precision) as engine:
        yield predictor(engine, mpp), _model(engine, path)


@contextmanager
def engine_for(
    samples: Sequence[Sample],
    mpp: float | None,
    *,
    bundle: Path | None = None,
    run: Path | None = None,
    backend: str = "auto",
    precision: str = "auto",
) -> Iterator[Engine]:
    """Open the engine of a bundle, or of a run that is exported first; as of `predicting`."""
    with tempfile.TemporaryDirectory() as scratch:
        if run is not None:
            saved = checkpoint.read(find_checkpoint(run))
            bundle, images = Path(scratch) / "bundle", Path(scratch) / "scored"
            _write_images(images, samples, _factor(mpp, saved.mpp))
            options = Options(precisions=("fp32",), tensorrt="off", calibrate=images)
            export_checkpoint(saved.method, run, bundle, options)
        assert bundle is not None
        engine = open_engine(bundle, backend=backend, precision=precision)
        try:
            yield engine
        finally:
            engine.close()


def score(
    samples: Sequence[Sample],
    predict: Predict,
    classes: Sequence[str],
    *,
    min_object_px: int = MIN_GLAND_PX,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Score predictions.

    Pixel scores for every class, pooled over all pixels and as the mean over images; where the
    set has instances and two classes, object scores too, of the connected regions of class 1.

    Parameters
    ----------
    samples, predict
        The images, and a function that labels them.
    classes
        Names of the classes.
    min_object_px
        Smaller regions are no objects.
    say
        Called with a line for each image.

    Raises
    ------
    ScoreError
        If a label map has another size than its image, or a label without a class.
    """
    per_image = PerImage(len(classes))
    objects = ObjectScores()
    rows: dict[str, dict[str, float]] = {}
    with_objects = len(classes) == 2 and all(s.instances is not None for s in samples)
    for sample in samples:
        labels = predict(sample)
        if labels.shape != sample.labels.shape:
            raise ScoreError(
                f"{sample.name}: its label map is {labels.shape}, the image {sample.labels.shape}; save it at that size"
            )
        labels = np.where(labels == NOT_ANALYSED, 0, labels)
        if labels.max() >= len(classes):
            raise ScoreError(
                f"{sample.name}: label {labels.max()}, but there are {len(classes)} classes; "
                "use a set of the same classes"
            )
        one = Confusion(len(classes))
        one.add(labels, sample.labels)
        per_image.add(labels, sample.labels)
        rows[sample.name] = {
            "accuracy": _short(one.accuracy()),
            **{f"f_{c}": _short(v) for c, v in zip(classes, one.dice(), strict=True)},
        }
        if with_objects:
            assert sample.instances is not None
            regions = instances_from_labels(labels, 1, min_px=min_object_px)
            objects.add(regions, sample.instances)
        say(f"{sample.name}: {rows[sample.name]}")
    pooled = per_image.pooled()
    return {
        "classes": list(classes),
        "images": len(samples),
        "pooled": _pixel_scores(lambda measure: measure(pooled), classes),
        "per_image_mean": _pixel_scores(lambda measure: per_image.reduce(measure, "per_image_mean"), classes),
        **({"objects": _object_scores(objects, min_object_px)} if with_objects else {}),
        "confusion": pooled.counts.tolist(),
        "each_image": rows,
    }


def _pixel_scores(reduce: Callable[[Any], Any], classes: Sequence[str]) -> dict[str, Any]:
    def named(values: NDArray[np.float64]) -> dict[str, float | None]:
        return {name: _short(v) for name, v in zip(classes, values, strict=True)}

    return {
        "accuracy": _short(reduce(Confusion.accuracy)),
        "mean_class_accuracy": _short(reduce(Confusion.mean_class_accuracy)),
        "f": named(reduce(Confusion.dice)),
        "mean_f": _short(reduce(Confusion.mean_dice)),
        "jaccard": named(reduce(Confusion.jaccard)),
        "mean_iou": _short(reduce(Confusion.mean_jaccard)),
    }


def _object_scores(objects: ObjectScores, min_px: int) -> dict[str, Any]:
    return {
        "min_object_px": min_px,
        "f1_pooled": _short(objects.f1_pooled()),
        "f1_per_image_mean": _short(objects.f1_per_image_mean()),
        "dice_per_image_mean": _short(objects.dice_per_image_mean()),
        "hausdorff_px_per_image_mean": round(objects.hausdorff_px_per_image_mean(), 2),
        "hausdorff_capped_images": objects.capped(),
    }


def _short(value: float) -> float:
    return round(float(value), 5)


def markdown(result: dict[str, Any]) -> str:
    """Return a result as a page."""
    pooled, means = result["pooled"], result["per_image_mean"]
    lines = [
        f"# {result['data']}, {result['part']}: {result['images']} images",
        "",
        f"Of {', '.join(f'{k} {_plain(v)}' for k, v in result['model'].items())}.",
        "",
        "| | pooled over pixels | mean over images |",
        "|---|---|---|",
        *(f"| F {c} | {pooled['f'][c]:.4f} | {means['f'][c]:.4f} |" for c in result["classes"]),
        *(
            f"| {name} | {pooled[key]:.4f} | {means[key]:.4f} |"
            for name, key in (
                ("mean F", "mean_f"),
                ("pixel accuracy", "accuracy"),
                ("mean class accuracy", "mean_class_accuracy"),
                ("mean IoU", "mean_iou"),
            )
        ),
    ]
    if "objects" in result:
        o = result["objects"]
        lines += [
            "",
            f"Objects (regions of {o['min_object_px']} px or more, GlaS rules): "
            f"F1 {o['f1_pooled']:.4f} pooled, {o['f1_per_image_mean']:.4f} mean over images; "
            f"object Dice {o['dice_per_image_mean']:.4f}; "
            f"object Hausdorff {o['hausdorff_px_per_image_mean']:.1f} px "
            f"({o['hausdorff_capped_images']} images capped at their diagonal).",
        ]
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _factor(mpp: float | None, model_mpp: float) -> float:
    return 1.0 if mpp is None else mpp / model_mpp


def _write_images(folder: Path, samples: Sequence[Sample], factor: float) -> None:
    """Write images at the resolution of the model."""
    folder.mkdir()
    for i, sample in enumerate(samples):
        image, _ = zoom(sample.image, sample.labels, factor)
        grey = image.shape[2] == 1
        Image.fromarray(image[..., 0] if grey else image).save(folder / f"{i}.png")


def predictor(engine: Engine, mpp: float | None, crf: CrfParams | None = None) -> Predict:
    """Return a function that labels images of a resolution, optionally with the dense CRF.

    Parameters
    ----------
    engine, mpp
        The model, and the resolution of the images; None: that of the model.
    crf
        Dense CRF that refines the scores at the model's resolution; its lengths are in pixels there.
    """
    factor = _factor(mpp, engine.card.mpp)

    def predict(sample: Sample) -> Labels:
        image, _ = zoom(sample.image, sample.labels, factor)
        if image.shape[2] != engine.card.channels:
            raise ScoreError(
                f"{sample.name}: {image.shape[2]} channels; the model takes {engine.card.channels}: convert the images"
            )
        if crf is None:
            return _resized(segment_pixels(image, engine), sample.labels.shape)
        return _resized(segment_with_crf(image, engine, crf), sample.labels.shape)

    return predict


def segment_with_crf(image: NDArray[np.uint8], engine: Engine, crf: CrfParams) -> Labels:
    """Segment an image at the model's resolution, and refine the labels by the dense CRF."""
    p = to_probabilities(score_pixels(image, engine), np.zeros(image.shape[:2], np.bool_))
    labels: Labels = dense_crf(image, p, crf).argmax(axis=0).astype(np.uint8)
    return labels


def _from_folder(folder: Path) -> Predict:
    if not folder.is_dir():
        raise ScoreError(f"{folder}: no such folder; check the path")

    def predict(sample: Sample) -> Labels:
        stem = Path(sample.name).stem
        for path in (folder / f"{stem}.png", folder / f"{stem}.tif", folder / stem / "labels.tif"):
            if path.is_file():
                labels = image_files.read_labels(path)
                if labels.size and labels.max() > NOT_ANALYSED:
                    raise ScoreError(f"{path}: label {labels.max()}; classes are 0 to 254: save it with those")
                return labels.astype(np.uint8)
        raise DataError(f"{folder}: no label map {stem}.png or {stem}.tif in it; add it")

    return predict


def _resized(labels: Labels, shape: tuple[int, ...]) -> Labels:
    """Resize a label map (nearest)."""
    if labels.shape == shape:
        return labels
    picture = Image.fromarray(labels).resize((shape[1], shape[0]), Image.Resampling.NEAREST)
    return np.asarray(picture)


def _model(engine: Engine, path: Path) -> dict[str, Any]:
    card = engine.card
    return {
        "place": str(path),
        "method": card.method,
        "classes": [c.name for c in card.classes],
        "mpp": card.mpp,
        "engine": engine.name,
    }
