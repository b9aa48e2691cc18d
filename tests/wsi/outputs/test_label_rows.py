"""Which class is the background, and that every file of a slide treats the same one so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from histostream.wsi.outputs.label_rows import ClassInfo, LabelRows, SlideInfo, background_label
from histostream.wsi.outputs.objects.counting import ObjectCount, with_rules
from histostream.wsi.outputs.sinks.object_files import Objects
from histostream.wsi.outputs.sinks.overview import Overview
from histostream.wsi.outputs.sinks.summary import Summary

WHITE, RED = (255, 255, 255), (255, 0, 0)


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (("background", "tumour"), 0),
        (("Tumor", "Background"), 1),
        (("BACKGROUND", "a"), 0),
        (("a", "b", "Hintergrund"), 2),
        (("Arrière-plan", "tumeur"), 0),
        (("fondo ", "tumore"), 0),
        (("ФОН", "опухоль"), 0),
        (("背景", "腫瘍"), 0),
        (("glass", "tissue"), None),
        (("backgrounder", "no background"), None),
    ],
)
def test_a_class_that_is_called_background_in_any_case_or_common_language_is_it(
    names: tuple[str, ...], label: int | None
) -> None:
    assert background_label([ClassInfo(name, WHITE) for name in names]) == label


def test_a_role_counts_more_than_a_name() -> None:
    classes = (ClassInfo("background", RED), ClassInfo("glass", WHITE, role="background"))
    assert background_label(classes) == 1
    with pytest.raises(ValueError, match="role 'Background'"):
        ClassInfo("glass", WHITE, role="Background")


@pytest.mark.parametrize("name", ["Hintergrund", "glass"])
def test_the_background_is_neither_painted_nor_counted_as_objects(tmp_path: Path, name: str) -> None:
    role = "background" if name == "glass" else ""
    classes = with_rules((ClassInfo("tumour", RED), ClassInfo(name, (1, 2, 3), role)), count_all=True)
    info = SlideInfo("slide", 8, 8, 0.5, classes)
    labels = np.ones((8, 8), np.uint8)
    labels[2:5, 2:5] = 0
    glass = np.full((8, 8, 3), 200, np.uint8)
    overview, summary = Overview(tmp_path / "overview.png", info, glass), Summary(tmp_path, info)
    objects = Objects(tmp_path, info, tmp_path / "slide.tif", [])
    for sink in (overview, summary, objects):
        sink.write(LabelRows(0, 0, labels))
    objects.finish()
    assert (overview.image()[labels == 1] == 200).all()
    assert (overview.image()[labels == 0] != 200).any()
    assert objects.counter.count(0) == ObjectCount(1, 2.25, None)  # 9 pixels of 0.5 um
    assert objects.counter.count(1) is None
    ((temporary, _), _) = summary.finish()
    roles = [entry["role"] for entry in json.loads(temporary.read_text())["classes"]]
    assert roles == ["", "background"]
