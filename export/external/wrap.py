"""Wrap a segmentation network from elsewhere, as ONNX, so that it keeps the tile contract.

Beside the wrapped graph comes a reference, the file as it is in ONNX Runtime with NumPy around it,
for the parity gate.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from histostream.export.bundle import Network
from histostream.export.external.file import (
    INVALID,
    OLDEST_OPSET,
    check_operators,
    convert,
    either,
    first_line,
    open_file,
    open_session,
    opset_of,
    prune,
    read_onnx,
    unused_name,
    value_names,
)
from histostream.export.graph.dynamic_batch import with_free_batch
from histostream.export.graph.model import GraphError, check_graph
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
LAYOUTS = ("auto", "nchw", "nhwc")
ACTIVATIONS = ("auto", "softmax", "sigmoid", "none")
ORDERS = ("rgb", "bgr")
FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
PREFIX = "histostream/"  # of the names of nodes and values that are added
SLACK = 1e-3  # how far probabilities may leave 0..1 by rounding, half precision included
# Nodes that move or average values, so that probabilities stay probabilities.
MOVING = frozenset({"Identity", "Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Resize"})

Tiles = NDArray[np.uint8]  # (N, tile_px, tile_px, C)
Scores = NDArray[np.uint8]  # (N, K, tile_px, tile_px)


@dataclass(frozen=True, slots=True)
class ForeignModel:
    """What an ONNX file does not say of itself.

    Attributes
    ----------
    classes
        Names in label order. A network with one output channel has two: without and with.
    tile_px
        Side of the tiles.
    mean, std
        Per channel, in the network's own order of channels: its input is
        (scale * pixel - mean) / std. Their length is the number of channels, 3 or 1.
    scale
        Factor of the raw pixels, 0 to 255.
    layout
        Of the network's input: "nchw", "nhwc", or "auto" to go by its shape.
    activation
        What makes probabilities of its output: "softmax", "sigmoid", "none" where it gives
        probabilities already, or "auto": none if the graph ends in one of the two or its output
        sums to 1 over the classes; else softmax, or sigmoid for one channel. Classes of a sigmoid
        may overlap; the label is then the likeliest.
    order
        Of the network's input channels: "rgb" or "bgr".
    resize_output
        Whether an output of lower resolution is interpolated to the tile (before the activation).
    input_name, output_name
        Which tensor, where the network has several.
    """

    classes: tuple[str, ...]
    tile_px: int
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    scale: float = 1 / 255
    layout: str = "auto"
    activation: str = "auto"
    order: str = "rgb"
    resize_output: bool = False
    input_name: str | None = None
    output_name: str | None = None

    def __post_init__(self) -> None:
        for name, valid, wanted in (
            ("classes", 2 <= len(self.classes) <= 254, "2 to 254 names"),
            ("tile_px", self.tile_px > 0, "a positive number"),
            (
                "mean",
                len(self.mean) in (1, 3) and all(map(math.isfinite, self.mean)),
                "3 numbers for RGB or 1 for grey",
            ),
            (
                "std",
                len(self.std) == len(self.mean) and all(0 < s < math.inf for s in self.std),
                f"{len(self.mean)} positive numbers, as many as mean has",
            ),
            ("scale", 0 < self.scale < math.inf, "a positive number"),
            ("layout", self.layout in LAYOUTS, f"one of {LAYOUTS}"),
            ("activation", self.activation in ACTIVATIONS, f"one of {ACTIVATIONS}"),
            ("order", self.order in ORDERS, f"one of {ORDERS}"),
        ):
            if not valid:
                raise GraphError(f"{name}={getattr(self, name)!r} is not {wanted}; give one")
        if self.order == "bgr" and self.channels == 1:
            raise GraphError("order='bgr' needs 3 channels, mean has 1 number")

    @property
    def channels(self) -> int:
        """Channels of a tile."""
        return len(self.mean)


@dataclass(frozen=True, slots=True)
class WrappedModel:
    """A foreign network behind the tile contract.

    Attributes
    ----------
    model
        Input ``tiles`` uint8 (N, tile_px, tile_px, C), output ``scores`` uint8
        (N, K, tile_px, tile_px); N is dynamic; all weights inside.
    reference
        The file as it came in ONNX Runtime on the CPU, pre- and post-processing in NumPy: tiles
        uint8 (N, tile_px, tile_px, C) to scores uint8 (N, K, tile_px, tile_px).
    options
        As given, with "auto" and the names of the tensors resolved.
    opset
        Operator set of ``model``.
    notes
        What was changed inside the network, for the record.
    """

    model: onnx.ModelProto
    reference: Callable[[Tiles], Scores]
    options: ForeignModel
    opset: int
    notes: tuple[str, ...]


def wrap_onnx(path: Path, options: ForeignModel) -> WrappedModel:
    """Turn a segmentation network into a graph that keeps the tile contract.

    The network's nodes keep their names; those that are added begin with ``histostream/``.
    It is tried out: the wrapped graph must compute what the file does, and two tiles together what
    each does alone. That takes about seven inferences of a tile on the CPU.

    Parameters
    ----------
    path
        An ONNX file, its external data beside it.
    options
        What the file does not say.

    Raises
    ------
    GraphError
        If it is not an ONNX file, does not fit the options, or may not be deployed.
    """
    original = read_onnx(path)
    check_operators(original)
    session = open_file(path, original)
    options = _named(session, options)
    model = prune(original, str(options.input_name), str(options.output_name))
    if len(session.get_inputs()) > 1:  # the others are not needed, but would have to be given
        session = open_session(model)
    network = _Network.of(session, options)
    options = replace(options, layout=network.layout)
    tiles = _trial_tiles(options)
    output = network.run(_normalised(tiles[:1], options))
    geometry = _Geometry.of(output, options)
    options = replace(options, activation=_activation(model, output, geometry, options))
    reference = _Reference(network, geometry, options)
    wanted = reference(tiles)
    converted = convert(model)
    try:
        wrapped, notes = _wrapped(converted, network, geometry, options, tiles, wanted)
    except GraphError:
        if converted is model or opset_of(model) < OLDEST_OPSET:
            raise
        # The converter between operator sets has gaps.
        wrapped, notes = _wrapped(model, network, geometry, options, tiles, wanted)
    return WrappedModel(wrapped, reference, options, opset_of(wrapped), notes)


def foreign_network(path: Path, options: ForeignModel, *, mpp: float, note: str = "") -> Network:
    """Wrap a segmentation network for `write_bundle`.

    Parameters
    ----------
    path, options
        As for `wrap_onnx`.
    mpp
        Resolution it was trained at, in um per pixel.
    note
        What it is for and where it fails, for the card.

    Raises
    ------
    GraphError
        As `wrap_onnx`.
    """
    if not 0 < mpp < math.inf:
        raise GraphError(f"mpp={mpp!r} is not a positive number; pass --mpp in um per pixel")
    wrapped = wrap_onnx(path, options)
    said = {k: v for k, v in asdict(wrapped.options).items() if v is not None}
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
            "wrapped_with": said,
            "changes": list(wrapped.notes),
        },
        note=note,
    )


def _wrapped(
    network: onnx.ModelProto,
    said: _Network,
    geometry: _Geometry,
    options: ForeignModel,
    tiles: Tiles,
    wanted: Scores,
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Build the wrapped graph, and try it out."""
    freed, changed, stuck = with_free_batch(network, said.input_shape(options))
    model = _assembled(freed, said, geometry, options)
    _check(model)
    _try_out(model, tiles, wanted, stuck)
    return model, tuple(f"{name}: freed of the fixed batch" for name in changed)


