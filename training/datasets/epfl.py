"""EPFL CA1 hippocampus: mitochondria in FIB-SEM of mouse brain (Lucchi et al. 2013), 5 nm voxels.

``train/`` and ``test/``, each with ``images/NNN.png`` (slice number) and ``masks/NNN.png``.
"""

from __future__ import annotations

from pathlib import Path

from histostream.training.data import DataSet, StoredSample
from histostream.training.datasets._files import (
    MITOCHONDRIA,
    collect,
    image_files,
    label_files,
    masked,
    refuse_background_only,
)

MPP = 0.005
NEAR = 12  # slices, 60 nm; nearer ones are near-copies of each other and stay in one part


def read(path: Path) -> DataSet:
    """Read the official training and test stacks.

    Raises
    ------
    DataError
        If a file is missing or cannot be used.
    """
    train, test = (_read_part(path / part) for part in ("train", "test"))
    return DataSet("epfl", MITOCHONDRIA, MPP, tuple(train), test=tuple(test))


def _read_part(folder: Path) -> list[StoredSample]:
    images = image_files(folder / "images")
    pairs = zip(images, label_files(images, folder / "masks"), strict=True)
    samples = collect(
        lambda pair: masked(*pair, at_least=128, group=_group(pair[0]), name=f"{folder.name}_{pair[0].name}"),
        pairs,
    )
    refuse_background_only(samples, folder)
    return samples


def _group(path: Path) -> str:
    first = int(path.stem) // NEAR * NEAR if path.stem.isdecimal() else path.stem
    return f"{path.parent.parent.name} slices from {first}"
