"""Wrap a segmentation network from elsewhere, as ONNX, so that it keeps the tile contract."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from histostream.export.bundle import Export, Network, Options, Say, check_options, write_bundle
from histostream.export.external.dynamic_batch import with_dynamic_batch
from histostream.export.external.file import OLDEST_OPSET, check_operators, convert, either, open_file, prune, read_onnx
from histostream.export.external.network import (
    FLOATS,
    ExternalModel,
    ExternalNetwork,
    OutputFormat,
    Reference,
    Scores,
    Tiles,
    choose_activation,
    choose_tensors,
    normalised,
    trial_tiles,
)
from histostream.export.graph.model import (
    INVALID,
    GraphError,
    check_graph,
    first_line,
    open_session,
    opset_of,
    unused_name,
    value_names,
)
from histostream.export.graph.scores import add_rounding
from histostream.export.graph.shapes import resize_scale
from histostream.wsi.outputs.label_rows import ClassInfo

# White, then Okabe and Ito's colours, which people with any colour vision tell apart.
PALETTE = (
    (255, 255, 255),
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (0, 0, 0),
)
ALIKE = 1 / 255  # by which scores may differ between the file and the wrapped graph, on average
PREFIX = "histostream/"  # of the names of nodes and values that are added


@dataclass(frozen=True, slots=True)
class WrappedModel:
    """A network from elsewhere behind the tile contract.

    Attributes
    ----------
    model
        The graph: input ``tiles`` uint8 (N, tile_px, tile_px, C), output ``scores`` float16 (N, K, tile_px, tile_px),
        N dynamic, all weights inside.
    reference
        The unchanged file in ONNX Runtime on the CPU, with pre- and post-processing in NumPy: the same input, and
        scores in float32 that are not rounded.
    options
        As given, with "auto" and the names of the tensors resolved.
    opset
        Operator set of ``model``.
    notes
        What was changed inside the network, for the record.
    """

    model: onnx.ModelProto
    reference: Callable[[Tiles], Scores]
    options: ExternalModel
    opset: int
    notes: tuple[str, ...]


def wrap_onnx(
    path: Path,
    out: Path,
    external: ExternalModel,
    options: Options | None = None,
    *,
    mpp: float,
    note: str = "",
    say: Say = lambda text: None,
) -> Export:
    """Write a segmentation network from elsewhere to the bundle ``out``.

    Parameters
    ----------
    path
        An ONNX file, with its external data beside it.
    out
        Folder to write; an existing bundle there is replaced once the new one is complete.
    external
        Properties of the network that the file does not contain; its ``tile_px`` counts, not that of ``options``.
    options
        How to export it.
    mpp
        Resolution that the network was trained at, in um per pixel.
    note
        What the network is for and where it fails, for the card.
    say
        Called with each line of progress.

    Raises
    ------
    GraphError
        If the file is not ONNX, does not fit ``external``, or may not be deployed.
    HistoError
        As `write_bundle`.
    """
    options = options or Options()
    check_options(out, options)
    return write_bundle(external_network(path, external, mpp=mpp, note=note), out, options, say=say)


def external_network(path: Path, options: ExternalModel, *, mpp: float, note: str = "") -> Network:
    """Wrap a network for `write_bundle`; parameters and errors as `wrap_onnx`."""
    if not 0 < mpp < math.inf:
        raise GraphError(f"mpp={mpp!r} is not a positive number; pass --mpp in um per pixel")
    wrapped = wrap_graph(path, options)
    return Network(
        model=wrapped.model,
        reference=wrapped.reference,
        method="foreign",
        classes=tuple(ClassInfo(name, PALETTE[k % len(PALETTE)]) for k, name in enumerate(options.classes)),
        mpp=mpp,
        channels=options.channels,
        tile_px=options.tile_px,
        score_kind="probability",
        training={
            "file": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "wrapped_with": {k: v for k, v in asdict(wrapped.options).items() if v is not None},
            "changes": list(wrapped.notes),
        },
        note=note,
    )


def wrap_graph(path: Path, options: ExternalModel) -> WrappedModel:
    """Turn a segmentation network into a graph that keeps the tile contract.

    The network's nodes keep their names; added nodes begin with ``histostream/``. The result is tried on two tiles: it
    must compute what the file does, and give the same scores for two tiles together as for each alone. That takes about
    seven inferences of a tile on the CPU.

    Raises
    ------
    GraphError
        If the file is not ONNX, does not fit the options, or may not be deployed.
    """
    original = read_onnx(path)
    check_operators(original)
    session = open_file(path, original)
    options = choose_tensors(session, options)
    model = prune(original, str(options.input_name), str(options.output_name))
    if len(session.get_inputs()) > 1:  # the file's session would need all of them
        session = open_session(model)
    network = ExternalNetwork.inspect(session, options)
    options = replace(options, layout=network.layout)
    tiles = trial_tiles(options)
    output = network.run(normalised(tiles[:1], options))
    output_format = OutputFormat.inspect(output, options)
    options = replace(options, activation=choose_activation(model, output, output_format, options))
    reference = Reference(network, output_format, options)
    expected = reference(tiles)

    def wrapped(candidate: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
        dynamic, changed, fixed = with_dynamic_batch(candidate, network.input_shape(options))
        graph = _with_processing(dynamic, network, output_format, options)
        try:
            check_graph(graph)
        except INVALID as error:
            raise GraphError(f"the graph is not valid ONNX ({first_line(error)}); export the model again") from error
        _try_out(graph, tiles, expected, fixed)
        return graph, tuple(f"{name}: freed of the fixed batch" for name in changed)

    converted = convert(model)
    try:
        result, notes = wrapped(converted)
    except GraphError:
        if converted is model or opset_of(model) < OLDEST_OPSET:
            raise
        # The converter between operator sets has gaps.
        result, notes = wrapped(model)
    return WrappedModel(result, reference, options, opset_of(result), notes)


def _with_processing(
    network: onnx.ModelProto, source: ExternalNetwork, output: OutputFormat, options: ExternalModel
) -> onnx.ModelProto:
    """Put pre- and post-processing around a network."""
    model = copy.deepcopy(network)
    graph = model.graph
    _reserve_names(graph)
    result, side = graph.output[0].name, options.tile_px
    before, after = _Nodes(graph, "in"), _Nodes(graph, "out")

    x = before.add("Cast", "tiles", to=TensorProto.FLOAT)  # first: TensorRT transposes no uint8
    per_channel, axis = (1, 1, 1, options.channels), 3
    if options.layout == "nchw":
        x = before.add("Transpose", x, perm=[0, 3, 1, 2])
        per_channel, axis = (1, options.channels, 1, 1), 1
    if options.order == "bgr":
        x = before.add("Gather", x, before.constant("order", np.array([2, 1, 0])), axis=axis)
    mean, std = np.array(options.mean), np.array(options.std)
    scale, offset = (v.reshape(per_channel) for v in (options.scale / std, -mean / std))
    x = before.add("Mul", x, before.constant("scale", scale.astype(np.float32)))
    x = before.add("Add", x, before.constant("offset", offset.astype(np.float32)))
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(FLOATS[source.type]))
    if kind != TensorProto.FLOAT:
        before.add("Cast", x, to=kind)
    before.nodes[-1].output[0] = graph.input[0].name

    y = result if output.float32 else after.add("Cast", result, to=TensorProto.FLOAT)
    if output.layout == "nhwc":
        y = after.add("Transpose", y, perm=[0, 3, 1, 2])
    if (output.height, output.width) != (side, side):
        scales = [1, 1, resize_scale(output.height, side), resize_scale(output.width, side)]
        y = after.add(
            "Resize",
            y,
            "",
            after.constant("scales", np.array(scales, np.float32)),
            mode="linear",
            coordinate_transformation_mode="half_pixel",
        )
    if options.activation == "softmax":
        y = after.add("Softmax", y, axis=1)
    elif options.activation == "sigmoid":
        y = after.add("Sigmoid", y)
    if output.channels == 1:
        without = after.add("Sub", after.constant("whole", np.float32(1)), y)
        y = after.add("Concat", without, y, axis=1)
    add_rounding(y, after.add, after.constant)
    after.nodes[-1].output[0] = "scores"

    nodes = [*before.nodes, *graph.node, *after.nodes]
    used = {name for node in nodes for name in node.input}
    weights = [t for t in graph.initializer if t.name in used]  # less what was replaced
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(weights)
    for values, name, kind, shape in (
        (graph.input, "tiles", TensorProto.UINT8, (side, side, options.channels)),
        (graph.output, "scores", TensorProto.FLOAT16, (len(options.classes), side, side)),
    ):
        values.append(helper.make_tensor_value_info(name, kind, ["N", *shape]))
    return model


class _Nodes:
    """Nodes to add to a graph, in order, with unique names."""

    def __init__(self, graph: onnx.GraphProto, stage: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._graph, self._stage = graph, f"{PREFIX}{stage}/"

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node of one output and return the output's name."""
        taken = {node.name for node in self.nodes}
        name = unused_name(f"{self._stage}{kind.lower()}", taken)
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, value: Any) -> str:
        """Add a constant and return its name."""
        self._graph.initializer.append(numpy_helper.from_array(value, f"{self._stage}{name}"))
        return f"{self._stage}{name}"


