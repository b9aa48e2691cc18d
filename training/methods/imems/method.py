"""iMEMS: segmentation by a conditional GAN that paints an image embedded in the label map.

The iMEMS paper ("image embedded segmentation"). The generator does not predict the label map
alone, but a map in which the grey image is embedded (equation 1), so that it learns the image
content together with the classes.

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
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histostream.training.checks import Decaying, LearningRate, Range, Weight, Width, check_fields
from histostream.training.data import DataError
from histostream.training.losses import annotated_mean, cross_entropy, known, logit_loss, one_hot
from histostream.training.methods.imems.networks import EncoderDiscriminator, TwoDecoderUNet
from histostream.training.networks.discriminator import Pix2PixDiscriminator
from histostream.training.networks.tile_model import TileModel
from histostream.training.networks.unet import UNet
from histostream.training.state import Batch, State
from histostream.training.steps import HALF_RANGE, adam, descend, evaluating, frozen, to_grey_levels, to_unit_range

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

    target: Literal["embedding", "labels"] = "embedding"  # paper; "labels" paints the one-hot label map instead
    adversarial: bool = True  # paper
    # "image": reconstruct it too; "+features": and the inner maps.
    second_task: Literal["none", "image", "image+features"] = "none"
    # For target="labels". L1 on the softmax ends with one class for all pixels, with and without a D
    # (docs/methods.md): "l1", or "auto", the earlier default: l1 beside a D, else cross_entropy.
    label_loss: Literal["cross_entropy", "l1", "auto"] = "cross_entropy"
    # "inverted": 255 - G in place of G. Equation 1 weighs a wrong label by (2 floor(G/2) + 1) / 255,
    # and so dark nuclei least (docs/methods.md).
    grey: Literal["paper", "inverted"] = "paper"
    # Paper, colon (0.4 epithelium, tubule); of the image: 1 - this.
    segmentation_weight: Annotated[float, Range(0, 1, above=True, below=True)] = 0.6
    feature_weight: Weight = 0.8  # paper, colon (0.7 epithelium, 0.3 tubule)
    base_width: Width = 64  # ours: the figure with the widths is lost; the usual U-Net
    depth: Annotated[int, Range(1, 8)] = 4  # ours: as above
    norm: Literal["none", "instance"] = "none"  # ours: none is mentioned
    dropout: Decaying = 0.2  # paper, section III-B
    l1_weight: Weight = 100.0  # paper (pix2pix)
    discriminator: Literal["encoder", "pix2pix70"] = "encoder"  # ours: "same operations as the encoder"
    discriminator_width: Width = 64  # ours: as the generator
    learning_rate: LearningRate = 2e-4  # ours: pix2pix
    discriminator_learning_rate: LearningRate = 2e-4  # ours: pix2pix
    beta1: Decaying = 0.5  # ours: pix2pix
    beta2: Decaying = 0.999  # ours: pix2pix

    def __post_init__(self) -> None:
        check_fields(self)
        if self.second_task != "none" and (self.adversarial or self.target == "embedding"):
            raise ValueError(
                f"second_task={self.second_task!r}: it goes with target='labels' and adversarial=false only: "
                "set both, or second_task='none'"
            )


def score_kind(config: Config) -> str:
    """Return what the scores of the deployed graph are."""
    return "embedding" if config.target == "embedding" else "probability"


def align_px(config: Config) -> int:
    """Height and width are multiples of this; the encoder discriminator pools four times."""
    return max(1 << config.depth, 16 if config.adversarial else 1)


def takes_class_weights(config: Config) -> str:
    """Return "" if the loss is a cross-entropy of pixels, else why it takes no class weights."""
    if config.second_task != "none" or _label_loss(config) == "cross_entropy":
        return ""
    if config.target == "embedding":
        return 'it paints an image of the classes by L1: set method.target="labels"'
    return 'its loss is L1: set method.label_loss="cross_entropy"'


def least_px(config: Config) -> int:
    """Return the smallest side of an image."""
    # Instance normalisation needs two pixels of the coarsest map, pix2pix's discriminator 24 px.
    norm = 2 << config.depth if config.norm == "instance" else 1
    return max(norm, 24 if config.adversarial and config.discriminator == "pix2pix70" else 1)


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
    """Return G of equation 1 for images (N, C, H, W) uint8: their grey level, or 255 minus it."""
    grey = luma(images)
    return 255 - grey if config.grey == "inverted" else grey


def embed(labels: Tensor, grey: Tensor, classes: int) -> Tensor:
    """Embed the grey image in the label map: equation 1 of the paper.

    Channel k is ``floor(G/2) + 128`` where the label is k and ``127 - floor(G/2)`` elsewhere.

    Parameters
    ----------
    labels
        (N, H, W) integer, 0..classes-1, or `IGNORED`, which is no class.
    grey
        (N, H, W) integer, 0..255.
    classes
        Number of classes K.

    Returns
    -------
    (N, K, H, W) int64 in 0..255.
    """
    half = torch.div(grey, 2, rounding_mode="floor")[:, None]
    return torch.where(one_hot(labels, classes).to(torch.bool), half + 128, 127 - half)


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
    """Make the networks and their optimisers.

    Raises
    ------
    DataError
        If the label map is to hold the grey value of images that have none.
    """
    if config.target == "embedding" and channels not in (1, 3):
        raise DataError(
            f"images of {channels} channels: iMEMS embeds the grey value of RGB or grey images; "
            'set method.target="labels" (a comparator, without the embedding), or use another method'
        )
    kind = UNet if config.second_task == "none" else TwoDecoderUNet
    generator = kind(
        channels, classes, base_width=config.base_width, depth=config.depth, dropout=config.dropout, norm=config.norm
    )
    modules: dict[str, nn.Module] = {"generator": generator}
    optimizers = {"generator": adam(generator.parameters(), config.learning_rate, config)}
    if config.adversarial:
        in_channels, width = channels + classes, config.discriminator_width
        discriminator = (
            EncoderDiscriminator(in_channels, base_width=width, dropout=config.dropout)
            if config.discriminator == "encoder"
            else Pix2PixDiscriminator(in_channels, base_width=width)
        )
        modules["discriminator"] = discriminator
        optimizers["discriminator"] = adam(discriminator.parameters(), config.discriminator_learning_rate, config)
    return State(config, modules, optimizers)


def step(state: State, batch: Batch) -> dict[str, Tensor]:
    """Train on one batch: the discriminator, where there is one, then the generator.

    Returns
    -------
    The losses, without their weights: ``l1`` or ``cross_entropy``, and with an adversary
    ``adversarial`` and ``discriminator``, with a second task ``image`` and ``features``.
    """
    config, generator = state.config, state.modules["generator"]
    x = to_unit_range(batch.images)
    output = generator(x)
    losses: dict[str, Tensor] = {}
    if config.second_task != "none":
        total, losses = _joint_loss(state, output, x, batch.labels)
    else:
        name, loss = _painting_loss(state, output, batch.images, batch.labels)
        total = loss if name == "cross_entropy" else config.l1_weight * loss
        if config.adversarial:
            # Where there is no label, D sees 0 in both.
            painted = _painted(config, output) * known(batch.labels)
            real = _target_maps(config, batch.images, batch.labels, output.shape[1]) * known(batch.labels)
            losses["discriminator"] = _step_discriminator(state, x, real, painted.detach())
            losses["adversarial"] = adversarial_loss(state, x, painted)
            total = config.l1_weight * loss + losses["adversarial"]
        losses[name] = loss
    descend(total, state.optimizers["generator"])
    return {name: loss.detach() for name, loss in losses.items()}


def _joint_loss(state: State, output: TwoTasks, x: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the losses of both tasks, and each without its weight."""
    config: Config = state.config
    scores, image, encoded, decoded = output
    share = config.segmentation_weight
    losses = {"cross_entropy": cross_entropy(scores, labels, state.class_weights), "image": F.mse_loss(image, x)}
    total = share * losses["cross_entropy"] + (1 - share) * losses["image"]
    if config.second_task == "image+features":
        levels = [F.mse_loss(e, d) for e, d in zip(encoded, decoded, strict=True)]
        losses["features"] = torch.stack(levels).sum()
        total = total + config.feature_weight * losses["features"]
    return total, losses


