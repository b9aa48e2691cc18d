"""iMEMS: segmentation by a conditional GAN that paints an image embedded in the label map.

"iMEMS: image embedded segmentation", paper 000 of the project. The generator does not predict the
label map alone, but a map in which the grey image is embedded (equation 1), so it has to learn
the image content together with the classes.

==========  ======================================================
paper       here
==========  ======================================================
I           ``images``, RGB, (N, 3, H, W) in [-1, 1] inside the network
S           ``labels``, (N, H, W) class of each pixel
G           ``luma``, grey levels 0..255
O           ``embed(labels, luma)``, (N, K, H, W), 0..255
D(x, O)     ``discriminator``
==========  ======================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histostream.training.methods import State
from histostream.training.networks.discriminator import EncoderDiscriminator, Pix2PixDiscriminator
from histostream.training.networks.unet import UNet

HALF_RANGE = 127.5  # uint8 0..255 <-> [-1, 1]: v / 127.5 - 1
SCORE_KIND = "embedding"


@dataclass(frozen=True, slots=True)
class Config:
    """What defines an iMEMS model; the defaults are the paper's, and ours where it is silent."""

    base_width: int = 64  # ours: the figure with the widths is lost; the usual U-Net
    depth: int = 4  # ours: as above
    dropout: float = 0.2  # paper, section III-B
    adversarial: bool = True  # paper; False gives its comparator UNet-R-single
    l1_weight: float = 100.0  # paper (pix2pix)
    discriminator: str = "encoder"  # ours: "same operations as the encoder"; or "pix2pix70"
    discriminator_width: int = 64  # ours: as the generator
    learning_rate: float = 2e-4  # ours: pix2pix
    discriminator_learning_rate: float = 2e-4  # ours: pix2pix
    beta1: float = 0.5  # ours: pix2pix
    beta2: float = 0.999  # ours: pix2pix

    def __post_init__(self) -> None:
        if self.discriminator not in ("encoder", "pix2pix70"):
            raise ValueError(f"discriminator={self.discriminator!r}: use 'encoder' or 'pix2pix70'")
        if self.base_width < 1 or self.depth < 1 or self.discriminator_width < 1:
            raise ValueError("base_width, depth and discriminator_width must be at least 1")


def luma(images: Tensor) -> Tensor:
    """Grey level of RGB images, rounded (ITU-R 601).

    Parameters
    ----------
    images
        (N, 3, H, W) uint8, or (N, 1, H, W), which is returned without its channel axis.

    Returns
    -------
    (N, H, W) int64 in 0..255.
    """
    if images.shape[1] == 1:
        return images[:, 0].to(torch.int64)
    weights = torch.tensor((0.299, 0.587, 0.114), device=images.device)
    grey = torch.einsum("nchw,c->nhw", images.to(torch.float32), weights)
    return torch.floor(grey + 0.5).to(torch.int64)


def embed(labels: Tensor, grey: Tensor, classes: int) -> Tensor:
    """Embed the grey image in the label map: equation 1 of the paper.

    Channel k is ``floor(G/2) + 128`` where the label is k and ``127 - floor(G/2)`` elsewhere.

    Parameters
    ----------
    labels
        (N, H, W) integer, 0..classes-1.
    grey
        (N, H, W) integer, 0..255.
    classes
        Number of classes K.

    Returns
    -------
    (N, K, H, W) int64 in 0..255.
    """
    half = torch.div(grey, 2, rounding_mode="floor")[:, None]
    own = F.one_hot(labels, classes).movedim(-1, 1).to(torch.bool)
    return torch.where(own, half + 128, 127 - half)


