"""Measure the peak rates of a device: how fast it multiplies matrices, and how fast it moves bytes.

A probe is built once and called between the measurements that are compared with it. The best rate counts, because other
load, cold caches and slow clocks only lower it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from histostream.runtime.engines.onnxruntime import open_session
from histostream.runtime.hardware import usable_cores
from histostream.wsi.errors import reason

Device = Literal["cpu", "gpu"]
Tensors = dict[str, NDArray[Any]]
SIDES = {"cpu": (1024, 2048), "gpu": (4096, 8192)}  # of the matrices; the best size varies
COPY_BYTES = {"cpu": 256 << 20, "gpu": 2 << 30}
GPU_CALLS = 20  # between two synchronisations
CALLS = 5  # the best counts
OPSET = 17
KINDS: dict[str, tuple[str, type[np.generic], type[np.generic], int]] = {
    "fp32": ("MatMul", np.float32, np.float32, TensorProto.FLOAT),
    "fp16": ("MatMul", np.float16, np.float16, TensorProto.FLOAT16),
    "int8": ("MatMulInteger", np.uint8, np.int8, TensorProto.INT32),
}


@dataclass(frozen=True, slots=True)
class Probe:
    """One measurement of a peak rate.

    Attributes
    ----------
    kind
        "fp32", "fp16" or "int8": matrix product, in GFLOP/s (8-bit: 10^9 operations/s); "copy":
        in GB/s, of bytes read and written.
    description
        The library, and what it computes.
    amount
        Operations or bytes of one call, in 10^9.
    call
        Runs the measured operation.
    """

    kind: str
    description: str
    amount: float
    call: Callable[[], object]

    def rate(self) -> float:
        """Call it a few times; return the best rate, in 10^9 operations or bytes per second."""
        best = 0.0
        for _ in range(CALLS):
            start = time.perf_counter()
            self.call()
            best = max(best, self.amount / (time.perf_counter() - start))
        return best


def open_probes(
    device: Device,
    precisions: tuple[str, ...],
) -> tuple[list[Probe], list[str]]:
    """Build the probes of a device and call each once to warm it up.

    Parameters
    ----------
    device
        "cpu" or "gpu".
    precisions
        Precisions of the matrix products; on a CPU, which computes FP16 in FP32, FP16 is not measured.

    Returns
    -------
    The probes, and the reason for each that is not available here.
    """
    size = COPY_BYTES[device]
    builders: list[Callable[[], Probe]] = [partial(_cpu_copy if device == "cpu" else _gpu_copy, size)]
    for side in SIDES[device]:
        if device == "gpu":
            builders += [partial(_gpu_product, precision, side) for precision in precisions]
            continue
        if "int8" in precisions:
            builders.append(partial(_cpu_product, "int8", side))
        if {"fp32", "fp16"} & set(precisions):
            builders += [
                partial(_numpy_product, side),
                partial(_cpu_product, "fp32", side),
                partial(_openvino_product, side),
            ]
    probes, missing = [], []
    for build in builders:
        try:
            probe = build()
            probe.call()
        except ImportError as error:
            missing.append(f"{error.name} is not installed")
        except Exception as error:  # libraries' own exceptions have no common base
            missing.append(reason(error))
        else:
            probes.append(probe)
    return probes, missing


def _numpy_product(side: int) -> Probe:
    matrices = _matrices("fp32", side)
    out = np.empty((side, side), np.float32)
    description = f"numpy, product of {side} x {side} matrices"
    return Probe("fp32", description, 2e-9 * side**3, lambda: np.matmul(matrices["a"], matrices["b"], out=out))


def _cpu_product(precision: str, side: int) -> Probe:
    session = open_session(_product(precision, side), "CPUExecutionProvider")
    matrices = _matrices(precision, side)
    description = f"onnxruntime, {KINDS[precision][0]} of {side} x {side} matrices"
    return Probe(precision, description, 2e-9 * side**3, lambda: session.run(None, matrices))


def _openvino_product(side: int) -> Probe:
    import openvino

    core = openvino.Core()
    model = core.read_model(model=_product("fp32", side), weights=b"")
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    matrices = _matrices("fp32", side)
    description = f"openvino, product of {side} x {side} matrices"
    return Probe("fp32", description, 2e-9 * side**3, lambda: request.infer(matrices, share_inputs=True))


def _cpu_copy(size: int) -> Probe:
    """Copy in one thread for each core, because one core may not saturate the memory."""
    cores = usable_cores()
    pieces = np.array_split(np.ones(size, np.uint8), cores)
    into = np.array_split(np.zeros(size, np.uint8), cores)
    pool = ThreadPoolExecutor(cores, thread_name_prefix="copy")
    description = f"numpy, copy of {size >> 20} MiB in {cores} threads"
    return Probe("copy", description, 2e-9 * size, lambda: list(pool.map(np.copyto, into, pieces)))


def _gpu_product(precision: str, side: int) -> Probe:
    call = _on_gpu(_product(precision, side), _matrices(precision, side))
    tf32 = ", in TF32 where the GPU has it" if precision == "fp32" else ""  # its default
    description = f"onnxruntime CUDA, {KINDS[precision][0]} of {side} x {side} matrices{tf32}"
    return Probe(precision, description, 2e-9 * side**3 * GPU_CALLS, call)


def _gpu_copy(size: int) -> Probe:
    value = helper.make_tensor_value_info
    shape = [size // 4]
    graph = helper.make_graph(
        [helper.make_node("Neg", ["a"], ["c"])],
        "copy",
        [value("a", TensorProto.FLOAT, shape)],
        [value("c", TensorProto.FLOAT, shape)],
    )
    call = _on_gpu(_model(graph), {"a": np.ones(shape, np.float32)})
    description = f"onnxruntime CUDA, negation of {size >> 20} MiB, read once and written once"
    return Probe("copy", description, 2e-9 * size * GPU_CALLS, call)


def _on_gpu(model: bytes, inputs: Tensors) -> Callable[[], None]:
    """Return a call that runs a graph `GPU_CALLS` times on tensors that stay on the GPU."""
    import onnxruntime

    session = open_session(model, "CUDAExecutionProvider")
    binding = session.io_binding()
    for name, array in inputs.items():
        value = onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", 0)
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("c", "cuda", 0)
    session.run_with_iobinding(binding)
    (out,) = binding.get_outputs()
    binding.bind_ortvalue_output("c", out)  # allocated once

    def call() -> None:
        for _ in range(GPU_CALLS):
            session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return call


def _product(precision: str, side: int) -> bytes:
    kind, a, b, c = KINDS[precision]
    value = helper.make_tensor_value_info
    types = [helper.np_dtype_to_tensor_dtype(np.dtype(dtype)) for dtype in (a, b)]
    graph = helper.make_graph(
        [helper.make_node(kind, ["a", "b"], ["c"])],
        "product",
        [value(name, dtype, [side, side]) for name, dtype in zip("ab", types, strict=True)],
        [value("c", c, [side, side])],
    )
    return _model(graph)


def _model(graph: onnx.GraphProto) -> bytes:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = 8  # what opset 17 came with: older runtimes take it
    return bytes(model.SerializeToString())


def _matrices(precision: str, side: int) -> Tensors:
    """Return matrices of small random numbers, because a GPU multiplies zeros faster."""
    rng = np.random.default_rng(0)
    _, a, b, _ = KINDS[precision]
    low, high = (0, 127) if precision == "int8" else (-4, 5)
    return {name: rng.integers(low, high, (side, side), np.int8).astype(dtype) for name, dtype in (("a", a), ("b", b))}
