"""Put pre- and post-processing around a network, and try the result out."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from histostream.export.external.file import either
from histostream.export.external.network import InputFormat, Tiles
from histostream.export.external.output import OutputFormat
from histostream.export.external.scoring import Scoring
from histostream.export.graph.model import INVALID, GraphError, check_graph, first_line, open_session, opset_of
from histostream.export.graph.nodes import Nodes, reserve_names
from histostream.export.graph.scores import add_rounding

MAX_DIFFERENCE = 1 / 255  # of a score, on average; the parity check is stricter


def with_processing(
    network: onnx.ModelProto, source: InputFormat, output: OutputFormat, scoring: Scoring
) -> onnx.ModelProto:
    """Return a graph that keeps the tile contract.

    Raises
    ------
    GraphError
        If it is not valid ONNX, or may not be deployed.
    """
    model = copy.deepcopy(network)
    graph, opset = model.graph, opset_of(model)
    reserve_names(graph)
    result, tile_px = graph.output[0].name, source.tile_px
    before, after = Nodes(graph, "in", opset), Nodes(graph, "out", opset)
    source.add_nodes(before, graph)
    y = scoring.add_nodes(after, output.add_nodes(after, result), output.channels)
    y = _placed(after, y, output, tile_px)
    add_rounding(y, after.add, after.constant)
    after.nodes[-1].output[0] = "scores"

    nodes = [*before.nodes, *graph.node, *after.nodes]
    used = {name for node in nodes for name in node.input}
    weights = [t for t in graph.initializer if t.name in used]  # less what was replaced
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(weights)
    for values, name, kind, shape in (
        (graph.input, "tiles", TensorProto.UINT8, (tile_px, tile_px, source.channels)),
        (graph.output, "scores", TensorProto.FLOAT16, (len(scoring.classes), tile_px, tile_px)),
    ):
        values.append(helper.make_tensor_value_info(name, kind, ["N", *shape]))
    try:
        check_graph(model)
    except INVALID as error:
        raise GraphError(f"the graph is not valid ONNX ({first_line(error)}); export the model again") from error
    return model


def try_out(model: onnx.ModelProto, tiles: Tiles, expected: NDArray[np.float32], fixed: list[str]) -> None:
    """Refuse a wrapped network that computes something else, or scores two tiles together unlike each alone.

    Parameters
    ----------
    model
        The wrapped network.
    tiles, expected
        Two tiles, and their scores by the reference.
    fixed
        Names of reshapes that have a fixed first dimension, for the message.
    """
    session = open_session(model)
    advice = "export the network with a dynamic batch axis"

    def scores(batch: Tiles) -> NDArray[Any]:
        try:
            (out,) = session.run(["scores"], {"tiles": batch})
        except Exception as error:  # ONNX Runtime's own exceptions have no common base
            raise GraphError(f"a batch of {len(batch)} tiles fails ({first_line(error)}); {advice}") from error
        return np.asarray(out, np.float32)

    alone = np.concatenate([scores(tiles[:1]), scores(tiles[1:])])
    difference = float(np.abs(alone - expected).mean()) if alone.shape == expected.shape else math.inf
    if difference > MAX_DIFFERENCE:
        raise GraphError(
            f"wrapped, the network computes something else ({difference:.3f} on average, of scores from 0 to 1): "
            "export it again with operator set 18"
        )
    together = scores(tiles)
    if together.shape != alone.shape or np.abs(together - alone).max() > MAX_DIFFERENCE:
        culprits = f" (perhaps at the Reshape {either(fixed)})" if fixed else ""
        raise GraphError(f"two tiles together score unlike each alone{culprits}; {advice}")


def _placed(nodes: Nodes, y: str, output: OutputFormat, tile_px: int) -> str:
    """Lay the scores on the tile, as `place` does."""
    size = output.side - 2 * output.border_px
    more = tile_px - output.border_px - size
    if more < 0:
        bounds = ([0, 0], [tile_px] * 2, [2, 3])
        return nodes.add("Slice", y, *(nodes.constant("bound", np.array(bound, np.int64)) for bound in bounds))
    if output.border_px or more:
        pads = [0, 0, output.border_px, output.border_px, 0, 0, more, more]
        return nodes.add("Pad", y, nodes.constant("pads", np.array(pads, np.int64)), mode="edge")
    return y
