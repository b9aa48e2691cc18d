"""What the training loop and the methods exchange: the networks of a model, and the batch of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True, slots=True)
class State:
    """Networks and optimisers of one model.

    Attributes
    ----------
    config
        The method's ``Config`` that they were built from.
    modules, optimizers
        By name.
    needed
        The modules that the deployed graph is made of; a checkpoint that is only to be exported
        may leave out the others.
    class_weights
        (K,) float32 weights of the classes in a loss per pixel, on the device; None: all alike. The
        loop sets them, for methods that take them.
    """

    config: Any
    modules: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    needed: tuple[str, ...] = ("generator",)
    class_weights: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step trains on.

    Attributes
    ----------
    images, labels
        (N, C, H, W) uint8 and (N, H, W) int64.
    pools
        Images without labels, (N, C, H, W) uint8, by the name of their pool.
    step, steps
        Number of this step, from 0, and of all steps: for ramps.
    """

    images: Tensor
    labels: Tensor
    pools: Mapping[str, Tensor] = field(default_factory=dict)
    step: int = 0
    steps: int = 1
