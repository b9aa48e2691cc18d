"""How far an output pixel of a deployed graph sees: halo, alignment, statistics of the tile.

Read off the ONNX graph, so it serves the networks of this project and foreign ones alike. Forwards,
each node says where the height and the width of the tile lie in its outputs; backwards, which
interval of its input an interval of its output needs. The tile is taken as unbounded, so padding
has no reach and a halo may be longer than the tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, cast

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, inliner, numpy_helper, reference, shape_inference

from histostream.export.graph import GraphError

Shape = tuple[int, ...]
Interval = tuple[int, int]  # first and last position
Window = Callable[[Interval], Interval | None]  # positions of an output -> of an input
TILES = "tiles"
SMALL = 4096  # elements; a constant that steers a node (a shape, pads, indices) has fewer


@dataclass(frozen=True, slots=True)
class Reach:
    """How far an output pixel of a graph sees.

    Parameters
    ----------
    halo_px
        Largest distance, along height or width, from an output pixel to an input pixel that it
        needs other than through a statistic of the whole tile.
    align_px
        What the positions of tiles must be multiples of for their poolings to agree.
    whole_tile
        The nodes through which an output pixel sees the whole tile, or that are not understood;
        empty if the result is local.
    """

    halo_px: int
    align_px: int
    whole_tile: tuple[str, ...]


def reach(model: onnx.ModelProto) -> Reach:
    """Halo, alignment and whole-tile nodes of a graph that keeps the tile contract.

    Exact for convolutions, pooling, resizing and shuffling by constant amounts. Channels are not
    followed, so it is conservative where a block of pixels is folded into channels that are never
    mixed; and by less than one pixel of the coarser map for a linear Resize with
    ``align_corners``, whose phase drifts across the tile. What it does not understand it names in
    ``whole_tile``.

    Parameters
    ----------
    model
        Input uint8 (N, H, W, C), output (N, K, H, W); H and W fixed, N dynamic or not.

    Raises
    ------
    GraphError
        If height or width are not fixed.
    """
    traced = trace(model)
    output = model.graph.output[0].name
    live = _ancestors(traced, output)
    layouts = [layout for name in live if (layout := traced.layouts.get(name))]
    align_px = math.lcm(*(side.stride.numerator for layout in layouts for side in layout))
    whole = [
        label(step.node)
        for step in traced.steps
        if step.effect.whole_tile and live.intersection(step.node.output)
    ]
    last = traced.layouts.get(output)
    if last and any(side != Side(2 + i, traced.sides[i].size) for i, side in enumerate(last)):
        # Not on the grid of the tile: a position of the output is not one of the slide.
        ends = [label(step.node) for step in traced.steps if output in step.node.output]
        whole += [name for name in ends if name not in whole]
    halo_px = 0
    for side in range(2):
        middle = traced.sides[side].size // 2 // align_px * align_px
        for position in range(middle, middle + align_px):
            seen = _seen(traced, output, position, side)
            if seen is not None:
                halo_px = max(halo_px, position - seen[0], seen[1] - position)
    return Reach(halo_px, align_px, tuple(whole))


def label(node: onnx.NodeProto) -> str:
    """Return the name of a node, or of its output where it has none."""
    return node.name or node.output[0]


def _ancestors(traced: Trace, output: str) -> set[str]:
    live = {output}
    for step in reversed(traced.steps):
        if live.intersection(step.node.output):
            live.update(step.node.input)
    return live


def _seen(traced: Trace, output: str, position: int, side: int) -> Interval | None:
    """Return the input positions that one output position needs; none if it needs none."""
    needed: dict[str, Interval] = {output: (position, position)}
    for step in reversed(traced.steps):
        for need in step.effect.needs:
            if (wanted := needed.get(need.output)) and (found := need.windows[side](wanted)):
                needed[need.tensor] = _hull(needed.get(need.tensor, found), found)
    return needed.get(traced.tiles)


def _hull(a: Interval, b: Interval) -> Interval:
    return min(a[0], b[0]), max(a[1], b[1])


# --- The forward pass: where the tile's sides lie in each tensor. ---


@dataclass(frozen=True, slots=True)
class Side:
    """Where the height, or the width, of the tile lies in a tensor."""

    axis: int
    size: int
    stride: Fraction = Fraction(1)  # pixels of the tile from one position to the next
    inner: int = 1  # elements of the axis from one position to the next; > 1 if others share it


Layout = tuple[Side, Side]  # height, width


@dataclass(frozen=True, slots=True)
class Need:
    """The positions of an input that positions of an output need, along height and width."""

    tensor: str
    output: str
    windows: tuple[Window, Window]


@dataclass(frozen=True, slots=True)
class Effect:
    """What a node does to the tile's sides; an output without a layout is a statistic."""

    layouts: dict[str, Layout | None]
    needs: tuple[Need, ...] = ()
    whole_tile: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """A node that depends on the tile, with its effect."""

    node: onnx.NodeProto
    effect: Effect


