"""A model bundle and a slide in, a label map out. Needs no torch."""

import os
from typing import TYPE_CHECKING

from histostream.wsi.lazy import import_on_use

if TYPE_CHECKING:
    from histostream.runtime.bundle.card import CardError, ModelCard, default_bundle, read_card
    from histostream.runtime.engines.base import Engine
    from histostream.runtime.engines.opener import open_engine
    from histostream.runtime.errors import EngineError
    from histostream.runtime.options import Options
    from histostream.runtime.pixels import segment_pixels
    from histostream.runtime.result import ResultError, SlideResult
    from histostream.runtime.segmenter import Segmenter
    from histostream.runtime.slide_run import segment_slide

__all__ = [
    "CardError",
    "Engine",
    "EngineError",
    "ModelCard",
    "Options",
    "ResultError",
    "Segmenter",
    "SlideResult",
    "default_bundle",
    "open_engine",
    "read_card",
    "segment_pixels",
    "segment_slide",
]

# ONNX Runtime 1.29 and later write a device id and a database of events below HOME, and send them,
# unless this is set before the library is loaded. Children of this process inherit it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

_MODULES = {
    "bundle.card": ("CardError", "ModelCard", "default_bundle", "read_card"),
    "engines.base": ("Engine",),
    "engines.opener": ("open_engine",),
    "errors": ("EngineError",),
    "slide_run": ("segment_slide",),
    "pixels": ("segment_pixels",),
    "options": ("Options",),
    "result": ("ResultError", "SlideResult"),
    "segmenter": ("Segmenter",),
}
__getattr__ = import_on_use(__name__, _MODULES)
