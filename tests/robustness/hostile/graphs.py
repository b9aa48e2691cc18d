"""ONNX files that are damaged, or ask for too much; their cards have the right checksum."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.robustness.hostile.case import Case, graph_case
from tests.robustness.hostile.edit import WORDS, some_bytes
from tests.robustness.hostile.seeds import seed_graph, seed_model


def _onnx_external(model: Any, rng: random.Random) -> str:
    tensor = model.graph.initializer[0]
    place = rng.choice(
        (
            "/etc/passwd",
            "../outside.bin",
            "weights.bin",
            "bundle/model.onnx",
            "slide.tif",
            "*/_ORT_MEM_ADDR_/*",
            "file:///etc/passwd",
            "/dev/zero",
            "\udc80".encode("utf-8", "surrogateescape").decode("latin1"),
        )
    )
    tensor.ClearField("raw_data")
    tensor.data_location = 1
    for key, value in (
        ("location", place),
        ("offset", rng.choice(("0", "-1", "4096", "x"))),
        ("length", rng.choice(("24", "-1", str(2**62), "0"))),
    ):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return f"weights in {place!r}"


def _onnx_tensor(model: Any, rng: random.Random) -> str:
    tensor = rng.choice(model.graph.initializer)
    way = rng.randrange(4)
    if way == 0:
        tensor.dims[:] = [rng.choice(WORDS[:27]) for _ in range(rng.choice((0, 1, 4, 4, 50)))]
        return f"{tensor.name} of shape {list(tensor.dims)}"
    if way == 1:
        tensor.data_type = rng.choice((0, 2, 8, 10, 11, 14, 16, 17, 23, 99, -1))
        return f"{tensor.name} of type {tensor.data_type}"
    if way == 2:
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
        return f"{tensor.name} of {len(tensor.raw_data)} bytes"
    tensor.name = rng.choice(("", "tiles", "scores", "planes", "weight"))
    return f"a tensor called {tensor.name!r}"


OPERATORS = (
    "Identity",
    "Relu",
    "MaxPool",
    "Conv",
    "ConvTranspose",
    "Resize",
    "Reshape",
    "Tile",
    "Expand",
    "Range",
    "ConstantOfShape",
    "Loop",
    "If",
    "Scan",
    "Gather",
    "Pad",
    "Concat",
    "Split",
    "Slice",
    "Unsqueeze",
    "NonZero",
    "TopK",
    "Einsum",
    "DepthToSpace",
    "RandomNormal",
    "BatchNormalization",
    "InstanceNormalization",
    "LSTM",
    "QuantizeLinear",
    "DequantizeLinear",
    "StringNormalizer",
    "PyOp",
    "PythonOp",
    "SequenceMap",
    "Optional",
    "NoSuchOperator",
    "ReduceMean",
    "Col2Im",
)
DOMAINS = (
    "",
    "ai.onnx",
    "ai.onnx.ml",
    "com.microsoft",
    "com.microsoft.extensions",
    "ai.onnx.preview.training",
    "evil.custom",
    "../x",
)


def _onnx_node(model: Any, rng: random.Random) -> str:
    node = rng.choice(model.graph.node)
    way = rng.randrange(4)
    if way == 0:
        node.op_type = rng.choice(OPERATORS)
        return f"a node is a {node.op_type}"
    if way == 1:
        node.domain = rng.choice(DOMAINS)
        return f"{node.op_type} of {node.domain!r}"
    names = ["tiles", "float", "planes", "mixed", "clipped", "scores", "weight", "low", "", "none"]
    if way == 2:
        node.input[rng.randrange(len(node.input))] = (name := rng.choice(names))
        return f"{node.op_type} takes {name!r}"
    node.output[0] = (name := rng.choice(names))
    return f"{node.op_type} gives {name!r}"


def _onnx_attribute(model: Any, rng: random.Random) -> str:
    from onnx import helper

    node = rng.choice(model.graph.node)
    name = rng.choice(("kernel_shape", "strides", "dilations", "pads", "group", "perm", "to", "auto_pad", "axis"))
    if name in ("group", "to", "axis"):
        value: Any = rng.choice((0, -1, 2, 3, 99, 2**31, 2**62, -(2**63)))
    elif name == "auto_pad":
        value = rng.choice(("SAME_UPPER", "VALID", "x", ""))
    else:
        size = rng.choice((0, 1, 2, 4, 8))
        value = [rng.choice((0, -1, 1, 2, 63, 65, 2**31, 2**40, 2**62)) for _ in range(size)]
    for i in [i for i, a in enumerate(node.attribute) if a.name == name]:
        del node.attribute[i]
    node.attribute.append(helper.make_attribute(name, [0] if value == [] else value))
    return f"{node.op_type} with {name}={value}"


def _onnx_contract(model: Any, rng: random.Random) -> str:
    value = rng.choice((model.graph.input[0], model.graph.output[0]))
    way = rng.randrange(5)
    if way == 0:
        value.name = rng.choice(("x", "", "tiles", "scores", "weight"))
        return f"called {value.name!r}"
    tensor = value.type.tensor_type
    if way == 1:
        tensor.elem_type = rng.choice((0, 1, 3, 7, 8, 11, 99))
        return f"{value.name} of type {tensor.elem_type}"
    if way == 2:
        del tensor.shape.dim[rng.randrange(4) :]
        return f"{value.name} of {len(tensor.shape.dim)} dimensions"
    if way == 3:
        value.type.ClearField("tensor_type")
        return f"{value.name} of no type"
    dim = rng.choice(tensor.shape.dim)
    dim.dim_value = rng.choice((0, 1, 2, 63, 65, 255, 2**31, 2**62, -1))
    return f"{value.name} of a side {dim.dim_value}"


def put_constant(model: Any, size: int) -> None:
    """Fill a tensor of one number, as large as wanted."""
    from onnx import helper, numpy_helper

    shape = np.array([1, 1, 1, size], np.int64)
    model.graph.initializer.append(numpy_helper.from_array(shape, "shape"))
    model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["shape"], ["huge"]))
    model.graph.node.insert(1, helper.make_node("ReduceMax", ["huge"], ["top"], keepdims=0))
    between(model, helper.make_node("Add", ["planes", "top"], ["planes2"]))


def put_range(model: Any, size: int, step: int) -> None:
    """Count to a number; by steps of 0, for ever."""
    from onnx import TensorProto, helper, numpy_helper

    for name, number in (("first", 0), ("end", size), ("step", step)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(number), name))
    model.graph.node.insert(0, helper.make_node("Range", ["first", "end", "step"], ["huge"]))
    model.graph.node.insert(1, helper.make_node("ReduceMax", ["huge"], ["last"], keepdims=0))
    model.graph.node.insert(2, helper.make_node("Cast", ["last"], ["top"], to=TensorProto.FLOAT))
    between(model, helper.make_node("Add", ["planes", "top"], ["planes2"]))


def put_resize(model: Any, scale: float) -> None:
    """Enlarge the tile."""
    from onnx import helper, numpy_helper

    scales = np.array([1, 1, scale, 1e4], np.float32)
    model.graph.initializer.append(numpy_helper.from_array(scales, "scales"))
    between(model, helper.make_node("Resize", ["planes", "", "scales"], ["planes2"]))


def put_side(model: Any, side: int) -> None:
    """Give scores of another size than the tile's, and say nothing of it."""
    from onnx import helper, numpy_helper

    sizes = np.array([1, 3, side, side], np.int64)
    model.graph.initializer.append(numpy_helper.from_array(sizes, "sizes"))
    between(model, helper.make_node("Resize", ["planes", "", "", "sizes"], ["planes2"]))
    for dim in model.graph.output[0].type.tensor_type.shape.dim[2:]:
        dim.dim_param = "any"


