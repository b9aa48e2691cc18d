"""Convert an ONNX graph: freeze statistics, FP16, INT8, mixed precision."""
