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
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histostream.training.losses import cross_entropy
from histostream.training.methods import Batch, State
from histostream.training.networks.discriminator import EncoderDiscriminator, Pix2PixDiscriminator
from histostream.training.networks.unet import NORMS, TwoDecoderUNet, UNet

if TYPE_CHECKING:
    from histostream.training.batches import Parts

HALF_RANGE = 127.5  # uint8 0..255 <-> [-1, 1]: v / 127.5 - 1
TARGETS = ("embedding", "labels")
SECOND_TASKS = ("none", "image", "image+features")
TwoTasks = tuple[Tensor, Tensor, list[Tensor], list[Tensor]]  # of `TwoDecoderUNet`


@dataclass(frozen=True, slots=True)
class Config:
    """What defines an iMEMS model; the defaults are the paper's, and ours where it is silent.

    Its comparators (paper, Table 2) differ in the first fields only:

    ================  ==========  ===========  ==============
    name              target      adversarial  second_task
    ================  ==========  ===========  ==============
    iMEMS             embedding   True         none
    UNet-R-single     embedding   False        none
    cGAN-C-single     labels      True         none
    UNet-C-single     labels      False        none
    UNet-C-multi      labels      False        image
    UNet-C-multi-int  labels      False        image+features
    ================  ==========  ===========  ==============
    """

    target: str = "embedding"  # paper; "labels" paints the one-hot label map instead
    adversarial: bool = True  # paper
    second_task: str = "none"  # or "image": reconstruct it too; "+features": and the inner maps
    # Of target="labels". L1 on the softmax ends with one class for all pixels, with and without a D
    # (F of nuclei 0 after 300 steps, .83 by cross-entropy); "l1", or "auto", which was the default
    # once: l1 beside a D, else cross_entropy.
    label_loss: str = "cross_entropy"
    # "inverted": 255 - G takes the place of G in equation 1, which weighs a wrong label by
    # (2 floor(G/2) + 1) / 255, and so dark nuclei least.
    grey: str = "paper"
    segmentation_weight: float = 0.6  # paper, colon (0.4 epithelium, tubule); image: 1 - this
    feature_weight: float = 0.8  # paper, colon (0.7 epithelium, 0.3 tubule)
    base_width: int = 64  # ours: the figure with the widths is lost; the usual U-Net
    depth: int = 4  # ours: as above
    norm: str = "none"  # ours: none is mentioned; or "instance"
    dropout: float = 0.2  # paper, section III-B
    l1_weight: float = 100.0  # paper (pix2pix)
    discriminator: str = "encoder"  # ours: "same operations as the encoder"; or "pix2pix70"
    discriminator_width: int = 64  # ours: as the generator
    learning_rate: float = 2e-4  # ours: pix2pix
    discriminator_learning_rate: float = 2e-4  # ours: pix2pix
    beta1: float = 0.5  # ours: pix2pix
    beta2: float = 0.999  # ours: pix2pix

    def __post_init__(self) -> None:
        for name, known in (
            ("target", TARGETS),
            ("second_task", SECOND_TASKS),
            ("label_loss", ("cross_entropy", "l1", "auto")),
            ("grey", ("paper", "inverted")),
            ("norm", NORMS),
            ("discriminator", ("encoder", "pix2pix70")),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}={value!r}: use {' or '.join(map(repr, known))}")
        if self.base_width < 1 or self.depth < 1 or self.discriminator_width < 1:
            raise ValueError("base_width, depth and discriminator_width must be at least 1")
        if not 0 < self.segmentation_weight < 1:
            raise ValueError(f"segmentation_weight={self.segmentation_weight}: use 0 to 1")
        if self.second_task != "none" and (self.adversarial or self.target == "embedding"):
            raise ValueError(
                "a second_task goes with target='labels', adversarial=false only: set them, or second_task='none'"
            )


def score_kind(config: Config) -> str:
    """Say what the deployed graph's scores are."""
    return "embedding" if config.target == "embedding" else "probability"


def align_px(config: Config) -> int:
    """Height and width are multiples of this; the encoder discriminator pools four times."""
    return max(1 << config.depth, 16 if config.adversarial else 1)


def pools(config: Config) -> tuple[str, ...]:
    """No images without labels."""
    del config
    return ()


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


