"""Freeze the statistics of the tile in a deployed graph, so that overlapping tiles agree.

The live graph normalises each tile by its own mean and variance, so two tiles disagree where they overlap. Freezing
replaces these statistics by constants: those of given tiles, pooled, as in a batch normalisation after training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, inliner, numpy_helper

from histostream.export.graph.model import (
    GraphError,
    attribute,
    check_graph,
    open_session,
    opset_of,
    unused_name,
    value_names,
)
from histostream.export.graph.operators import FREEZABLE, POINTWISE
from histostream.export.graph.shapes import tiles_input
from histostream.export.receptive_field.measure import Step, Trace, label, receptive_field, trace


def freeze_statistics(model: onnx.ModelProto, tiles: NDArray[np.uint8]) -> onnx.ModelProto:
    """Replace the statistics of the tile in a graph by constants estimated from tiles.

    All tiles run as one batch, once, in ONNX Runtime on the CPU. Each mean and variance, and each other value that is
    reduced over the whole tile, is averaged over the batch where it first appears, so that later statistics are
    computed from frozen earlier ones.

    Parameters
    ----------
    model
        A graph that keeps the tile contract, with N dynamic.
    tiles
        (N, H, W, C), N >= 1; all are held in memory at once with their feature maps.

    Returns
    -------
    A graph with the same input and output and no statistics (``receptive_field(...).is_local``), or
    ``model`` itself if it has none.

    Raises
    ------
    GraphError
        If a node depends on the whole tile through something other than a statistic (attention, for example), or is
        unknown; if the tiles do not fit the graph; or if its N is fixed.
    """
    two = trace(model, batch=2)
    one_tile = two.shapes[two.tiles][1:]
    if tiles.dtype != np.uint8 or tiles.shape[1:] != one_tile or not len(tiles):
        needed = f"(N, {', '.join(map(str, one_tile))})"
        raise GraphError(f"tiles are {tiles.dtype} {tiles.shape}: give uint8 {needed} with N of 1 or more")
    if receptive_field(model).is_local:
        return model
    if two.shapes[two.tiles][0] != 2:
        raise GraphError(f"input {two.tiles!r} has a fixed N: export with a dynamic one")
    pooled = copy.deepcopy(model)
    if pooled.functions:
        pooled = inliner.inline_local_functions(pooled)
    frozen = _with_constants(pooled, _run(pooled, _pool(pooled), tiles))
    field = receptive_field(frozen)
    left = field.whole_tile + field.unknown
    if left:
        raise GraphError(
            f"node {left[0]!r} depends on the whole tile and cannot be frozen; export without --freeze-statistics"
        )
    output = frozen.graph.output[0].name
    if trace(frozen, batch=2).shapes.get(output, (2,))[0] != 2:
        raise GraphError(
            f"output {output!r} takes its N from a statistic, which has none if frozen; "
            "export without --freeze-statistics"
        )
    check_graph(frozen)
    return frozen


def _pool(model: onnx.ModelProto) -> dict[str, bool]:
    """Average statistics over the batch where they appear.

    Returns the tensors that become constants, and whether their first axis is N.
    """
    traced = trace(model)
    per_tile = _per_tile(traced, model)
    steps = {step.node.output[0]: step for step in traced.steps}
    graph = _Graph(model)
    for node in model.graph.node:
        step = steps.get(node.output[0])
        if step is None:
            graph.nodes.append(node)
        elif step.effect.whole_tile:
            _pool_node(graph, step, traced, per_tile)
        elif any(step.effect.layouts.values()):
            graph.nodes.append(_with_frozen_inputs(graph, node, traced, per_tile))
        else:
            graph.nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(graph.nodes)
    model.graph.initializer.extend(graph.initializers)
    return graph.frozen


def _per_tile(traced: Trace, model: onnx.ModelProto) -> set[str]:
    """Return the tensors whose first axis, and no other, is N."""
    shapes, two = traced.shapes, trace(model, batch=2).shapes
    return {
        name for name, shape in shapes.items() if name in two and shape[:1] == (1,) and two[name] == (2, *shape[1:])
    }


class _Graph:
    """The nodes and initializers of the pooled graph while it is made."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.opset = opset_of(model)
        self.tiles = tiles_input(model)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.frozen: dict[str, bool] = {}  # name -> whether its first axis is N
        self.taken = value_names(model.graph)

    def add(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Add a node; return its output."""
        name = self.fresh(name)
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def fresh(self, name: str) -> str:
        """Return a name that no tensor has."""
        name = unused_name(name, self.taken)
        self.taken.add(name)
        return name

    def constant(self, value: NDArray[Any], name: str) -> str:
        """Add an initializer; return its name."""
        name = self.fresh(name)
        self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def mean(self, tensor: str, axes: Iterable[int], name: str) -> str:
        """Add the mean over some axes, which stay with length 1; return its name."""
        axes = list(axes)
        if self.opset < 18:  # then the axes became an input
            return self.add("ReduceMean", [tensor], name, axes=axes)
        where = self.constant(np.array(axes, np.int64), f"{name}_axes")
        return self.add("ReduceMean", [tensor, where], name)

    def variance(self, tensor: str, mean: str, axes: Iterable[int], name: str) -> str:
        """Add the mean square of the distance to a mean; return its name."""
        distance = self.add("Sub", [tensor, mean], f"{name}_distance")
        squared = self.add("Mul", [distance, distance], f"{name}_squared")
        return self.mean(squared, axes, name)

    def flat(self, tensor: str) -> str:
        """Add the tensor as a vector; return its name."""
        one_axis = self.constant(np.array([-1], np.int64), f"{tensor}_one_axis")
        return self.add("Reshape", [tensor, one_axis], f"{tensor}_flat")

    def freeze(self, tensor: str, *, per_tile: bool = False) -> str:
        """Note that a tensor becomes a constant; return its name."""
        self.frozen[tensor] = per_tile
        return tensor


def _refuse(node: onnx.NodeProto) -> GraphError:
    return GraphError(
        f"node {label(node)!r} ({node.op_type}) depends on the whole tile and is not a statistic that can be frozen; "
        "export without --freeze-statistics"
    )


def _pool_node(graph: _Graph, step: Step, traced: Trace, per_tile: set[str]) -> None:
    """Add a node that depends on the whole tile in its pooled form."""
    node = step.node
    out = node.output[0]
    spatial = [name for name in node.input if traced.layouts.get(name)]
    if len(spatial) != 1 or not {*spatial, out} <= per_tile or any(node.output[1:]):
        raise _refuse(node)
    if node.op_type in NORMALISATIONS:
        if any(name in traced.layouts for name in node.input[1:]):
            raise _refuse(node)
        NORMALISATIONS[node.op_type](graph, node, traced)
        return
    if node.op_type not in FREEZABLE or any(step.effect.layouts.values()):
        raise _refuse(node)
    # Average over the batch, then repeat, so that what follows still has its N.
    live = copy.deepcopy(node)
    live.output[0] = graph.fresh(f"{out}_per_tile")
    graph.nodes.append(live)
    mean = graph.mean(live.output[0], [0], f"{out}_mean")
    shape = graph.add("Shape", [live.output[0]], f"{out}_shape")
    graph.nodes.append(helper.make_node("Expand", [mean, shape], [out], f"{out}_repeated"))


def _instance_norm(graph: _Graph, node: onnx.NodeProto, traced: Trace) -> None:
    """InstanceNormalization with frozen statistics is a batch normalisation."""
    x, scale, bias = node.input
    name = f"{node.output[0]}_tile"
    axes = [0, *range(2, len(traced.shapes[x]))]
    mean = graph.mean(x, axes, f"{name}_mean")
    variance = graph.variance(x, mean, axes, f"{name}_variance")
    _batch_norm(graph, node, scale, bias, graph.flat(mean), graph.flat(variance))


def _group_norm(graph: _Graph, node: onnx.NodeProto, traced: Trace) -> None:
    """GroupNormalization likewise, each channel with the statistics of its group."""
    x, scale, bias = node.input
    name = f"{node.output[0]}_tile"
    channels, groups = traced.shapes[x][1], attribute(node, "num_groups", 1)
    to_groups = graph.constant(np.array([0, groups, -1], np.int64), f"{name}_to_groups")
    grouped = graph.add("Reshape", [x, to_groups], f"{name}_groups")
    mean = graph.mean(grouped, [0, 2], f"{name}_mean")
    variance = graph.variance(grouped, mean, [0, 2], f"{name}_variance")
    group = np.repeat(np.arange(groups, dtype=np.int64), channels // groups)
    index = graph.constant(group, f"{name}_group_of_channel")

    def per_channel(per_group: str) -> str:
        return graph.add("Gather", [per_group, index], f"{per_group}_per_channel", axis=0)

    if graph.opset < 21:  # then scale and bias were given per group
        scale, bias = (graph.freeze(per_channel(weight)) for weight in (scale, bias))
    mean, variance = (per_channel(graph.flat(value)) for value in (mean, variance))
    _batch_norm(graph, node, scale, bias, mean, variance)


def _batch_norm(graph: _Graph, node: onnx.NodeProto, scale: str, bias: str, mean: str, variance: str) -> None:
    inputs = [node.input[0], scale, bias, graph.freeze(mean), graph.freeze(variance)]
    epsilon = attribute(node, "epsilon", 1e-5)
    graph.nodes.append(helper.make_node("BatchNormalization", inputs, node.output, node.name, epsilon=epsilon))


def _layer_norm(graph: _Graph, node: onnx.NodeProto, traced: Trace) -> None:
    """LayerNormalization over a side of the tile: (x - mean) / sqrt(variance + epsilon)."""
    x, scale, out = node.input[0], node.input[1], node.output[0]
    rank = len(traced.shapes[x])
    axes = [0, *range(attribute(node, "axis", -1) % rank, rank)]
    mean = graph.freeze(graph.mean(x, axes, f"{out}_tile_mean"))
    variance = graph.variance(x, mean, axes, f"{out}_tile_variance")
    epsilon = np.array(attribute(node, "epsilon", 1e-5), np.float32)
    raised = graph.add("Add", [variance, graph.constant(epsilon, f"{out}_epsilon")], f"{out}_sum")
    deviation = graph.freeze(graph.add("Sqrt", [raised], f"{out}_tile_deviation"))
    result = graph.add("Sub", [x, mean], f"{out}_centred")
    result = graph.add("Div", [result, deviation], f"{out}_normalised")
    result = graph.add("Mul", [result, scale], f"{out}_scaled")
    if len(node.input) > 2 and node.input[2]:
        result = graph.add("Add", [result, node.input[2]], f"{out}_biased")
    graph.nodes.append(helper.make_node("Identity", [result], [out], node.name))


NORMALISATIONS: dict[str, Callable[[_Graph, onnx.NodeProto, Trace], None]] = {
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "LayerNormalization": _layer_norm,
}


def _with_frozen_inputs(graph: _Graph, node: onnx.NodeProto, traced: Trace, per_tile: set[str]) -> onnx.NodeProto:
    """Freeze the statistics that a node combines with pixels; repeat them along N where it must match."""
    frozen = copy.deepcopy(node)
    for i, name in enumerate(node.input):
        if name not in traced.layouts or traced.layouts[name] is not None:
            continue
        graph.freeze(name, per_tile=name in per_tile)
        if node.op_type == "Concat":
            frozen.input[i] = _repeated(graph, name, len(traced.shapes[name]))
        elif node.op_type not in (*POINTWISE, "MatMul"):
            raise GraphError(
                f"node {label(node)!r} ({node.op_type}) takes {name!r}, which differs from tile to "
                "tile, in a way that cannot be frozen; "
                "export without --freeze-statistics"
            )
    return frozen


def _repeated(graph: _Graph, tensor: str, rank: int) -> str:
    """Add nodes that repeat the first entry of a tensor for every tile."""
    shape = graph.add("Shape", [graph.tiles], f"{tensor}_tiles")
    zero = graph.constant(np.array([0], np.int64), f"{tensor}_first_axis")
    n = graph.add("Gather", [shape, zero], f"{tensor}_n", axis=0)
    ones = graph.constant(np.ones(rank - 1, np.int64), f"{tensor}_ones")
    to = graph.add("Concat", [n, ones], f"{tensor}_repeats", axis=0)
    return graph.add("Expand", [tensor, to], f"{tensor}_every_tile")


def _run(pooled: onnx.ModelProto, names: dict[str, bool], tiles: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """Return the frozen tensors of the pooled graph, with one entry on the axis of N."""
    model = copy.deepcopy(pooled)
    del model.graph.value_info[:]
    del model.graph.output[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    values = open_session(model).run(list(names), {tiles_input(model): tiles})
    # Along N all entries are equal: one is kept, which broadcasts.
    return {
        name: value[:1] if per_tile else value for (name, per_tile), value in zip(names.items(), values, strict=True)
    }


def _with_constants(pooled: onnx.ModelProto, values: dict[str, NDArray[Any]]) -> onnx.ModelProto:
    """Replace tensors by constants and remove the nodes that are then unused."""
    frozen = copy.deepcopy(pooled)
    graph = frozen.graph
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output) and not set(node.output) & values.keys():
            kept.append(node)
            needed.update(node.input)
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    weights += [numpy_helper.from_array(v, name) for name, v in values.items() if name in needed]
    made = {name for node in kept for name in node.output}
    shapes = [value for value in graph.value_info if value.name in made]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(weights)
    graph.value_info.extend(shapes)
    return frozen