# --- the network as it came ---------------------------------------------------------------------


def _named(session: Any, options: ForeignModel) -> ForeignModel:
    """Settle which input and output are meant."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    return replace(
        options,
        input_name=_one_of("input", options.input_name, [i.name for i in inputs]),
        output_name=_one_of("output", options.output_name, [o.name for o in outputs]),
    )


def _one_of(kind: str, asked: str | None, names: list[str]) -> str:
    if asked is None and len(names) != 1:
        raise GraphError(f"the network has {len(names)} {kind}s: pass --{kind} {either(names)}")
    if asked is not None and asked not in names:
        raise GraphError(f"the network has no {kind} {asked!r}; it has {either(names)}: pass --{kind} with one of them")
    return asked or names[0]


@dataclass(frozen=True, slots=True)
class _Network:
    """The file in ONNX Runtime, and what its input looks like."""

    session: Any
    input_name: str
    output_name: str
    type: str
    layout: str
    batch: int | None  # None where it is free

    @classmethod
    def of(cls, session: Any, options: ForeignModel) -> _Network:
        said = next(i for i in session.get_inputs() if i.name == options.input_name)
        if said.type not in FLOATS:
            raise GraphError(f"input {said.name!r} is a {said.type}: use one of {either(list(FLOATS))}")
        if len(said.shape) != 4:
            raise GraphError(
                f"input {said.name!r} is {said.shape}: four dimensions are needed: "
                "export the model for images, (N, C, H, W)"
            )
        batch, *rest = [d if isinstance(d, int) and d > 0 else None for d in said.shape]
        layout = options.layout
        if layout == "auto":
            first, last = (d in (options.channels, 1, 3) for d in (rest[0], rest[2]))
            if first == last:
                raise GraphError(f"input {said.name!r} is {said.shape}: pass --layout nchw or --layout nhwc")
            layout = "nchw" if first else "nhwc"
        channels, *sides = rest if layout == "nchw" else [rest[2], *rest[:2]]
        if channels not in (None, options.channels):
            raise GraphError(
                f"input {said.name!r} has {channels} channels, mean and std have "
                f"{options.channels}; tiles are RGB (3) or grey (1): "
                "pass as many numbers to --mean and --std"
            )
        if any(s not in (None, options.tile_px) for s in sides):
            fixed = {side for side in sides if side is not None}
            hint = (
                f"pass --tile-px {fixed.pop()}"
                if len(fixed) == 1
                else "tiles are square: export the model for square ones"
            )
            raise GraphError(f"the network takes {_by(sides)} pixels, not {_by([options.tile_px] * 2)}; {hint}")
        return cls(session, said.name, str(options.output_name), said.type, layout, batch)

    def input_shape(self, options: ForeignModel) -> tuple[int, int, int, int]:
        """Shape of the input for tiles; N is 1 where it is free."""
        batch, side, channels = self.batch or 1, options.tile_px, options.channels
        if self.layout == "nchw":
            return batch, channels, side, side
        return batch, side, side, channels

    def run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map normalised tiles, in the network's layout, to its raw output; in its batches."""
        size = self.batch or len(x)
        parts = []
        for start in range(0, len(x), size):
            part = x[start : start + size].astype(FLOATS[self.type])
            filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            try:
                (out,) = self.session.run([self.output_name], {self.input_name: filled})
            except Exception as error:  # ONNX Runtime's own exceptions have no common base
                side = x.shape[2]
                multiple = -(-side // 32) * 32
                raise GraphError(
                    f"the network does not take {_by([side] * 2)} pixels "
                    f"({first_line(error)}); "
                    f"try --tile-px {multiple if multiple > side else side + 32}, a multiple of 32"
                ) from error
            parts.append(out[: len(part)])
        return np.concatenate(parts)


@dataclass(frozen=True, slots=True)
class _Geometry:
    """What the network's output looks like."""

    layout: str
    channels: int
    height: int
    width: int
    float32: bool

    @classmethod
    def of(cls, output: NDArray[Any], options: ForeignModel) -> _Geometry:
        name, side, classes = options.output_name, options.tile_px, len(options.classes)
        if output.ndim != 4:
            raise GraphError(
                f"output {name!r} is {output.shape}: (N, K, H, W) or (N, H, W, K) is needed, "
                "before any arg-max: "
                "export the model so, or pass another --output"
            )
        if not np.issubdtype(output.dtype, np.floating):
            raise GraphError(
                f"output {name!r} is {output.dtype}: scores are needed, not labels: "
                "export the model without its arg-max"
            )
        counts = (classes, 1) if classes == 2 else (classes,)
        layouts = {"nchw": output.shape[1:], "nhwc": (output.shape[3], *output.shape[1:3])}
        fitting = [k for k, v in layouts.items() if v[0] in counts]
        # Where both fit, the full size decides, then the layout of the input.
        full = [k for k in fitting if layouts[k][1:] == (side, side)]
        fitting = full or fitting
        if not fitting:
            channels, *_ = layouts[options.layout]
            raise GraphError(
                f"output {name!r} is {output.shape}, {channels} channels; "
                f"{classes} classes were named; "
                "name as many with --classes"
            )
        layout = options.layout if options.layout in fitting else fitting[0]
        channels, height, width = layouts[layout]
        if max(height, width) > side:
            raise GraphError(
                f"output {name!r} is {_by((height, width))} pixels: more than a tile; pass another --output"
            )
        if (height, width) != (side, side) and not options.resize_output:
            raise GraphError(
                f"output {name!r} is {_by((height, width))} pixels for a tile of "
                f"{_by((side, side))}: pass --resize-output if it shows the whole tile at lower "
                "resolution (not if it is cropped, as by convolutions without padding)"
            )
        return cls(layout, channels, height, width, output.dtype == np.float32)


def _activation(model: onnx.ModelProto, output: NDArray[Any], geometry: _Geometry, options: ForeignModel) -> str:
    """Settle what makes probabilities of the output, and refuse what cannot."""
    if not np.isfinite(output).all():
        raise GraphError(
            "the network's output is not finite on the tiles tried; check --mean, --std and --scale, or train it again"
        )
    low, high = float(output.min()), float(output.max())
    within = low >= -SLACK and high <= 1 + SLACK
    total = output.astype(np.float32).sum(axis=1 if geometry.layout == "nchw" else 3)
    shares = within and geometry.channels > 1 and bool(np.all(np.abs(total - 1) <= SLACK * 4))
    activation = options.activation
    if activation == "auto":
        makers = {name: node for node in model.graph.node for name in node.output}
        node = makers.get(str(options.output_name))
        while node is not None and node.op_type in MOVING:
            node = makers.get(node.input[0])
        if shares or (node is not None and node.op_type in ("Softmax", "Sigmoid", "HardSigmoid")):
            activation = "none"
        else:
            activation = "softmax" if geometry.channels > 1 else "sigmoid"
    if activation == "softmax" and geometry.channels == 1:
        raise GraphError("softmax over one channel is 1 everywhere: use --activation sigmoid")
    if activation == "softmax" and shares:
        raise GraphError("the output is probabilities already: use --activation none")
    if activation == "none" and not within:
        raise GraphError(
            f"the output goes from {low:.3g} to {high:.3g}, so it is not probabilities: "
            "use --activation softmax or --activation sigmoid"
        )
    return activation


# --- the reference, in NumPy --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Reference:
    """The file as it came, between pre- and post-processing in NumPy."""

    network: _Network
    geometry: _Geometry
    options: ForeignModel

    def __call__(self, tiles: Tiles) -> Scores:
        """Map tiles (N, H, W, C) to scores (N, K, H, W), one tile at a time."""
        return np.concatenate([self._one(tile[None]) for tile in tiles])

    def _one(self, tile: Tiles) -> Scores:
        y = self.network.run(_normalised(tile, self.options)).astype(np.float64)
        if self.geometry.layout == "nhwc":
            y = np.moveaxis(y, -1, 1)
        side = self.options.tile_px
        if y.shape[2:] != (side, side):
            rows, columns = (_interpolation(n, side) for n in y.shape[2:])
            y = rows @ y @ columns.T
        if self.options.activation == "softmax":
            y = np.exp(y - y.max(axis=1, keepdims=True))
            y /= y.sum(axis=1, keepdims=True)
        elif self.options.activation == "sigmoid":
            y = 0.5 * (1 + np.tanh(0.5 * y))  # the logistic function, without overflow
        if y.shape[1] == 1:
            y = np.concatenate([1 - y, y], axis=1)
        return np.clip(np.floor(255 * y + 0.5), 0, 255).astype(np.uint8)


def _normalised(tiles: Tiles, options: ForeignModel) -> NDArray[np.float32]:
    """Map tiles (N, H, W, C) to the network's input, in its layout."""
    pixels = tiles[..., ::-1] if options.order == "bgr" else tiles
    x = (pixels * options.scale - np.array(options.mean)) / np.array(options.std)
    if options.layout == "nchw":
        x = np.moveaxis(x, -1, 1)
    return np.ascontiguousarray(x, dtype=np.float32)


def _interpolation(source: int, target: int) -> NDArray[np.float64]:
    """Matrix (target, source) of linear interpolation between the middles of pixels."""
    position = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    weight: NDArray[np.float64] = 1 - np.abs(position[:, None] - np.arange(source))
    return weight.clip(0)


def _trial_tiles(options: ForeignModel) -> Tiles:
    """Two tiles that differ: even colours beneath noise, so that all grey levels occur."""
    random = np.random.default_rng(0)
    side, channels = options.tile_px, options.channels
    ramp = np.linspace(0, 200, side)[None, :, None, None] * np.ones((2, 1, side, channels))
    noise = random.integers(0, 56, (2, side, side, channels))
    tiles = (ramp + noise).astype(np.uint8)
    tiles[1] = 255 - tiles[1]
    return tiles


# --- the wrapped graph --------------------------------------------------------------------------


def _assembled(network: onnx.ModelProto, said: _Network, geometry: _Geometry, options: ForeignModel) -> onnx.ModelProto:
    """Put pre- and post-processing around a network."""
    model = onnx.ModelProto()
    model.CopyFrom(network)
    graph = model.graph
    _make_room(graph)
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
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(FLOATS[said.type]))
    if kind != TensorProto.FLOAT:
        before.add("Cast", x, to=kind)
    before.nodes[-1].output[0] = graph.input[0].name

    y = result if geometry.float32 else after.add("Cast", result, to=TensorProto.FLOAT)
    if geometry.layout == "nhwc":
        y = after.add("Transpose", y, perm=[0, 3, 1, 2])
    if (geometry.height, geometry.width) != (side, side):
        scales = [1, 1, resize_scale(geometry.height, side), resize_scale(geometry.width, side)]
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
    if geometry.channels == 1:
        without = after.add("Sub", after.constant("one", np.float32(1)), y)
        y = after.add("Concat", without, y, axis=1)
    full = after.constant("full", np.float32(255))
    y = after.add("Mul", y, full)
    y = after.add("Add", y, after.constant("half", np.float32(0.5)))  # the cast cuts off
    y = after.add("Clip", y, after.constant("least", np.float32(0)), full)
    after.add("Cast", y, to=TensorProto.UINT8)
    after.nodes[-1].output[0] = "scores"

    nodes = [*before.nodes, *graph.node, *after.nodes]
    used = {name for node in nodes for name in node.input}
    weights = [t for t in graph.initializer if t.name in used]  # less what was replaced
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(weights)
    for values, name, shape in (
        (graph.input, "tiles", (side, side, options.channels)),
        (graph.output, "scores", (len(options.classes), side, side)),
    ):
        values.append(helper.make_tensor_value_info(name, TensorProto.UINT8, ["N", *shape]))
    return model


