"""Drosophila larva ventral nerve cord: mitochondria in ssTEM (Gerhard et al. 2013), 4.6 nm pixels.

``stack1/raw/NN.png`` and ``stack1/mitochondria/NN.png``, 20 sections 45 to 50 nm apart. The set has
no official parts: 67 % of the columns train and 33 % test, as in the APMA-Net paper.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from histostream.training.data import DataSet, StoredSample
from histostream.training.datasets._files import MITOCHONDRIA, read_masks

MPP = 0.0046
TRAIN = 0.67  # of the columns: 0 to 685 of 1024


def read(path: Path) -> DataSet:
    """Read the sections, cut into training and test columns; ``path`` may be ``stack1`` itself."""
    folder = path / "stack1" if (path / "stack1").is_dir() else path
    sections = read_masks(
        folder / "raw", folder / "mitochondria", group=lambda p: f"section {p.stem}", name=lambda p: p.name
    )
    train, test = (tuple(_columns(s, right) for s in sections) for right in (False, True))
    return DataSet("vnc", MITOCHONDRIA, MPP, train, test=test)


def _columns(section: StoredSample, right: bool) -> StoredSample:
    middle = round(TRAIN * section.shape[1])
    columns = np.s_[:, middle:] if right else np.s_[:, :middle]
    name = Path(section.name)
    return StoredSample(
        f"{name.stem}_{'right' if right else 'left'}{name.suffix}",
        section.group,
        np.ascontiguousarray(section.image[columns]),
        np.ascontiguousarray(section.labels[columns]),
    )
