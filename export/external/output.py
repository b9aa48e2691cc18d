"""The layout and the size of a network's output, and where it lies on the tile."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from histostream.export.external.activation import last_operator
from histostream.export.external.description import DescriptionError, ExternalModel
from histostream.export.graph.model import GraphError
from histostream.export.graph.nodes import Nodes
from histostream.export.graph.shapes import resize_scale


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """The layout and the size of a network's output.

    Attributes
    ----------
    layout
        "nchw", "nhwc", or "nhw" for labels without an axis of channels.
    channels, height, width
        Its size.
    labels
        Whether it is labels, an arg-max inside the network.
    is_float32
        Whether it is FP32 already.
    side
        Side of the network's input, in pixels.
    border_px
        Pixels at each side of the input that it does not cover.
    """

    layout: str
    channels: int
    height: int
    width: int
    labels: bool
    is_float32: bool
    side: int
    border_px: int = 0

    @classmethod
    def inspect(
        cls, model: onnx.ModelProto, output: NDArray[Any], options: ExternalModel, layout: str, side: int
    ) -> OutputFormat:
        """Read the format of an output, or refuse it.

        Parameters
        ----------
        model, output
            The network, and its output for one tile.
        options
            What the user says.
        layout, side
            Layout of the network's input, and its side in pixels.
        """
        name = str(options.output_name)
        integers = not np.issubdtype(output.dtype, np.floating)
        labels = integers or last_operator(model, name) in ("ArgMax", "ArgMin")
        if output.ndim == 3 and labels:
            layouts = {"nhw": (1, *output.shape[1:])}
        elif output.ndim == 4:
            layouts = {"nchw": output.shape[1:], "nhwc": (output.shape[3], *output.shape[1:3])}
        else:
            raise GraphError(
                f"output {name!r} is {output.shape}: (N, K, H, W) or (N, H, W, K) is needed, or (N, H, W) of labels: "
                "export the model so, or pass another --output"
            )
        counts = (1,) if labels else _channel_counts(options)
        fitting = [kind for kind, size in layouts.items() if size[0] in counts]
        # If both layouts fit, the full size decides, then the layout of the input.
        full = [kind for kind in fitting if layouts[kind][1:] == (side, side)]
        fitting = full or fitting
        if not fitting:
            channels = layouts.get(layout, next(iter(layouts.values())))[0]
            of_labels = " of labels, which need one" if labels else ""
            named = len(options.classes)
            raise DescriptionError(
                f"output {name!r} is {output.shape}, {channels} channels{of_labels}; {named} classes were named; name "
                "as many with --classes, background included if it is one of the channels"
                if not labels
                else f"output {name!r} is {output.shape}, {channels} channels{of_labels}; pass another --output"
            )
        kind = layout if layout in fitting else fitting[0]
        channels, height, width = layouts[kind]
        found = cls(kind, channels, height, width, labels, output.dtype == np.float32, side)
        return replace(found, border_px=found._border_px(name, options))

    def _border_px(self, name: str, options: ExternalModel) -> int:
        """Return the pixels at each side that the output does not cover; 0 if it shows the whole input."""
        height, width, side = self.height, self.width, self.side
        size, tile = f"{height} x {width} pixels", f"{side} x {side}"
        if max(height, width) > side:
            raise GraphError(f"output {name!r} is {size}: more than a tile of {tile}; pass another --output")
        if (height, width) == (side, side):
            return 0
        if options.resize_output:
            if self.labels:
                raise DescriptionError(
                    f"output {name!r} is {size} of labels for a tile of {tile}: labels cannot be enlarged; export the "
                    "model without its arg-max"
                )
            return 0
        if options.crop_output:
            if height != width or (side - height) % 2:
                raise DescriptionError(
                    f"output {name!r} is {size} for a tile of {tile}: it has no centre in common with the tile; export "
                    "the model for another size"
                )
            return (side - height) // 2
        raise DescriptionError(
            f"output {name!r} is {size} for a tile of {tile}: pass --resize-output if it shows the whole tile at lower "
            "resolution, or --crop-output if it is the tile's centre, as of convolutions without padding"
        )

    @property
    def is_enlarged(self) -> bool:
        """Whether the output shows the whole tile at lower resolution."""
        return not self.border_px and (self.height, self.width) != (self.side, self.side)

    def channels_first(self, output: NDArray[Any]) -> NDArray[Any]:
        """Return an output as (N, C, H, W)."""
        if self.layout == "nhwc":
            return np.moveaxis(output, -1, 1)
        return output[:, None] if self.layout == "nhw" else output

    def to_tile(self, output: NDArray[Any]) -> NDArray[Any]:
        """Return an output as (N, C, H, W), enlarged if it is coarser than the tile."""
        output = self.channels_first(output)
        if self.is_enlarged:
            rows, columns = (_interpolation(length, self.side) for length in output.shape[2:])
            output = rows @ output.astype(np.float64) @ columns.T
        return output

    def add_nodes(self, nodes: Nodes, y: str) -> str:
        """Add the same to a graph, and return the name of the result, in FP32."""
        if not self.is_float32:
            y = nodes.add("Cast", y, to=TensorProto.FLOAT)
        if self.layout == "nhwc":
            y = nodes.add("Transpose", y, perm=[0, 3, 1, 2])
        elif self.layout == "nhw":
            y = nodes.add("Unsqueeze", y, nodes.constant("channel", np.array([1], np.int64)))
        if self.is_enlarged:
            scales = [1, 1, resize_scale(self.height, self.side), resize_scale(self.width, self.side)]
            y = nodes.add(
                "Resize",
                y,
                "",
                nodes.constant("scales", np.array(scales, np.float32)),
                mode="linear",
                coordinate_transformation_mode="half_pixel",
            )
        return y


def _channel_counts(options: ExternalModel) -> tuple[int, ...]:
    """Return the numbers of output channels that fit the classes."""
    named = len(options.classes)
    if named == 2 or (named > 2 and options.background_index() == 0):
        return named, named - 1
    return (named,)


def _interpolation(source: int, target: int) -> NDArray[np.float64]:
    """Return the matrix (target, source) of linear interpolation between pixel centres."""
    position = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    weight: NDArray[np.float64] = 1 - np.abs(position[:, None] - np.arange(source))
    return weight.clip(0)
