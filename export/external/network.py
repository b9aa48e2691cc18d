"""A segmentation network from elsewhere as it came: the format of its input, and ONNX Runtime that runs it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from histostream.export.external.description import (
    MAX_CHANNELS,
    MIN_SIDE,
    DescriptionError,
    ExternalModel,
    check_normalisation,
)
from histostream.export.external.file import either
from histostream.export.graph.model import GraphError, first_line
from histostream.export.graph.nodes import Nodes
from histostream.export.graph.operators import MOVING

TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
}
TILE_PX = 512  # of a network that takes any size
NEAR_PX = 64  # how much larger sizes are tried where a network refuses one

Tiles = NDArray[np.uint8]  # (N, tile_px, tile_px, C)


@dataclass(frozen=True, slots=True)
class InputFormat:
    """The input of a network, and what becomes of a tile on the way to it.

    Attributes
    ----------
    name
        Name of the tensor.
    type
        float32, float16 or uint8. A network that takes uint8 gets raw pixels.
    layout
        "nchw" or "nhwc".
    channels, side
        Its channels, and its height and width.
    batch
        The batch size that it is built for; None: any.
    has_fixed_side
        Whether the file says the side.
    order, mean, std, scale
        As in `ExternalModel`, with a number for each channel.
    tile_px
        Side of the tile. A smaller tile is extended to ``side`` by repeating its last row and column, of a larger
        one the last rows and columns are left out.
    """

    name: str
    type: type[np.generic]
    layout: str
    channels: int
    side: int
    batch: int | None
    has_fixed_side: bool
    order: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float
    tile_px: int

    @classmethod
    def inspect(cls, session: Any, options: ExternalModel) -> InputFormat:
        """Read the format of the input, or refuse it."""
        source = next(i for i in session.get_inputs() if i.name == options.input_name)
        if source.type not in TYPES:
            raise GraphError(
                f"input {source.name!r} is a {source.type}: {either(list(TYPES))} is needed; export the model so"
            )
        if len(source.shape) != 4:
            raise GraphError(
                f"input {source.name!r} is {source.shape}: four dimensions are needed: "
                "export the model for images, (N, C, H, W)"
            )
        batch, *rest = [d if isinstance(d, int) and d > 0 else None for d in source.shape]
        layout = _layout(source, rest, options)
        channels, *sides = rest if layout == "nchw" else [rest[2], *rest[:2]]
        kind = TYPES[source.type]
        count = _channels(source.name, channels, options)
        side, fixed = _side(sides, options)
        mean, std, scale = _normalisation(kind, count, options)
        return cls(
            source.name,
            kind,
            layout,
            count,
            side,
            batch,
            fixed,
            options.order,
            mean,
            std,
            scale,
            options.tile_px or side,
        )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the input; N is 1 if any batch size is allowed."""
        batch, side = self.batch or 1, self.side
        return (batch, self.channels, side, side) if self.layout == "nchw" else (batch, side, side, self.channels)

    def normalised(self, tiles: Tiles) -> NDArray[Any]:
        """Map tiles (N, H, W, C) to the network's input, in its layout and size."""
        more = max(self.side - self.tile_px, 0)
        tiles = np.pad(tiles[:, : self.side, : self.side], ((0, 0), (0, more), (0, more), (0, 0)), mode="edge")
        x: NDArray[Any] = tiles[..., ::-1] if self.order == "bgr" else tiles
        if self.type is not np.uint8:
            x = (x * self.scale - np.array(self.mean)) / np.array(self.std)
        if self.layout == "nchw":
            x = np.moveaxis(x, -1, 1)
        return np.ascontiguousarray(x, dtype=np.uint8 if self.type is np.uint8 else np.float32)

    def add_nodes(self, nodes: Nodes, graph: onnx.GraphProto) -> None:
        """Add nodes that do the same, from ``tiles`` to the input of a graph."""
        x = nodes.add("Cast", "tiles", to=TensorProto.FLOAT)  # first: TensorRT transposes no uint8
        per_channel, axis = (1, 1, 1, self.channels), 3
        if self.layout == "nchw":
            x = nodes.add("Transpose", x, perm=[0, 3, 1, 2])
            per_channel, axis = (1, self.channels, 1, 1), 1
        if self.order == "bgr":
            x = nodes.add("Gather", x, nodes.constant("order", np.array([2, 1, 0])), axis=axis)
        height = 2 if self.layout == "nchw" else 1
        if self.side > self.tile_px:
            pads = np.zeros(8, np.int64)
            pads[4 + height : 6 + height] = self.side - self.tile_px
            x = nodes.add("Pad", x, nodes.constant("pads", pads), mode="edge")
        elif self.side < self.tile_px:
            bounds = ([0, 0], [self.side] * 2, [height, height + 1])
            names = (nodes.constant("bound", np.array(bound, np.int64)) for bound in bounds)
            x = nodes.add("Slice", x, *names)
        if self.type is not np.uint8:
            mean, std = np.array(self.mean), np.array(self.std)
            scale, offset = (v.reshape(per_channel).astype(np.float32) for v in (self.scale / std, -mean / std))
            x = nodes.add("Mul", x, nodes.constant("scale", scale))
            x = nodes.add("Add", x, nodes.constant("offset", offset))
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.type))
        takes_float = self.type is np.float32 or (self.type is np.uint8 and _casts_first(graph))
        if not takes_float:
            nodes.add("Cast", x, to=kind)
        nodes.nodes[-1].output[0] = graph.input[0].name


