"""Read an ONNX file from elsewhere: check it, and reduce it to the network of one input and one output.

The file is not trusted: only operators of the ONNX standard run, in ONNX Runtime, and weights outside the file are read
only from its own folder.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
import onnx.shape_inference
import onnx.version_converter
from google.protobuf.message import DecodeError, Message
from onnx import TensorProto, helper

from histostream.export.graph.from_torch import OPSET
from histostream.export.graph.model import (
    INVALID,
    GraphError,
    attribute,
    first_line,
    open_session,
    opset_of,
    unused_name,
)
from histostream.export.graph.operators import STANDARD_DOMAINS

OLDEST_OPSET = 13  # the nodes that wrapping adds have the same meaning from this operator set on
ASYMMETRIC_OPSET = 11  # until then Resize and Upsample map positions without an offset of half a pixel
MAX_BYTES = 2**31 - 1  # of one ONNX file: protobuf's limit
MAX_NODES = 100_000  # after local functions are inlined; large networks have some thousands
MAX_DEPTH = 100  # of nested functions; exporters need a few


def read_onnx(path: Path) -> onnx.ModelProto:
    """Read an ONNX file and its external data, which must lie in the same folder.

    Raises
    ------
    GraphError
        If it is not an ONNX file, is damaged or too large, or its weights are missing or lie outside its folder.
    """
    try:
        content = path.read_bytes()
        model = onnx.load_model_from_string(content)
        tensors = [part for part in _parts(model) if isinstance(part, TensorProto)]
    except OSError as error:
        raise GraphError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    except (DecodeError, UnicodeDecodeError) as error:  # which one depends on protobuf's version
        raise GraphError(f"{path}: not an ONNX file, or damaged; export the model again") from error
    if not model.graph.node or not model.graph.output:
        raise GraphError(f"{path}: not an ONNX file, or one without a network; name the .onnx file of a network")
    folder, external_bytes = path.resolve().parent, dict[Path, int]()
    for tensor in tensors:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        location = next((e.value for e in tensor.external_data if e.key == "location"), "")
        data = folder / location
        try:
            inside = bool(location) and data.resolve().is_relative_to(folder)
        except (OSError, RuntimeError, ValueError):  # a loop of links, or not a name at all
            inside = False
        if not inside:
            raise GraphError(
                f"{path}: weights {tensor.name!r} lie in {location!r}, outside the model's folder; "
                "only files beside the model are read: "
                "move it there and export the model again"
            )
        if not data.is_file():
            raise GraphError(f"{data}: is missing; weights of {path.name} lie in it: copy it beside the model")
        external_bytes[data] = data.stat().st_size
    if len(content) + sum(external_bytes.values()) > MAX_BYTES:
        raise GraphError(f"{path}: with its weights larger than one ONNX file can be (2 GiB); use a smaller network")
    try:
        onnx.load_external_data_for_model(model, str(folder))
        onnx.checker.check_model(model)
    except (ValueError, OSError, *INVALID) as error:
        raise GraphError(f"{path}: damaged ({first_line(error)}); export the model again") from error
    for tensor in tensors:
        if tensor.data_location == TensorProto.EXTERNAL:
            raise GraphError(
                f"{path}: weights {tensor.name!r} outside the file, in a function; export the model without functions"
            )
    return model


def check_operators(model: onnx.ModelProto) -> None:
    """Refuse operators outside the standard, subgraphs, and functions that call themselves or grow without limit.

    Raises
    ------
    GraphError
        Naming the node or the function.
    """
    functions = {(f.domain, f.name, f.overload): f for f in model.functions}
    sizes: dict[tuple[str, str, str], int] = {}

    def size(nodes: Any, parents: tuple[tuple[str, str, str], ...]) -> int:
        total = 0
        for node in nodes:
            key = (node.domain, node.op_type, node.overload)
            if any(a.HasField("g") or a.graphs for a in node.attribute):
                raise GraphError(
                    f"node {node.name!r} is a {node.op_type}: not in a deployed graph; "
                    "export the model for inference, without control flow"
                )
            if key in parents or len(parents) > MAX_DEPTH:
                raise GraphError(
                    f"function {node.op_type!r} calls itself, or is too deep; export the model without functions"
                )
            if key not in functions:
                if node.domain not in STANDARD_DOMAINS:
                    raise GraphError(
                        f"node {node.name!r} is a {node.op_type} of {node.domain!r}, not an "
                        "operator of the ONNX standard; export the model without custom operators"
                    )
                total += 1
                continue
            if key not in sizes:
                sizes[key] = size(functions[key].node, (*parents, key))
            total += sizes[key]
        return total

    if (nodes := size(model.graph.node, ())) > MAX_NODES:
        raise GraphError(
            f"{nodes} nodes after its functions are inlined: too many to be a network; "
            "export the model without functions"
        )


def open_file(path: Path, model: onnx.ModelProto) -> Any:
    """Open a network in ONNX Runtime.

    Raises
    ------
    GraphError
        If ONNX Runtime cannot load it; the message names the file.
    """
    try:
        return open_session(model)
    except GraphError as error:
        raise GraphError(f"{path}: ONNX Runtime cannot load it ({error}); export the model again") from error


def prune(original: onnx.ModelProto, input_name: str, output_name: str) -> onnx.ModelProto:
    """Inline functions, keep only the nodes that the output needs, and name nodes without a name.

    Raises
    ------
    GraphError
        If the output needs other inputs, or not this one.
    """
    model = copy.deepcopy(original)
    if model.functions:
        try:
            model = onnx.inliner.inline_local_functions(model)
        except (RuntimeError, ValueError, *INVALID) as error:
            raise GraphError(
                f"functions cannot be inlined ({first_line(error)}); export the model without functions"
            ) from error
        check_operators(model)
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output if name}
    needed: set[str] = set()
    waiting = [output_name]
    while waiting:
        name = waiting.pop()
        if name and name not in needed:
            needed.add(name)
            waiting += makers[name].input if name in makers else []
    nodes = [n for n in graph.node if needed & set(n.output)]
    weights = [t for t in graph.initializer if t.name in needed]
    sparse = [t for t in graph.sparse_initializer if t.values.name in needed]
    known = {t.name for t in weights} | {t.values.name for t in sparse}
    missing = needed - set(makers) - known - {input_name}
    if missing:
        raise GraphError(
            f"output {output_name!r} also needs the inputs {either(sorted(missing))}: "
            "only networks of one image can be wrapped"
        )
    if input_name not in needed:
        raise GraphError(f"output {output_name!r} does not depend on the input; pass another --output")
    names = {n.name for n in nodes}
    for count, node in enumerate(nodes):
        if not node.name:
            node.name = unused_name(f"{node.op_type}_{count}", names)
            names.add(node.name)
        node.doc_string = ""  # exporters leave paths of their machine here
        del node.metadata_props[:]
        if node.op_type == "Dropout" and len(node.input) < 3 and not any(node.output[1:]):
            node.op_type = "Identity"  # without training_mode it does nothing, by the standard
            del node.input[1:], node.output[1:], node.attribute[:]
    kept = helper.make_graph(
        nodes,
        graph.name or "network",
        [i for i in graph.input if i.name == input_name],
        [o for o in graph.output if o.name == output_name],
        weights,
        sparse_initializer=sparse,
    )
    standard = [i for i in model.opset_import if i.domain in STANDARD_DOMAINS]
    # From version 4 on weights need not be inputs.
    return helper.make_model(kept, ir_version=max(model.ir_version, 4), opset_imports=standard)


def convert(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convert an older network to operator set 18; one that cannot be converted is returned as it is.

    Raises
    ------
    GraphError
        If it cannot be converted and is older than operator set `OLDEST_OPSET`.
    """
    opset = opset_of(model)
    if opset >= OPSET:
        return model
    try:
        converted = onnx.version_converter.convert_version(model, OPSET)
        if opset < ASYMMETRIC_OPSET:
            _keep_coordinates(converted.graph)
        return converted
    except (RuntimeError, ValueError, *INVALID) as error:
        if opset >= OLDEST_OPSET:
            return model
        raise GraphError(
            f"operator set {opset} cannot be converted to {OPSET} ({first_line(error)}); "
            f"export the model again with operator set {OLDEST_OPSET} or later"
        ) from error


def _keep_coordinates(graph: onnx.GraphProto) -> None:
    """Make every Resize what it was before operator set 11, which the converter does not do."""
    for node in graph.node:
        if node.op_type == "Resize" and attribute(node, "coordinate_transformation_mode", None) is None:
            attributes = (("coordinate_transformation_mode", "asymmetric"), ("nearest_mode", "floor"))
            node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes)


def either(names: Sequence[str]) -> str:
    """Return names as a message lists them: 'a', 'b' or 'c'."""
    *most, last = (repr(name) for name in names)
    return f"{', '.join(most)} or {last}" if most else last


def _parts(message: Message) -> Iterator[Message]:
    """Yield every message in a model, also in attributes and functions; DecodeError if a text is not UTF-8."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                yield from _parts(part)
        elif field.type == field.TYPE_STRING:
            # Protobuf leaves what is not UTF-8 as bytes.
            texts = [value] if isinstance(value, str | bytes) else value
            if not all(isinstance(text, str) for text in texts):
                raise DecodeError(f"{field.name} is not text")