def put_loop(model: Any) -> None:
    """Do nothing, 2^62 times."""
    from onnx import TensorProto, helper, numpy_helper

    value, node = helper.make_tensor_value_info, helper.make_node
    body = helper.make_graph(
        [node("Identity", ["go"], ["on"]), node("Identity", ["x"], ["y"])],
        "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("x", TensorProto.FLOAT, None)],
        [value("on", TensorProto.BOOL, []), value("y", TensorProto.FLOAT, None)],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(2**62), "times"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    between(model, node("Loop", ["times", "yes", "planes"], ["planes2"], body=body))


def put_laughs(model: Any, depth: int) -> None:
    """Call functions that each call the next twice: 2^depth nodes once written out."""
    from onnx import helper

    opset = [helper.make_opsetid("", 18), helper.make_opsetid("ha", 1)]
    for i in range(depth):
        below = ("Identity", "") if i == 0 else (f"f{i - 1}", "ha")
        nodes = [
            helper.make_node(below[0], ["x"], ["m"], domain=below[1]),
            helper.make_node(below[0], ["m"], ["y"], domain=below[1]),
        ]
        model.functions.append(helper.make_function("ha", f"f{i}", ["x"], ["y"], nodes, opset))
    model.opset_import.append(helper.make_opsetid("ha", 1))
    between(model, helper.make_node(f"f{depth - 1}", ["planes"], ["planes2"], domain="ha"))


def put_chain(model: Any, length: int) -> None:
    """Add a long chain of nodes that nobody needs."""
    from onnx import helper

    for i in range(length):
        before = f"chain{i - 1}" if i else "planes"
        model.graph.node.append(helper.make_node("Identity", [before], [f"chain{i}"]))


def between(model: Any, node: Any) -> None:
    """Put a node between the transpose and the convolution."""
    nodes = model.graph.node
    place = next(i for i, node in enumerate(nodes) if node.op_type == "Conv")
    nodes[place].input[0] = node.output[0]
    nodes.insert(place, node)


EXTRAS: dict[str, Callable[[Any, random.Random], None]] = {
    "constant": lambda model, rng: put_constant(model, rng.choice((2**20, 2**31, 2**40))),
    "range": lambda model, rng: put_range(model, rng.choice((2**20, 2**40)), rng.randrange(2)),
    "resize": lambda model, rng: put_resize(model, rng.choice((0, 1e4, 1e9, float("nan"), -1))),
    "side": lambda model, rng: put_side(model, rng.choice((32, 63, 65, 128))),
    "loop": lambda model, rng: put_loop(model),
    "laughs": lambda model, rng: put_laughs(model, rng.choice((3, 30))),
    "chain": lambda model, rng: put_chain(model, rng.choice((100, 3000))),
}


def _onnx_extra(model: Any, rng: random.Random) -> str:
    """Add something that may take for ever, or all memory."""
    if all(node.op_type != "Conv" for node in model.graph.node):
        return "nothing"  # another change took the place away
    name = rng.choice(sorted(EXTRAS))
    EXTRAS[name](model, rng)
    return f"extra {name}"


def _onnx_versions(model: Any, rng: random.Random) -> str:
    model.ir_version = rng.choice((0, 1, 9, 99, 2**62))
    model.opset_import[0].version = rng.choice((-1, 0, 1, 7, 18, 999, 2**62))
    return f"ir {model.ir_version}, opset {model.opset_import[0].version}"


ONNX_CHANGES: tuple[Callable[[Any, random.Random], str], ...] = (
    _onnx_external,
    _onnx_tensor,
    _onnx_tensor,
    _onnx_node,
    _onnx_node,
    _onnx_attribute,
    _onnx_attribute,
    _onnx_contract,
    _onnx_extra,
    _onnx_extra,
    _onnx_versions,
)


def make_onnx(rng: random.Random) -> Case:
    """Damage a graph; the card's checksum fits it."""
    if rng.random() < 0.4:
        what, content = some_bytes(seed_graph(), rng)
        return graph_case(what, content)
    model = seed_model()
    said = [rng.choice(ONNX_CHANGES)(model, rng) for _ in range(rng.choice((1, 1, 2)))]
    return graph_case("; ".join(said), model.SerializeToString())
