"""APMA-Net: a segmentation learned on one domain, adapted to images of another without labels.

"Adversarial-prediction guided multi-task adaptation for semantic segmentation of electron
microscopy images" (Yi, Yuan and Peng). One encoder serves a segmentation decoder and a
reconstruction decoder. Two discriminators tell the domains apart, by the last features and by the
predictions, and the networks learn to fool them on the target.

=================  ==============================================================
paper              here
=================  ==============================================================
x_s, x_t           ``images`` and the pool "target", (N, C, H, W) in [0, 1] inside
E, GE              ``generator``: `GroupNormUNet`; all that is deployed
f, p               its features (N, width, H, W), and the softmax of its scores
AE                 its encoding and ``reconstructor``
D_feat, D_pred     ``discriminator_feat``, ``discriminator_pred``: logits of "source"
=================  ==============================================================

Errors in the paper: "the MMD loss is unsupervised" means supervised; "the combination of DE and
DE_feat" means EN + DE_feat. Equations 3 to 7 are right as printed: source is 1, and the generator
side minimises -log D(target), not equation 4's term with 1 - D, whose minimum would make the
domains easier to tell apart. Equation 1 is on the missing page: it is the mean cross-entropy, as in
DAMT-Net.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histostream.training.batches import Parts
from histostream.training.checks import Decaying, LearningRate, Range, Share, Weight, Width, check_fields
from histostream.training.data import DataError, Picture
from histostream.training.losses import cross_entropy, known, logit_loss, one_hot, soft_dice
from histostream.training.methods.apma_net.networks import (
    GroupNormUNet,
    ReconstructionDecoder,
    damt_classifier,
    ganin_classifier,
    reverse_gradient,
)
from histostream.training.networks.discriminator import DomainDiscriminator
from histostream.training.networks.tile_model import TileModel
from histostream.training.networks.unet import widths_of
from histostream.training.state import Batch, State
from histostream.training.steps import adam, descend, evaluating, evenly_chosen, frozen

DOMAINS = ("source", "target")
TARGET = "target"  # name of the pool
MAX_MEASURED = 256  # images of a domain whose minima and maxima are measured
PRED_PX = 32  # smallest maps of D_pred: five convolutions of stride 2
FEAT_PX = {"fcn": 16, "damt": 8, "ganin": 32}  # of D_feat: 4 convolutions, 3 or 5 poolings


@dataclass(frozen=True, slots=True)
class Config:
    """What defines an APMA-Net; the defaults are the paper's, DAMT-Net's or ours, as each says.

    The paper's comparators (tables 1 and 2) differ in these fields; all begin with the same steps on
    the source alone:

    =============  ===========  ==============  =================
    name           reconstruct  adapt_features  adapt_predictions
    =============  ===========  ==============  =================
    APMA-Net       True         adversarial     True
    EN + DE_feat   True         adversarial     False
    DE_pred        False        none            True
    DE_feat        False        adversarial     False
    EN (Roels)     True         none            False
    Ganin          False        reversal        False
    no adaptation  False        none            False
    =============  ===========  ==============  =================

    The oracle is "no adaptation" trained on the target's labels, with validation_domain="source".

    Input is scaled to [0, 1] by minimum and maximum. ``normalise="per_image"`` takes those of each
    image, as DAMT-Net does; but a step sees crops and the deployed graph sees tiles, whose minima
    and maxima depend on what happens to be in them, so that results would depend on the tiling.
    The default therefore measures the mean minimum and the mean maximum of the images of each
    domain once, before the first step, and keeps them. The deployed graph uses the target's where
    the model has a target.
    """

    seg_loss: Literal["cross_entropy", "dice"] = "cross_entropy"  # equation 1 is lost; as DAMT-Net
    reconstruct: bool = True  # paper: EN, equation 2
    # Paper: DE_feat; "reversal" is Ganin's.
    adapt_features: Literal["none", "adversarial", "reversal"] = "adversarial"
    adapt_predictions: bool = True  # paper: DE_pred
    lambda_rec: Weight = 1e-3  # paper
    # Equation 2 does not say whether it is a "mean" over pixels or a "sum" over those of an image,
    # which at 128 x 128 px is 16 in place of 1e-3 for lambda_rec; ours: mean, as DAMT-Net.
    reconstruction_reduction: Literal["mean", "sum"] = "mean"
    lambda_feat: Weight = 1e-3  # paper; with "reversal" the final strength of the reversal (ours)
    lambda_pred: Weight = 1e-3  # paper
    source_only_steps: Share = 0.25  # share of the run; ours: 10,000 of 40,000, paper: no length
    base_width: Width = 64  # DAMT-Net: 64 to 1024
    norm: Literal["group", "none"] = "group"  # DAMT-Net: GroupNorm in 32 groups, not affine
    # Ours: works at any size; "damt" is DAMT-Net's, "ganin" is of Roels's code.
    feat_disc: Literal["fcn", "damt", "ganin"] = "fcn"
    feat_crop: Annotated[int, Range(1, 16384)] = 512  # side of the crops, which "damt" and "ganin" are built for
    grl_at: Literal["last", "bottleneck"] = "last"  # Roels's code: the reversal is on the last features
    pred_disc_norm: Literal["none", "group"] = "none"  # AdaptSegNet; "group" is DAMT-Net's
    discriminator_width: Width = 64  # AdaptSegNet
    learning_rate: LearningRate = 2e-4  # paper, with schedule.decay="poly"
    discriminator_learning_rate: LearningRate = 1e-4  # ours: AdaptSegNet
    beta1: Decaying = 0.9  # DAMT-Net
    beta2: Decaying = 0.99  # DAMT-Net
    normalise: Literal["fixed", "per_image"] = "fixed"  # ours, see above; "per_image" is DAMT-Net's
    validation_domain: Literal["source", "target"] = "target"  # whose scale images to validate and test have

    def __post_init__(self) -> None:
        check_fields(self)
        if self.feat_disc != "fcn" and self.feat_crop % self.least_crop_px:
            raise ValueError(f"feat_crop={self.feat_crop}: use a multiple of {self.least_crop_px}")

    @property
    def adapts(self) -> bool:
        """Whether there is a term for the target."""
        return self.reconstruct or self.adapt_features != "none" or self.adapt_predictions

    @property
    def judges_encoding(self) -> bool:
        """Whether the reversal is on the encoding, 1/16 of the image, not on the last features."""
        return self.adapt_features == "reversal" and self.grl_at == "bottleneck"

    @property
    def least_crop_px(self) -> int:
        """Side of the smallest crops that the networks take."""
        # GroupNorm needs two values: of the coarsest map, two pixels.
        least = GroupNormUNet.stride_px * (2 if self.norm == "group" else 1)
        if self.adapt_predictions:
            least = max(least, PRED_PX)
        if self.adapt_features != "none":
            shrunk = GroupNormUNet.stride_px if self.judges_encoding else 1
            least = max(least, FEAT_PX[self.feat_disc] * shrunk)
        return least


def align_px(config: Config) -> int:
    """Height and width are multiples of this: four poolings."""
    return GroupNormUNet.stride_px


def least_px(config: Config) -> int:
    """Return the smallest side of an image."""
    return config.least_crop_px


def only_px(config: Config) -> int:
    """Return the side of the crops that a classifier with full connections is built for, else 0."""
    return config.feat_crop if config.adapt_features != "none" and config.feat_disc != "fcn" else 0


def pools(config: Config) -> tuple[str, ...]:
    """Images of the target, to adapt to; "no adaptation" needs them for their scale only."""
    scale = config.normalise == "fixed" and config.validation_domain == TARGET
    return (TARGET,) if config.adapts or scale else ()


def takes_class_weights(config: Config) -> str:
    """Return "" if the loss is the cross-entropy of pixels, else why it takes no class weights."""
    if config.seg_loss == "cross_entropy":
        return ""
    return 'the Dice loss is the mean of the classes already: set method.seg_loss="cross_entropy"'


def can_extend(config: Config, done: int, steps: int, more: int) -> str:
    """Return "" if a run can get more steps, else why not: its phase on the source alone is a share of them."""
    if not config.adapts or done <= _first_joint_step(config, steps) or done >= _first_joint_step(config, more):
        return ""
    return "the steps on the source alone are a share of all steps, and would begin again"


class DomainScale(nn.Module):
    """Grey levels to [0, 1] by minimum and maximum: of each image, or of all images of a domain.

    All channels share one minimum and one maximum. Until `measure` was called they are 0 and 255.
    """

    low: Tensor
    high: Tensor

    def __init__(self, *, per_image: bool) -> None:
        super().__init__()
        self.per_image = per_image
        self.register_buffer("low", torch.zeros(len(DOMAINS)))
        self.register_buffer("high", torch.full((len(DOMAINS),), 255.0))

    def forward(self, images: Tensor, domain: str) -> Tensor:
        """Map (N, C, H, W), 0..255, to float32 about [0, 1]."""
        x = images.to(torch.float32)
        low, high = self.span(x, domain)
        return (x - low) / (high - low).clamp(min=1)  # a flat image is all 0

    def undo(self, scaled: Tensor, images: Tensor, domain: str) -> Tensor:
        """Map back to the grey levels of ``images``, uint8."""
        low, high = self.span(images.to(torch.float32), domain)
        grey = scaled * (high - low).clamp(min=1) + low
        return grey.round().clamp(0, 255).to(torch.uint8)

    def span(self, x: Tensor, domain: str) -> tuple[Tensor, Tensor]:
        """Minimum and maximum that a domain's images, (N, C, H, W), are scaled by."""
        if self.per_image:
            axes = (1, 2, 3)
            return x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
        index = DOMAINS.index(domain)
        return self.low[index], self.high[index]

    def measure(self, domain: str, pictures: Sequence[Picture]) -> None:
        """Keep the mean minimum and the mean maximum of up to 256 images, evenly chosen."""
        images = [picture.image for picture in evenly_chosen(pictures, MAX_MEASURED)]
        index = DOMAINS.index(domain)
        self.low[index] = float(np.mean([image.min() for image in images]))
        self.high[index] = float(np.mean([image.max() for image in images]))


