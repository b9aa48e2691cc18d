"""The receptive field of an ONNX graph."""
