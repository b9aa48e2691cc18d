"""Nodes that are added to a graph: pre- and post-processing of a network, the end of an older bundle."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper, numpy_helper

from histostream.export.graph.model import unused_name, value_names

PREFIX = "histostream/"  # of the names of nodes and values that are added


class Nodes:
    """Nodes to add to a graph, in order, with unique names.

    Parameters
    ----------
    graph
        The graph; constants are added to it at once, nodes by the caller.
    stage
        Part of the names of nodes and values.
    opset
        The operator set.
    """

    def __init__(self, graph: onnx.GraphProto, stage: str, opset: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.opset = opset
        self._graph, self._stage = graph, f"{PREFIX}{stage}/"

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node of one output and return the output's name."""
        if kind == "ReduceMax" and self.opset < 18:  # the axes are an attribute until then
            (axes,) = (t for t in self._graph.initializer if t.name == inputs[1])
            inputs, attributes = inputs[:1], {**attributes, "axes": numpy_helper.to_array(axes).tolist()}
        taken = {node.name for node in self.nodes}
        name = unused_name(f"{self._stage}{kind.lower()}", taken)
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, value: Any) -> str:
        """Add a constant and return its name."""
        name = unused_name(f"{self._stage}{name}", {tensor.name for tensor in self._graph.initializer})
        self._graph.initializer.append(numpy_helper.from_array(value, name))
        return name


def reserve_names(graph: onnx.GraphProto) -> None:
    """Rename values and nodes of the network whose names are needed for added ones."""
    used = value_names(graph)
    taken = {n for n in used if n in ("tiles", "scores") or n.startswith(PREFIX)}
    new = {name: unused_name(f"{name.removeprefix(PREFIX)}_", used | {"tiles", "scores"}) for name in taken}
    for node in graph.node:
        node.name = node.name.removeprefix(PREFIX)
        for names in (node.input, node.output):
            names[:] = [new.get(name, name) for name in names]
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = new.get(value.name, value.name)
    for tensor in graph.sparse_initializer:
        tensor.values.name = new.get(tensor.values.name, tensor.values.name)
