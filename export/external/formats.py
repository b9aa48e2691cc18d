"""Read the file of a network: ONNX, or what can be turned into it without running code of the file."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import onnx

from histostream.export.external.file import check_operators, open_file, read_onnx
from histostream.export.graph.model import GraphError

# Those of torch are run by the tests; docs/networks.md has more of each library.
TORCHSCRIPT = (
    'python -c "import torch; torch.onnx.export(torch.jit.load({name!r}).eval(), (torch.zeros(1, 3, 512, 512),), '
    "'model.onnx', dynamo=False)\""
)
STATE_DICT = (
    "net = YourNetwork(); net.load_state_dict(torch.load({name!r}, weights_only=True)); "
    "torch.onnx.export(net.eval(), (torch.zeros(1, 3, 512, 512),), 'model.onnx', dynamo=True)"
)
KERAS = "keras.saving.load_model({name!r}).export('model.onnx', format='onnx')"
TENSORFLOW = "python -m tf2onnx.convert --saved-model {name!r} --output model.onnx"
HDF5 = b"\x89HDF\r\n\x1a\n"
PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def open_network(path: Path) -> tuple[onnx.ModelProto, Any]:
    """Read the file of a network, and open it.

    Returns
    -------
    The network as ONNX, and a session that runs it as it came: ONNX Runtime's, or the program in torch.

    Raises
    ------
    GraphError
        If it is of another format, with the way to ONNX; or as `read_onnx` and `read_exported_program`.
    """
    advice = _way_to_onnx(path)
    if advice:
        raise GraphError(f"{path}: {advice}")
    if path.is_file() and zipfile.is_zipfile(path):
        from histostream.export.external.torch_file import read_exported_program

        return read_exported_program(path)
    model = read_onnx(path)
    check_operators(model)  # before ONNX Runtime sees it
    return model, open_file(path, model)


def _way_to_onnx(path: Path) -> str:
    """Return what a file is and how to make ONNX of it; "" if it can be read, or is not known."""
    if path.is_dir():
        if (path / "saved_model.pb").is_file():
            return f"a SavedModel of TensorFlow: make ONNX of it with {TENSORFLOW.format(name=path.name)}"
        return "a folder; name the file of a network"
    try:
        with path.open("rb") as file:
            start = file.read(8)
        names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    except (OSError, ValueError, zipfile.BadZipFile):
        return ""  # the readers have the message
    inner = {name.partition("/")[2] for name in names}
    if any(name.startswith("models/") and name.endswith(".json") for name in inner):
        return ""
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        return (
            "TorchScript, which is code and is not run here; if you trust it, make ONNX of it with "
            f"{TORCHSCRIPT.format(name=path.name)}"
        )
    if "data.pkl" in inner or start.startswith(PICKLES):
        return f"weights of torch without their network: in the code that has it, {STATE_DICT.format(name=path.name)}"
    if "model.weights.h5" in names or start == HDF5:
        return f"a model of Keras: make ONNX of it in Python with {KERAS.format(name=path.name)}"
    if path.suffix == ".safetensors":
        return (
            "weights without their network: in the code that has it, load them and call "
            "torch.onnx.export(net.eval(), (torch.zeros(1, 3, 512, 512),), 'model.onnx', dynamo=True)"
        )
    return "a zip archive without a network of torch.export; name the file of a network" if names else ""
