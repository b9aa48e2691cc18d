"""A small training set of dark blobs on pale ground."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from histostream.training import datasets
from histostream.training.data import DataSet
from histostream.wsi.synthetic import SyntheticSlide


@pytest.fixture(scope="session")
def nuclei_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight crops of the synthetic slide's tissue with instance labels."""
    folder = tmp_path_factory.mktemp("nuclei")
    (folder / "images").mkdir()
    (folder / "labels_instance").mkdir()
    slide = SyntheticSlide(1600, 1600, seed=2)
    pixels, labels = slide.region(0, 0, 1600, 1600)
    tissue = [
        (y, x) for y in range(0, 1600, 80) for x in range(0, 1600, 80) if labels[y : y + 80, x : x + 80].mean() > 0.05
    ]
    assert len(tissue) >= 8
    for i, (y, x) in enumerate(tissue[:8]):
        Image.fromarray(pixels[y : y + 80, x : x + 80]).save(folder / "images" / f"{i}.png")
        instance = labels[y : y + 80, x : x + 80].astype(np.uint16)
        Image.fromarray(instance).save(folder / "labels_instance" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def found(nuclei_folder: Path) -> DataSet:
    """The data set of `nuclei_folder`."""
    return datasets.open_dataset(str(nuclei_folder))
