"""Types that say where the height and the width of the tile lie in the tensors of a graph.

The package ``receptive_field`` and its rules share them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import onnx
from numpy.typing import NDArray

from histostream.export.graph.model import attribute
from histostream.export.graph.shapes import Shape

Interval = tuple[int, int]  # first and last position
Window = Callable[[Interval], Interval | None]  # positions of an output -> of an input


@dataclass(frozen=True, slots=True)
class SpatialAxis:
    """The axis of a tensor along which the height, or the width, of the tile runs."""

    axis: int
    size: int
    stride: Fraction = Fraction(1)  # pixels of the tile from one position to the next
    inner: int = 1  # elements of the axis from one position to the next; > 1 if others share it


Layout = tuple[SpatialAxis, SpatialAxis]  # height, width


@dataclass(frozen=True, slots=True)
class Need:
    """The positions of an input that positions of an output need, along height and width."""

    tensor: str
    output: str
    windows: tuple[Window, Window]


@dataclass(frozen=True, slots=True)
class Effect:
    """The layouts of a node's outputs, and the inputs that they need; an output without a layout is a statistic.

    ``whole_tile``: an output depends on the whole tile. ``unknown``: so it may, because no rule covers the node.
    """

    layouts: dict[str, Layout | None]
    needs: tuple[Need, ...] = ()
    whole_tile: bool = False
    unknown: bool = False


class UnknownEffectError(Exception):
    """No rule covers a node: its output may depend on any pixel."""


@dataclass(frozen=True, slots=True)
class Op:
    """A node with the shapes, layouts and constants of its inputs."""

    node: onnx.NodeProto
    opset: int
    shapes: dict[str, Shape]
    layouts: dict[str, Layout | None]
    constants: dict[str, NDArray[Any]]

    @property
    def outputs(self) -> list[str]:
        """The names of the outputs that are used."""
        return [name for name in self.node.output if name]

    @property
    def spatial_inputs(self) -> list[str]:
        """Names of the inputs that have a position in the tile."""
        return [name for name in self.node.input if self.layouts.get(name)]

    @property
    def spatial_axes(self) -> Layout:
        """Spatial axes of the first input, if it is the only spatial one."""
        if self.spatial_inputs != [self.node.input[0]]:
            raise UnknownEffectError
        return cast("Layout", self.layouts[self.node.input[0]])

    @property
    def unshared_axes(self) -> Layout:
        """Spatial axes of the first input, if neither shares its axis with channels or the other one."""
        shape = self.shape(self.node.input[0])
        if any(axis.inner != 1 or shape[axis.axis] != axis.size for axis in self.spatial_axes):
            raise UnknownEffectError
        return self.spatial_axes

    @property
    def rank(self) -> int:
        """The number of axes of the first input."""
        return len(self.shape(self.node.input[0]))

    def shape(self, name: str) -> Shape:
        """Return the shape of a tensor."""
        if name not in self.shapes:
            raise UnknownEffectError
        return self.shapes[name]

    def out_shape(self, index: int = 0) -> Shape:
        """Return the shape of an output."""
        return self.shape(self.node.output[index])

    def attribute(self, name: str, default: Any) -> Any:
        """Return an attribute of the node, text as ``str``."""
        return attribute(self.node, name, default)

    def has_input(self, index: int) -> bool:
        """Whether an optional input is given."""
        return len(self.node.input) > index and bool(self.node.input[index])

    def numbers(self, index: int) -> list[Any]:
        """Return an input that is a small constant."""
        if not self.has_input(index) or self.node.input[index] not in self.constants:
            raise UnknownEffectError
        return self.constants[self.node.input[index]].ravel().tolist()

    def integers(self, attribute: str, index: int) -> list[int] | None:
        """Return integers that are an attribute or, in later opsets, an input; None if they are left out."""
        if self.has_input(index):
            return [int(number) for number in self.numbers(index)]
        return cast("list[int] | None", self.attribute(attribute, None))


def same(wanted: Interval) -> Interval:
    """Return the window of a node that keeps positions."""
    return wanted
