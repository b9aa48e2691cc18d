from __future__ import annotations

import torch
import torch.nn.functional as F

from histostream.training.losses import cross_entropy


def test_cross_entropy_is_torchs_with_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 5, 9, 7, generator=generator, requires_grad=True)
    labels = torch.randint(0, 5, (2, 9, 7), generator=generator)
    ours, theirs = cross_entropy(scores, labels), F.cross_entropy(scores, labels)
    torch.testing.assert_close(ours, theirs)
    one, other = (torch.autograd.grad(loss, scores)[0] for loss in (ours, theirs))
    torch.testing.assert_close(one, other)