@dataclass(frozen=True, slots=True)
class ExternalNetwork:
    """The network in ONNX Runtime."""

    session: Any
    source: InputFormat
    output_name: str

    def run(self, x: NDArray[Any]) -> NDArray[Any]:
        """Map normalised tiles, in the network's layout, to its raw output, in batches of its fixed size.

        Raises
        ------
        GraphError
            If it does not take them; where another size is the remedy, the message names one that it takes.
        """
        try:
            return self._run(x)
        except GraphError as error:
            if self.source.has_fixed_side:
                raise
            advice = self._size_that_runs()
            raise GraphError(
                f"the network does not take {size_text([self.source.side] * 2)} pixels ({error}); {advice}"
            ) from error

    def _run(self, x: NDArray[Any]) -> NDArray[Any]:
        size, source = self.source.batch or len(x), self.source
        parts = []
        for start in range(0, len(x), size):
            part = x[start : start + size].astype(source.type)
            filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            try:
                (out,) = self.session.run([self.output_name], {source.name: filled})
            except Exception as error:  # ONNX Runtime's own exceptions have no common base
                raise GraphError(first_line(error)) from error
            parts.append(np.asarray(out)[: len(part)])
        return np.concatenate(parts)

    def _size_that_runs(self) -> str:
        """Return advice: the nearest size that the network takes."""
        side = self.source.side
        multiple = -(-side // 32) * 32
        for other in dict.fromkeys((multiple, multiple + 32, *range(side + 1, side + NEAR_PX))):
            source = replace(self.source, side=other, tile_px=other)
            try:
                replace(self, source=source)._run(np.zeros(source.shape, np.float32))
            except GraphError:
                continue
            return f"pass --tile {other}"
        return f"nor any other from {side + 1} to {side + NEAR_PX}: pass the --tile that it was made for"


def trial_tiles(side: int, channels: int) -> Tiles:
    """Return two different tiles of a ramp and noise, in which all grey levels occur."""
    random = np.random.default_rng(0)
    ramp = np.linspace(0, 200, side)[None, :, None, None] * np.ones((2, 1, side, channels))
    noise = random.integers(0, 56, (2, side, side, channels))
    tiles = (ramp + noise).astype(np.uint8)
    tiles[1] = 255 - tiles[1]
    return tiles


def choose_tensors(session: Any, options: ExternalModel) -> ExternalModel:
    """Fill in the names of the input and the output, or refuse if the choice is not clear."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    return replace(
        options,
        input_name=_one_of("input", options.input_name, [i.name for i in inputs]),
        output_name=_one_of("output", options.output_name, [o.name for o in outputs]),
    )


def takes_bytes(session: Any, options: ExternalModel) -> bool:
    """Whether the input is uint8."""
    return any(i.type == "tensor(uint8)" for i in session.get_inputs() if i.name == options.input_name)


def size_text(sides: Iterable[int | None]) -> str:
    """Return a size as text; None stands for any length."""
    return " x ".join("any" if side is None else str(side) for side in sides)


def _one_of(kind: str, name: str | None, names: list[str]) -> str:
    if name is None and len(names) != 1:
        raise DescriptionError(f"the network has {len(names)} {kind}s: pass --{kind} {either(names)}")
    if name is not None and name not in names:
        raise DescriptionError(
            f"the network has no {kind} {name!r}; it has {either(names)}: pass --{kind} with one of them"
        )
    return name or names[0]


def _layout(source: Any, rest: Sequence[int | None], options: ExternalModel) -> str:
    """Return the layout that the user says, or the only one that the shape allows."""
    if options.layout != "auto":
        return options.layout
    first, middle, last = rest
    possible = {
        "nchw": first if _may_be_sides(middle, last) and _may_be_channels(first) else 0,
        "nhwc": last if _may_be_sides(first, middle) and _may_be_channels(last) else 0,
    }
    layouts = [name for name, channels in possible.items() if channels != 0]
    usual = [name for name in layouts if possible[name] in (options.channels, 1, 3, 4)]
    for fitting in (layouts, usual):
        if len(fitting) == 1:
            return fitting[0]
    raise DescriptionError(f"input {source.name!r} is {source.shape}: pass --layout nchw or --layout nhwc")


def _may_be_channels(count: int | None) -> bool:
    return count is None or count <= MAX_CHANNELS


def _may_be_sides(height: int | None, width: int | None) -> bool:
    return all(side is None or side >= MIN_SIDE for side in (height, width))


def _channels(name: str, channels: int | None, options: ExternalModel) -> int:
    """Return the number of channels that the file and the user say; 3 if neither does."""
    count = channels or options.channels or 3
    if options.channels not in (None, count):
        raise DescriptionError(
            f"input {name!r} has {channels} channels, --mean, --std or --channel-names {options.channels}: pass as "
            "many, or one number for all"
        )
    if count > MAX_CHANNELS:
        raise GraphError(f"input {name!r} has {count} channels: more than {MAX_CHANNELS} cannot be; check --layout")
    if options.order == "bgr" and count != 3:
        raise DescriptionError(f"--bgr needs 3 channels, input {name!r} has {count}; leave it out")
    return count


def _side(sides: Sequence[int | None], options: ExternalModel) -> tuple[int, bool]:
    """Return the side of the input, and whether the file says it."""
    fixed = {side for side in sides if side is not None}
    if len(fixed) > 1:
        raise GraphError(
            f"the network takes {size_text(sides)} pixels, and tiles are square: export the model for a square input"
        )
    side = fixed.pop() if fixed else options.tile_px or TILE_PX
    if options.tile_px not in (None, side):
        raise DescriptionError(
            f"the network takes {size_text(sides)} pixels, not {size_text([options.tile_px] * 2)}; pass --tile {side}, "
            "or leave it out"
        )
    return side, any(length is not None for length in sides)


def _normalisation(
    kind: type[np.generic], channels: int, options: ExternalModel
) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """Return mean, standard deviation and scale, with a number for each channel."""
    given = [name for name in ("mean", "std", "scale") if getattr(options, name) is not None]
    if kind is np.uint8:
        if given:
            raise DescriptionError(
                f"the network takes uint8 and normalises it itself: leave {', '.join('--' + n for n in given)} out"
            )
        return (0.0,) * channels, (1.0,) * channels, 1.0
    mean, std = options.mean or (0.0,), options.std or (1.0,)
    scale = 1 / 255 if options.scale is None else options.scale
    check_normalisation(mean, std, scale)
    return mean * (channels // len(mean)), std * (channels // len(std)), scale


def _casts_first(graph: onnx.GraphProto) -> bool:
    """Whether the pixels of a graph are only moved until they are cast, so that floats may stand for uint8."""
    return all(node.op_type == "Cast" for node in _first_changes(graph))


def _first_changes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes that do more to the pixels than to move them, or to read their shape."""
    pixels = {graph.input[0].name}
    for node in graph.node:
        if node.op_type == "Shape" or not pixels.intersection(node.input):
            continue
        if node.op_type in MOVING - {"Cast", "Resize"}:
            pixels.update(node.output)
        else:
            yield node
