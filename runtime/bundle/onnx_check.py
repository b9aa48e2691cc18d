"""Check an ONNX file of a bundle, which is not trusted, before a library reads it.

ONNX can keep weights in other files, run loops and call functions that call functions. A deployed
graph does none of these, and a file that does is refused. Only the structure of the file is read,
in protobuf's wire format, which needs no onnx package and takes time in proportion to its size.
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

Field = tuple[int, int, memoryview | int]  # number, wire type, value


def read_graph(bundle: Path, card: ModelCard, name: str) -> bytes:
    """Read an ONNX file of a bundle, and refuse a graph that is not a deployed one.

    Raises
    ------
    CardError
        As `read_file`; or if the file has weights in other files, control flow, functions or steps
        for training, which an exported graph does not have.
    """
    content = read_file(bundle, card, name)
    try:
        _check_model(memoryview(content))
    except _RefusedError as refused:
        raise CardError(f"{bundle / name}: {refused}; export the model again") from None
    return content


class _RefusedError(ValueError):
    """A graph is refused; the message says why."""


def _check_model(model: memoryview) -> None:
    for number, _, value in _fields(model):
        if number == MODEL_FUNCTIONS:
            raise _RefusedError("it has functions, which a deployed graph does not have")
        if number == MODEL_TRAINING:
            raise _RefusedError("it has steps for training, which a deployed graph does not have")
        if number == MODEL_GRAPH and isinstance(value, memoryview):
            _check_graph(value)


def _check_graph(graph: memoryview) -> None:
    for number, _, value in _fields(graph):
        if not isinstance(value, memoryview):
            continue
        if number == GRAPH_NODE:
            _check_node(value)
        elif number == GRAPH_TENSOR:
            _check_tensor(value)
        elif number == GRAPH_SPARSE:
            _check_sparse(value)


def _check_node(node: memoryview) -> None:
    fields = [(number, value) for number, _, value in _fields(node) if isinstance(value, memoryview)]
    kind = "".join(ascii(bytes(value))[1:40] for number, value in fields if number == NODE_TYPE)
    for attribute in (value for number, value in fields if number == NODE_ATTRIBUTE):
        for number, _, value in _fields(attribute):
            if number in (ATTRIBUTE_GRAPH, ATTRIBUTE_GRAPHS):
                raise _RefusedError(f"a node is a {kind}: a deployed graph has no control flow")
            if isinstance(value, memoryview) and number in (ATTRIBUTE_TENSOR, ATTRIBUTE_TENSORS):
                _check_tensor(value)
            if isinstance(value, memoryview) and number in ATTRIBUTE_SPARSE:
                _check_sparse(value)


def _check_sparse(sparse: memoryview) -> None:
    for number, _, value in _fields(sparse):
        if number in (1, 2) and isinstance(value, memoryview):  # values and indices
            _check_tensor(value)


def _check_tensor(tensor: memoryview) -> None:
    for number, _, value in _fields(tensor):
        if number == TENSOR_EXTERNAL or (number == TENSOR_LOCATION and value):
            raise _RefusedError("its weights are in another file, which a bundle must not have")


def _fields(message: memoryview) -> Iterator[Field]:
    """Yield the fields of a message.

    Raises
    ------
    _RefusedError
        If it is not a message.
    """
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
            raise _RefusedError("it is damaged, or not an ONNX file")
        if at + size > len(message):
            raise _RefusedError("it is damaged, or was cut off")
        yield number, kind, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return the number at an offset, and the offset behind it."""
    value = 0
    for i, byte in enumerate(message[at : at + 10]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    raise _RefusedError("it is damaged, or was cut off")
