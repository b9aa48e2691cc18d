"""A model bundle and a slide in, a label map out. Needs no torch."""

from histostream.runtime.card import CardError, ModelCard, default_bundle, read_card
from histostream.runtime.engine import Engine, EngineError, open_engine
from histostream.runtime.infer import SlideResult, segment_pixels, segment_slide
from histostream.runtime.options import Options

__all__ = [
    "CardError",
    "Engine",
    "EngineError",
    "ModelCard",
    "Options",
    "SlideResult",
    "default_bundle",
    "open_engine",
    "read_card",
    "segment_pixels",
    "segment_slide",
]
