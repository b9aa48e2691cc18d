"""Eight-bit integers in the graph: QDQ nodes, with ranges measured on real tiles.

Activations are unsigned with a zero point, weights signed, one scale per output channel and seven
of their eight bits used (``reduce_range``). CPUs without VNNI add pairs of products in 16 bits,
which eight-bit weights overflow; with seven the result is the same on every CPU.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import tempfile
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Self

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import TensorsData, save_tensors_data

from histostream.export.parity import open_session

# What eight bits make faster, and what moves its results about. Arithmetic between them (residual
# sums, normalisation by hand) costs more accuracy than it saves time.
OPERATORS = (
    "Conv",
    "ConvTranspose",
    "Gemm",
    "MatMul",
    "MaxPool",
    "AveragePool",
    "Relu",
    "Clip",
    "LeakyRelu",
    "Concat",
    "Resize",
    "Split",
    "Pad",
    "Transpose",
    "Reshape",
    "Slice",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "DepthToSpace",
    "SpaceToDepth",
)
WATCHED_BYTES = 256 << 20  # of activations that one session keeps to find their ranges


class Quantizer:
    """Quantises one graph, as often as is wanted, from ranges measured once.

    Parameters
    ----------
    model
        A graph in FP32 that keeps the tile contract, its nodes named.
    tiles
        (N, H, W, C) uint8 to measure the ranges of activations on.
    """

    def __init__(self, model: onnx.ModelProto, tiles: NDArray[np.uint8]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="histo-int8-")
        self._source = Path(self._folder.name) / "fp32.onnx"
        self._ranges = self._source.with_name("ranges.json")
        onnx.save(model, self._source)
        save_tensors_data(TensorsData(CalibrationMethod.MinMax, measure_ranges(model, tiles)), self._ranges)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def quantize(self, keep_fp32: Collection[str]) -> onnx.ModelProto:
        """Quantise every node but those named."""
        out = self._source.with_name("int8.onnx")
        with _quiet():
            quantize_static(
                self._source,
                out,
                None,
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
                reduce_range=True,
                op_types_to_quantize=list(OPERATORS),
                nodes_to_exclude=sorted(keep_fp32),
                calibration_cache_path=self._ranges,
            )
        model = onnx.load(out)
        del model.metadata_props[:]
        return model


def measure_ranges(
    model: onnx.ModelProto, tiles: NDArray[np.uint8]
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Smallest and largest value of every FP32 tensor over the tiles (N, H, W, C), run one by one.

    ONNX Runtime's own calibrator watches all tensors at once, which keeps them all in memory: two
    gigabytes for a network of 31 M parameters. Here a session watches as many as fit.
    """
    inferred = onnx.shape_inference.infer_shapes(model)
    produced = {name for node in inferred.graph.node for name in node.output}
    ranges = {}
    group: list[str] = []
    room = WATCHED_BYTES
    for value in (*inferred.graph.value_info, *inferred.graph.output):
        kind = value.type.tensor_type
        if kind.elem_type != TensorProto.FLOAT or value.name not in produced:
            continue
        size = 4 * math.prod(dim.dim_value or 1 for dim in kind.shape.dim)
        if group and size > room:
            ranges.update(_ranges_of(group, inferred, tiles))
            group, room = [], WATCHED_BYTES
        group.append(value.name)
        room -= size
    ranges.update(_ranges_of(group, inferred, tiles))
    return ranges


def _ranges_of(
    tensors: list[str], model: onnx.ModelProto, tiles: NDArray[np.uint8]
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    wanted = [f"{name}/{kind}" for name in tensors for kind in ("Min", "Max")]
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    for made in wanted:
        name, _, kind = made.rpartition("/")
        watched.graph.node.append(helper.make_node(f"Reduce{kind}", [name], [made], keepdims=0))
        watched.graph.output.append(helper.make_tensor_value_info(made, TensorProto.FLOAT, []))
    session = open_session(watched)
    found = np.array([session.run(wanted, {"tiles": tile[None]}) for tile in tiles], np.float32)
    low, high = found[:, ::2].min(axis=0), found[:, 1::2].max(axis=0)
    return {name: (low[i], high[i]) for i, name in enumerate(tensors)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence ONNX Runtime's advice to pre-process, which the exporter has done already."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
