"""An ONNX file of a bundle, read without trust before any library reads it.

ONNX may keep weights in other files, run loops, and call functions that multiply; a deployed graph
does none of these, and a file that does is refused here. Only the outline of the file is read, in
protobuf's wire format: this needs no onnx package, and takes time and memory by the file's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from histostream.runtime.bundle.card import CardError, ModelCard, read_file

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # protobuf's wire types
# Field numbers of onnx.proto.
MODEL_GRAPH, MODEL_TRAINING, MODEL_FUNCTIONS = 7, 20, 25
GRAPH_NODE, GRAPH_TENSOR, GRAPH_SPARSE = 1, 5, 15
NODE_TYPE, NODE_ATTRIBUTE = 4, 5
ATTRIBUTE_TENSOR, ATTRIBUTE_GRAPH, ATTRIBUTE_TENSORS, ATTRIBUTE_GRAPHS = 5, 6, 10, 11
ATTRIBUTE_SPARSE = (22, 23)
TENSOR_EXTERNAL, TENSOR_LOCATION = 13, 14

Field = tuple[int, int, memoryview | int]  # number, wire type, what it holds


def read_graph(bundle: Path, card: ModelCard, name: str) -> bytes:
    """Read an ONNX file of a bundle, checked against the card and for what may not be in it.

    Raises
    ------
    CardError
        If `read_file` does; or if the file keeps weights elsewhere, or has control flow or
        functions, which an export has written out.
    """
    content = read_file(bundle, card, name)
    try:
        _check_model(memoryview(content))
    except _RefusedError as refused:
        raise CardError(f"{bundle / name}: {refused}; export the model again") from None
    return content


class _RefusedError(ValueError):
    """Why a graph is refused."""


def _check_model(model: memoryview) -> None:
    for number, _, held in _fields(model):
        if number == MODEL_FUNCTIONS:
            raise _RefusedError("it has functions, which a deployed graph has not")
        if number == MODEL_TRAINING:
            raise _RefusedError("it has steps for training, which a deployed graph has not")
        if number == MODEL_GRAPH and isinstance(held, memoryview):
            _check_graph(held)


def _check_graph(graph: memoryview) -> None:
    for number, _, held in _fields(graph):
        if not isinstance(held, memoryview):
            continue
        if number == GRAPH_NODE:
            _check_node(held)
        elif number == GRAPH_TENSOR:
            _check_tensor(held)
        elif number == GRAPH_SPARSE:
            _check_sparse(held)


def _check_node(node: memoryview) -> None:
    fields = [(number, held) for number, _, held in _fields(node) if isinstance(held, memoryview)]
    kind = "".join(ascii(bytes(held))[1:40] for number, held in fields if number == NODE_TYPE)
    for attribute in (held for number, held in fields if number == NODE_ATTRIBUTE):
        for number, _, held in _fields(attribute):
            if number in (ATTRIBUTE_GRAPH, ATTRIBUTE_GRAPHS):
                raise _RefusedError(f"a node is a {kind}: a deployed graph has no control flow")
            if isinstance(held, memoryview) and number in (ATTRIBUTE_TENSOR, ATTRIBUTE_TENSORS):
                _check_tensor(held)
            if isinstance(held, memoryview) and number in ATTRIBUTE_SPARSE:
                _check_sparse(held)


def _check_sparse(sparse: memoryview) -> None:
    for number, _, held in _fields(sparse):
        if number in (1, 2) and isinstance(held, memoryview):  # values and indices
            _check_tensor(held)


def _check_tensor(tensor: memoryview) -> None:
    for number, _, held in _fields(tensor):
        if number == TENSOR_EXTERNAL or (number == TENSOR_LOCATION and held):
            raise _RefusedError("its weights lie in another file, which a bundle's do not")


def _fields(message: memoryview) -> Iterator[Field]:
    """Yield the fields of a message; raises where it is none."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = _varint(message, at)
            yield number, kind, value
            continue
        if kind == BYTES:
            size, at = _varint(message, at)
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
        else:
            raise _RefusedError("it is damaged, or no ONNX file")
        if at + size > len(message):
            raise _RefusedError("it is damaged, or was cut off")
        yield number, kind, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return the number at a place, and the place after it."""
    value = 0
    for i, byte in enumerate(message[at : at + 10]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    raise _RefusedError("it is damaged, or was cut off")
