"""The program that compares wrapped networks with ONNX Runtime run directly, on a small slide."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest

from histostream.wsi.synthetic import SyntheticSlide
from tests.docs.test_commands import check_options
from tests.robustness import networks, networks_reference


@pytest.mark.parametrize("name", networks.CASES)
def test_the_code_and_the_command_of_each_network_stand_on_the_page(name: str) -> None:
    code, words = networks.section_of(networks.CASES[name])
    compile(code, name, "exec")
    assert words[:2] == ["histo-export", "wrap"]
    assert f'"{words[2]}"' in code
    check_options(words)


def test_tiles_cover_a_slide_and_their_windows_sum_to_one() -> None:
    starts = networks_reference.starts_of(1500, 512, 64, 32)
    assert starts == [0, 448, 896, 992]  # the last one ends at the next multiple of 32 after 1500
    assert networks_reference.starts_of(300, 512, 64, 1) == [0]
    windows = [networks_reference.ramps(starts[:3], number, 512, 64) for number in range(3)]
    total = np.zeros(1408)
    for start, window in zip(starts, windows, strict=False):
        total[start : start + 512] += window
    assert np.allclose(total, 1)
    parts = [networks_reference.nearest(starts, number, 512, 1500) for number in range(4)]
    assert [part.start for part in parts] == [0, 480, 928, 1200]
    assert [part.stop for part in parts] == [480, 928, 1200, 1500]


@pytest.mark.full
def test_labels_of_monai_s_unet_are_those_of_onnx_runtime(tmp_path: Path) -> None:
    slide = tmp_path / "slide.svs"
    SyntheticSlide(700, 600, 0.5, 1).write(slide)
    with contextlib.chdir(tmp_path):
        result = networks.run_case("monai-unet", slide, networks_reference.read_pixels(slide), networks.QUICK)
    for mode in ("hann", "crop"):
        assert result[mode]["pixels"] > 0.7 * 700 * 600  # the rest is glass
        assert result[mode]["agreement"] >= networks.LEAST_AGREEMENT
        assert min(result[mode]["shares"]) > 0.05  # all classes occur