def build(config: Config, classes: int, channels: int = 3) -> State:
    """Make the networks and their optimisers."""
    # The generator comes first: all comparators of one seed start from the same weights.
    modules: dict[str, nn.Module] = {
        "generator": GroupNormUNet(channels, classes, base_width=config.base_width, norm=config.norm),
        "scale": DomainScale(per_image=config.normalise == "per_image"),
    }
    learning = list(modules["generator"].parameters())
    if config.reconstruct:
        modules["reconstructor"] = ReconstructionDecoder(config.base_width, channels, config.norm)
        learning += modules["reconstructor"].parameters()
    optimizers = {"generator": adam(learning, config.learning_rate, config)}
    discriminators: dict[str, nn.Module] = {}
    if config.adapt_features != "none":
        discriminators["discriminator_feat"] = _feature_discriminator(config)
    if config.adapt_predictions:
        discriminators["discriminator_pred"] = DomainDiscriminator(
            classes, widths_of(config.discriminator_width, 3), norm=config.pred_disc_norm
        )
    modules |= discriminators
    for name, discriminator in discriminators.items():
        optimizers[name] = adam(discriminator.parameters(), config.discriminator_learning_rate, config)
    return State(config, modules, optimizers, needed=("generator", "scale"))


def _feature_discriminator(config: Config) -> nn.Module:
    channels, side_px = config.base_width, config.feat_crop
    if config.judges_encoding:
        channels, side_px = 16 * channels, side_px // GroupNormUNet.stride_px
    if config.feat_disc == "damt":
        return damt_classifier(channels, side_px)
    if config.feat_disc == "ganin":
        return ganin_classifier(channels, side_px)
    return DomainDiscriminator(channels, widths_of(config.discriminator_width, 2))


