"""Compute the receptive field of a graph by rules: halo, alignment, and statistics of the tile.

It is computed from the ONNX graph, so it works for networks of this project and from elsewhere. In a forward pass, each
node states where the height and the width of the tile lie in its outputs; in a backward pass, which interval of its
input an interval of its output needs. The tile is treated as unbounded: padding adds nothing, and a halo may be longer
than the tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx

from histostream.export.graph.model import opset_of
from histostream.export.graph.operators import STANDARD_DOMAINS
from histostream.export.graph.shapes import Shape, known_shapes, small_constants, tiles_input, with_shapes
from histostream.export.graph.spatial_axes import (
    Effect,
    Interval,
    Layout,
    Need,
    Op,
    SpatialAxis,
    UnknownEffectError,
    same,
)
from histostream.export.receptive_field.rules import RULES

COMPUTED, MEASURED = "computed", "measured"


@dataclass(frozen=True, slots=True)
class ReceptiveField:
    """The input pixels that an output pixel of a graph depends on.

    Parameters
    ----------
    halo_px
        Largest distance, along height or width, from an output pixel to an input pixel that it needs, statistics of the
        whole tile excepted.
    align_px
        Positions of tiles must be multiples of it, so that their poolings agree.
    whole_tile
        Names of the nodes through which an output pixel depends on the whole tile.
    unknown
        Names of the nodes that no rule covers. `perturbation.receptive_field_of` measures what they do.
    source
        "computed" by rules, or "measured" by perturbation.
    position
        Whether the result depends on where in its tile a pixel lies, as with aligned corners; it is always measured.
    """

    halo_px: int
    align_px: int
    whole_tile: tuple[str, ...]
    unknown: tuple[str, ...] = ()
    source: str = COMPUTED
    position: bool = False

    @property
    def is_local(self) -> bool:
        """Whether overlapping tiles agree where they are a halo away from their edges, as far as is known."""
        return not (self.whole_tile or self.position) and (not self.unknown or self.source == MEASURED)


def receptive_field(model: onnx.ModelProto) -> ReceptiveField:
    """Compute halo, alignment and whole-tile nodes of a graph that keeps the tile contract.

    The result is exact for convolutions, pooling, resizing and shuffling by constant amounts. Channels are not
    followed, so it is too large if a block of pixels is folded into channels that are never mixed; and by less than one
    pixel of the coarser map for a linear Resize with ``align_corners``, whose phase drifts across the tile. Behind a
    node without a rule, listed in ``unknown``, it is a lower bound.

    Parameters
    ----------
    model
        Input uint8 (N, H, W, C), output (N, K, H, W); H and W are fixed.

    Raises
    ------
    GraphError
        If height or width are not fixed.
    """
    return computed_field(trace(model))


def computed_field(traced: Trace) -> ReceptiveField:
    """Compute halo, alignment and whole-tile nodes as `receptive_field`, of a graph that was followed already."""
    output = traced.model.graph.output[0].name
    used = _ancestors(traced, output)
    align_px, beyond = _alignment(traced, used)
    steps = [step for step in traced.steps if used.intersection(step.node.output)]
    whole = [
        label(step.node)
        for step in steps
        if (step.effect.whole_tile and not step.effect.unknown) or beyond.intersection(step.node.output)
    ]
    last = traced.layouts.get(output)
    if last and any(axis != SpatialAxis(2 + i, traced.spatial_axes[i].size) for i, axis in enumerate(last)):
        # The output is not on the grid of the tile, so its positions are not those of the slide.
        ends = [label(step.node) for step in traced.steps if output in step.node.output]
        whole += [name for name in ends if name not in whole]
    unknown = tuple(label(step.node) for step in steps if step.effect.unknown)
    halo_px = 0
    for direction in range(2):
        middle = traced.spatial_axes[direction].size // 2 // align_px * align_px
        for position in range(middle, middle + align_px):
            needed = _needed_positions(traced, output, position, direction)
            if needed is not None:
                halo_px = max(halo_px, position - needed[0], needed[1] - position)
    return ReceptiveField(halo_px, align_px, tuple(whole), unknown)


def _alignment(traced: Trace, used: set[str]) -> tuple[int, set[str]]:
    """Return the common multiple of the strides that overlapping tiles can keep, and the tensors of longer strides.

    Tiles that share at most half of their pixels cannot begin at multiples of more than half a tile.
    """
    longest = {
        name: math.lcm(*(axis.stride.numerator for axis in layout))
        for name in used
        if (layout := traced.layouts.get(name))
    }
    most = max(min(axis.size for axis in traced.spatial_axes) // 2, 1)
    align_px = 1
    for stride in sorted(set(longest.values())):
        if math.lcm(align_px, stride) <= most:
            align_px = math.lcm(align_px, stride)
    return align_px, {name for name, stride in longest.items() if align_px % stride}


def label(node: onnx.NodeProto) -> str:
    """Return the name of a node, or of its output where it has none."""
    return node.name or node.output[0]


@dataclass(frozen=True, slots=True)
class Step:
    """A node that depends on the tile, and its effect."""

    node: onnx.NodeProto
    effect: Effect


@dataclass(frozen=True, slots=True)
class Trace:
    """The nodes of a graph that depend on the tile, and the layout of every tensor that they make.

    A tensor without an entry does not depend on the pixels; a tensor with the entry None is a statistic, which has no
    position in the tile. The shapes in ``model`` are known and its N is fixed.
    """

    model: onnx.ModelProto
    tiles: str
    spatial_axes: Layout  # of the input
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
        The N for which the shapes are computed.

    Raises
    ------
    GraphError
        If height or width are not fixed.
    """
    model = with_shapes(model, batch)
    tiles = tiles_input(model)
    shapes = known_shapes(model)
    opset = opset_of(model)
    constants = small_constants(model)
    _, height, width, _ = shapes[tiles]
    axes = SpatialAxis(1, height), SpatialAxis(2, width)
    layouts: dict[str, Layout | None] = {tiles: axes}
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
    return Trace(model, tiles, axes, tuple(steps), layouts, shapes)