def decode(embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Labels (arg-max) and grey image of an embedding (N, K, H, W) in 0..255.

    The grey image is read from the winning channel, ``2 (O_k - 128)``, and loses its lowest bit.

    Returns
    -------
    labels
        (N, H, W) int64.
    grey
        (N, H, W), the type of ``embedding``.
    """
    winner, labels = embedding.max(dim=1)
    return labels, 2 * (winner - 128)


def build(config: Config, classes: int, channels: int = 3) -> State:
    """Make the networks and their optimisers."""
    generator = UNet(
        channels,
        classes,
        base_width=config.base_width,
        depth=config.depth,
        dropout=config.dropout,
    )
    modules: dict[str, nn.Module] = {"generator": generator}
    betas = (config.beta1, config.beta2)
    optimizers: dict[str, torch.optim.Optimizer] = {
        "generator": torch.optim.Adam(generator.parameters(), config.learning_rate, betas)
    }
    if config.adversarial:
        pair_channels = channels + classes
        modules["discriminator"] = (
            EncoderDiscriminator(
                pair_channels, base_width=config.discriminator_width, dropout=config.dropout
            )
            if config.discriminator == "encoder"
            else Pix2PixDiscriminator(pair_channels, base_width=config.discriminator_width)
        )
        optimizers["discriminator"] = torch.optim.Adam(
            modules["discriminator"].parameters(), config.discriminator_learning_rate, betas
        )
    return State(config, modules, optimizers)


def step(state: State, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Train on one batch: the discriminator first, then the generator.

    Parameters
    ----------
    state
        What `build` made; its networks are changed.
    images
        (N, C, H, W) uint8.
    labels
        (N, H, W) int64.

    Returns
    -------
    The losses: ``l1``, and with the adversarial term ``adversarial`` and ``discriminator``.
    """
    generator = state.modules["generator"]
    classes = cast(UNet, generator).out_channels
    x = images.to(torch.float32) / HALF_RANGE - 1
    target = embed(labels, luma(images), classes).to(torch.float32) / HALF_RANGE - 1
    output = generator(x)
    losses = {}
    if state.config.adversarial:
        losses["discriminator"] = _step_discriminator(state, x, target, output.detach())
    l1 = F.l1_loss(output, target)
    total = state.config.l1_weight * l1
    losses["l1"] = l1.item()
    if state.config.adversarial:
        adversarial = adversarial_loss(state, x, output)
        losses["adversarial"] = adversarial.item()
        total = total + adversarial
    state.optimizers["generator"].zero_grad(set_to_none=True)
    total.backward()
    state.optimizers["generator"].step()
    return losses


def adversarial_loss(state: State, x: Tensor, output: Tensor) -> Tensor:
    """Mean BCE(D(x, G(x)), 1), the non-saturating loss; the discriminator gets no gradient."""
    discriminator = state.modules["discriminator"].requires_grad_(False)
    logits = discriminator(torch.cat([x, output], dim=1))
    discriminator.requires_grad_(True)
    return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))


def _step_discriminator(state: State, x: Tensor, real: Tensor, fake: Tensor) -> float:
    discriminator = state.modules["discriminator"]
    pairs = torch.cat([torch.cat([x, real], dim=1), torch.cat([x, fake], dim=1)])
    logits = discriminator(pairs)
    wanted = torch.zeros_like(logits)
    wanted[: len(x)] = 1
    # The mean over real and fake is the half-sum of the two terms (pix2pix's factor 1/2).
    loss = F.binary_cross_entropy_with_logits(logits, wanted)
    state.optimizers["discriminator"].zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    state.optimizers["discriminator"].step()
    return loss.item()


@torch.no_grad()
def validate(state: State, images: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Return the validation L1 on the embedding, and the predicted labels (N, H, W).

    The adversarial term is left out: it cannot be compared between epochs.
    """
    generator = state.modules["generator"].eval()
    x = images.to(torch.float32) / HALF_RANGE - 1
    output = generator(x)
    generator.train()
    target = embed(labels, luma(images), output.shape[1]).to(torch.float32) / HALF_RANGE - 1
    return float(F.l1_loss(output, target)), output.argmax(dim=1)


class Deployed(nn.Module):
    """The generator behind the tile contract: uint8 (N, H, W, C) in, uint8 (N, K, H, W) out.

    The output is the embedding in its own units, 0..255, rounded; the arg-max over K is the label.
    """

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, tiles: Tensor) -> Tensor:
        """Normalise, run the generator, return to 0..255."""
        # Cast before transpose: TensorRT refuses a uint8 transpose.
        x = tiles.to(torch.float32).permute(0, 3, 1, 2)
        y = self.generator(x / HALF_RANGE - 1)
        return torch.clamp((y + 1) * HALF_RANGE + 0.5, 0, 255).to(torch.uint8)


def deployed(state: State) -> nn.Module:
    """Return the module that export wraps: the generator only, dropout off."""
    return Deployed(state.modules["generator"]).eval()
