"""A model bundle and a slide in, a label map out. Needs no torch."""

from histostream.runtime.card import CardError, ModelCard, default_bundle, read_card
from histostream.runtime.engine import Engine, EngineError, open_engine
from histostream.runtime.infer import segment_pixels, segment_slide
from histostream.runtime.options import Options
from histostream.runtime.result import ResultError, SlideResult
from histostream.runtime.segmenter import Segmenter

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