def embedded_grey(config: Config, images: Tensor) -> Tensor:
    """G of equation 1 for images (N, C, H, W) uint8: their grey level, or 255 less it.

    It is its own inverse: of the G that an embedding is decoded to, it is the image's grey level.
    """
    grey = luma(images)
    return 255 - grey if config.grey == "inverted" else grey


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
    kind = UNet if config.second_task == "none" else TwoDecoderUNet
    generator = kind(
        channels, classes, base_width=config.base_width, depth=config.depth, dropout=config.dropout, norm=config.norm
    )
    modules: dict[str, nn.Module] = {"generator": generator}
    betas = (config.beta1, config.beta2)
    optimizers: dict[str, torch.optim.Optimizer] = {
        "generator": torch.optim.Adam(generator.parameters(), config.learning_rate, betas)
    }
    if config.adversarial:
        pair_channels = channels + classes
        modules["discriminator"] = (
            EncoderDiscriminator(pair_channels, base_width=config.discriminator_width, dropout=config.dropout)
            if config.discriminator == "encoder"
            else Pix2PixDiscriminator(pair_channels, base_width=config.discriminator_width)
        )
        optimizers["discriminator"] = torch.optim.Adam(
            modules["discriminator"].parameters(), config.discriminator_learning_rate, betas
        )
    return State(config, modules, optimizers)


def before_step(state: State, parts: Parts, step: int, steps: int) -> None:
    """Nothing depends on the whole of the data."""


def finish(state: State, parts: Parts) -> None:
    """Nothing is measured at the end."""


def step(state: State, batch: Batch) -> dict[str, Tensor]:
    """Train on one batch: the discriminator, where there is one, then the generator.

    Returns
    -------
    The losses, without their weights: ``l1`` or ``cross_entropy``, and with an adversary
    ``adversarial`` and ``discriminator``, with a second task ``image`` and ``features``.
    """
    if state.config.second_task != "none":
        return _step_two_tasks(state, batch)
    x = _normalised(batch.images)
    output = state.modules["generator"](x)
    losses: dict[str, Tensor] = {}
    name, loss = _painting_loss(state.config, output, batch.images, batch.labels)
    total = loss if name == "cross_entropy" else state.config.l1_weight * loss
    if state.config.adversarial:
        painted = _painted(state.config, output)
        real = _wanted(state.config, batch.images, batch.labels, output.shape[1])
        losses["discriminator"] = _step_discriminator(state, x, real, painted.detach())
        losses["adversarial"] = adversarial_loss(state, x, painted)
        total = state.config.l1_weight * loss + losses["adversarial"]
    losses[name] = loss
    _descend(state.optimizers["generator"], total)
    return {name: loss.detach() for name, loss in losses.items()}


def _step_two_tasks(state: State, batch: Batch) -> dict[str, Tensor]:
    """UNet-C-multi and UNet-C-multi-int: labels and image from one encoder."""
    x = _normalised(batch.images)
    total, losses = _joint_loss(state.config, state.modules["generator"](x), x, batch.labels)
    _descend(state.optimizers["generator"], total)
    return {name: loss.detach() for name, loss in losses.items()}


