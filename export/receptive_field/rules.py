"""What each operator of ONNX does to the height and the width of the tile: ``reach`` by rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import cast

import numpy as np

from histostream.export.graph.shapes import Shape
from histostream.export.graph.spatial_axes import (
    Effect,
    Interval,
    Layout,
    Need,
    NotUnderstoodError,
    Op,
    Side,
    Window,
    same,
)

FINEST = 4096  # largest denominator of a Resize's scale, which is a float32 in the file


def _moved(op: Op, sides: Sequence[Side], windows: Sequence[Window]) -> Effect:
    """Return the effect of a node with one spatial input, the first, on its first output."""
    out = op.node.output[0]
    layouts = {**dict.fromkeys(op.outputs), out: (sides[0], sides[1])}
    return Effect(layouts, (Need(op.node.input[0], out, (windows[0], windows[1])),))


def _shifted(by: int) -> Window:
    return lambda wanted: (wanted[0] + by, wanted[1] + by)


def _pointwise(op: Op) -> Effect:
    """Rule for inputs that broadcast, with their sides on the same axes of the output."""
    rank = len(op.out_shape())
    found = set()
    for name in op.spatial:
        added = rank - len(op.shape(name))
        layout = cast("Layout", op.layouts[name])
        found.add(tuple(replace(side, axis=side.axis + added) for side in layout))
    if len(found) != 1:
        raise NotUnderstoodError
    height, width = found.pop()
    out = op.node.output[0]
    needs = tuple(Need(name, out, (same, same)) for name in op.spatial)
    return Effect({**dict.fromkeys(op.outputs), out: (height, width)}, needs)


def _statistic(op: Op) -> Effect:
    return Effect(dict.fromkeys(op.outputs), whole_tile=True)


def _normalised(axes_of: Callable[[Op], Iterable[int]]) -> Callable[[Op], Effect]:
    """Rule of a node that keeps the shape, with statistics over some axes."""

    def rule(op: Op) -> Effect:
        axes = {axis % op.rank for axis in axes_of(op)}
        seen = any(side.axis in axes for side in op.sides)
        return replace(_moved(op, op.sides, (same, same)), whole_tile=seen)

    return rule


def _softmax_axes(op: Op) -> Iterable[int]:
    if op.opset >= 13:
        return [op.attribute("axis", -1)]
    return range(op.attribute("axis", 1) % op.rank, op.rank)


def _layer_norm_axes(op: Op) -> Iterable[int]:
    return range(op.attribute("axis", -1) % op.rank, op.rank)


def _batch_norm_axes(op: Op) -> Iterable[int]:
    return range(op.rank) if op.attribute("training_mode", 0) else []


def _reduced(axes_of: Callable[[Op], list[int] | None]) -> Callable[[Op], Effect]:
    """Rule of a node that reduces some axes, all of them if there are none."""

    def rule(op: Op) -> Effect:
        axes = axes_of(op)
        if not axes and op.attribute("noop_with_empty_axes", 0):
            return _moved(op, op.sides, (same, same))
        gone = {axis % op.rank for axis in axes or range(op.rank)}
        if any(side.axis in gone for side in op.sides):
            return _statistic(op)
        if op.attribute("keepdims", 1):
            return _moved(op, op.sides, (same, same))
        before = [sum(axis < side.axis for axis in gone) for side in op.sides]
        sides = [replace(s, axis=s.axis - b) for s, b in zip(op.sides, before, strict=True)]
        return _moved(op, sides, (same, same))

    return rule


def _reduce_axes(op: Op) -> list[int] | None:
    return op.integers("axes", 1)


def _arg_axes(op: Op) -> list[int] | None:
    return [op.attribute("axis", 0)]


@dataclass(frozen=True, slots=True)
class _Kernel:
    """The kernel of a convolution or a pooling along one side."""

    size: int
    stride: int
    dilation: int
    begin: int  # padding before the first position

    def window(self, wanted: Interval) -> Interval:
        first = wanted[0] * self.stride - self.begin
        return first, wanted[1] * self.stride - self.begin + (self.size - 1) * self.dilation

    def transposed_window(self, wanted: Interval) -> Interval | None:
        """Input i adds to the outputs i * stride - begin + k * dilation, k < size."""
        span = (self.size - 1) * self.dilation
        first = -((span - wanted[0] - self.begin) // self.stride)
        last = (wanted[1] + self.begin) // self.stride
        adding = [i for i in range(first, last + 1) if self._adds(i, wanted)]
        return (adding[0], adding[-1]) if adding else None

    def _adds(self, position: int, wanted: Interval) -> bool:
        """Whether an input position of a transposed convolution adds to a wanted output."""
        low, high = (w + self.begin - position * self.stride for w in wanted)
        nearest = max(0, -(-low // self.dilation))
        return nearest < self.size and nearest * self.dilation <= high


def _kernel(op: Op, side: Side, sizes: Sequence[int], *, transposed: bool = False) -> _Kernel:
    spatial, i = len(sizes), side.axis - 2
    if i < 0:
        raise NotUnderstoodError
    size = sizes[i]
    stride = op.attribute("strides", None) or [1] * spatial
    dilation = op.attribute("dilations", None) or [1] * spatial
    pads = op.attribute("pads", None) or [0] * (2 * spatial)
    auto = op.attribute("auto_pad", "NOTSET")
    span = (size - 1) * dilation[i] + 1
    begin = pads[i]
    if auto == "VALID":
        begin = 0
    elif transposed and (auto != "NOTSET" or op.attribute("output_shape", None)):
        extra = (op.attribute("output_padding", None) or [0] * spatial)[i]
        full = stride[i] * (side.size - 1) + extra + span
        total = full - op.out_shape()[side.axis]
        begin = total // 2 if auto == "SAME_UPPER" else total - total // 2
    elif auto != "NOTSET":
        total = max(0, (op.out_shape()[side.axis] - 1) * stride[i] + span - side.size)
        begin = total - total // 2 if auto == "SAME_LOWER" else total // 2
    return _Kernel(size, stride[i], dilation[i], begin)


def _convolution(weight: int) -> Callable[[Op], Effect]:
    """Rule of a convolution whose kernel is the input of that index."""

    def rule(op: Op) -> Effect:
        sizes = op.attribute("kernel_shape", None) or op.shape(op.node.input[weight])[2:]
        strides = op.attribute("strides", None) or [1]
        if {*sizes, *strides} == {1} and not any(op.attribute("pads", None) or []):
            return _moved(op, op.sides, (same, same))  # also where a side shares its axis
        return _slid(op, sizes)

    return rule


def _pooled(op: Op) -> Effect:
    return _slid(op, op.attribute("kernel_shape", None))


def _slid(op: Op, sizes: Sequence[int]) -> Effect:
    kernels = [_kernel(op, side, sizes) for side in op.plain_sides]
    sides = [
        Side(side.axis, op.out_shape()[side.axis], side.stride * kernel.stride)
        for side, kernel in zip(op.plain_sides, kernels, strict=True)
    ]
    return _moved(op, sides, [kernel.window for kernel in kernels])


def _conv_transpose(op: Op) -> Effect:
    sizes = op.attribute("kernel_shape", None) or op.shape(op.node.input[1])[2:]
    kernels = [_kernel(op, side, sizes, transposed=True) for side in op.plain_sides]
    sides = [
        Side(side.axis, op.out_shape()[side.axis], side.stride / kernel.stride)
        for side, kernel in zip(op.plain_sides, kernels, strict=True)
    ]
    return _moved(op, sides, [kernel.transposed_window for kernel in kernels])


@dataclass(frozen=True, slots=True)
class _Resampling:
    """One side of a Resize; ``scale`` is output length / input length."""

    scale: Fraction
    mode: str
    coordinates: str
    rounding: str
    antialias: bool

    def window(self, wanted: Interval) -> Interval:
        # Within a period of the scale a later output may start at an earlier input (cubic).
        period = math.ceil(self.scale) + 2
        first, last = wanted
        starts, ends = range(first, last + 1)[:period], range(first, last + 1)[-period:]
        taps = [tap for position in (*starts, *ends) for tap in self._taps(position)]
        return min(taps), max(taps)

    def _taps(self, position: int) -> Interval:
        """Return the first and the last input that one output position needs."""
        places = self._places(position)
        low, high = min(places), max(places)
        if self.mode == "nearest":
            return self._nearest(low), self._nearest(high)
        reach = 1 if self.mode == "linear" else 2
        if self.antialias and self.scale < 1:
            return math.ceil(low - reach / self.scale), math.floor(high + reach / self.scale)
        first = math.floor(low) if low.denominator == 1 else math.floor(low) - reach + 1
        last = math.ceil(high) if high.denominator == 1 else math.ceil(high) + reach - 1
        return first, last

    def _places(self, position: int) -> list[Fraction]:
        """Return the place of an output in the input; the extremes where it drifts."""
        at = Fraction(position)
        if self.coordinates == "asymmetric":
            return [at / self.scale]
        if self.coordinates == "tf_half_pixel_for_nn":
            return [(at + Fraction(1, 2)) / self.scale]
        if self.coordinates == "align_corners":
            # at * (input - 1) / (output - 1): the drift between the first pixel and the last.
            return [at / self.scale, (at + 1) / self.scale - 1]
        return [(at + Fraction(1, 2)) / self.scale - Fraction(1, 2)]

    def _nearest(self, place: Fraction) -> int:
        if self.rounding == "floor":
            return math.floor(place)
        if self.rounding == "ceil":
            return math.ceil(place)
        if self.rounding == "round_prefer_ceil":
            return math.floor(place + Fraction(1, 2))
        return math.ceil(place - Fraction(1, 2))


COORDINATES = frozenset(
    {"half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "asymmetric", "align_corners", "tf_half_pixel_for_nn"}
)


def _resize(op: Op) -> Effect:
    upsample = op.node.op_type == "Upsample" or op.opset < 11
    mode = op.attribute("mode", "nearest")
    coordinates = "asymmetric" if upsample else op.attribute("coordinate_transformation_mode", "half_pixel")
    rounding = "floor" if upsample else op.attribute("nearest_mode", "round_prefer_floor")
    if (
        coordinates not in COORDINATES
        or mode not in ("nearest", "linear", "bilinear", "cubic")
        or op.attribute("keep_aspect_ratio_policy", "stretch") != "stretch"
    ):
        raise NotUnderstoodError
    mode = "linear" if mode == "bilinear" else mode
    antialias = bool(op.attribute("antialias", 0))
    scales = _resize_scales(op, 1 if upsample else 2)
    ways = [_Resampling(scales(side), mode, coordinates, rounding, antialias) for side in op.plain_sides]
    sides = [
        Side(side.axis, op.out_shape()[side.axis], side.stride / way.scale)
        for side, way in zip(op.plain_sides, ways, strict=True)
    ]
    return _moved(op, sides, [way.window for way in ways])


def _resize_scales(op: Op, index: int) -> Callable[[Side], Fraction]:
    """Return the scale of a side: as given, or from the sizes."""
    given = op.attribute("scales", None)
    if given is None and op.has_input(index):
        given = op.numbers(index)
    axes = op.attribute("axes", None) or range(op.rank)
    by_axis = {
        axis % op.rank: Fraction(scale).limit_denominator(FINEST)
        for axis, scale in zip(axes, given or [], strict=False)
    }
    fixed = not given or op.attribute("coordinate_transformation_mode", "") == "align_corners"

    def scale(side: Side) -> Fraction:
        if fixed:
            return Fraction(op.out_shape()[side.axis], side.size)
        return by_axis.get(side.axis, Fraction(1))

    return scale


def _pad(op: Op) -> Effect:
    pads = op.integers("pads", 1)
    axes = [axis % op.rank for axis in op.numbers(3)] if pads is None or op.has_input(3) else list(range(op.rank))
    begin = dict(zip(axes, pads or [], strict=False))
    touched = {axis for axis, n in zip(axes * 2, pads or [], strict=True) if n}
    return _cut(op, {axis: (-begin[axis], 1) for axis in touched})


def _slice(op: Op) -> Effect:
    starts = op.integers("starts", 1)
    if starts is None:
        raise NotUnderstoodError
    axes = op.integers("axes", 3) or list(range(len(starts)))
    steps = op.integers("steps", 4) or [1] * len(starts)
    shape = op.shape(op.node.input[0])
    cuts = {}
    for start, axis, step in zip(starts, axes, steps, strict=True):
        n = shape[axis]
        first = start + n if start < 0 else start
        first = min(max(first, 0), n if step > 0 else n - 1)
        if step != 1 or first or op.out_shape()[axis] != n:
            cuts[axis % op.rank] = (first, step)
    return _cut(op, cuts)


def _cut(op: Op, cuts: dict[int, tuple[int, int]]) -> Effect:
    """Output position p of an axis is input position first + p * step."""
    sides: list[Side] = []
    windows: list[Window] = []
    for i, side in enumerate(op.sides):
        if side.axis not in cuts:
            sides.append(side)
            windows.append(same)
            continue
        first, step = cuts[side.axis]
        side = op.plain_sides[i]
        size = op.out_shape()[side.axis]
        sides.append(Side(side.axis, size, side.stride * abs(step)))
        windows.append(_strided(first, step))
    return _moved(op, sides, windows)


def _strided(first: int, step: int) -> Window:
    def window(wanted: Interval) -> Interval:
        ends = first + step * wanted[0], first + step * wanted[1]
        return min(ends), max(ends)

    return window


def _gather(op: Op) -> Effect:
    axis = op.attribute("axis", 0) % op.rank
    added = len(op.shape(op.node.input[1])) - 1
    if any(side.axis == axis for side in op.sides):
        indices = op.numbers(1)
        steps = set(np.diff(indices).tolist())
        if added or len(steps) != 1 or 0 in steps:
            raise NotUnderstoodError
        return _cut(op, {axis: (int(indices[0]), int(steps.pop()))})
    sides = [replace(s, axis=s.axis + added) if s.axis > axis else s for s in op.sides]
    return _moved(op, sides, (same, same))


def _transpose(op: Op) -> Effect:
    order = op.attribute("perm", None) or range(op.rank)[::-1]
    sides = [replace(side, axis=list(order).index(side.axis)) for side in op.sides]
    return _moved(op, sides, (same, same))


def _concat(op: Op) -> Effect:
    out = op.node.output[0]
    axis = op.attribute("axis", 1) % len(op.out_shape())
    parts = [(name, cast("Layout", op.layouts[name])) for name in op.spatial]
    sides = parts[0][1]
    if all(side.axis != axis for side in sides):
        if any(other != sides for _, other in parts):
            raise NotUnderstoodError
        return _pointwise(op)
    # Along a side, the short parts are a border, as padding is; the long one is the tile.
    lengths = [op.shape(name)[axis] for name in op.node.input]
    longest = lengths.index(max(lengths))
    name = op.node.input[longest]
    layout = op.layouts.get(name)
    if 2 * lengths[longest] <= sum(lengths) or not layout or any(s.inner != 1 for s in layout):
        raise NotUnderstoodError
    height, width = (replace(side, size=sum(lengths)) if side.axis == axis else side for side in layout)
    before = -sum(lengths[:longest])
    windows = tuple(_shifted(before) if side.axis == axis else same for side in layout)
    return Effect({out: (height, width)}, (Need(name, out, (windows[0], windows[1])),))


def _split(op: Op) -> Effect:
    axis = op.attribute("axis", 0) % op.rank
    along = any(side.axis == axis for side in op.sides)
    layouts: dict[str, Layout | None] = {}
    needs = []
    start = 0
    for i, out in enumerate(op.node.output):
        size = op.out_shape(i)[axis]
        sides = op.plain_sides if along else op.sides
        height, width = (replace(s, size=size) if s.axis == axis else s for s in sides)
        windows = [_shifted(start) if s.axis == axis else same for s in sides]
        layouts[out] = (height, width)
        needs.append(Need(op.node.input[0], out, (windows[0], windows[1])))
        start += size
    return Effect(layouts, tuple(needs))


def _depth_to_space(op: Op) -> Effect:
    block = op.attribute("blocksize", 1)
    sides = [Side(s.axis, s.size * block, s.stride / block) for s in op.plain_sides]
    return _moved(op, sides, [_merged(block)] * 2)


def _space_to_depth(op: Op) -> Effect:
    block = op.attribute("blocksize", 1)
    sides = [Side(s.axis, s.size // block, s.stride * block) for s in op.plain_sides]
    return _moved(op, sides, [_parted(block)] * 2)


def _merged(by: int) -> Window:
    return lambda wanted: (wanted[0] // by, wanted[1] // by)


def _parted(by: int) -> Window:
    return lambda wanted: (wanted[0] * by, wanted[1] * by + by - 1)


def _repeated(op: Op) -> Effect:
    repeats = op.numbers(1)
    if any(repeats[side.axis] != 1 for side in op.sides):
        raise NotUnderstoodError
    return _moved(op, op.sides, (same, same))


def _reshape(op: Op) -> Effect:
    """Follow the sides by their place in memory, which a reshape does not change."""
    shape, out = op.shape(op.node.input[0]), op.out_shape()
    (height, window_h), (width, window_w) = (_replaced(side, shape, out) for side in op.sides)
    sides, windows = [height, width], [window_h, window_w]
    if height.axis != width.axis:
        for i, side in enumerate(sides):
            if side.inner > 1 and out[side.axis] == side.size * side.inner:  # a pixel shuffle
                sides[i] = Side(side.axis, out[side.axis], side.stride / side.inner)
                windows[i] = _merged(side.inner)
    return _moved(op, sides, windows)


def _replaced(side: Side, shape: Shape, out: Shape) -> tuple[Side, Window]:
    if len(out) == len(shape) and out[side.axis :] == shape[side.axis :]:
        return side, same
    step = side.inner * math.prod(shape[side.axis + 1 :])
    end = step * side.size
    for axis in reversed(range(len(out))):
        inner = math.prod(out[axis + 1 :])
        if step % inner == 0 and inner * out[axis] >= end and inner * out[axis] % end == 0:
            return Side(axis, side.size, side.stride, step // inner), same
    for axis in reversed(range(len(out))):
        inner = math.prod(out[axis + 1 :])
        if inner % step == 0 and inner * out[axis] == end and out[axis] > 1:
            block = inner // step
            return Side(axis, out[axis], side.stride * block), _parted(block)
    raise NotUnderstoodError


def _matmul(op: Op) -> Effect:
    """Local if the product sums over channels: no side on the axis that is summed."""
    if len(op.spatial) != 1:
        raise NotUnderstoodError
    a, b = (op.shape(name) for name in op.node.input[:2])
    name = op.spatial[0]
    first = name == op.node.input[0]
    rank = len(a) if first else len(b)
    if min(len(a), len(b)) < 2:
        raise NotUnderstoodError
    layout = cast("Layout", op.layouts[name])
    if any(side.axis == rank - (1 if first else 2) for side in layout):
        return _statistic(op)
    height, width = (replace(s, axis=s.axis + len(op.out_shape()) - rank) for s in layout)
    out = op.node.output[0]
    return Effect({out: (height, width)}, (Need(name, out, (same, same)),))


def _gemm(op: Op) -> Effect:
    summed = 0 if op.attribute("transA", 0) else 1
    if any(side.axis == summed for side in op.sides):
        return _statistic(op)
    return _moved(op, [replace(side, axis=0) for side in op.sides], (same, same))


def _quantised_from_its_range(op: Op) -> Effect:
    """DynamicQuantizeLinear: its scale is a statistic of the whole tensor."""
    return replace(_moved(op, op.sides, (same, same)), whole_tile=True)


POINTWISE = (
    "Abs",
    "Acos",
    "Acosh",
    "Add",
    "And",
    "Asin",
    "Asinh",
    "Atan",
    "Atanh",
    "BitShift",
    "BitwiseAnd",
    "BitwiseNot",
    "BitwiseOr",
    "BitwiseXor",
    "Cast",
    "CastLike",
    "Ceil",
    "Celu",
    "Clip",
    "Cos",
    "Cosh",
    "DequantizeLinear",
    "Div",
    "Dropout",
    "Elu",
    "Equal",
    "Erf",
    "Exp",
    "Expand",
    "Floor",
    "Gelu",
    "Greater",
    "GreaterOrEqual",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "IsInf",
    "IsNaN",
    "LeakyRelu",
    "Less",
    "LessOrEqual",
    "Log",
    "Max",
    "Mean",
    "Min",
    "Mish",
    "Mod",
    "Mul",
    "Neg",
    "Not",
    "Or",
    "PRelu",
    "Pow",
    "QuantizeLinear",
    "Reciprocal",
    "Relu",
    "Round",
    "Selu",
    "Shrink",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sinh",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Sub",
    "Sum",
    "Swish",
    "Tan",
    "Tanh",
    "ThresholdedRelu",
    "Where",
    "Xor",
    "LRN",
)
REDUCTIONS = (
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
)
RULES: dict[str, Callable[[Op], Effect]] = {
    **dict.fromkeys(POINTWISE, _pointwise),
    **dict.fromkeys(REDUCTIONS, _reduced(_reduce_axes)),
    **dict.fromkeys(("ArgMax", "ArgMin"), _reduced(_arg_axes)),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _normalised(_softmax_axes)),
    **dict.fromkeys(("MaxPool", "AveragePool", "LpPool"), _pooled),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"), _statistic),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    **dict.fromkeys(("Conv", "ConvInteger"), _convolution(1)),
    "QLinearConv": _convolution(3),
    "ConvTranspose": _conv_transpose,
    "InstanceNormalization": _normalised(lambda op: range(2, op.rank)),
    "GroupNormalization": _normalised(lambda op: range(1, op.rank)),
    "LayerNormalization": _normalised(_layer_norm_axes),
    "RMSNormalization": _normalised(_layer_norm_axes),
    "BatchNormalization": _normalised(_batch_norm_axes),
    "MeanVarianceNormalization": _normalised(lambda op: op.attribute("axes", [0, 2, 3])),
    "LpNormalization": _normalised(lambda op: [op.attribute("axis", -1)]),
    "DynamicQuantizeLinear": _quantised_from_its_range,
    "Concat": _concat,
    "DepthToSpace": _depth_to_space,
    "Gather": _gather,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Pad": _pad,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Tile": _repeated,
    "Transpose": _transpose,
}
