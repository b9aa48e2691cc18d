r"""Compare the share of touching objects that a run reports with the true one, where every nucleus is outlined.

::

    python -m histostream.benchmarks.accuracy.touching --data ../shared/data \
        --out benchmarks/results/accuracy-touching.json

TNBC (Naylor et al. 2018, 50 images) and MoNuSeg (20 images), both at 0.25 um per pixel, are averaged down to the
model's resolution. Objects are found in two label maps: that of the model, and the annotated one, in which every pixel
is right. A nucleus belongs to the object that holds at least half of its pixels. An object touches if it has two nuclei
or more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from histostream.benchmarks.accuracy.nuclei import SOURCE_MPP
from histostream.benchmarks.report import write_result
from histostream.runtime import default_bundle, open_engine, read_card, segment_pixels
from histostream.training.augment import zoom
from histostream.wsi.outputs.label_rows import SlideInfo
from histostream.wsi.outputs.objects.components import Complete
from histostream.wsi.outputs.objects.counting import CONCAVE, LARGE, ObjectCounter, counted_labels, find_components
from histostream.wsi.outputs.objects.ellipse import filled

SETS = {"tnbc": ("nuclei-tnbc",), "monuseg": ("nuclei-monuseg/test", "nuclei-monuseg/train")}
NUCLEUS = 1  # label of the model that ships
MIN_OBJECTS = 20  # of an image, to judge its share

Labels = NDArray[np.uint8]
Instances = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Judged:
    """The objects of an image: which are said to touch, and how many nuclei each has."""

    said: NDArray[np.bool_]
    nuclei: NDArray[np.int64]
    reported: float | None
    annotated: int


def judge(labels: Labels, instances: Instances, info: SlideInfo) -> Judged:
    """Find the objects of a label map, and count the annotated nuclei of each."""
    counter, components = ObjectCounter(info), find_components(info, counted_labels(info.classes), outlines=False)
    found: list[Complete] = [*components.add(0, 0, labels), components.finish()]
    for complete in found:
        counter.add(complete)
    area = np.concatenate([complete.area for complete in found])
    fill = np.concatenate([filled(complete.area, complete.moments) for complete in found])
    first = np.concatenate([complete.first for complete in found])
    said = (area > LARGE * np.median(area)) & (fill < CONCAVE) if len(area) else np.zeros(0, bool)

    regions, _ = ndimage.label(labels == NUCLEUS)
    both = (instances > 0) & (regions > 0)
    pairs, shared_px = np.unique(np.stack([instances[both], regions[both]]), axis=1, return_counts=True)
    size_px = np.bincount(instances.ravel())
    is_half = 2 * shared_px >= size_px[pairs[0]]
    nuclei = np.bincount(pairs[1][is_half], minlength=regions.max() + 1)
    count = counter.count(NUCLEUS)
    return Judged(
        said,
        nuclei[regions.ravel()[first]],
        None if count is None else count.touching_share,
        int((size_px[1:] > 0).sum()),
    )


def score(images: list[Judged]) -> dict[str, Any]:
    """Return how well objects that touch are found, and how far the share of an image is from the true one."""
    said, nuclei = (np.concatenate([getattr(image, name) for image in images]) for name in ("said", "nuclei"))
    true = nuclei >= 2
    hits = int((said & true).sum())
    errors = np.array(
        [
            image.reported - (image.nuclei >= 2).mean()
            for image in images
            if image.reported is not None and len(image.said) >= MIN_OBJECTS
        ]
    )
    return {
        "images": len(images),
        "nuclei": sum(image.annotated for image in images),
        "objects": len(said),
        "true_share": round(float(true.mean()), 4),
        "reported_share": round(float(said.mean()), 4),
        "precision": round(hits / max(int(said.sum()), 1), 4),
        "recall": round(hits / max(int(true.sum()), 1), 4),
        "error_mean": round(float(errors.mean()), 4) if len(errors) else None,
        "error_absolute_mean": round(float(np.abs(errors).mean()), 4) if len(errors) else None,
        "error_worst": round(float(np.abs(errors).max()), 4) if len(errors) else None,
        "nuclei_per_touching_object": round(float(nuclei[said].mean()), 2),
        "nuclei_per_other_object": round(float(nuclei[~said].mean()), 2),
    }


def read_images(folder: Path) -> Iterator[tuple[NDArray[np.uint8], Instances]]:
    """Yield the images of a set and their annotated nuclei, numbered from 1."""
    for path in sorted((folder / "images").iterdir()):
        with Image.open(path) as image, Image.open(folder / "labels_instance" / f"{path.stem}.png") as instances:
            yield np.asarray(image.convert("RGB")), np.asarray(instances).astype(np.int32)


@click.command()
@click.option("--data", "data_dir", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON to write.")
def main(data_dir: Path, out: Path) -> None:
    """Compare the reported share of touching objects with the true one."""
    card = read_card(default_bundle())
    engine = open_engine(default_bundle(), backend="cpu")
    results = {}
    for name, folders in SETS.items():
        judged: dict[str, list[Judged]] = {"model": [], "annotation": []}
        for folder in folders:
            for pixels, whole in read_images(data_dir / folder):
                small, _ = zoom(pixels, np.zeros(whole.shape, np.uint8), SOURCE_MPP / card.mpp)
                height, width = small.shape[:2]
                instances = np.asarray(Image.fromarray(whole).resize((width, height), Image.Resampling.NEAREST))
                info = SlideInfo(name, width, height, card.mpp, card.classes)
                judged["model"].append(judge(segment_pixels(small, engine), instances, info))
                judged["annotation"].append(judge((instances > 0).astype(np.uint8), instances, info))
        results[name] = {labels: score(images) for labels, images in judged.items()}
    write_result(out, {"large": LARGE, "concave": CONCAVE, "min_area_um2": 8, "sets": results})


if __name__ == "__main__":
    main()