@dataclass(frozen=True, slots=True)
class Trace:
    """A graph's nodes that depend on the tile, and the layout of every tensor they make.

    A tensor with no entry does not depend on the pixels; one with the entry None is a statistic,
    a tensor without places in the tile.
    """

    tiles: str
    sides: Layout  # of the input
    steps: tuple[Step, ...]
    layouts: dict[str, Layout | None]
    shapes: dict[str, Shape]


def trace(model: onnx.ModelProto, batch: int = 1) -> Trace:
    """Follow height and width through a graph that keeps the tile contract.

    Parameters
    ----------
    model
        The graph.
    batch
        The N for which the shapes are worked out.

    Raises
    ------
    GraphError
        If height or width are not fixed.
    """
    model = _with_shapes(model, batch)
    tiles = tiles_input(model)
    shapes = _shapes(model)
    opset = max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    constants = _constants(model)
    _, height, width, _ = shapes[tiles]
    sides = Side(1, height), Side(2, width)
    layouts: dict[str, Layout | None] = {tiles: sides}
    steps: list[Step] = []
    for node in model.graph.node:
        subgraph = any(a.HasField("g") for a in node.attribute)
        if not subgraph and not any(name in layouts for name in node.input):
            continue
        if node.op_type in ("Shape", "Size"):
            continue
        effect = _effect(Op(node, opset, shapes, layouts, constants), subgraph)
        layouts.update(effect.layouts)
        steps.append(Step(node, effect))
    return Trace(tiles, sides, tuple(steps), layouts, shapes)


def tiles_input(model: onnx.ModelProto) -> str:
    """Return the name of the input with the pixels."""
    weights = {tensor.name for tensor in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in weights]
    return TILES if TILES in names else names[0]


def _effect(op: Op, subgraph: bool) -> Effect:
    if subgraph:
        return Effect(dict.fromkeys(op.outputs), whole_tile=True)
    if not op.spatial:
        return Effect(dict.fromkeys(op.outputs))
    rule = RULES.get(op.node.op_type) if op.node.domain in ("", "ai.onnx") else None
    try:
        return rule(op) if rule else _not_understood(op)
    except _NotUnderstoodError:
        return _not_understood(op)


def _not_understood(op: Op) -> Effect:
    """Name the node; take it as pointwise if its output has the shape of its input."""
    first = op.spatial[0]
    out = op.shapes.get(op.outputs[0])
    if out is None or out != op.shapes.get(first):
        return Effect(dict.fromkeys(op.outputs), whole_tile=True)
    layouts = {**dict.fromkeys(op.outputs), op.outputs[0]: op.layouts[first]}
    needs = (Need(first, op.outputs[0], (_same, _same)),)
    return Effect(layouts, needs, whole_tile=True)


class _NotUnderstoodError(Exception):
    """A node is beyond the rules: its result may see anything."""


@dataclass(frozen=True, slots=True)
class Op:
    """A node with what is known of its inputs."""

    node: onnx.NodeProto
    opset: int
    shapes: dict[str, Shape]
    layouts: dict[str, Layout | None]
    constants: dict[str, NDArray[Any]]

    @property
    def outputs(self) -> list[str]:
        """The names of the outputs that are used."""
        return [name for name in self.node.output if name]

    @property
    def spatial(self) -> list[str]:
        """The inputs that have places in the tile."""
        return [name for name in self.node.input if self.layouts.get(name)]

    @property
    def sides(self) -> Layout:
        """Sides of the first input, if it alone has places in the tile."""
        if self.spatial != [self.node.input[0]]:
            raise _NotUnderstoodError
        return cast("Layout", self.layouts[self.node.input[0]])

    @property
    def plain_sides(self) -> Layout:
        """Sides of the first input, if each has an axis for itself."""
        shape = self.shape(self.node.input[0])
        if any(side.inner != 1 or shape[side.axis] != side.size for side in self.sides):
            raise _NotUnderstoodError
        return self.sides

    @property
    def rank(self) -> int:
        """The number of axes of the first input."""
        return len(self.shape(self.node.input[0]))

    def shape(self, name: str) -> Shape:
        """Return the shape of a tensor."""
        if name not in self.shapes:
            raise _NotUnderstoodError
        return self.shapes[name]

    def out_shape(self, index: int = 0) -> Shape:
        """Return the shape of an output."""
        return self.shape(self.node.output[index])

    def attribute(self, name: str, default: Any) -> Any:
        """Return an attribute of the node, text as ``str``."""
        found = [a for a in self.node.attribute if a.name == name]
        value = helper.get_attribute_value(found[0]) if found else default
        return value.decode() if isinstance(value, bytes) else value

    def has_input(self, index: int) -> bool:
        """Whether an optional input is given."""
        return len(self.node.input) > index and bool(self.node.input[index])

    def numbers(self, index: int) -> list[Any]:
        """Return an input that is a small constant."""
        if not self.has_input(index) or self.node.input[index] not in self.constants:
            raise _NotUnderstoodError
        return self.constants[self.node.input[index]].ravel().tolist()

    def integers(self, attribute: str, index: int) -> list[int] | None:
        """Return integers that are an attribute or, in later opsets, an input; none if left out."""
        if self.has_input(index):
            return [int(number) for number in self.numbers(index)]
        return cast("list[int] | None", self.attribute(attribute, None))