class _Nodes:
    """Nodes to add to a graph, in order, under names of their own."""

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


def _make_room(graph: onnx.GraphProto) -> None:
    """Rename values and nodes of the network that have names of the contract or of ours."""
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


# --- whether it works ---------------------------------------------------------------------------


def _check(model: onnx.ModelProto) -> None:
    try:
        check_graph(model)
    except INVALID as error:
        raise GraphError(f"the graph is not valid ONNX ({first_line(error)}); export the model again") from error


def _try_out(model: onnx.ModelProto, tiles: Tiles, wanted: Scores, stuck: list[str]) -> None:
    """Run a wrapped network on two tiles, together and alone."""
    session = open_session(model)
    advice = "export the network with a dynamic batch axis"

    def scores(batch: Tiles) -> NDArray[np.int16]:
        try:
            (out,) = session.run(["scores"], {"tiles": batch})
        except Exception as error:  # ONNX Runtime's own exceptions have no common base
            raise GraphError(f"a batch of {len(batch)} tiles fails ({first_line(error)}); {advice}") from error
        return np.asarray(out, np.int16)

    alone = np.concatenate([scores(tiles[:1]), scores(tiles[1:])])
    difference = np.abs(alone - wanted).mean() if alone.shape == wanted.shape else math.inf
    if difference > 1:  # of 255; how close it has to be is the parity gate's to say
        raise GraphError(
            f"wrapped, the network computes something else ({difference:.1f} of 255 on average): "
            "export it again with operator set 18"
        )
    together = scores(tiles)
    if together.shape != alone.shape or np.abs(together - alone).max() > 1:
        culprits = f" (perhaps at the Reshape {either(stuck)})" if stuck else ""
        raise GraphError(f"two tiles together score unlike each alone{culprits}; {advice}")


def _by(sides: Iterable[int | None]) -> str:
    return " x ".join("any" if side is None else str(side) for side in sides)
