"""Values of command options, in a module without heavy imports, so that --help is quick."""

from histostream.wsi.registry import Registry

ENGINES = Registry(
    "histostream.runtime.engines",
    "histostream.engines",
    "engine",
    hidden=("base", "device_engine", "onnxruntime", "opener"),
)
BACKENDS = ("auto", *ENGINES.names())
PRECISIONS = {"fp32": "model.onnx", "fp16": "model.fp16.onnx", "int8": "model.int8.onnx"}
BF16 = "bf16"  # the FP32 graph, computed in bfloat16 by a CPU that can
AUTO = "auto"  # as the model needs
RUN_PRECISIONS = ("auto", *PRECISIONS, BF16)
WINDOWS = ("hann", "gaussian", "linear", "mean", "crop", "exact")
