"""EPFL CA1 hippocampus: mitochondria in FIB-SEM of mouse brain (Lucchi et al. 2013), 5 nm voxels.

``train/`` and ``test/``, each with ``images/NNN.png`` (slice number) and ``masks/NNN.png``.
"""

from __future__ import annotations

from pathlib import Path

from histostream.training.data import DataSet
from histostream.training.datasets._files import MITOCHONDRIA, read_masks

MPP = 0.005
NEAR = 12  # slices, 60 nm; nearer ones are near-copies of each other and stay in one part


def read(path: Path) -> DataSet:
    """Read the official training and test stacks."""
    train, test = (
        read_masks(path / part / "images", path / part / "masks", group=_group, name=lambda p: f"{_part(p)}_{p.name}")
        for part in ("train", "test")
    )
    return DataSet("epfl", MITOCHONDRIA, MPP, tuple(train), test=tuple(test))


def _part(path: Path) -> str:
    return path.parent.parent.name


def _group(path: Path) -> str:
    first = int(path.stem) // NEAR * NEAR if path.stem.isdecimal() else path.stem
    return f"{_part(path)} slices from {first}"
