"""ONNX graphs: made from torch, read, and their shapes."""
