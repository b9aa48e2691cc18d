"""What the steps of methods share: one step of an optimiser, frozen networks, measured batch statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

HALF_RANGE = 127.5  # uint8 0..255 <-> [-1, 1]: v / 127.5 - 1

Item = TypeVar("Item")


def adam(weights: Iterable[nn.Parameter], learning_rate: float, config: Any) -> Optimizer:
    """Make an Adam optimiser with the ``beta1`` and ``beta2`` of a method's config."""
    return torch.optim.Adam(weights, learning_rate, (config.beta1, config.beta2))


def descend(loss: Tensor, *optimizers: Optimizer) -> None:
    """Step optimisers by the gradient of one loss."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    for optimizer in optimizers:
        optimizer.step()


@contextmanager
def frozen(network: nn.Module) -> Iterator[nn.Module]:
    """Hold the weights of a network, which gets no gradient from what is computed inside."""
    network.requires_grad_(False)
    try:
        yield network
    finally:
        network.requires_grad_(True)


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Put networks into evaluation mode, and back into the mode in which they were."""
    modes = [network.training for network in networks]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for network, training in zip(networks, modes, strict=True):
            network.train(training)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, keep: float) -> None:
    """Move a mean teacher's weights towards the student's; its batch statistics are its own."""
    for mean, weight in zip(teacher.parameters(), student.parameters(), strict=True):
        mean.lerp_(weight, 1 - keep)


@torch.no_grad()
def measure_statistics(network: nn.Module, pass_images: Callable[[], None]) -> None:
    """Measure the batch statistics of a network anew: their plain mean over the batches of some passes.

    Parameters
    ----------
    network
        Only its batch normalisations are in training mode meanwhile, so there is no dropout.
    pass_images
        Passes images through the network.
    """
    layers = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in layers]
    with evaluating(network):
        for layer in layers:
            layer.train()
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean over all batches
        pass_images()
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


def evenly_chosen(items: Sequence[Item], most: int) -> list[Item]:
    """Return up to ``most`` items, evenly spaced."""
    indices = np.linspace(0, len(items) - 1, min(most, len(items))).round()
    return [items[int(i)] for i in indices]


def to_unit_range(images: Tensor) -> Tensor:
    """Map grey levels 0..255 to float32 in [-1, 1]."""
    return images.to(torch.float32) / HALF_RANGE - 1


def to_grey_levels(images: Tensor) -> Tensor:
    """Map [-1, 1] to uint8, rounded; values beyond are cut off."""
    return ((images + 1) * HALF_RANGE).round().clamp(0, 255).to(torch.uint8)
