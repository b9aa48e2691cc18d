"""A checkpoint or an ONNX file in, a model bundle out."""

from typing import TYPE_CHECKING

import histostream.runtime  # noqa: F401  (switches ONNX Runtime's telemetry off before its import)
from histostream.wsi.lazy import import_on_use

if TYPE_CHECKING:
    from histostream.export.bundle import Export, Options
    from histostream.export.external.description import ExternalModel
    from histostream.export.external.wrap import wrap_onnx
    from histostream.export.trained import export_checkpoint

__all__ = ["Export", "ExternalModel", "Options", "export_checkpoint", "wrap_onnx"]

_MODULES = {
    "bundle": ("Export", "Options"),
    "external.description": ("ExternalModel",),
    "external.wrap": ("wrap_onnx",),
    "trained": ("export_checkpoint",),
}
__getattr__ = import_on_use(__name__, _MODULES)
