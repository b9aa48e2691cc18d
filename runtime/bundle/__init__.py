"""Model bundles: the card, and the check of the ONNX file before a library loads it."""
