"""TensorRT: build engines, keep them in files, run them."""