# --- Rules: one per kind of node. ---


def _moved(op: Op, sides: Sequence[Side], windows: Sequence[Window]) -> Effect:
    """Return the effect of a node with one spatial input, the first, on its first output."""
    out = op.node.output[0]
    layouts = {**dict.fromkeys(op.outputs), out: (sides[0], sides[1])}
    return Effect(layouts, (Need(op.node.input[0], out, (windows[0], windows[1])),))


def _same(wanted: Interval) -> Interval:
    return wanted


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
        raise _NotUnderstoodError
    height, width = found.pop()
    out = op.node.output[0]
    needs = tuple(Need(name, out, (_same, _same)) for name in op.spatial)
    return Effect({**dict.fromkeys(op.outputs), out: (height, width)}, needs)


def _statistic(op: Op) -> Effect:
    return Effect(dict.fromkeys(op.outputs), whole_tile=True)


def _normalised(axes_of: Callable[[Op], Iterable[int]]) -> Callable[[Op], Effect]:
    """Rule of a node that keeps the shape, with statistics over some axes."""

    def rule(op: Op) -> Effect:
        axes = {axis % op.rank for axis in axes_of(op)}
        seen = any(side.axis in axes for side in op.sides)
        return replace(_moved(op, op.sides, (_same, _same)), whole_tile=seen)

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
            return _moved(op, op.sides, (_same, _same))
        gone = {axis % op.rank for axis in axes or range(op.rank)}
        if any(side.axis in gone for side in op.sides):
            return _statistic(op)
        if op.attribute("keepdims", 1):
            return _moved(op, op.sides, (_same, _same))
        before = [sum(axis < side.axis for axis in gone) for side in op.sides]
        sides = [replace(s, axis=s.axis - b) for s, b in zip(op.sides, before, strict=True)]
        return _moved(op, sides, (_same, _same))

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
        raise _NotUnderstoodError
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
            return _moved(op, op.sides, (_same, _same))  # also where a side shares its axis
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
    {"half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "asymmetric", "align_corners",
     "tf_half_pixel_for_nn"}
)  # fmt: skip


def _resize(op: Op) -> Effect:
    upsample = op.node.op_type == "Upsample" or op.opset < 11
    mode = op.attribute("mode", "nearest")
    coordinates = (
        "asymmetric" if upsample else op.attribute("coordinate_transformation_mode", "half_pixel")
    )
    rounding = "floor" if upsample else op.attribute("nearest_mode", "round_prefer_floor")
    if (
        coordinates not in COORDINATES
        or mode not in ("nearest", "linear", "bilinear", "cubic")
        or op.attribute("keep_aspect_ratio_policy", "stretch") != "stretch"
    ):
        raise _NotUnderstoodError
    mode = "linear" if mode == "bilinear" else mode
    antialias = bool(op.attribute("antialias", 0))
    scales = _resize_scales(op, 1 if upsample else 2)
    ways = [
        _Resampling(scales(side), mode, coordinates, rounding, antialias) for side in op.plain_sides
    ]
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
        axis % op.rank: Fraction(scale).limit_denominator(SMALL)
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
    if pads is None or op.has_input(3):
        axes = [axis % op.rank for axis in op.numbers(3)]
    else:
        axes = list(range(op.rank))
    begin = dict(zip(axes, pads or [], strict=False))
    touched = {axis for axis, n in zip(axes * 2, pads or [], strict=True) if n}
    return _cut(op, {axis: (-begin[axis], 1) for axis in touched})