def _joint_loss(config: Config, output: TwoTasks, x: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the losses of both tasks, and each without its weight."""
    scores, image, encoded, decoded = output
    share = config.segmentation_weight
    losses = {"cross_entropy": cross_entropy(scores, labels), "image": F.mse_loss(image, x)}
    total = share * losses["cross_entropy"] + (1 - share) * losses["image"]
    if config.second_task == "image+features":
        levels = [F.mse_loss(e, d) for e, d in zip(encoded, decoded, strict=True)]
        losses["features"] = torch.stack(levels).sum()
        total = total + config.feature_weight * losses["features"]
    return total, losses


def adversarial_loss(state: State, x: Tensor, painted: Tensor) -> Tensor:
    """Mean BCE(D(x, G(x)), 1), the non-saturating loss; the discriminator gets no gradient."""
    discriminator = state.modules["discriminator"].requires_grad_(False)
    logits = discriminator(torch.cat([x, painted], dim=1))
    discriminator.requires_grad_(True)
    return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))


def _step_discriminator(state: State, x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    discriminator = state.modules["discriminator"]
    pairs = torch.cat([torch.cat([x, real], dim=1), torch.cat([x, fake], dim=1)])
    logits = discriminator(pairs)
    wanted = torch.zeros_like(logits)
    wanted[: len(x)] = 1
    # The mean over real and fake is the half-sum of the two terms (pix2pix's factor 1/2).
    loss = F.binary_cross_entropy_with_logits(logits, wanted)
    _descend(state.optimizers["discriminator"], loss)
    return loss


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _normalised(images: Tensor) -> Tensor:
    return images.to(torch.float32) / HALF_RANGE - 1


def _wanted(config: Config, images: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Make what is to be painted, (N, K, H, W): the embedding in [-1, 1], or one-hot maps."""
    if config.target == "embedding":
        return _normalised(embed(labels, embedded_grey(config, images), classes))
    return F.one_hot(labels, classes).movedim(-1, 1).to(torch.float32)


def _painted(config: Config, output: Tensor) -> Tensor:
    """Return what was painted, in the units of `_wanted`."""
    return output if config.target == "embedding" else output.softmax(dim=1)


def _painting_loss(config: Config, output: Tensor, images: Tensor, labels: Tensor) -> tuple[str, Tensor]:
    """Name and value of the supervised loss."""
    beside_d = "l1" if config.adversarial else "cross_entropy"
    label_loss = beside_d if config.label_loss == "auto" else config.label_loss
    if config.target == "labels" and label_loss == "cross_entropy":
        return "cross_entropy", cross_entropy(output, labels)
    wanted = _wanted(config, images, labels, output.shape[1])
    return "l1", F.l1_loss(_painted(config, output), wanted)


@torch.no_grad()
def validate(state: State, images: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Return the supervised validation loss, and the predicted labels (N, H, W).

    The adversarial term is left out: it cannot be compared between epochs. With a second task it is
    the joint loss of both tasks, which the network is trained for.
    """
    network, x = state.modules["generator"].eval(), _normalised(images)
    output = network(x)
    network.train()
    if state.config.second_task != "none":
        return float(_joint_loss(state.config, output, x, labels)[0]), output[0].argmax(dim=1)
    loss = _painting_loss(state.config, output, images, labels)[1]
    return float(loss), output.argmax(dim=1)


@torch.no_grad()
def paint(state: State, images: Tensor) -> dict[str, Tensor]:
    """Decode the grey image from an iMEMS embedding, or return a second task's image.

    Returns
    -------
    Pictures (N, 1 or C, H, W) uint8; none for networks that paint labels only.
    """
    network = state.modules["generator"].eval()
    output = network(_normalised(images))
    network.train()
    if state.config.target == "embedding":
        grey = decode((output + 1) * HALF_RANGE)[1]
        levels = grey[:, None].round().clamp(0, 255).to(torch.uint8)
        return {"grey": 255 - levels if state.config.grey == "inverted" else levels}
    if state.config.second_task != "none":
        image = ((output[1] + 1) * HALF_RANGE).round().clamp(0, 255)
        return {"reconstruction": image.to(torch.uint8)}
    return {}


class Deployed(nn.Module):
    """The generator behind the tile contract: uint8 (N, H, W, C) in, uint8 (N, K, H, W) out.

    The output is the embedding in its own units, 0..255, rounded, or 255 times the probability
    of each class; the arg-max over K is the label.
    """

    def __init__(self, generator: nn.Module, *, embedding: bool) -> None:
        super().__init__()
        self.generator = generator
        self.embedding = embedding

    def forward(self, tiles: Tensor) -> Tensor:
        """Normalise, run the generator, return to 0..255."""
        # Cast before transpose: TensorRT refuses a uint8 transpose.
        x = tiles.to(torch.float32).permute(0, 3, 1, 2)
        y = self.generator(x / HALF_RANGE - 1)
        scores = (y + 1) * HALF_RANGE if self.embedding else y.softmax(dim=1) * 255
        return torch.clamp(scores + 0.5, 0, 255).to(torch.uint8)


def deployed(state: State) -> nn.Module:
    """Return the module that export wraps: the generator only, dropout off."""
    generator = state.modules["generator"]
    if isinstance(generator, TwoDecoderUNet):
        generator = generator.segmenter
    return Deployed(generator, embedding=state.config.target == "embedding").eval()
