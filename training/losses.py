"""Losses that methods share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-7  # least probability whose logarithm is taken


def cross_entropy(scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of label maps, each pixel weighted by its class.

    The same as ``torch.nn.functional.cross_entropy``, which for maps has no deterministic
    implementation on GPUs and is refused by ``torch.use_deterministic_algorithms``.

    Parameters
    ----------
    scores
        (N, K, H, W), before the softmax.
    labels
        (N, H, W) int64.
    weights
        (K,) of the classes; the sum over the pixels is divided by the sum of their weights.
    """
    return weighted_mean(-(one_hot(labels, scores.shape[1]) * F.log_softmax(scores, dim=1)).sum(dim=1), labels, weights)


def weighted_mean(losses: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """Mean of the losses of pixels (N, H, W), weighted by the weights (K,) of their classes."""
    if weights is None:
        return losses.mean()
    each = weights[labels]
    return (each * losses).sum() / each.sum().clamp(min=EPSILON)


def soft_dice(probability: Tensor, truth: Tensor, *, smooth: float = 1.0) -> Tensor:
    """Soft Dice coefficient of each class over all images of a batch: (2 sum p y + s) / (sum p + sum y + s).

    Parameters
    ----------
    probability, truth
        (N, K, H, W); the truth is 0 or 1.
    smooth
        s; with 0, a class of fewer than one pixel has its product over 1.

    Returns
    -------
    (K,), 1 is best.
    """
    axes = (0, 2, 3)
    both = (probability * truth).sum(axes)
    either = probability.sum(axes) + truth.sum(axes)
    return (2 * both + smooth) / (either + smooth).clamp(min=1)


def logit_loss(logits: Tensor, *, real: bool) -> Tensor:
    """Mean binary cross-entropy of a discriminator's logits with "real" everywhere, or with "not real".

    With ``real`` for maps that are not, it is the non-saturating loss of a generator, -log D.
    """
    wanted = torch.ones_like(logits) if real else torch.zeros_like(logits)
    return F.binary_cross_entropy_with_logits(logits, wanted)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Return labels (N, H, W) as one-hot maps (N, K, H, W) int64."""
    return F.one_hot(labels, classes).movedim(-1, 1)
