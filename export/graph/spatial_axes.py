"""Where the height and the width of the tile lie in the tensors of a graph.

The vocabulary that ``reach`` and its rules share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import onnx
from numpy.typing import NDArray
from onnx import helper

from histostream.export.graph.shapes import Shape

Interval = tuple[int, int]  # first and last position
Window = Callable[[Interval], Interval | None]  # positions of an output -> of an input


@dataclass(frozen=True, slots=True)
class Side:
    """Where the height, or the width, of the tile lies in a tensor."""

    axis: int
    size: int
    stride: Fraction = Fraction(1)  # pixels of the tile from one position to the next
    inner: int = 1  # elements of the axis from one position to the next; > 1 if others share it


Layout = tuple[Side, Side]  # height, width


@dataclass(frozen=True, slots=True)
class Need:
    """The positions of an input that positions of an output need, along height and width."""

    tensor: str
    output: str
    windows: tuple[Window, Window]


@dataclass(frozen=True, slots=True)
class Effect:
    """What a node does to the tile's sides; an output without a layout is a statistic."""

    layouts: dict[str, Layout | None]
    needs: tuple[Need, ...] = ()
    whole_tile: bool = False


class NotUnderstoodError(Exception):
    """A node is beyond the rules: its result may see anything."""


@dataclass(frozen=True, slots=True)
class Op:
    """A node with what is known of its inputs."""

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
    def spatial(self) -> list[str]:
        """The inputs that have places in the tile."""
        return [name for name in self.node.input if self.layouts.get(name)]

    @property
    def sides(self) -> Layout:
        """Sides of the first input, if it alone has places in the tile."""
        if self.spatial != [self.node.input[0]]:
            raise NotUnderstoodError
        return cast("Layout", self.layouts[self.node.input[0]])

    @property
    def plain_sides(self) -> Layout:
        """Sides of the first input, if each has an axis for itself."""
        shape = self.shape(self.node.input[0])
        if any(side.inner != 1 or shape[side.axis] != side.size for side in self.sides):
            raise NotUnderstoodError
        return self.sides

    @property
    def rank(self) -> int:
        """The number of axes of the first input."""
        return len(self.shape(self.node.input[0]))

    def shape(self, name: str) -> Shape:
        """Return the shape of a tensor."""
        if name not in self.shapes:
            raise NotUnderstoodError
        return self.shapes[name]

    def out_shape(self, index: int = 0) -> Shape:
        """Return the shape of an output."""
        return self.shape(self.node.output[index])

    def attribute(self, name: str, default: Any) -> Any:
        """Return an attribute of the node, text as ``str``."""
        found = [a for a in self.node.attribute if a.name == name]
        value = helper.get_attribute_value(found[0]) if found else default
        return value.decode() if isinstance(value, bytes) else value

    def has_input(self, index: int) -> bool:
        """Whether an optional input is given."""
        return len(self.node.input) > index and bool(self.node.input[index])

    def numbers(self, index: int) -> list[Any]:
        """Return an input that is a small constant."""
        if not self.has_input(index) or self.node.input[index] not in self.constants:
            raise NotUnderstoodError
        return self.constants[self.node.input[index]].ravel().tolist()

    def integers(self, attribute: str, index: int) -> list[int] | None:
        """Return integers that are an attribute or, in later opsets, an input; none if left out."""
        if self.has_input(index):
            return [int(number) for number in self.numbers(index)]
        return cast("list[int] | None", self.attribute(attribute, None))


def same(wanted: Interval) -> Interval:
    """Return the window of a node that moves nothing."""
    return wanted
