"""MoNuSeg 2018: nuclei of several organs (Kumar et al. 2017, 2020); TCGA, H&E, 40x.

``train/`` and ``test/``, each with ``images/TCGA-XX-XXXX-*.*`` and ``labels_instance/*.png``.
"""

from __future__ import annotations

from pathlib import Path

from histostream.training.data import DataError, DataSet
from histostream.training.datasets._files import NUCLEI, check_option, read_object_folder

MPP = 0.25  # 40x, about
PATIENT = len("TCGA-XX-XXXX")
# The training images of kidney renal clear cell carcinoma.
KIRC = ("TCGA-B0-5698", "TCGA-B0-5710", "TCGA-B0-5711")


def read(path: Path, *, organ: str = "all") -> DataSet:
    """Read the official training and test parts.

    Parameters
    ----------
    path
        The folder of both.
    organ
        Which images to train on: "kirc" (kidney clear cell), "other" or "all". The test part is
        always whole.

    Raises
    ------
    DataError
        If there is no such organ, or a file is missing or cannot be used.
    """
    check_option("organ", organ, ("kirc", "other", "all"))
    train = read_object_folder(path / "train", lambda stem: stem[:PATIENT])
    chosen = [s for s in train if organ == "all" or (s.group in KIRC) == (organ == "kirc")]
    if not chosen:
        raise DataError(f"{path / 'train'}: no image of organ={organ!r} in it; fetch the whole set")
    has_test = (path / "test").is_dir()
    test = read_object_folder(path / "test", lambda stem: stem[:PATIENT]) if has_test else []
    return DataSet("monuseg", NUCLEI, MPP, tuple(chosen), test=tuple(test))
