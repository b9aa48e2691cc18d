"""Rules that state what each operator of ONNX does to the height and the width of the tile; see `RULES`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import cast

import numpy as np

from histostream.export.graph.operators import POINTWISE, REDUCTIONS
from histostream.export.graph.shapes import Shape
from histostream.export.graph.spatial_axes import (
    Effect,
    Interval,
    Layout,
    Need,
    Op,
    SpatialAxis,
    UnknownEffectError,
    Window,
    same,
)

MAX_DENOMINATOR = 4096  # of the scale of a Resize, which is a float32 in the file
MAX_BINS = 8  # PSPNet divides the tile into 1, 2, 3 and 6 bins per side, its followers into up to 8
MAX_LOCAL_STRIDE = 4  # of a pooling into so few positions; a pyramid of features goes down by 2 to 4 at a time


def _mapped(op: Op, axes: Sequence[SpatialAxis], windows: Sequence[Window] = (same, same)) -> Effect:
    """Return the effect of a node that maps its first input to its first output."""
    out = op.node.output[0]
    layouts = {**dict.fromkeys(op.outputs), out: (axes[0], axes[1])}
    return Effect(layouts, (Need(op.node.input[0], out, (windows[0], windows[1])),))


def _shifted(by: int) -> Window:
    return lambda wanted: (wanted[0] + by, wanted[1] + by)


def _pointwise(op: Op) -> Effect:
    """Rule for inputs that broadcast and have the height and the width on the same axes."""
    rank = len(op.out_shape())
    layouts = set()
    for name in op.spatial_inputs:
        added = rank - len(op.shape(name))
        layout = cast("Layout", op.layouts[name])
        layouts.add(tuple(replace(spatial, axis=spatial.axis + added) for spatial in layout))
    if len(layouts) != 1:
        raise UnknownEffectError
    height, width = layouts.pop()
    out = op.node.output[0]
    needs = tuple(Need(name, out, (same, same)) for name in op.spatial_inputs)
    return Effect({**dict.fromkeys(op.outputs), out: (height, width)}, needs)


def _statistic(op: Op) -> Effect:
    return Effect(dict.fromkeys(op.outputs), whole_tile=True)


def _normalised(axes_of: Callable[[Op], Iterable[int]]) -> Callable[[Op], Effect]:
    """Make the rule of a node that keeps the shape and has statistics over some axes."""

    def rule(op: Op) -> Effect:
        axes = {axis % op.rank for axis in axes_of(op)}
        whole_tile = any(spatial.axis in axes for spatial in op.spatial_axes)
        return replace(_mapped(op, op.spatial_axes), whole_tile=whole_tile)

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
    """Make the rule of a node that reduces some axes, or all if none are given."""

    def rule(op: Op) -> Effect:
        axes = axes_of(op)
        if not axes and op.attribute("noop_with_empty_axes", 0):
            return _mapped(op, op.spatial_axes)
        reduced = {axis % op.rank for axis in axes or range(op.rank)}
        if any(spatial.axis in reduced for spatial in op.spatial_axes):
            return _statistic(op)
        if op.attribute("keepdims", 1):
            return _mapped(op, op.spatial_axes)
        return _mapped(op, [replace(s, axis=s.axis - sum(r < s.axis for r in reduced)) for s in op.spatial_axes])

    return rule


def _reduce_axes(op: Op) -> list[int] | None:
    return op.integers("axes", 1)


def _arg_axes(op: Op) -> list[int] | None:
    return [op.attribute("axis", 0)]


@dataclass(frozen=True, slots=True)
class _Kernel:
    """The kernel of a convolution or a pooling along one axis."""

    size: int
    stride: int
    dilation: int
    begin: int  # padding before the first position

    def window(self, wanted: Interval) -> Interval:
        first = wanted[0] * self.stride - self.begin
        return first, wanted[1] * self.stride - self.begin + (self.size - 1) * self.dilation

    def transposed_window(self, wanted: Interval) -> Interval | None:
        """Return the inputs i that add to a wanted output i * stride - begin + k * dilation, k < size."""
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


def _kernel(op: Op, spatial: SpatialAxis, sizes: Sequence[int], *, transposed: bool = False) -> _Kernel:
    dimensions, i = len(sizes), spatial.axis - 2
    if i < 0:
        raise UnknownEffectError
    size = sizes[i]
    stride = op.attribute("strides", None) or [1] * dimensions
    dilation = op.attribute("dilations", None) or [1] * dimensions
    pads = op.attribute("pads", None) or [0] * (2 * dimensions)
    auto = op.attribute("auto_pad", "NOTSET")
    span = (size - 1) * dilation[i] + 1
    begin = pads[i]
    if auto == "VALID":
        begin = 0
    elif transposed and (auto != "NOTSET" or op.attribute("output_shape", None)):
        extra = (op.attribute("output_padding", None) or [0] * dimensions)[i]
        full = stride[i] * (spatial.size - 1) + extra + span
        total = full - op.out_shape()[spatial.axis]
        begin = total // 2 if auto == "SAME_UPPER" else total - total // 2
    elif auto != "NOTSET":
        total = max(0, (op.out_shape()[spatial.axis] - 1) * stride[i] + span - spatial.size)
        begin = total - total // 2 if auto == "SAME_LOWER" else total // 2
    return _Kernel(size, stride[i], dilation[i], begin)


def _convolution(weight: int) -> Callable[[Op], Effect]:
    """Make the rule of a convolution whose kernel is the input with that index."""

    def rule(op: Op) -> Effect:
        sizes = op.attribute("kernel_shape", None) or op.shape(op.node.input[weight])[2:]
        strides = op.attribute("strides", None) or [1]
        if {*sizes, *strides} == {1} and not any(op.attribute("pads", None) or []):
            return _mapped(op, op.spatial_axes)  # also if the height shares its axis
        return _statistic(op) if _sees_all(op, max_bins=1) else _slid(op, sizes)

    return rule


def _pooled(op: Op) -> Effect:
    return _statistic(op) if _sees_all(op, max_bins=MAX_BINS) else _slid(op, op.attribute("kernel_shape", None))


def _sees_all(op: Op, *, max_bins: int) -> bool:
    """Whether the windows divide the height or the width of the tile into at most so many bins.

    Exporters write a pooling over the whole tile, or over a part of it that is given as a share, with the kernel that
    fits one size of tile. Its stride is no phase that tiles could keep.
    """
    for spatial in op.unshared_axes:
        bins = op.out_shape()[spatial.axis]
        if bins == 1 < spatial.size or (bins <= max_bins and spatial.size > MAX_LOCAL_STRIDE * bins):
            return True
    return False


def _slid(op: Op, sizes: Sequence[int]) -> Effect:
    kernels = [_kernel(op, spatial, sizes) for spatial in op.unshared_axes]
    strides = [Fraction(kernel.stride) for kernel in kernels]
    return _mapped(op, _resampled_axes(op, strides), [kernel.window for kernel in kernels])


def _conv_transpose(op: Op) -> Effect:
    sizes = op.attribute("kernel_shape", None) or op.shape(op.node.input[1])[2:]
    kernels = [_kernel(op, spatial, sizes, transposed=True) for spatial in op.unshared_axes]
    strides = [Fraction(1, kernel.stride) for kernel in kernels]
    return _mapped(op, _resampled_axes(op, strides), [kernel.transposed_window for kernel in kernels])


def _resampled_axes(op: Op, strides: Sequence[Fraction]) -> list[SpatialAxis]:
    """Return the axes of the output, one position of which is so many positions of the input."""
    axes = []
    for spatial, factor in zip(op.unshared_axes, strides, strict=True):
        size, stride = op.out_shape()[spatial.axis], spatial.stride * factor
        nearest = Fraction(round(stride)) if stride > 1 else Fraction(1, round(1 / stride))
        # A tile of 513 px has maps of 257, 129 and 65: those of strides 2, 4 and 8, although no factor is whole.
        if abs(nearest * size - spatial.stride * spatial.size) < spatial.stride:
            stride = nearest
        axes.append(SpatialAxis(spatial.axis, size, stride))
    return axes


@dataclass(frozen=True, slots=True)
class _Resampling:
    """A Resize along one axis; ``scale`` is output length / input length."""

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
        """Return the first and the last input that one output needs."""
        coordinates = self._input_coordinates(position)
        low, high = min(coordinates), max(coordinates)
        if self.mode == "nearest":
            return self._nearest(low), self._nearest(high)
        radius = 1 if self.mode == "linear" else 2
        if self.antialias and self.scale < 1:
            return math.ceil(low - radius / self.scale), math.floor(high + radius / self.scale)
        first = math.floor(low) if low.denominator == 1 else math.floor(low) - radius + 1
        last = math.ceil(high) if high.denominator == 1 else math.ceil(high) + radius - 1
        return first, last

    def _input_coordinates(self, position: int) -> list[Fraction]:
        """Return the coordinate of an output in the input, or its extremes if it drifts."""
        at = Fraction(position)
        if self.coordinates == "asymmetric":
            return [at / self.scale]
        if self.coordinates == "tf_half_pixel_for_nn":
            return [(at + Fraction(1, 2)) / self.scale]
        if self.coordinates == "align_corners":
            # at * (input - 1) / (output - 1): the drift between the first pixel and the last.
            return [at / self.scale, (at + 1) / self.scale - 1]
        return [(at + Fraction(1, 2)) / self.scale - Fraction(1, 2)]

    def _nearest(self, coordinate: Fraction) -> int:
        if self.rounding == "floor":
            return math.floor(coordinate)
        if self.rounding == "ceil":
            return math.ceil(coordinate)
        if self.rounding == "round_prefer_ceil":
            return math.floor(coordinate + Fraction(1, 2))
        return math.ceil(coordinate - Fraction(1, 2))


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
        raise UnknownEffectError
    mode = "linear" if mode == "bilinear" else mode
    antialias = bool(op.attribute("antialias", 0))
    scales = _resize_scales(op, 1 if upsample else 2)
    resamplings = []
    for spatial in op.unshared_axes:
        scale, origin = scales(spatial), coordinates
        steps = op.out_shape()[spatial.axis] - 1, spatial.size - 1
        if coordinates == "align_corners" and min(steps) > 0 and 0 in (steps[0] % steps[1], steps[1] % steps[0]):
            # 33 positions, 16 px apart, are 32 steps: as many as 512 steps of 1 px, so that nothing drifts.
            scale, origin = Fraction(*steps), "asymmetric"
        resamplings.append(_Resampling(scale, mode, origin, rounding, antialias))
    return _mapped(op, _resampled_axes(op, [1 / r.scale for r in resamplings]), [r.window for r in resamplings])


def _resize_scales(op: Op, index: int) -> Callable[[SpatialAxis], Fraction]:
    """Return the scale of an axis, as given or from the sizes."""
    given = op.attribute("scales", None)
    if given is None and op.has_input(index):
        given = op.numbers(index)
    axes = op.attribute("axes", None) or range(op.rank)
    by_axis = {
        axis % op.rank: Fraction(scale).limit_denominator(MAX_DENOMINATOR)
        for axis, scale in zip(axes, given or [], strict=False)
    }
    from_sizes = not given or op.attribute("coordinate_transformation_mode", "") == "align_corners"

    def scale(spatial: SpatialAxis) -> Fraction:
        if from_sizes:
            return Fraction(op.out_shape()[spatial.axis], spatial.size)
        return by_axis.get(spatial.axis, Fraction(1))

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
        raise UnknownEffectError
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
    """Return the effect of cuts: output position p of an axis is input position first + p * step."""
    axes: list[SpatialAxis] = []
    windows: list[Window] = []
    for i, spatial in enumerate(op.spatial_axes):
        if spatial.axis not in cuts:
            axes.append(spatial)
            windows.append(same)
            continue
        first, step = cuts[spatial.axis]
        spatial = op.unshared_axes[i]
        size = op.out_shape()[spatial.axis]
        axes.append(SpatialAxis(spatial.axis, size, spatial.stride * abs(step)))
        windows.append(_strided(first, step))
    return _mapped(op, axes, windows)


def _strided(first: int, step: int) -> Window:
    def window(wanted: Interval) -> Interval:
        ends = first + step * wanted[0], first + step * wanted[1]
        return min(ends), max(ends)

    return window


def _gather(op: Op) -> Effect:
    axis = op.attribute("axis", 0) % op.rank
    added = len(op.shape(op.node.input[1])) - 1
    if any(spatial.axis == axis for spatial in op.spatial_axes):
        indices = op.numbers(1)
        steps = set(np.diff(indices).tolist())
        if added or len(steps) != 1 or 0 in steps:
            raise UnknownEffectError
        return _cut(op, {axis: (int(indices[0]), int(steps.pop()))})
    axes = [replace(s, axis=s.axis + added) if s.axis > axis else s for s in op.spatial_axes]
    return _mapped(op, axes)


def _transpose(op: Op) -> Effect:
    order = op.attribute("perm", None) or range(op.rank)[::-1]
    axes = [replace(spatial, axis=list(order).index(spatial.axis)) for spatial in op.spatial_axes]
    return _mapped(op, axes)


def _concat(op: Op) -> Effect:
    out = op.node.output[0]
    axis = op.attribute("axis", 1) % len(op.out_shape())
    parts = [(name, cast("Layout", op.layouts[name])) for name in op.spatial_inputs]
    axes = parts[0][1]
    if all(spatial.axis != axis for spatial in axes):
        if any(other != axes for _, other in parts):
            raise UnknownEffectError
        return _pointwise(op)
    # Along the height or the width, the short parts are a border, like padding; the long one is the tile.
    lengths = [op.shape(name)[axis] for name in op.node.input]
    longest = lengths.index(max(lengths))
    name = op.node.input[longest]
    layout = op.layouts.get(name)
    if 2 * lengths[longest] <= sum(lengths) or not layout or any(s.inner != 1 for s in layout):
        raise UnknownEffectError
    height, width = (replace(spatial, size=sum(lengths)) if spatial.axis == axis else spatial for spatial in layout)
    before = -sum(lengths[:longest])
    windows = tuple(_shifted(before) if spatial.axis == axis else same for spatial in layout)
    return Effect({out: (height, width)}, (Need(name, out, (windows[0], windows[1])),))


def _split(op: Op) -> Effect:
    axis = op.attribute("axis", 0) % op.rank
    along = any(spatial.axis == axis for spatial in op.spatial_axes)
    layouts: dict[str, Layout | None] = {}
    needs = []
    start = 0
    for i, out in enumerate(op.node.output):
        size = op.out_shape(i)[axis]
        axes = op.unshared_axes if along else op.spatial_axes
        height, width = (replace(s, size=size) if s.axis == axis else s for s in axes)
        windows = [_shifted(start) if s.axis == axis else same for s in axes]
        layouts[out] = (height, width)
        needs.append(Need(op.node.input[0], out, (windows[0], windows[1])))
        start += size
    return Effect(layouts, tuple(needs))


def _depth_to_space(op: Op) -> Effect:
    block = op.attribute("blocksize", 1)
    axes = [SpatialAxis(s.axis, s.size * block, s.stride / block) for s in op.unshared_axes]
    return _mapped(op, axes, [_merged(block)] * 2)


def _space_to_depth(op: Op) -> Effect:
    block = op.attribute("blocksize", 1)
    axes = [SpatialAxis(s.axis, s.size // block, s.stride * block) for s in op.unshared_axes]
    return _mapped(op, axes, [_split_block(block)] * 2)


def _merged(block: int) -> Window:
    return lambda wanted: (wanted[0] // block, wanted[1] // block)


def _split_block(block: int) -> Window:
    return lambda wanted: (wanted[0] * block, wanted[1] * block + block - 1)


def _repeated(op: Op) -> Effect:
    repeats = op.numbers(1)
    if any(repeats[spatial.axis] != 1 for spatial in op.spatial_axes):
        raise UnknownEffectError
    return _mapped(op, op.spatial_axes)


def _reshape(op: Op) -> Effect:
    """Follow the height and the width by their strides in memory, which a reshape does not change."""
    shape, out = op.shape(op.node.input[0]), op.out_shape()
    (height, window_h), (width, window_w) = (_reshaped_axis(spatial, shape, out) for spatial in op.spatial_axes)
    axes, windows = [height, width], [window_h, window_w]
    if height.axis != width.axis:
        for i, spatial in enumerate(axes):
            if spatial.inner > 1 and out[spatial.axis] == spatial.size * spatial.inner:  # a pixel shuffle
                axes[i] = SpatialAxis(spatial.axis, out[spatial.axis], spatial.stride / spatial.inner)
                windows[i] = _merged(spatial.inner)
    return _mapped(op, axes, windows)


def _reshaped_axis(spatial: SpatialAxis, shape: Shape, out: Shape) -> tuple[SpatialAxis, Window]:
    if len(out) == len(shape) and out[spatial.axis :] == shape[spatial.axis :]:
        return spatial, same
    step = spatial.inner * math.prod(shape[spatial.axis + 1 :])
    end = step * spatial.size
    for axis in reversed(range(len(out))):
        inner = math.prod(out[axis + 1 :])
        if step % inner == 0 and inner * out[axis] >= end and inner * out[axis] % end == 0:
            return SpatialAxis(axis, spatial.size, spatial.stride, step // inner), same
    for axis in reversed(range(len(out))):
        inner = math.prod(out[axis + 1 :])
        if inner % step == 0 and inner * out[axis] == end and out[axis] > 1:
            block = inner // step
            return SpatialAxis(axis, out[axis], spatial.stride * block), _split_block(block)
    raise UnknownEffectError


def _matmul(op: Op) -> Effect:
    """Return a local effect if the height and the width are among the axes that stay: not summed, and not paired."""
    rank = len(op.out_shape())
    if min(len(op.shape(name)) for name in op.node.input[:2]) < 2:
        raise UnknownEffectError
    layouts = []
    for i, name in enumerate(op.node.input[:2]):
        if layout := op.layouts.get(name):
            added = rank - len(op.shape(name))
            layouts.append(tuple(replace(spatial, axis=spatial.axis + added) for spatial in layout))
            if any(spatial.axis == rank - (1, 2)[i] for spatial in layouts[-1]):
                return _statistic(op)
    (height, width), *others = layouts
    if others and others[0] != (height, width):
        if all(spatial.axis >= rank - 2 for layout in layouts for spatial in layout):
            return _statistic(op)  # every position meets every other one, as in attention
        raise UnknownEffectError
    if others and max(height.axis, width.axis) >= rank - 2:
        raise UnknownEffectError
    out = op.node.output[0]
    needs = tuple(Need(name, out, (same, same)) for name in op.spatial_inputs)
    return Effect({out: (height, width)}, needs)


def _gemm(op: Op) -> Effect:
    summed = 0 if op.attribute("transA", 0) else 1
    if any(spatial.axis == summed for spatial in op.spatial_axes):
        return _statistic(op)
    return _mapped(op, [replace(spatial, axis=0) for spatial in op.spatial_axes])


def _dynamically_quantised(op: Op) -> Effect:
    """Return the effect of DynamicQuantizeLinear, whose scale is a statistic of the whole tensor."""
    return replace(_mapped(op, op.spatial_axes), whole_tile=True)


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
    "DynamicQuantizeLinear": _dynamically_quantised,
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
