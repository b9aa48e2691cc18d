"""TNBC: nuclei in triple negative breast cancer (Naylor et al. 2018); H&E, 40x, 50 images.

``images/SS_I.*`` and ``labels_instance/SS_I.png``; SS is the slide, one of each patient.
"""

from __future__ import annotations

from pathlib import Path

from histostream.training.data import DataSet
from histostream.training.datasets._files import NUCLEI, read_object_folder

MPP = 0.25  # 40x; the paper


def read(path: Path) -> DataSet:
    """Read all images; there is no official test part."""
    train = read_object_folder(path, lambda stem: f"slide {stem.partition('_')[0]}")
    return DataSet("tnbc", NUCLEI, MPP, tuple(train))
