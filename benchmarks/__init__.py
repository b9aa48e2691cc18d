"""What was measured, and how to measure it again."""

import histostream.runtime  # noqa: F401  (switches ONNX Runtime's telemetry off before its import)
