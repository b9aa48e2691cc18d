"""Read a file of ``torch.export.save`` (``.pt2``) without running anything that is in it.

``torch.export.load`` is not safe for a file from elsewhere: it unpickles sample inputs and some weights, evaluates
sizes as Python expressions, resolves operators by any name below ``torch``, and generates code that holds the names of
values. The file itself is a zip archive of JSON and raw weights, so it is read here first. Only a graph of ATen
operators over raw weights is accepted, texts may hold letters, digits, dots and underscores only, and a new archive is
written in memory with nothing else in it. That one is loaded.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from histostream.export.external.file import MAX_BYTES, MAX_NODES
from histostream.export.graph.model import GraphError, open_session
from histostream.wsi.errors import reason

GRAPH, MODEL = re.compile(r"[^/]+/models/([^/]+)\.json"), "model"
ADVICE = "export the network to ONNX instead (docs/networks.md)"
TARGET = re.compile(r"torch\.ops\.aten\.(?!__)[a-z0-9_]+\.[A-Za-z0-9][A-Za-z0-9_]*")
ARITHMETIC = re.compile(r"_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|eq|ne|lt|le|gt|ge)")
FORBIDDEN = ("torch.ops.aten.from_file.",)  # reads a file
TEXT = re.compile(r"[A-Za-z0-9_.]{0,500}")
# Sizes, as sums and products of symbols.
SIZE = re.compile(
    r"(?:Symbol\('[su][0-9]+'(?:, (?:positive|integer|nonnegative)=True)*\)|[su][0-9]+|Integer\(-?[0-9]{1,18}\)"
    r"|Rational\(-?[0-9]{1,9}, [0-9]{1,9}\)|[0-9]{1,18}|Add|Mul|Max|Min|FloorDiv|CleanDiv|Mod|CeilDiv|[-+*(), ])+"
)
INPUTS = ("user_input", "parameter", "buffer", "tensor_constant")
REFUSED_KEYS = ("as_graph", "as_custom_obj", "as_operator", "custom_obj", "token")
FILES = {"weights": re.compile("weight_[0-9]+"), "constants": re.compile("tensor_[0-9]+")}
KEY = "a key"  # stands for the key of a key
LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}


@dataclass(frozen=True, slots=True)
class TorchSession:
    """An exported program, with the part of ONNX Runtime's session that a reference needs."""

    program: Any
    onnx_session: Any

    def get_inputs(self) -> list[Any]:
        """Return the inputs, as of the ONNX file that was made of it."""
        return list(self.onnx_session.get_inputs())

    def get_outputs(self) -> list[Any]:
        """Return the outputs, as of the ONNX file that was made of it."""
        return list(self.onnx_session.get_outputs())

    def run(self, names: list[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run the program in torch."""
        import torch

        with torch.no_grad():
            results = self.program.module()(*(torch.from_numpy(value.copy()) for value in feeds.values()))
        by_name = dict(zip([o.name for o in self.get_outputs()], _flat(results), strict=True))
        return [np.asarray(by_name[name].numpy()) for name in names]


def is_exported_program(path: Path) -> bool:
    """Whether a file is an archive of ``torch.export.save``."""
    return zipfile.is_zipfile(path) and any(GRAPH.fullmatch(name) for name in zipfile.ZipFile(path).namelist())


def read_exported_program(path: Path) -> tuple[onnx.ModelProto, TorchSession]:
    """Read a program, and make ONNX of it.

    Raises
    ------
    GraphError
        If the file holds anything but a graph of ATen operators and raw weights, or cannot be made ONNX.
    """
    import torch

    from histostream.export.graph.from_torch import OPSET, quiet_exporter

    try:
        archive = io.BytesIO(_cleaned(path))
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, GraphError):
            raise
        raise GraphError(f"{path}: not a file of torch.export.save, or damaged; {ADVICE}") from error
    try:
        with quiet_exporter():
            program = torch.export.load(archive)
            made = torch.onnx.export(program, (), opset_version=OPSET, dynamo=True)
    except Exception as error:  # whatever torch raises for a graph that it does not understand
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise GraphError(
            f"{path}: torch cannot load it or make ONNX of it ({reason(cause)}); save it for images of a fixed height "
            f"and width, or {ADVICE}"
        ) from error
    assert made is not None
    return made.model_proto, TorchSession(program, open_session(made.model_proto))


def _cleaned(path: Path) -> bytes:
    """Return a new archive with the graph and the raw weights of a file, and nothing else."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        graphs = [name for name in names if GRAPH.fullmatch(name)]
        if len(graphs) != 1 or len(set(names)) != len(names):
            raise GraphError(f"{path}: holds {len(graphs)} programs; one is needed: {ADVICE}")
        if sum(entry.file_size for entry in archive.infolist()) > MAX_BYTES:
            raise GraphError(f"{path}: larger than one ONNX file can be (2 GiB); use a smaller network")
        match = GRAPH.fullmatch(graphs[0])
        assert match is not None
        root, model = graphs[0].partition("/")[0], match[1]
        files = {f"models/{MODEL}.json": _to_bytes(_checked_program(path, json.loads(archive.read(graphs[0]))))}
        for kind, pattern in FILES.items():
            config = json.loads(archive.read(f"{root}/data/{kind}/{model}_{kind}_config.json"))
            files[f"data/{kind}/{MODEL}_{kind}_config.json"] = _to_bytes(_checked_config(path, config, pattern))
            for entry in config["config"].values():
                name = entry["path_name"]
                files[f"data/{kind}/{name}"] = archive.read(f"{root}/data/{kind}/{name}")
        for name in ("archive_format", "archive_version", "byteorder", ".data/version"):
            files[name] = archive.read(f"{root}/{name}")
    files[f"data/sample_inputs/{MODEL}.pt"] = b""  # which would be unpickled
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as clean:
        for name, content in files.items():
            clean.writestr(f"{MODEL}/{name}", content)
    return out.getvalue()


def _checked_program(path: Path, program: dict[str, Any]) -> dict[str, Any]:
    """Return the program with only what is needed to run its graph."""
    module = program["graph_module"]
    graph, signature = module["graph"], module["signature"]
    if len(graph["nodes"]) > MAX_NODES:
        raise GraphError(f"{path}: {len(graph['nodes'])} nodes: too many to be a network; {ADVICE}")
    for node in graph["nodes"]:
        target = str(node["target"])
        if not (TARGET.fullmatch(target) or ARITHMETIC.fullmatch(target)) or target.startswith(FORBIDDEN):
            raise GraphError(
                f"{path}: node {str(node['name'])[:80]!r} is a {target[:80]!r}, no ATen operator; {ADVICE}"
            )
        node["metadata"] = {}
    kinds = [kind for spec in signature["input_specs"] for kind in spec]
    outputs = [kind for spec in signature["output_specs"] for kind in spec]
    if not set(kinds) <= set(INPUTS) or set(outputs) != {"user_output"}:
        raise GraphError(f"{path}: needs more than tensors, or changes its own; {ADVICE}")
    inputs = kinds.count("user_input")
    constraints = program.get("range_constraints", {})
    for value in _values({"graph": graph, "signature": signature}):
        _check_value(path, value)
    for name in constraints:
        _check_value(path, ("expr_str", name))
    children = [LEAF] * len(outputs)
    call = {
        "inputs": [],
        "outputs": [],
        "in_spec": _spec(_node("tuple", [_node("tuple", [LEAF] * inputs), _node("dict", [], context="[]")])),
        "out_spec": _spec(LEAF if graph.get("is_single_tensor_return") else _node("tuple", children)),
        "forward_arg_names": [f"input_{number}" for number in range(inputs)],
    }
    cleaned_module = {
        "graph": _on_cpu(graph),
        "signature": signature,
        "module_call_graph": [{"fqn": "", "signature": call}],
        "metadata": {},
        "treespec_namedtuple_fields": {},
    }
    return {
        "graph_module": cleaned_module,
        "opset_version": {"aten": int(program["opset_version"]["aten"])},
        "range_constraints": {
            name: {key: None if limit is None else int(limit) for key, limit in limits.items()}
            for name, limits in constraints.items()
        },
        "schema_version": {key: int(program["schema_version"][key]) for key in ("major", "minor")},
        "verifiers": ["TRAINING"],
        "torch_version": "",
        "guards_code": [],
    }


def _checked_config(path: Path, config: dict[str, Any], pattern: re.Pattern[str]) -> dict[str, Any]:
    """Return the list of weights, all of them raw, on the CPU."""
    for entry in config["config"].values():
        if entry["use_pickle"] is not False or not pattern.fullmatch(entry["path_name"]) or not entry["tensor_meta"]:
            raise GraphError(f"{path}: holds pickled objects, which are not read; {ADVICE}")
    for value in _values(config):
        _check_value(path, value)
    checked: dict[str, Any] = _on_cpu(config)
    return checked


def _values(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key and every value of nested JSON, each value with its key."""
    if isinstance(value, dict):
        for name, entry in value.items():
            yield KEY, name
            yield from _values(entry, name)
    elif isinstance(value, list):
        for entry in value:
            yield from _values(entry, key)
    else:
        yield key, value


def _check_value(path: Path, value: tuple[str, Any]) -> None:
    """Refuse a text that is not a plain name, or a size that is not plain arithmetic."""
    key, content = value
    if not isinstance(content, str):
        return
    fits = SIZE.fullmatch(content) and "**" not in content if key == "expr_str" else TEXT.fullmatch(content)
    if not fits or (key == KEY and content in REFUSED_KEYS):
        raise GraphError(f"{path}: {content[:80]!r} is not understood in a graph of tensors; {ADVICE}")


def _on_cpu(value: Any) -> Any:
    """Return nested JSON with all devices replaced by the CPU."""
    if isinstance(value, dict):
        if value.keys() == {"type", "index"}:
            return {"type": "cpu", "index": None}
        return {key: _on_cpu(entry) for key, entry in value.items()}
    return [_on_cpu(entry) for entry in value] if isinstance(value, list) else value


def _node(kind: str, children: list[Any], context: str = "null") -> dict[str, Any]:
    return {"type": f"builtins.{kind}", "context": context, "children_spec": children}


def _spec(tree: dict[str, Any]) -> str:
    return json.dumps([1, tree])


def _to_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


def _flat(results: Any) -> list[Any]:
    return list(results) if isinstance(results, tuple | list) else [results]