def _slice(op: Op) -> Effect:
    starts = op.integers("starts", 1)
    if starts is None:
        raise _NotUnderstoodError
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
            windows.append(_same)
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
            raise _NotUnderstoodError
        return _cut(op, {axis: (int(indices[0]), int(steps.pop()))})
    sides = [replace(s, axis=s.axis + added) if s.axis > axis else s for s in op.sides]
    return _moved(op, sides, (_same, _same))


def _transpose(op: Op) -> Effect:
    order = op.attribute("perm", None) or range(op.rank)[::-1]
    sides = [replace(side, axis=list(order).index(side.axis)) for side in op.sides]
    return _moved(op, sides, (_same, _same))


def _concat(op: Op) -> Effect:
    out = op.node.output[0]
    axis = op.attribute("axis", 1) % len(op.out_shape())
    parts = [(name, cast("Layout", op.layouts[name])) for name in op.spatial]
    sides = parts[0][1]
    if all(side.axis != axis for side in sides):
        if any(other != sides for _, other in parts):
            raise _NotUnderstoodError
        return _pointwise(op)
    # Along a side, the short parts are a border, as padding is; the long one is the tile.
    lengths = [op.shape(name)[axis] for name in op.node.input]
    longest = lengths.index(max(lengths))
    name = op.node.input[longest]
    layout = op.layouts.get(name)
    if 2 * lengths[longest] <= sum(lengths) or not layout or any(s.inner != 1 for s in layout):
        raise _NotUnderstoodError
    height, width = (
        replace(side, size=sum(lengths)) if side.axis == axis else side for side in layout
    )
    before = -sum(lengths[:longest])
    windows = tuple(_shifted(before) if side.axis == axis else _same for side in layout)
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
        windows = [_shifted(start) if s.axis == axis else _same for s in sides]
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
        raise _NotUnderstoodError
    return _moved(op, op.sides, (_same, _same))


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
        return side, _same
    step = side.inner * math.prod(shape[side.axis + 1 :])
    end = step * side.size
    for axis in reversed(range(len(out))):
        inner = math.prod(out[axis + 1 :])
        if step % inner == 0 and inner * out[axis] >= end and inner * out[axis] % end == 0:
            return Side(axis, side.size, side.stride, step // inner), _same
    for axis in reversed(range(len(out))):
        inner = math.prod(out[axis + 1 :])
        if inner % step == 0 and inner * out[axis] == end and out[axis] > 1:
            block = inner // step
            return Side(axis, out[axis], side.stride * block), _parted(block)
    raise _NotUnderstoodError


def _matmul(op: Op) -> Effect:
    """Local if the product sums over channels: no side on the axis that is summed."""
    if len(op.spatial) != 1:
        raise _NotUnderstoodError
    a, b = (op.shape(name) for name in op.node.input[:2])
    name = op.spatial[0]
    first = name == op.node.input[0]
    rank = len(a) if first else len(b)
    if min(len(a), len(b)) < 2:
        raise _NotUnderstoodError
    layout = cast("Layout", op.layouts[name])
    if any(side.axis == rank - (1 if first else 2) for side in layout):
        return _statistic(op)
    height, width = (replace(s, axis=s.axis + len(op.out_shape()) - rank) for s in layout)
    out = op.node.output[0]
    return Effect({out: (height, width)}, (Need(name, out, (_same, _same)),))


def _gemm(op: Op) -> Effect:
    summed = 0 if op.attribute("transA", 0) else 1
    if any(side.axis == summed for side in op.sides):
        return _statistic(op)
    return _moved(op, [replace(side, axis=0) for side in op.sides], (_same, _same))


def _quantised_from_its_range(op: Op) -> Effect:
    """DynamicQuantizeLinear: its scale is a statistic of the whole tensor."""
    return replace(_moved(op, op.sides, (_same, _same)), whole_tile=True)


POINTWISE = (
    "Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "BitShift",
    "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Cast", "CastLike", "Ceil", "Celu",
    "Clip", "Cos", "Cosh", "DequantizeLinear", "Div", "Dropout", "Elu", "Equal", "Erf", "Exp",
    "Expand", "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish",
    "Identity", "IsInf", "IsNaN", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Mean", "Min",
    "Mish", "Mod", "Mul", "Neg", "Not", "Or", "PRelu", "Pow", "QuantizeLinear", "Reciprocal",
    "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign",
    "Sqrt", "Sub", "Sum", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Where", "Xor", "LRN",
)  # fmt: skip
REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare",
)  # fmt: skip
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


