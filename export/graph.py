"""The deployed graph: what it must not contain, and how far an output pixel sees."""

from __future__ import annotations

import copy

import onnx
import torch
from torch import Tensor, nn

from histostream.wsi.errors import HistoError

# Nodes that would make a deployed graph random, stateful or dependent on control flow.
FORBIDDEN_NODES = frozenset(
    {"Dropout", "If", "Loop", "Scan", "RandomNormal", "RandomNormalLike", "RandomUniform",
     "RandomUniformLike", "Bernoulli", "Multinomial"}
)  # fmt: skip
TILE_STATISTICS = (
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm, nn.LayerNorm,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip


class GraphError(HistoError, ValueError):
    """A graph breaks a rule of deployment; the message names the node."""


def check_graph(model: onnx.ModelProto) -> None:
    """Refuse a graph with random, training-mode or control-flow nodes, or outside data.

    Raises
    ------
    GraphError
        Naming the node.
    """
    for node in model.graph.node:
        if node.op_type in FORBIDDEN_NODES:
            raise GraphError(f"node {node.name!r} is a {node.op_type}: not in a deployed graph")
        if node.op_type == "BatchNormalization" and any(
            a.name == "training_mode" and a.i for a in node.attribute
        ):
            raise GraphError(f"node {node.name!r}: batch normalisation in training mode")
    for tensor in model.graph.initializer:
        if tensor.external_data:
            raise GraphError(f"weights {tensor.name!r} lie outside the file")
    onnx.checker.check_model(model, full_check=True)


def depends_on_tile_statistics(module: nn.Module) -> bool:
    """Whether a network has layers that use statistics of the whole tile."""
    return any(
        isinstance(part, TILE_STATISTICS) and not getattr(part, "track_running_stats", False)
        for part in module.modules()
    )


def halo_px(network: nn.Module, channels: int, align_px: int, size_px: int = 1024) -> int:
    """How far from an output pixel its input reaches, computed by gradient support.

    In a copy of the network every weight becomes 1 / fan-in and every max pooling an average, so
    that no path cancels or is switched off; the inputs with a gradient are then the receptive
    field. Its largest reach over all phases of the pooling is taken, along both axes.

    Parameters
    ----------
    network
        The network without pre- and post-processing; takes (1, channels, H, W).
    channels
        Its input channels.
    align_px
        What H and W must be multiples of.
    size_px
        Length of the input that is tried; the field has to fit.

    Returns
    -------
    The halo in pixels; ``size_px`` if the field does not fit.
    """
    open_network = _without_cancellation(network)
    reach = 0
    for axis in (2, 3):
        shape = [1, channels, 2 * align_px, 2 * align_px]
        shape[axis] = size_px
        middle = size_px // 2 // align_px * align_px
        for position in range(middle, middle + align_px):
            reach = max(reach, _reach(open_network, shape, axis, position))
            if reach >= middle - align_px:
                return size_px
    return reach


def _reach(network: nn.Module, shape: list[int], axis: int, position: int) -> int:
    x = torch.ones(shape, requires_grad=True)
    out: Tensor = network(x)
    (gradient,) = torch.autograd.grad(out.select(axis, position).sum(), x)
    other = [d for d in range(4) if d != axis]
    seen = torch.nonzero(gradient.abs().sum(dim=other))[:, 0]
    return int(max(position - seen.min(), seen.max() - position))


def _without_cancellation(network: nn.Module) -> nn.Module:
    network = copy.deepcopy(network).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.fill_(1 / fan_in if parameter.ndim > 1 else 0)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.MaxPool2d):
                average = nn.AvgPool2d(child.kernel_size, child.stride, child.padding)
                setattr(parent, name, average)
    return network
