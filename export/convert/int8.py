"""Quantise a graph to eight-bit integers: QDQ nodes, with ranges measured on real tiles.

Activations are unsigned with a zero point, weights signed, one scale per output channel and seven
of their eight bits used (``reduce_range``). CPUs without VNNI add pairs of products in 16 bits,
which eight-bit weights overflow; with seven the result is the same on every CPU.
"""

from __future__ import annotations

import contextlib
import copy
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

from histostream.export.graph.model import open_session
from histostream.export.graph.operators import QUANTIZED

MAX_WATCHED_BYTES = 256 << 20  # of activations that one session keeps to find their ranges


class Quantizer:
    """Quantises one graph any number of times; the ranges of its activations are measured once.

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

    def quantize(self, fp32_nodes: Collection[str]) -> onnx.ModelProto:
        """Return the graph with every node quantised but ``fp32_nodes``, which are names."""
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
                op_types_to_quantize=list(QUANTIZED),
                nodes_to_exclude=sorted(fp32_nodes),
                calibration_cache_path=self._ranges,
            )
        model = onnx.load(out)
        del model.metadata_props[:]
        return model


def measure_ranges(
    model: onnx.ModelProto, tiles: NDArray[np.uint8]
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Return the smallest and largest value of every FP32 tensor over tiles (N, H, W, C), run one by one.

    ONNX Runtime's own calibrator watches all tensors at once and keeps them all in memory: two gigabytes for a
    network of 31 M parameters. Here a session watches at most `MAX_WATCHED_BYTES`.
    """
    inferred = onnx.shape_inference.infer_shapes(model)
    produced = {name for node in inferred.graph.node for name in node.output}
    ranges = {}
    group: list[str] = []
    room = MAX_WATCHED_BYTES
    for value in (*inferred.graph.value_info, *inferred.graph.output):
        kind = value.type.tensor_type
        if kind.elem_type != TensorProto.FLOAT or value.name not in produced:
            continue
        size = 4 * math.prod(dim.dim_value or 1 for dim in kind.shape.dim)
        if group and size > room:
            ranges.update(_ranges_of(group, inferred, tiles))
            group, room = [], MAX_WATCHED_BYTES
        group.append(value.name)
        room -= size
    ranges.update(_ranges_of(group, inferred, tiles))
    return ranges


def _ranges_of(
    tensors: list[str], model: onnx.ModelProto, tiles: NDArray[np.uint8]
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    outputs = [f"{name}/{kind}" for name in tensors for kind in ("Min", "Max")]
    watched = copy.deepcopy(model)
    del watched.graph.output[:]
    for output in outputs:
        name, _, kind = output.rpartition("/")
        watched.graph.node.append(helper.make_node(f"Reduce{kind}", [name], [output], keepdims=0))
        watched.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, []))
    session = open_session(watched)
    extremes = np.array([session.run(outputs, {"tiles": tile[None]}) for tile in tiles], np.float32)
    low, high = extremes[:, ::2].min(axis=0), extremes[:, 1::2].max(axis=0)
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
