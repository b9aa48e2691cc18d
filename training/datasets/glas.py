"""GlaS: glands in colon tissue, MICCAI 2015 (Sirinukunwattana et al. 2017); H&E, 20x.

The files as published, in one folder or sorted into ``train/``, ``testA/`` and ``testB/``:
``train_N.bmp`` (any image format) with ``train_N_anno.bmp``, and ``Grade.csv``.
"""

from __future__ import annotations

import csv
from pathlib import Path

from histostream.training.data import DataError, DataSet, StoredSample, listed
from histostream.training.datasets._files import by_number, collect, image_files, read_objects

CLASSES = (("stroma", (255, 255, 255)), ("gland", (213, 62, 120)))
MPP = 0.62005  # Zeiss MIRAX MIDI at 20x; the challenge's page
PARTS = ("train", "testA", "testB")


def read(path: Path) -> DataSet:
    """Read the official training part and the test parts that are there.

    Patients are known from ``Grade.csv``; most patients of the test parts are in the training part
    too, as published.

    Raises
    ------
    DataError
        If the training part or an annotation is missing, or a file cannot be used.
    """
    patients = _patients(path / "Grade.csv")
    train, test_a, test_b = (_read_part(path, part, patients) for part in PARTS)
    if not train:
        raise DataError(f"{path}: no train_1, train_2, ... in it or in {path / 'train'}; check the path")
    return DataSet("glas", CLASSES, MPP, tuple(train), test=(*test_a, *test_b))


def _read_part(path: Path, part: str, patients: dict[str, str]) -> list[StoredSample]:
    folder = path / part if (path / part).is_dir() else path
    if not any(folder.glob(f"{part}_*")):
        return []
    files = [p for p in image_files(folder) if p.stem.startswith(f"{part}_")]
    truths = {p.stem.removesuffix("_anno"): p for p in files if p.stem.endswith("_anno")}
    images = sorted((p for p in files if not p.stem.endswith("_anno")), key=by_number)
    missing = [p.name for p in images if p.stem not in truths]
    if missing:
        raise DataError(f"{folder}: no annotation (NAME_anno) for {listed(missing)}; fetch the whole set")
    return collect(lambda p: read_objects(p, truths[p.stem], patients.get(p.stem, "")), images)


def _patients(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    # The published file ends its lines with CR alone, which splitlines knows.
    rows = csv.reader(path.read_text(encoding="utf-8").splitlines())
    return {row[0].strip(): f"patient {row[1].strip()}" for row in rows if len(row) > 1}
