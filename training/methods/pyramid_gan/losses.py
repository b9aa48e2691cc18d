"""Losses of the pyramid GAN (Li et al. 2021): of pairs of image and mask, and of painted images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histostream.training.losses import logit_loss, one_hot
from histostream.training.methods.pyramid_gan.networks import Judged

PENALTY = 0.1  # weight of WGAN-GP's gradient penalty; SinGAN
VGG_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)  # of relu1_1 to relu5_1; pix2pixHD


def adversarial_loss(kind: str, judged: Judged, *, real: bool) -> Tensor:
    """How far D's logits are from "real", or from "not real": the mean of its scales.

    With ``real`` for pairs that are not, it is what G and S minimise: -log D, the non-saturating
    form of equations 2 and 6.

    Parameters
    ----------
    kind
        "bce", "lsgan" (squares) or "wgan-gp" (the mean itself).
    judged
        What D returned.
    real
        Whether the logits should be those of true pairs.
    """
    losses = []
    for *_, logits in judged:
        if kind == "bce":
            losses.append(logit_loss(logits, real=real))
        elif kind == "wgan-gp":
            losses.append(-logits.mean() if real else logits.mean())
        else:
            losses.append(F.mse_loss(logits, torch.full_like(logits, float(real))))
    return torch.stack(losses).mean()


def discriminator_mask(kind: str, scores: Tensor) -> Tensor:
    """Mask (N, K, h, w) of the segmenter's pairs, as D sees it and as S is judged by it.

    With "softmax" it is p itself. A true mask is 0 or 1 everywhere and p never is, so that D can tell
    the pairs apart by certainty alone (docs/methods.md). With "straight_through" it is the arg-max as
    one-hot, which differs from a true mask only where it is wrong, with the gradient of p:
    ``hard + p - p.detach()``.
    """
    p = scores.softmax(dim=1)
    if kind == "softmax":
        return p
    hard = one_hot(p.argmax(dim=1), p.shape[1]).to(p.dtype)
    return hard + (p - p.detach())  # in this order it is 0 or 1 exactly


def feature_loss(real: Judged, fake: Judged) -> Tensor:
    """Distance of D's inner maps of true and painted pairs: equation 4, pix2pixHD's factors.

    The mean over the scales of 4 / layers times the sum over a scale's layers of mean ``|a - b|``.
    """
    scales = []
    for of_real, of_fake in zip(real, fake, strict=True):
        inner = list(zip(of_real[:-1], of_fake[:-1], strict=True))
        off = torch.stack([F.l1_loss(b, a.detach()) for a, b in inner])
        scales.append(4 / len(inner) * off.sum())
    return torch.stack(scales).mean()


def perceptual_loss(vgg: nn.Module, painted: Tensor, images: Tensor) -> Tensor:
    """Weighted distance of VGG19's maps of painted and true images, as pix2pixHD."""
    with torch.no_grad():
        wanted = vgg(images)
    maps = zip(VGG_WEIGHTS, vgg(painted), wanted, strict=True)
    weighted = [weight * F.l1_loss(a, b) for weight, a, b in maps]
    return torch.stack(weighted).sum()


def gradient_penalty(judge: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """WGAN-GP's penalty on pairs between true and not true ones, per pixel as SinGAN has it.

    ``mean (|grad| - 1)^2`` over pixels and scales; the norm is over channels.
    """
    share = torch.rand(len(real), 1, 1, 1, device=real.device)
    between = torch.lerp(fake, real, share).requires_grad_(True)
    penalties = []
    for *_, logits in judge(between):
        (slope,) = torch.autograd.grad(logits.sum(), between, create_graph=True)
        penalties.append(((slope.norm(dim=1) - 1) ** 2).mean())
    return torch.stack(penalties).mean()
