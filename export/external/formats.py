"""Read the file of a network: ONNX, or what can be turned into it without running code of the file."""

from __future__ import annotations

from pathlib import Path

import onnx

from histostream.export.external.file import read_onnx


def read_network(path: Path) -> onnx.ModelProto:
    return read_onnx(path)
