"""Make a bundle of today's schema of a bundle of schema 1, whose graphs round scores to 8 bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from histostream.export.bundle import Export, Network, OptionError, Options, Say, write_bundle
from histostream.export.graph.model import GraphError, opset_of
from histostream.export.graph.nodes import Nodes
from histostream.export.graph.scores import add_rounding
from histostream.export.parity import run_graph
from histostream.runtime.bundle.card import OLD_SCHEMA, CardError, graph_file, read_card, write_card
from histostream.runtime.bundle.onnx_check import read_graph

# The nodes at the end of a graph of schema 1, from the output backwards: clip(255 s + 1/2), cut off to bytes.
OLD_END = ("Cast", "Clip", "Add")


def upgrade_bundle(bundle: Path, out: Path, options: Options | None = None, *, say: Say = lambda text: None) -> Export:
    """Write a bundle of schema 1 again, with scores that are not rounded to 8 bits.

    The end of its FP32 graph is replaced, and the other precisions are made of that graph anew. The reference of the
    parity check is the arg-max of the FP32 graph's own scores before they are rounded.

    Parameters
    ----------
    bundle
        The bundle.
    out
        Folder to write; it may be ``bundle`` itself, which is replaced once the new bundle is complete.
    options
        How to export; its precisions are those to write.
    say
        Called with each line of progress.

    Raises
    ------
    CardError
        If it is no bundle, or is not of schema 1.
    GraphError
        If its FP32 graph does not end as graphs of schema 1 do.
    HistoError
        As `write_bundle`.
    """
    options = options or Options()
    card = read_card(bundle)
    if card.schema != OLD_SCHEMA:
        raise CardError(f"{bundle}: it is of schema {card.schema} already; there is nothing to upgrade")
    if options.tile_px not in (None, card.tile_px):
        raise OptionError(f"--tile {options.tile_px}: the graph is made for {card.tile_px}; leave --tile out")
    name = graph_file("fp32")
    model = with_float_scores(onnx.load_from_string(read_graph(bundle, card, name)), f"{bundle / name}")
    frozen = card.precision.get("fp32", {})
    network = Network(
        model=model,
        reference=lambda tiles: run_graph(model, tiles).unrounded,
        method=card.method,
        classes=card.classes,
        mpp=card.mpp,
        channels=card.channels,
        tile_px=card.tile_px,
        score_kind=card.score_kind,
        training=card.training,
        note=card.note,
    )
    export = write_bundle(network, out, options, say=say)
    upgraded = replace(export.card, crf=card.crf, further=card.further)
    if frozen:
        upgraded = replace(upgraded, precision={"fp32": frozen, **upgraded.precision})
    write_card(upgraded, out)
    return replace(export, card=upgraded)


def with_float_scores(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Replace the nodes at the end of a graph of schema 1, in place, and return it.

    Raises
    ------
    GraphError
        If it does not end in scores that are rounded to bytes.
    """
    graph = model.graph
    producer = {output: node for node in graph.node for output in node.output}
    (out,) = graph.output
    value, end = out.name, []
    for kind in OLD_END:
        node = producer.get(value)
        if node is None or node.op_type != kind:
            found = "an input" if node is None else f"a {node.op_type}"
            raise GraphError(f"{name}: its scores come from {found}, not from {kind}; export the model again")
        end.append(node)
        value = node.input[0]
    nodes = Nodes(graph, "scores", opset_of(model))
    add_rounding(nodes.add("Mul", value, nodes.constant("whole", np.float32(1 / 255))), nodes.add, nodes.constant)
    nodes.nodes[-1].output[0] = out.name
    for node in end:
        graph.node.remove(node)
    graph.node.extend(nodes.nodes)
    out.type.tensor_type.elem_type = TensorProto.FLOAT16
    used = {name for node in graph.node for name in node.input}
    unused_weights = [tensor for tensor in graph.initializer if tensor.name not in used]
    for tensor in unused_weights:
        graph.initializer.remove(tensor)
    return model
