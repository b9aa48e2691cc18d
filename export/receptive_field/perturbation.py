"""Measure the receptive field of a graph by perturbing its input, where rules do not know a node.

Two measurements, on noise, in ONNX Runtime on the CPU:

- One quarter of the tile is kept, the rest is NaN, and operators that swallow NaN are replaced by others that see the
  same pixels. What is still a number depends on the quarter alone. The same is done with other noise instead of NaN,
  and without replacements, where a node turns NaN into a number.
- Two tiles that overlap, a multiple of the alignment apart, must give the same where they are a halo away from their
  edges. Otherwise the result depends on where in its tile a pixel lies, and not on its surroundings alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from histostream.export.graph.model import GraphError, attribute, first_line, open_session, opset_of
from histostream.export.graph.operators import POINTWISE
from histostream.export.graph.scores import UNROUNDED, with_unrounded_scores
from histostream.export.graph.shapes import Shape, tiles_input
from histostream.export.receptive_field.measure import MEASURED, ReceptiveField, Step, Trace, computed_field, trace

PHASES = 4  # positions of the kept quarter, spread over the alignment
BORDER = 8  # this part of a quarter lies at the border of the tile, where padding may bring in the other side
TOLERANCE = 1e-4  # standard deviations by which rounding may move a value of a tile that is somewhere else
ODD_ONES = 1e-3  # share of values that may move more: hard decisions amplify rounding

SOFTMAX = ("Softmax", "LogSoftmax")

Values = NDArray[np.float32]  # (1, H, W, C), or (1, K, H, W)


def receptive_field_of(model: onnx.ModelProto, border_px: int = 0) -> ReceptiveField:
    """Compute the receptive field of a graph by rules, and measure what they leave open.

    Where a node has no rule, halo and alignment are measured. If the graph is local, that is tried on two overlapping
    tiles.

    Parameters
    ----------
    model
        A graph that keeps the tile contract.
    border_px
        Pixels at each side of a tile for which the network gives no scores; tiles are not compared there.

    Raises
    ------
    GraphError
        If height or width are not fixed, or ONNX Runtime cannot run the graph.
    """
    traced = trace(model)
    field = computed_field(traced)
    if field.unknown:
        return _measured(traced, field, border_px)
    if field.whole_tile:
        return field
    return replace(field, position=_moves(traced, max(field.halo_px, border_px), field.align_px) is False)


def _measured(traced: Trace, field: ReceptiveField, border_px: int) -> ReceptiveField:
    """Measure halo and alignment, beginning with the alignment that the rules found."""
    half = min(_size(traced)) // 2
    perturbation = _Perturbation(traced, statistics=bool(field.whole_tile))
    align_px = field.align_px
    while True:
        halo_px = perturbation.halo(align_px)
        if halo_px is None:  # half of the tile at least, and perhaps all of it
            whole = tuple(dict.fromkeys((*field.whole_tile, *field.unknown)))
            return replace(field, halo_px=half, whole_tile=whole, source=MEASURED)
        moves = None if field.whole_tile else _moves(traced, max(halo_px, border_px), align_px)
        if moves is not False:
            return replace(field, halo_px=halo_px, align_px=align_px, source=MEASURED)
        if 2 * align_px > half:
            return replace(field, halo_px=halo_px, source=MEASURED, position=True)
        align_px *= 2


class _Perturbation:
    """A graph whose input is replaced in part, to see which outputs change."""

    def __init__(self, traced: Trace, *, statistics: bool) -> None:
        self._size = _size(traced)
        shape = traced.shapes[traced.tiles]
        self._pixels, self._others = _noise(shape, 0), _noise(shape, 1)
        self._spreading = _runner(_spreading(traced))
        self._as_it_is = None if statistics else _runner(_to_floats(traced))
        self._unchanged = None if self._as_it_is is None else self._as_it_is(self._pixels)

    def halo(self, align_px: int) -> int | None:
        """Return how far the outside is seen inside a kept quarter; None: everywhere in it.

        Between the positions that are tried it may be seen further, by less than the distance between them.
        """
        gap = -(-align_px // PHASES)
        height, width = self._size
        longest = 0
        for phase in range(0, align_px, gap):
            y, x = height // 2 + phase, width // 2 + phase
            lower_right = self._seen(slice(y, height), slice(x, width), first=phase == 0)
            upper_left = self._seen(slice(0, height - y), slice(0, width - x), first=phase == 0)
            if lower_right is None or upper_left is None:
                return None
            longest = max(longest, lower_right, upper_left)
        return longest + gap - 1 if longest else 0

    def _seen(self, rows: slice, columns: slice, *, first: bool) -> int | None:
        """Return how far the outside of a quarter is seen in it; at its other sides is the border of the tile."""
        kept = slice(None), rows, columns
        nan = np.full_like(self._pixels, np.nan)
        nan[kept] = self._pixels[kept]
        touched = np.isnan(self._spreading(nan))
        if first and self._as_it_is is not None:
            other = self._others.copy()
            other[kept] = self._pixels[kept]
            touched |= self._as_it_is(other) != self._unchanged
        inside = touched.any(axis=(0, 1))[rows, columns]
        inside = inside if rows.start else inside[::-1, ::-1]  # the outside lies before the first row and column
        height, width = (n - n // BORDER for n in inside.shape)
        ys, xs = np.nonzero(inside[:height, :width])
        seen = int(np.minimum(ys, xs).max(initial=-1)) + 1
        return seen if seen < min(height, width) else None


def _moves(traced: Trace, halo_px: int, align_px: int) -> bool | None:
    """Whether two overlapping tiles give the same where they are a halo away from their edges; None: they never are."""
    height, width = _size(traced)
    room = min(height, width) - 2 * halo_px
    steps = max(room // 2 // align_px, 1)
    shift = align_px * (steps - 1 + steps % 2)  # an odd multiple: an even one may be the alignment that is needed
    if shift >= room:
        return None
    n, _, _, channels = traced.shapes[traced.tiles]
    pixels = _noise((n, height + shift, width + shift, channels), 2)
    run = _runner(_to_floats(traced))
    first, second = run(pixels[:, :height, :width]), run(pixels[:, shift:, shift:])
    low, ends = halo_px, (height - halo_px, width - halo_px)
    ours = first[..., low + shift : ends[0], low + shift : ends[1]]
    theirs = second[..., low : ends[0] - shift, low : ends[1] - shift]
    moved = ~(np.abs(ours - theirs) <= TOLERANCE * float(first.std()))
    return bool(moved.mean() <= ODD_ONES)


def _noise(shape: Shape, seed: int) -> Values:
    """Return pixels (N, H, W, C) of all grey levels, coarse and fine."""
    n, height, width, channels = shape
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 200, (n, -(-height // 8), -(-width // 8), channels))
    coarse = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]
    return np.asarray(coarse + random.integers(0, 56, (n, height, width, channels)), np.float32)


def _size(traced: Trace) -> tuple[int, int]:
    height, width = traced.spatial_axes
    return height.size, width.size


def _runner(model: onnx.ModelProto) -> Callable[[Values], Values]:
    session, name = open_session(model), tiles_input(model)

    def run(pixels: Values) -> Values:
        try:
            (out,) = session.run(None, {name: np.ascontiguousarray(pixels)})
        except Exception as error:  # ONNX Runtime's own exceptions have no common base
            raise GraphError(f"the graph does not run on noise ({first_line(error)})") from error
        return np.asarray(out, np.float32)

    return run


def _to_floats(traced: Trace) -> onnx.ModelProto:
    """Return the graph from pixels as floats to the last tensor (N, K, H, W) before steps that see one pixel each."""
    model = with_unrounded_scores(copy.deepcopy(traced.model))
    graph = model.graph
    steps = {name: step for step in traced.steps for name in step.node.output}
    end = graph.output[-1].name
    if end == UNROUNDED:
        end = graph.node[-1].input[0]
    while (step := steps.get(end)) and (name := _same_pixel(step, traced)):
        end = name
    for value in graph.input:
        if value.name == traced.tiles:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    # The shapes stay true; the types behind the input may not.
    del graph.output[:], graph.value_info[:]
    graph.output.append(helper.make_empty_tensor_value_info(end))
    return model


def _same_pixel(step: Step, traced: Trace) -> str | None:
    """Return the tensor (N, K, H, W) of which a node sees, for each pixel, the same pixel and nothing else."""
    height, width = (axis.size for axis in traced.spatial_axes)
    if not (name := _alone(step.node, traced)):
        return None
    shapes = [traced.shapes.get(n, ()) for n in (name, step.node.output[0])]
    others = [traced.shapes.get(n) for n in step.node.input if n not in ("", name)]
    if any(shape is None or math.prod(shape[-2:]) != 1 for shape in others):  # coordinates, for example
        return None
    local = step.node.op_type in POINTWISE or (step.node.op_type in SOFTMAX and attribute(step.node, "axis", -1) == 1)
    return name if local and all(len(shape) == 4 and shape[2:] == (height, width) for shape in shapes) else None


def _alone(node: onnx.NodeProto, traced: Trace) -> str | None:
    """Return the input of a node that depends on the tile, if only one does."""
    depends = [name for name in node.input if name in traced.layouts]
    return depends[0] if len(depends) == 1 else None


def _spreading(traced: Trace) -> onnx.ModelProto:
    """Return the graph with NaN reaching all that sees it, except through statistics of the whole tile."""
    types = {value.name: value.type.tensor_type.elem_type for value in traced.model.graph.value_info}
    opset = opset_of(traced.model)
    whole = {name for s in traced.steps if s.effect.whole_tile and not s.effect.unknown for name in s.node.output}
    model = _to_floats(traced)
    nodes = []
    for node in model.graph.node:
        out = node.output[0]
        if out in whole and traced.layouts[out] is None and out in types and out in traced.shapes:
            zeros = np.zeros(traced.shapes[out], helper.tensor_dtype_to_np_dtype(types[out]))
            model.graph.initializer.append(numpy_helper.from_array(zeros, out))
        elif (
            (name := _alone(node, traced))
            and types.get(name) == types.get(out)
            and (out in whole or node.op_type in POINTWISE)
        ):
            nodes.append(helper.make_node("Identity", [name], [out]))  # Relu, for example, makes 0 of NaN
        elif node.op_type == "MaxPool":
            nodes += _averaged(node, opset)
        elif node.op_type in SOFTMAX and opset >= 13:
            axes = numpy_helper.from_array(np.array([attribute(node, "axis", -1)]), f"{out}/axes")
            model.graph.initializer.append(axes)
            nodes.append(helper.make_node("ReduceSum", [node.input[0], axes.name], [f"{out}/sum"]))
            nodes.append(helper.make_node("Add", [node.input[0], f"{out}/sum"], [out]))
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _averaged(node: onnx.NodeProto, opset: int) -> list[onnx.NodeProto]:
    """Return a maximum pooling as an average pooling; the places of the maxima stay as they are."""
    options = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name != "storage_order"}
    if opset < 19 and set(options.pop("dilations", [1])) != {1}:
        return [node]
    average = helper.make_node("AveragePool", node.input, node.output[:1], **options)
    if not any(node.output[1:]):
        return [average]
    places = copy.deepcopy(node)
    places.output[0] = f"{node.output[0]}/largest"
    return [places, average]
