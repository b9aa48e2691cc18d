from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from histostream.runtime.bundle.card import CardError, read_card
from histostream.runtime.engines.base import Engine
from histostream.runtime.engines.opener import open_engine
from histostream.runtime.errors import EngineError

BACKENDS = [
    "cpu",
    pytest.param(
        "openvino",
        marks=pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed"),
    ),
]


@pytest.fixture(params=BACKENDS)
def engine(request: pytest.FixtureRequest, tiny_bundle: Path) -> Iterator[Engine]:
    opened = open_engine(tiny_bundle, backend=request.param)
    yield opened
    opened.close()


@pytest.fixture
def tiles() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (5, 128, 128, 3), dtype=np.uint8)


def test_an_engine_keeps_the_tile_contract(engine: Engine, tiles: NDArray[np.uint8]) -> None:
    assert isinstance(engine, Engine)
    scores = engine.infer(tiles)
    assert scores.dtype == np.float16
    assert 0 <= scores.min() < scores.max() <= 1
    assert scores.shape == (5, 3, 128, 128)
    assert len(np.unique(scores)) > 10


def test_scores_do_not_depend_on_the_batch(engine: Engine, tiles: NDArray[np.uint8]) -> None:
    one_by_one = np.concatenate([engine.infer(t[None]) for t in tiles])
    np.testing.assert_array_equal(engine.infer(tiles), one_by_one)


def test_scores_do_not_depend_on_threads(tiny_bundle: Path, tiles: NDArray[np.uint8]) -> None:
    one, two = (open_engine(tiny_bundle, backend="cpu", threads=n).infer(tiles) for n in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_tiles_of_a_wrong_kind_are_refused(engine: Engine, tiles: NDArray[np.uint8]) -> None:
    wrongs: list[Any] = [tiles[:, :64], tiles[..., :1], tiles.astype(np.float32)]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=r"takes uint8 \(N, 128, 128, 3\)"):
            engine.infer(wrong)


@pytest.mark.parametrize("backend", ["cuda", "tensorrt"])
def test_a_gpu_that_is_not_there_is_an_error_not_a_cpu_run(tiny_bundle: Path, backend: str) -> None:
    from histostream.runtime.cuda.driver import gpu_count

    if gpu_count():
        pytest.skip("a GPU is here")
    with pytest.raises(EngineError, match=backend):
        open_engine(tiny_bundle, backend=backend)


def test_auto_runs_here(tiny_bundle: Path, tiles: NDArray[np.uint8]) -> None:
    engine = open_engine(tiny_bundle)
    assert engine.infer(tiles).shape == (5, 3, 128, 128)
    assert "onnxruntime" in engine.name


def test_an_unknown_backend_is_named(tiny_bundle: Path) -> None:
    with pytest.raises(EngineError, match="'cuda2'"):
        open_engine(tiny_bundle, backend="cuda2")


def test_a_damaged_network_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    content = bytearray((bundle / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / "model.onnx").write_bytes(content)
    with pytest.raises(CardError, match="does not match"):
        open_engine(bundle, backend="cpu")


def test_a_card_that_does_not_fit_its_network_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    path = bundle / "card.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tile_px": 256}))
    with pytest.raises(EngineError, match="the card says"):
        open_engine(bundle, backend="cpu")


def test_exact_blending_equals_whole_image_inference(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Seam-exact mode, with torch on the whole image as the oracle.

    The tolerance is one step of float16 on one pixel in ten thousand: ONNX Runtime and torch round sums of products in
    different orders, and a score can lie on the edge of two steps.
    """
    import tifffile
    import torch

    from histostream.runtime.options import Options
    from histostream.runtime.slide_run import segment_slide
    from histostream.training import checkpoint, methods
    from histostream.wsi.synthetic import SyntheticSlide
    from tests.runtime.conftest import write_slide

    pixels = SyntheticSlide(400, 300, seed=3).region(0, 0, 400, 300)[0]
    path = write_slide(tmp_path / "slide.tif", pixels)
    options = Options(tissue=False, blend="exact", probabilities=True)
    result = segment_slide(path, open_engine(tiny_bundle, backend="cpu"), tmp_path, options)
    found = tifffile.imread(result.folder / "probabilities.tif", level=0)

    imems = methods.load_method("imems")
    state = imems.build(imems.Config(base_width=4, depth=2, discriminator_width=4), 3)
    checkpoint.load(tiny_checkpoint, state)
    with torch.no_grad():
        wanted = imems.deployed(state)(torch.from_numpy(pixels[None]))[0].numpy()
    difference = np.abs(found / 65535 - wanted.transpose(1, 2, 0).astype(np.float64))
    assert 0 < read_card(tiny_bundle).halo_px < 64
    assert difference.max() <= 2**-10
    assert (difference > 2**-14).mean() < 1e-3  # 2**-15 is the rounding of the file and of the sums


def test_bfloat16_is_openvino_s_and_is_close_to_single_precision(tiny_bundle: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    with pytest.raises(EngineError, match="pass --backend openvino"):
        open_engine(tiny_bundle, backend="cpu", precision="bf16")
    if "ONEDNN_MAX_CPU_ISA" in os.environ:
        pytest.skip("ONEDNN_MAX_CPU_ISA hides instructions that OpenVINO believes in")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(EngineError, match="has no bfloat16 arithmetic"):
            open_engine(tiny_bundle, backend="openvino", precision="bf16")
        return
    tiles = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), np.uint8)
    engine = open_engine(tiny_bundle, backend="openvino", precision="bf16")
    assert engine.name.endswith("cpu bf16")
    exact = open_engine(tiny_bundle, backend="openvino", precision="fp32").infer(tiles)
    found = engine.infer(tiles)
    assert np.abs(found.astype(np.float32) - exact).max() <= 8 / 255
    assert not np.array_equal(found, exact)