def _reserve_names(graph: onnx.GraphProto) -> None:
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


def _try_out(model: onnx.ModelProto, tiles: Tiles, expected: Scores, fixed: list[str]) -> None:
    """Refuse a wrapped network that computes something else, or scores two tiles together unlike each alone."""
    session = open_session(model)
    advice = "export the network with a dynamic batch axis"

    def scores(batch: Tiles) -> NDArray[np.float32]:
        try:
            (out,) = session.run(["scores"], {"tiles": batch})
        except Exception as error:  # ONNX Runtime's own exceptions have no common base
            raise GraphError(f"a batch of {len(batch)} tiles fails ({first_line(error)}); {advice}") from error
        return np.asarray(out, np.float32)

    alone = np.concatenate([scores(tiles[:1]), scores(tiles[1:])])
    difference = np.abs(alone - expected).mean() if alone.shape == expected.shape else math.inf
    if difference > ALIKE:  # the parity check is stricter
        raise GraphError(
            f"wrapped, the network computes something else (scores differ by {difference:.3f} on average): "
            "export it again with operator set 18"
        )
    together = scores(tiles)
    if together.shape != alone.shape or np.abs(together - alone).max() > ALIKE:
        culprits = f" (perhaps at the Reshape {either(fixed)})" if fixed else ""
        raise GraphError(f"two tiles together score unlike each alone{culprits}; {advice}")
