"""Losses that methods share.

A pixel whose label is `IGNORED` (255) is not annotated. It has no part in a loss of labels, and its
scores get no gradient from it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from histostream.training.data import IGNORED

EPSILON = 1e-7  # least probability whose logarithm is taken


def cross_entropy(scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of the annotated pixels of label maps, weighted by class; 0 where there is none.

    The same as ``torch.nn.functional.cross_entropy``, which for maps has no deterministic
    implementation on GPUs and is refused by ``torch.use_deterministic_algorithms``.

    Parameters
    ----------
    scores
        (N, K, H, W), before the softmax.
    labels
        (N, H, W) int64, 0..K-1 or `IGNORED`.
    weights
        (K,) of the classes; None: all are 1.
    """
    each = -(one_hot(labels, scores.shape[1]) * F.log_softmax(scores, dim=1)).sum(dim=1)
    return annotated_mean(each[:, None], labels, weights)


def known(labels: Tensor) -> Tensor:
    """Return where labels (N, H, W) are annotated, as (N, 1, H, W) float32 of 1 and 0."""
    return (labels != IGNORED)[:, None].to(torch.float32)


def annotated_mean(values: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of values (N, C, H, W) over the annotated pixels of labels (N, H, W); 0 where there is none.

    With ``weights``, (K,), each pixel has the weight of its class, and the sum is divided by that of
    the weights.
    """
    here = known(labels)
    if weights is None:
        return (values * here).mean() * (labels.numel() / here.sum().clamp(min=1))
    here = here * weights[labels.clamp(max=len(weights) - 1)][:, None]
    return (values * here).mean() * (labels.numel() / here.sum().clamp(min=EPSILON))


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
    """Return labels (N, H, W) as one-hot maps (N, K, H, W) int64; where they are `IGNORED`, all are 0."""
    return (labels[:, None] == torch.arange(classes, device=labels.device)[:, None, None]).to(torch.int64)