def adversarial_loss(state: State, x: Tensor, painted: Tensor) -> Tensor:
    """Mean BCE(D(x, G(x)), 1), the non-saturating loss; the discriminator gets no gradient."""
    with frozen(state.modules["discriminator"]) as discriminator:
        return logit_loss(discriminator(torch.cat([x, painted], dim=1)), real=True)


def _step_discriminator(state: State, x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    pairs = torch.cat([torch.cat([x, real], dim=1), torch.cat([x, fake], dim=1)])
    logits = state.modules["discriminator"](pairs)
    truth = torch.zeros_like(logits)
    truth[: len(x)] = 1
    # The mean over real and fake is the half-sum of the two terms (pix2pix's factor 1/2).
    loss = F.binary_cross_entropy_with_logits(logits, truth)
    descend(loss, state.optimizers["discriminator"])
    return loss


def _target_maps(config: Config, images: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the maps to paint, (N, K, H, W): the embedding in [-1, 1], or one-hot labels."""
    if config.target == "embedding":
        return to_unit_range(embed(labels, embedded_grey(config, images), classes))
    return one_hot(labels, classes).to(torch.float32)


def _painted(config: Config, output: Tensor) -> Tensor:
    """Return the painted maps, in the units of `_target_maps`."""
    return output if config.target == "embedding" else output.softmax(dim=1)


def _label_loss(config: Config) -> str:
    """Return the name of the supervised loss of a single task, "l1" or "cross_entropy"."""
    if config.target == "embedding":
        return "l1"
    beside_d = "l1" if config.adversarial else "cross_entropy"
    return beside_d if config.label_loss == "auto" else config.label_loss


def _painting_loss(state: State, output: Tensor, images: Tensor, labels: Tensor) -> tuple[str, Tensor]:
    """Name and value of the supervised loss."""
    config: Config = state.config
    if _label_loss(config) == "cross_entropy":
        return "cross_entropy", cross_entropy(output, labels, state.class_weights)
    wanted = _target_maps(config, images, labels, output.shape[1])
    return "l1", annotated_mean((_painted(config, output) - wanted).abs(), labels)


@torch.no_grad()
def validate(state: State, images: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Return the supervised validation loss, and the predicted labels (N, H, W).

    The adversarial term is left out: it cannot be compared between epochs. With a second task it is
    the joint loss of both tasks, which the network is trained for.
    """
    x = to_unit_range(images)
    with evaluating(state.modules["generator"]):
        output = state.modules["generator"](x)
    if state.config.second_task != "none":
        return float(_joint_loss(state, output, x, labels)[0]), output[0].argmax(dim=1)
    loss = _painting_loss(state, output, images, labels)[1]
    return float(loss), output.argmax(dim=1)


@torch.no_grad()
def paint(state: State, images: Tensor) -> dict[str, Tensor]:
    """Decode the grey image from an iMEMS embedding, or return a second task's image.

    Returns
    -------
    Images (N, 1 or C, H, W) uint8; none for networks that paint labels only.
    """
    with evaluating(state.modules["generator"]):
        output = state.modules["generator"](to_unit_range(images))
    if state.config.target == "embedding":
        grey = decode((output + 1) * HALF_RANGE)[1]
        levels = grey[:, None].round().clamp(0, 255).to(torch.uint8)
        return {"grey": 255 - levels if state.config.grey == "inverted" else levels}
    if state.config.second_task != "none":
        return {"reconstruction": to_grey_levels(output[1])}
    return {}


class Deployed(TileModel):
    """The generator behind the tile contract; an embedding, 0..255, is divided by 255."""

    def __init__(self, generator: nn.Module, *, embedding: bool) -> None:
        super().__init__()
        self.generator = generator
        self.embedding = embedding

    def scores(self, images: Tensor) -> Tensor:
        """Return the embedding, divided by 255, or the probability of each class."""
        y: Tensor = self.generator(images / HALF_RANGE - 1)
        return (y + 1) / 2 if self.embedding else y.softmax(dim=1)


def deployed(state: State) -> TileModel:
    """Return the module that export wraps: the generator only, dropout off."""
    generator = state.modules["generator"]
    if isinstance(generator, TwoDecoderUNet):
        generator = generator.segmenter
    return Deployed(generator, embedding=state.config.target == "embedding").eval()
