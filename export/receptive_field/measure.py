"""How far an output pixel of a deployed graph sees: halo, alignment, statistics of the tile.

Read off the ONNX graph, so it serves the networks of this project and foreign ones alike. Forwards,
each node says where the height and the width of the tile lie in its outputs; backwards, which
interval of its input an interval of its output needs. The tile is taken as unbounded, so padding
has no reach and a halo may be longer than the tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx

from histostream.export.graph.shapes import Shape, known_shapes, small_constants, tiles_input, with_shapes
from histostream.export.graph.spatial_axes import (
    Effect,
    Interval,
    Layout,
    Need,
    NotUnderstoodError,
    Op,
    Side,
    same,
)
from histostream.export.receptive_field.rules import RULES


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
        label(step.node) for step in traced.steps if step.effect.whole_tile and live.intersection(step.node.output)
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
    model = with_shapes(model, batch)
    tiles = tiles_input(model)
    shapes = known_shapes(model)
    opset = max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    constants = small_constants(model)
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


def _effect(op: Op, subgraph: bool) -> Effect:
    if subgraph:
        return Effect(dict.fromkeys(op.outputs), whole_tile=True)
    if not op.spatial:
        return Effect(dict.fromkeys(op.outputs))
    rule = RULES.get(op.node.op_type) if op.node.domain in ("", "ai.onnx") else None
    try:
        return rule(op) if rule else _not_understood(op)
    except NotUnderstoodError:
        return _not_understood(op)


def _not_understood(op: Op) -> Effect:
    """Name the node; take it as pointwise if its output has the shape of its input."""
    first = op.spatial[0]
    out = op.shapes.get(op.outputs[0])
    if out is None or out != op.shapes.get(first):
        return Effect(dict.fromkeys(op.outputs), whole_tile=True)
    layouts = {**dict.fromkeys(op.outputs), op.outputs[0]: op.layouts[first]}
    needs = (Need(first, op.outputs[0], (same, same)),)
    return Effect(layouts, needs, whole_tile=True)
