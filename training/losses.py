"""Losses that methods share, each with a deterministic backward pass on GPUs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of label maps.

    The same as ``torch.nn.functional.cross_entropy``, which for maps has no deterministic
    implementation on GPUs and is refused by ``torch.use_deterministic_algorithms``.

    Parameters
    ----------
    scores
        (N, K, H, W), before the softmax.
    labels
        (N, H, W) int64.
    """
    own = F.one_hot(labels, scores.shape[1]).movedim(-1, 1)
    return -(own * F.log_softmax(scores, dim=1)).sum(dim=1).mean()
