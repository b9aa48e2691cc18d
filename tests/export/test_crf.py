from __future__ import annotations

import numpy as np
import onnx
import pytest

from histostream.export.crf import export_crf
from histostream.export.graph import GraphError
from histostream.export.parity import open_session
from histostream.runtime.crf import CrfParams, dense_crf, factorised
from histostream.wsi.synthetic import SyntheticSlide

TILE_PX, CLASSES, LANDMARKS = 50, 3, 48
PARAMS = CrfParams(w1=8, theta_alpha=13, theta_beta=20, n_iter=3)  # the grid's stride is 4 px


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    return export_crf(PARAMS, classes=CLASSES, tile_px=TILE_PX, landmarks=LANDMARKS)


@pytest.mark.full
def test_the_graph_computes_what_numpy_does(graph: onnx.ModelProto) -> None:
    slide, rng = SyntheticSlide(4096, 4096, seed=1), np.random.default_rng(0)
    places = [(3500, 300), (3652, 900), (3300, 1100)]  # (x, y), multiples of the stride
    tiles = np.stack([slide.region(x, y, TILE_PX, TILE_PX)[0] for x, y in places])
    scores = rng.dirichlet(np.ones(CLASSES), (len(tiles), TILE_PX, TILE_PX))
    scores = np.ascontiguousarray(np.moveaxis(scores, -1, 1), np.float32)
    landmarks = factorised.find_landmarks(tiles, PARAMS.theta_beta, LANDMARKS)
    feeds = {
        "tiles": tiles,
        "scores": scores,
        "landmarks": np.stack([landmarks.astype(np.float32)] * len(tiles)),
        "whitening": np.stack([factorised.whiten(landmarks, PARAMS.theta_beta)] * len(tiles)),
    }
    (found,) = open_session(graph).run(["probabilities"], feeds)
    for tile, given, got, (x, y) in zip(tiles, scores, found, places, strict=True):
        wanted = dense_crf(
            tile, given, PARAMS, origin=(y, x), backend="factorised", landmarks=landmarks
        )
        np.testing.assert_allclose(got, wanted, atol=1e-4)
        assert (wanted.argmax(0) != given.argmax(0)).mean() > 0.05


@pytest.mark.full
def test_the_graph_is_static_but_for_the_batch(graph: onnx.ModelProto) -> None:
    (stride,) = (prop.value for prop in graph.metadata_props if prop.key == "crf_stride_px")
    assert stride == "4"
    for value in (*graph.graph.input, *graph.graph.output):
        batch, *rest = value.type.tensor_type.shape.dim
        assert batch.dim_param
        assert all(size.dim_value > 0 for size in rest)


def test_a_crf_that_the_graph_is_not_made_for_is_refused() -> None:
    with pytest.raises(GraphError, match="of 1 classes"):
        export_crf(PARAMS, classes=1, tile_px=TILE_PX)
    with pytest.raises(GraphError, match="w2=0"):
        export_crf(CrfParams(w2=0), classes=2, tile_px=TILE_PX)
