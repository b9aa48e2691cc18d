"""Networks from elsewhere: wrap a foreign ONNX file into a model bundle."""