def _ancestors(traced: Trace, output: str) -> set[str]:
    used = {output}
    for step in reversed(traced.steps):
        if used.intersection(step.node.output):
            used.update(step.node.input)
    return used


def _needed_positions(traced: Trace, output: str, position: int, direction: int) -> Interval | None:
    """Return the input positions that one output position needs along height (0) or width (1)."""
    needed: dict[str, Interval] = {output: (position, position)}
    for step in reversed(traced.steps):
        for need in step.effect.needs:
            if (wanted := needed.get(need.output)) and (window := need.windows[direction](wanted)):
                first, last = needed.get(need.tensor, window)
                needed[need.tensor] = min(first, window[0]), max(last, window[1])
    return needed.get(traced.tiles)


def _effect(op: Op, subgraph: bool) -> Effect:
    if subgraph:
        return Effect(dict.fromkeys(op.outputs), whole_tile=True, unknown=True)
    if not op.spatial_inputs:
        return Effect(dict.fromkeys(op.outputs))
    rule = RULES.get(op.node.op_type) if op.node.domain in STANDARD_DOMAINS else None
    try:
        return rule(op) if rule else _unknown_effect(op)
    except UnknownEffectError:
        return _unknown_effect(op)


def _unknown_effect(op: Op) -> Effect:
    """Treat a node without a rule as pointwise if it keeps the shape; what it depends on is not known."""
    first = op.spatial_inputs[0]
    out = op.shapes.get(op.outputs[0])
    if out is None or out != op.shapes.get(first):
        return Effect(dict.fromkeys(op.outputs), whole_tile=True, unknown=True)
    layouts = {**dict.fromkeys(op.outputs), op.outputs[0]: op.layouts[first]}
    needs = (Need(first, op.outputs[0], (same, same)),)
    return Effect(layouts, needs, whole_tile=True, unknown=True)