def before_step(state: State, parts: Parts, step: int, steps: int) -> None:
    """Measure the scale of both domains before the first step; a resumed run has it kept."""
    scale = state.modules["scale"]
    if step or state.config.normalise != "fixed":
        return
    assert isinstance(scale, DomainScale)
    scale.measure("source", [parts.samples[i] for i in parts.split.train])
    if TARGET in pools(state.config):
        scale.measure("target", parts.pools[TARGET])


# ----------------------------------------------------------------------------- losses


def segmentation_loss(config: Config, scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean cross-entropy of the annotated pixels (equation 1), or 1 - their mean soft Dice.

    ``weights``, (K,), are of the classes in the cross-entropy.
    """
    if config.seg_loss == "cross_entropy":
        return cross_entropy(scores, labels, weights)
    truth = one_hot(labels, scores.shape[1])
    return 1 - soft_dice(scores.softmax(dim=1) * known(labels), truth, smooth=0.0).mean()


def reconstruction_loss(config: Config, rebuilt: Tensor, images: Tensor) -> Tensor:
    """Squared error of equation 2 of one domain's images (N, C, H, W): their mean.

    Over the pixels of an image it is a mean or a sum, as ``config.reconstruction_reduction`` says.
    """
    error = F.mse_loss(rebuilt, images)
    return error * images[0].numel() if config.reconstruction_reduction == "sum" else error


def domain_loss(source: Tensor, target: Tensor) -> Tensor:
    """Loss of a discriminator, from its logits: equations 3 to 5, source is 1.

    The mean of the two halves. Lambda is left out: it only scales the gradient, which Adam
    undoes.
    """
    return (logit_loss(source, real=True) + logit_loss(target, real=False)) / 2


def reversal_strength(config: Config, batch: Batch) -> float:
    """Ganin et al. 2016, section 5.2.2: 2 / (1 + exp(-10 t)) - 1, times ``lambda_feat``.

    t is the progress of the joint steps, 0 to 1.
    """
    first = _first_joint_step(config, batch.steps)
    progress = (batch.step - first) / max(1, batch.steps - first)
    return config.lambda_feat * (2 / (1 + math.exp(-10 * progress)) - 1)


def _first_joint_step(config: Config, steps: int) -> int:
    return round(config.source_only_steps * steps)


# ----------------------------------------------------------------------------- training


def step(state: State, batch: Batch) -> dict[str, Tensor]:
    """Train on one batch: E, GE and the reconstruction by equation 6, then both D by equation 3.

    In the first steps the segmentation is learned alone, on the source.

    Returns
    -------
    The losses, without their weights, all from the first step on (0 until they are used):
    ``segmentation``, ``reconstruction``, and for ``feat`` and ``pred`` the generator's
    ``fooling_*`` (not with gradient reversal) and ``discriminator_*``.

    Raises
    ------
    DataError
        If the crops are too small for the discriminators, or not of the side that a classifier
        with full connections was built for.
    """
    config: Config = state.config
    if config.adapts:
        _check_crops(config, batch)
    x = state.modules["scale"](batch.images, "source")
    maps = state.modules["generator"](x)
    segmentation = segmentation_loss(config, maps[0], batch.labels, state.class_weights)
    losses = {"segmentation": segmentation}
    if config.adapts and batch.step >= _first_joint_step(config, batch.steps):
        losses |= _step_jointly(state, batch, x, maps, segmentation)
    else:
        descend(segmentation, state.optimizers["generator"])
    nothing = torch.zeros_like(segmentation)
    return {name: losses.get(name, nothing).detach() for name in _loss_names(config)}


Maps = tuple[Tensor, Tensor, Tensor]  # scores, features, encoding: what the generator returns


def _step_jointly(state: State, batch: Batch, x: Tensor, source: Maps, segmentation: Tensor) -> dict[str, Tensor]:
    """Step the generator side on all terms, then the discriminators; return the further losses."""
    config: Config = state.config
    y = state.modules["scale"](batch.pools[TARGET], "target")
    target: Maps = state.modules["generator"](y)
    losses: dict[str, Tensor] = {}
    total, stepping = segmentation, [state.optimizers["generator"]]
    if config.reconstruct:
        rebuild = state.modules["reconstructor"]
        # Equation 2: the sum over both domains (DAMT-Net's code halves it).
        losses["reconstruction"] = reconstruction_loss(config, rebuild(source[2]), x) + reconstruction_loss(
            config, rebuild(target[2]), y
        )
        total = total + config.lambda_rec * losses["reconstruction"]
    if config.adapt_features == "reversal":
        judged = 2 if config.judges_encoding else 1
        # One backward pass trains the classifier as it is, and the network against it.
        losses["discriminator_feat"] = _reversed_loss(
            state, source[judged], target[judged], reversal_strength(config, batch)
        )
        total = total + losses["discriminator_feat"]
        stepping.append(state.optimizers["discriminator_feat"])
    games: list[tuple[str, float, Tensor, Tensor]] = []
    if config.adapt_features == "adversarial":
        games.append(("feat", config.lambda_feat, source[1], target[1]))
    if config.adapt_predictions:
        games.append(("pred", config.lambda_pred, source[0].softmax(dim=1), target[0].softmax(1)))
    for name, weight, _, of_target in games:
        losses[f"fooling_{name}"] = _fool(state, f"discriminator_{name}", of_target)
        total = total + weight * losses[f"fooling_{name}"]
    descend(total, *stepping)
    for name, _, of_source, of_target in games:
        judge = f"discriminator_{name}"
        losses[judge] = _step_discriminator(state, judge, of_source, of_target)
    return losses


def _loss_names(config: Config) -> list[str]:
    names = ["segmentation"]
    if config.reconstruct:
        names.append("reconstruction")
    if config.adapt_features == "adversarial":
        names.append("fooling_feat")
    if config.adapt_features != "none":
        names.append("discriminator_feat")
    if config.adapt_predictions:
        names += ["fooling_pred", "discriminator_pred"]
    return names


def _check_crops(config: Config, batch: Batch) -> None:
    """Refuse crops that the discriminators cannot take, with what to set."""
    fixed = config.adapt_features != "none" and config.feat_disc != "fcn"
    for images in (batch.images, batch.pools[TARGET]):
        height, width = images.shape[-2:]
        if fixed and (height, width) != (config.feat_crop, config.feat_crop):
            raise DataError(
                f"crops are {width} x {height} px, feat_disc={config.feat_disc!r} is built for "
                f"feat_crop={config.feat_crop}: set method.feat_crop and schedule.crop_px alike, "
                'or method.feat_disc="fcn"'
            )
        if min(height, width) < config.least_crop_px:
            raise DataError(
                f"crops are {width} x {height} px, the networks take {config.least_crop_px} px or "
                "more: set schedule.crop_px higher"
            )


def fooling_loss(target: Tensor) -> Tensor:
    """-L' of equation 7, -E log D(target), from D's logits: what equation 6 minimises."""
    return logit_loss(target, real=True)


def _fool(state: State, name: str, target: Tensor) -> Tensor:
    """Fooling loss of target maps; the discriminator gets no gradient."""
    with frozen(state.modules[name]) as discriminator:
        return fooling_loss(discriminator(target))


def _step_discriminator(state: State, name: str, source: Tensor, target: Tensor) -> Tensor:
    discriminator = state.modules[name]
    loss = domain_loss(discriminator(source.detach()), discriminator(target.detach()))
    descend(loss, state.optimizers[name])
    return loss


def _reversed_loss(state: State, source: Tensor, target: Tensor, strength: float) -> Tensor:
    classifier = state.modules["discriminator_feat"]
    source, target = (classifier(reverse_gradient(m, strength)) for m in (source, target))
    return domain_loss(source, target)


# ----------------------------------------------------------------------------- evaluation


@torch.no_grad()
def validate(state: State, images: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Return the segmentation loss, and the predicted labels (N, H, W).

    Images count as of ``config.validation_domain``; the adversarial terms are left out, they
    cannot be compared between steps.
    """
    x = state.modules["scale"](images, state.config.validation_domain)
    with evaluating(state.modules["generator"]):
        scores = state.modules["generator"](x)[0]
    return float(segmentation_loss(state.config, scores, labels, state.class_weights)), scores.argmax(dim=1)


@torch.no_grad()
def paint(state: State, images: Tensor) -> dict[str, Tensor]:
    """Return the reconstruction, (N, C, H, W) uint8, where the model has one."""
    if "reconstructor" not in state.modules:
        return {}
    scale, domain = state.modules["scale"], state.config.validation_domain
    assert isinstance(scale, DomainScale)
    encoding = state.modules["generator"](scale(images, domain))[2]
    rebuilt = state.modules["reconstructor"](encoding)
    return {"reconstruction": scale.undo(rebuilt, images, domain)}


class Deployed(TileModel):
    """E and GE behind the tile contract."""

    def __init__(self, generator: nn.Module, scale: nn.Module, domain: str) -> None:
        super().__init__()
        self.generator = generator
        self.scale = scale
        self.domain = domain

    def scores(self, images: Tensor) -> Tensor:
        """Return the probability of each class."""
        logits: Tensor = self.generator(self.scale(images, self.domain))[0]
        return logits.softmax(dim=1)


def deployed(state: State) -> TileModel:
    """Return the module that export wraps: no discriminator, no reconstruction."""
    domain = TARGET if TARGET in pools(state.config) else "source"
    return Deployed(state.modules["generator"], state.modules["scale"], domain).eval()