# --- Shapes, for a fixed number of tiles. ---

# Nodes with which exporters compute shapes.
SHAPE_ARITHMETIC = frozenset(
    {"Add", "Cast", "Ceil", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Floor",
     "Gather", "Identity", "Max", "Min", "Mod", "Mul", "Neg", "Range", "ReduceProd", "Reshape",
     "Slice", "Squeeze", "Sub", "Unsqueeze", "Where"}
)  # fmt: skip


def _with_shapes(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """Copy the model with a fixed N, every shape inferred and computed shapes made constants."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if copy.functions:
        copy = inliner.inline_local_functions(copy)
    tiles = tiles_input(copy)
    (value,) = (value for value in copy.graph.input if value.name == tiles)
    dims = value.type.tensor_type.shape.dim
    if len(dims) != 4 or not (dims[1].dim_value and dims[2].dim_value and dims[3].dim_value):
        raise GraphError(
            f"input {tiles!r} is not (N, H, W, C) with fixed H, W and C: export for one tile size"
        )
    if not dims[0].dim_value:
        dims[0].dim_value = batch
    # What the exporter noted of the shapes holds for any N and may be incomplete.
    del copy.graph.value_info[:]
    for out in copy.graph.output:
        out.type.tensor_type.ClearField("shape")
    while True:
        inferred = shape_inference.infer_shapes(copy, data_prop=True)
        found, unsaid = _folded(inferred), _left_by_inference(inferred)
        if not found and not unsaid:
            return inferred
        copy.graph.value_info.extend(unsaid)
        kept = [node for node in copy.graph.node if node.output[0] not in found]
        del copy.graph.node[:]
        copy.graph.node.extend(kept)
        copy.graph.initializer.extend(
            numpy_helper.from_array(value, name) for name, value in found.items()
        )


def _left_by_inference(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Return the outputs that have the type of their input, of nodes that onnx does not infer."""
    graph = model.graph
    known = {value.name: value.type for value in (*graph.input, *graph.value_info, *graph.output)}
    return [
        helper.make_value_info(node.output[0], known[node.input[0]])
        for node in graph.node
        if node.op_type in ("GroupNormalization", "RMSNormalization")
        and node.input[0] in known
        and node.output[0] not in known
    ]


def _shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """Return the shape of every tensor of which all lengths are known."""
    graph = model.graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        dims = kind.shape.dim
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            shapes.setdefault(value.name, tuple(d.dim_value for d in dims))
    return shapes


def _constants(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """Return the small constants of a graph."""
    values = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if math.prod(tensor.dims) <= SMALL and tensor.data_type != TensorProto.STRING
    }
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.name == "value" and math.prod(attribute.t.dims) <= SMALL:
                values[node.output[0]] = numpy_helper.to_array(attribute.t)
            elif attribute.name in ("value_int", "value_ints", "value_float", "value_floats"):
                values[node.output[0]] = np.array(helper.get_attribute_value(attribute))
    return values


def _folded(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """Return the value of every shape that the graph computes from known shapes and constants."""
    known, shapes = _constants(model), _shapes(model)
    found: dict[str, NDArray[Any]] = {}
    for node in model.graph.node:
        value = None
        if node.op_type == "Shape" and node.input[0] in shapes:
            ends = {a.name: a.i for a in node.attribute}
            part = shapes[node.input[0]][ends.get("start", 0) : ends.get("end")]
            value = np.array(part, np.int64)
        elif node.op_type == "Size" and node.input[0] in shapes:
            value = np.array(math.prod(shapes[node.input[0]]), np.int64)
        elif (
            node.op_type in SHAPE_ARITHMETIC
            and all(name in known for name in node.input if name)
            and math.prod(shapes.get(node.output[0], (1,))) <= SMALL
        ):
            value = _evaluated(node, known, model.opset_import)
        if value is not None and value.size <= SMALL:
            found[node.output[0]] = known[node.output[0]] = value
    return found


def _evaluated(
    node: onnx.NodeProto,
    known: dict[str, NDArray[Any]],
    opsets: Sequence[onnx.OperatorSetIdProto],
) -> NDArray[Any]:
    inputs = {name: known[name] for name in node.input if name}
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), None)
        for name, value in inputs.items()
    ]
    out = helper.make_empty_tensor_value_info(node.output[0])
    graph = helper.make_graph([node], "shape", values, [out])
    session = reference.ReferenceEvaluator(helper.make_model(graph, opset_imports=opsets))
    (value,) = cast("list[Any]", session.run(None, inputs))
    return np.asarray(value)
