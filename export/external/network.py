"""A segmentation network from elsewhere as it came: its input, its output, and a reference that runs it.

The reference is the file in ONNX Runtime with pre- and post-processing in NumPy; parity of the wrapped graph is checked
against it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from histostream.export.external.file import either
from histostream.export.graph.model import GraphError, first_line
from histostream.export.graph.operators import MOVING

LAYOUTS = ("auto", "nchw", "nhwc")
ACTIVATIONS = ("auto", "softmax", "sigmoid", "none")
ORDERS = ("rgb", "bgr")
FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
TOLERANCE = 1e-3  # by which rounding, half precision included, may move probabilities out of 0..1

Tiles = NDArray[np.uint8]  # (N, tile_px, tile_px, C)
Scores = NDArray[np.float32]  # (N, K, tile_px, tile_px), not rounded


@dataclass(frozen=True, slots=True)
class ExternalModel:
    """Properties of a network from elsewhere that its ONNX file does not contain.

    Attributes
    ----------
    classes
        Names in label order. A network with one output channel has two classes: without and with.
    tile_px
        Side of the tiles.
    mean, std
        Per channel, in the network's own order of channels: its input is
        (scale * pixel - mean) / std. Their length is the number of channels, 3 or 1.
    scale
        Factor of the raw pixels, 0 to 255.
    layout
        Layout of the network's input: "nchw", "nhwc", or "auto" to infer it from the shape.
    activation
        How its output becomes probabilities: "softmax"; "sigmoid"; "none" if the output is probabilities already; or
        "auto": none if the graph ends in one of the two or its output sums to 1 over the classes, else softmax, or
        sigmoid for one channel. Classes of a sigmoid may overlap; the label is the likeliest class.
    order
        Order of the network's input channels: "rgb" or "bgr".
    resize_output
        Whether an output of lower resolution is enlarged to the tile, before the activation.
    input_name, output_name
        Names of the tensors, if the network has several.
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
        for name, valid, requirement in (
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
                raise GraphError(f"{name}={getattr(self, name)!r} is not {requirement}; give one")
        if self.order == "bgr" and self.channels == 1:
            raise GraphError("order='bgr' needs 3 channels, mean has 1 number")

    @property
    def channels(self) -> int:
        """Channels of a tile."""
        return len(self.mean)


@dataclass(frozen=True, slots=True)
class ExternalNetwork:
    """The network in ONNX Runtime, and the format of its input."""

    session: Any
    input_name: str
    output_name: str
    type: str
    layout: str
    batch: int | None  # None: any

    @classmethod
    def inspect(cls, session: Any, options: ExternalModel) -> ExternalNetwork:
        """Read the format of the input, or refuse it."""
        source = next(i for i in session.get_inputs() if i.name == options.input_name)
        if source.type not in FLOATS:
            raise GraphError(f"input {source.name!r} is a {source.type}: use one of {either(list(FLOATS))}")
        if len(source.shape) != 4:
            raise GraphError(
                f"input {source.name!r} is {source.shape}: four dimensions are needed: "
                "export the model for images, (N, C, H, W)"
            )
        batch, *rest = [d if isinstance(d, int) and d > 0 else None for d in source.shape]
        layout = options.layout
        if layout == "auto":
            first, last = (d in (options.channels, 1, 3) for d in (rest[0], rest[2]))
            if first == last:
                raise GraphError(f"input {source.name!r} is {source.shape}: pass --layout nchw or --layout nhwc")
            layout = "nchw" if first else "nhwc"
        channels, *sides = rest if layout == "nchw" else [rest[2], *rest[:2]]
        if channels not in (None, options.channels):
            raise GraphError(
                f"input {source.name!r} has {channels} channels, mean and std have "
                f"{options.channels}; tiles are RGB (3) or grey (1): "
                "pass as many numbers to --mean and --std"
            )
        if any(s not in (None, options.tile_px) for s in sides):
            fixed = {side for side in sides if side is not None}
            hint = (
                f"pass --tile {fixed.pop()}"
                if len(fixed) == 1
                else "tiles are square: export the model for square ones"
            )
            raise GraphError(
                f"the network takes {_size_text(sides)} pixels, not {_size_text([options.tile_px] * 2)}; {hint}"
            )
        return cls(session, source.name, str(options.output_name), source.type, layout, batch)

    def input_shape(self, options: ExternalModel) -> tuple[int, int, int, int]:
        """Return the shape of the input; N is 1 if any batch size is allowed."""
        batch, side, channels = self.batch or 1, options.tile_px, options.channels
        if self.layout == "nchw":
            return batch, channels, side, side
        return batch, side, side, channels

    def run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map normalised tiles, in the network's layout, to its raw output, in batches of its fixed size."""
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
                    f"the network does not take {_size_text([side] * 2)} pixels "
                    f"({first_line(error)}); "
                    f"try --tile {multiple if multiple > side else side + 32}, a multiple of 32"
                ) from error
            parts.append(out[: len(part)])
        return np.concatenate(parts)


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """The layout and size of the network's output."""

    layout: str
    channels: int
    height: int
    width: int
    float32: bool

    @classmethod
    def inspect(cls, output: NDArray[Any], options: ExternalModel) -> OutputFormat:
        """Read the format of an output, or refuse it."""
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
        # If both layouts fit, the full size decides, then the layout of the input.
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
                f"output {name!r} is {_size_text((height, width))} pixels: more than a tile; pass another --output"
            )
        if (height, width) != (side, side) and not options.resize_output:
            raise GraphError(
                f"output {name!r} is {_size_text((height, width))} pixels for a tile of "
                f"{_size_text((side, side))}: pass --resize-output if it shows the whole tile at lower "
                "resolution (not if it is cropped, as by convolutions without padding)"
            )
        return cls(layout, channels, height, width, output.dtype == np.float32)


