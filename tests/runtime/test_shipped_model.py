"""The model that ships, on tissue whose nuclei are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from histostream.runtime import Options, default_bundle, open_engine, segment_slide
from histostream.training.metrics import Confusion
from histostream.wsi.outputs.label_rows import NOT_ANALYSED
from histostream.wsi.synthetic import SyntheticSlide


@pytest.mark.full
def test_nuclei_of_the_demo_slide_are_found_where_they_are(tmp_path: Path) -> None:
    """Dice is .93 on the whole demo slide; the bound leaves room for other processors' rounding."""
    whole = SyntheticSlide(1600, 1100, seed=5)
    truth = whole.region(0, 0, 1600, 1100)[1]
    whole.write(tmp_path / "slide.tif")
    engine = open_engine(default_bundle(), backend="cpu")
    result = segment_slide(tmp_path / "slide.tif", engine, tmp_path / "out", Options())
    labels = np.asarray(tifffile.imread(result.folder / "labels.tif", level=0))
    analysed = labels != NOT_ANALYSED
    assert truth[analysed].sum() > 1000
    assert truth[~analysed].sum() < 0.001 * truth.sum()  # a nucleus alone in the glass may be left out
    confusion = Confusion(2)
    confusion.add(labels[analysed], truth[analysed])
    assert confusion.dice()[1] > 0.85
