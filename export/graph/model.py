"""The deployed graph: what it must not contain."""

from __future__ import annotations

import onnx

from histostream.wsi.errors import HistoError

# Nodes that would make a deployed graph random, stateful or dependent on control flow.
FORBIDDEN_NODES = frozenset(
    {
        "Dropout",
        "If",
        "Loop",
        "Scan",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Bernoulli",
        "Multinomial",
    }
)


class GraphError(HistoError, ValueError):
    """A graph breaks a rule of deployment; the message names the node."""


def check_graph(model: onnx.ModelProto) -> None:
    """Refuse a graph with random, training-mode or control-flow nodes, or outside data.

    Raises
    ------
    GraphError
        Naming the node.
    """
    for node in model.graph.node:
        if node.op_type in FORBIDDEN_NODES:
            raise GraphError(
                f"node {node.name!r} is a {node.op_type}: not in a deployed graph; "
                "leave it out of what deployed() returns"
            )
        if node.op_type == "BatchNormalization" and any(a.name == "training_mode" and a.i for a in node.attribute):
            raise GraphError(f"node {node.name!r}: batch normalisation in training mode; call eval() in deployed()")
    for tensor in model.graph.initializer:
        if tensor.external_data:
            raise GraphError(f"weights {tensor.name!r} lie outside the file; export the model again")
    onnx.checker.check_model(model, full_check=True)