def choose_activation(
    model: onnx.ModelProto, output: NDArray[Any], output_format: OutputFormat, options: ExternalModel
) -> str:
    """Return the activation that makes probabilities of the output, or refuse a choice that cannot."""
    if not np.isfinite(output).all():
        raise GraphError(
            "the network's output is not finite on the tiles tried; check --mean, --std and --scale, or train it again"
        )
    low, high = float(output.min()), float(output.max())
    within = low >= -TOLERANCE and high <= 1 + TOLERANCE
    total = output.astype(np.float32).sum(axis=1 if output_format.layout == "nchw" else 3)
    shares = within and output_format.channels > 1 and bool(np.all(np.abs(total - 1) <= TOLERANCE * 4))
    activation = options.activation
    if activation == "auto":
        makers = {name: node for node in model.graph.node for name in node.output}
        node = makers.get(str(options.output_name))
        while node is not None and node.op_type in MOVING:
            node = makers.get(node.input[0])
        if shares or (node is not None and node.op_type in ("Softmax", "Sigmoid", "HardSigmoid")):
            activation = "none"
        else:
            activation = "softmax" if output_format.channels > 1 else "sigmoid"
    if activation == "softmax" and output_format.channels == 1:
        raise GraphError("softmax over one channel is 1 everywhere: use --activation sigmoid")
    if activation == "softmax" and shares:
        raise GraphError("the output is probabilities already: use --activation none")
    if activation == "none" and not within:
        raise GraphError(
            f"the output goes from {low:.3g} to {high:.3g}, so it is not probabilities: "
            "use --activation softmax or --activation sigmoid"
        )
    return activation


@dataclass(frozen=True, slots=True)
class Reference:
    """The unchanged network with pre- and post-processing in NumPy."""

    network: ExternalNetwork
    output_format: OutputFormat
    options: ExternalModel

    def __call__(self, tiles: Tiles) -> Scores:
        """Map tiles (N, H, W, C) to scores (N, K, H, W), one tile at a time."""
        return np.concatenate([self._scores(tile[None]) for tile in tiles])

    def _scores(self, tile: Tiles) -> Scores:
        y = self.network.run(normalised(tile, self.options)).astype(np.float64)
        if self.output_format.layout == "nhwc":
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
        return y.astype(np.float32)


def normalised(tiles: Tiles, options: ExternalModel) -> NDArray[np.float32]:
    """Map tiles (N, H, W, C) to the network's input, in its layout."""
    pixels = tiles[..., ::-1] if options.order == "bgr" else tiles
    x = (pixels * options.scale - np.array(options.mean)) / np.array(options.std)
    if options.layout == "nchw":
        x = np.moveaxis(x, -1, 1)
    return np.ascontiguousarray(x, dtype=np.float32)


def _interpolation(source: int, target: int) -> NDArray[np.float64]:
    """Return the matrix (target, source) of linear interpolation between pixel centres."""
    position = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    weight: NDArray[np.float64] = 1 - np.abs(position[:, None] - np.arange(source))
    return weight.clip(0)


def trial_tiles(options: ExternalModel) -> Tiles:
    """Return two different tiles of a ramp and noise, in which all grey levels occur."""
    random = np.random.default_rng(0)
    side, channels = options.tile_px, options.channels
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


def _one_of(kind: str, name: str | None, names: list[str]) -> str:
    if name is None and len(names) != 1:
        raise GraphError(f"the network has {len(names)} {kind}s: pass --{kind} {either(names)}")
    if name is not None and name not in names:
        raise GraphError(f"the network has no {kind} {name!r}; it has {either(names)}: pass --{kind} with one of them")
    return name or names[0]


def _size_text(sides: Iterable[int | None]) -> str:
    """Return a size as text; None stands for any length."""
    return " x ".join("any" if side is None else str(side) for side in sides)
