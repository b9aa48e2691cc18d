"""A checkpoint in, a model bundle out."""

import histostream.runtime  # noqa: F401  (switches ONNX Runtime's telemetry off before its import)
