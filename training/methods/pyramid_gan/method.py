"""Pyramid GAN: images painted from masks, and segmented, coarse to fine, at every level.

"High resolution histopathology image generation and segmentation through adversarial training"
(Li et al. 2021). Each level has a generator that paints masks, a segmenter, and a
discriminator that tells the pairs of both from true ones. Levels are trained one after another,
the coarsest first; a finished level passes its result on.

====================  ==========================================================
paper                 here
====================  ==========================================================
x_n, y_n              images in [-1, 1] and one-hot masks, 1 / 2^n of the crop
G_n, S_n, D_n         ``generator_n``, ``segmenter_n``, ``discriminator_n``
xt_n, yh_n            what G_n paints, the softmax of the scores of S_n
N                     ``levels - 1``, the coarsest
m_l, m_g, m_u         images of a level's step: labelled, painted, unlabelled
alpha, beta, gamma    ``lambda_rec``, ``lambda_feat``, ``lambda_perc``
alpha'                ``lambda_ce``
====================  ==========================================================

Errors in the paper, and what is done here. Equation 7 lacks the minus of the cross-entropy. Equation
6 prints the segmenter's pair as D(x_n | y_n, yh_{n+1}); it is D(x_n, yh_n). Algorithm 2 names
equation 6 for all updates; it is equation 8, as in Algorithm 3. The perceptual loss is printed for
pairs of image and mask, but a VGG takes three channels, and the mask is the same on both sides; it
is of images. Phi_n and the amplitude of the noise are in an appendix that we do not have; they are
SinGAN's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from histostream.training import device
from histostream.training.batches import UNLABELLED, Parts, padded, stacked
from histostream.training.checks import (
    Decaying,
    FileName,
    LearningRate,
    NumberList,
    Range,
    Share,
    Weight,
    Width,
    check_fields,
)
from histostream.training.data import IGNORED, DataError, Sample
from histostream.training.losses import EPSILON, annotated_mean, cross_entropy, one_hot
from histostream.training.methods.pyramid_gan.fc_densenet import FCDenseNet
from histostream.training.methods.pyramid_gan.losses import (
    PENALTY,
    adversarial_loss,
    discriminator_mask,
    feature_loss,
    gradient_penalty,
    perceptual_loss,
)
from histostream.training.methods.pyramid_gan.networks import (
    Generator,
    GeneratorPyramid,
    Judged,
    PatchDiscriminator,
    Pix2PixUNet,
    SegmenterPyramid,
    halved,
    multi_scale_discriminator,
    one_hot_levels,
    resnet_trunk,
    singan_trunk,
    up2,
)
from histostream.training.methods.pyramid_gan.vgg import STRIDE_PX as VGG_STRIDE_PX
from histostream.training.methods.pyramid_gan.vgg import VGG19Features
from histostream.training.networks.tile_model import TileModel
from histostream.training.schedule import Decay, Schedule
from histostream.training.state import Batch, State
from histostream.training.steps import (
    HALF_RANGE,
    adam,
    descend,
    evenly_chosen,
    follow,
    frozen,
    measure_statistics,
    to_unit_range,
)

AVERAGED_STEPS = 100  # of the running estimate of the paintings' error
MAX_MEASURED = 64  # training images over which noise and batch statistics are measured
MEASURED_BATCH = 4  # whole images in a batch whose statistics are measured; the paper's finest level
PATCH_PX = 32  # smallest images of pix2pix's discriminator


@dataclass(frozen=True, slots=True)
class Config:
    """What defines a model; the defaults are the paper's, else those of the work it cites.

    The methods that it is compared with differ in these fields:

    ====================  ======  =======  =============  ================================
    name                  levels  g_arch   judge_segm...  else
    ====================  ======  =======  =============  ================================
    full                  4       singan   True
    semi-supervised       4       singan   True           semi_supervised
    m-FCDenseNet          1       none     False
    + pyramid             4       none     False          True: D stays (not in the paper)
    consistency           1       none     False          lambda_consistency=1
    pix2pix               1       unet     False          d_arch="patch", L1 of weight 100
    pix2pixHD             1       resnet   False          gan="lsgan", wider
    ====================  ======  =======  =============  ================================

    pix2pix and pix2pixHD are for the images that they paint; a segmenter is trained beside them on
    the true pairs, without a part in their losses, so that every run is scored and exported alike.
    They get noise as the paper's generators do, so that samples of one mask differ.

    The run's steps are divided among the levels by ``level_shares``, or else so that each level
    passes over the images equally often, as in the paper (200 epochs each). Times within a level
    are shares of its steps.
    """

    levels: Annotated[int, Range(1, 8)] = 4  # paper: N + 1; 64 to 512 px for GlaS; 5 for 1024 px
    level_batches: NumberList = ""  # images a step, coarsest first, "8,6,4,4" in the paper; "": the batch
    level_shares: NumberList = ""  # of the steps, coarsest first, in any unit; "": as 1 / level_batches
    # Generator
    # Ours: appendix A.1 is lost; "unet" is pix2pix's.
    g_arch: Literal["singan", "resnet", "unet", "none"] = "singan"
    g_width: Width = 64  # ours: of SinGAN's finest levels; pix2pix: 64
    g_downs: Annotated[int, Range(0, 8)] = 2  # ours, of "resnet"; pix2pixHD: 4; pix2pix's U-Net: 8
    g_blocks: Annotated[int, Range(0, 64)] = 4  # ours, of "resnet"; pix2pixHD: 9
    noise: Annotated[float, Range(0, 100)] = (
        0.1  # SinGAN: times the RMSE of what the coarser level painted; coarsest: 1
    )
    # Segmenter: m-FCDenseNet, "42 layers, roughly 1 M parameters"
    first_width: Width = 48  # FC-DenseNet's code, as the next three
    growth: Annotated[int, Range(1, 1024)] = 12
    layers: Annotated[int, Range(1, 64)] = 5
    dropout: Decaying = 0.2
    poolings: Annotated[int, Range(0, 8)] = 3  # what gives 42 layers and 0.966 M parameters
    segmenter_noise: Annotated[float, Range(0, 100)] = 0.1  # ours: z_n of equation 5, standard deviation, in training
    painted_statistics: bool = True  # painted images move S's batch statistics; recommended: False
    reestimate: bool = False  # recommended: True, batch statistics of clean images are frozen
    # Discriminator
    d_arch: Literal["multiscale", "patch"] = "multiscale"  # paper: as pix2pixHD; "patch": pix2pix
    d_width: Width = 64  # pix2pixHD
    d_scales: Annotated[int, Range(1, 8)] = 3  # paper
    judge_segmenter: bool = True  # paper: D judges the segmenter's pairs, equation 6
    gan: Literal["bce", "lsgan", "wgan-gp"] = "bce"  # paper: log form; "lsgan": pix2pixHD, "wgan-gp": SinGAN
    # Paper; recommended: "straight_through", `discriminator_mask`.
    mask_for_discriminator: Literal["softmax", "straight_through"] = "softmax"
    # Losses
    rec_loss: Literal["l2", "l1"] = "l2"  # paper, equation 3; "l1": pix2pix
    lambda_rec: Weight = 1e-3  # paper: alpha
    lambda_feat: Weight = 10.0  # paper: beta, equation 4
    lambda_perc: Weight = 10.0  # paper: gamma
    perceptual: Literal["none", "vgg19"] = "none"  # paper: "vgg19", whose weights have to be at hand
    vgg_weights: FileName = ""  # path of torchvision's vgg19, .safetensors or .pth
    lambda_ce: Weight = 1.0  # paper: alpha'
    synthetic_weight: Weight = 0.03  # paper: of the cross-entropy on painted images; 0: none
    synthetic_rule: Literal["epochs", "quality"] = "epochs"  # paper; recommended: "quality", of the paintings
    synthetic_from: Share = 0.5  # paper: after 100 epochs of 200, the same for all levels here
    synthetic_quality: Annotated[float, Range(0, 100)] = (
        0.7  # ours: RMSE of paintings, in deviations of the images, at most
    )
    # Semi-supervised, Algorithm 3
    semi_supervised: bool = False
    # Ours: final share of S's own pairs among D's true ones; as many images have labels as not.
    pseudo_positives: Annotated[float, Range(0, 0.5)] = 0.5
    pseudo_from: Share = 0.25  # ours: when the share leaves 0: after 50 epochs,
    pseudo_to: Share = 0.5  # and when it is full: after 100
    # Consistency, equation 9
    lambda_consistency: Weight = 0.0  # ours where it is on: 1
    consistency_noise: Annotated[float, Range(0, 100)] = 0.1  # ours: standard deviation, for teacher and student
    consistency_ramp: Share = 0.2  # ours: lambda is full after 40 epochs
    ema: Decaying = 0.99  # ours: of the teacher
    # Optimisers
    generator_learning_rate: LearningRate = 1e-4  # paper
    segmenter_learning_rate: LearningRate = 5e-4  # paper
    discriminator_learning_rate: LearningRate = 5e-4  # paper
    level_decay: Decay = "none"  # paper: says none; "cosine", "poly": rates fall to 0 in each level
    beta1: Decaying = 0.5  # paper
    beta2: Decaying = 0.999  # paper

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_together()

    def _check_together(self) -> None:
        """Refuse settings that exclude each other."""
        for name in ("level_batches", "level_shares"):
            numbers = self._numbers(name)
            if numbers and (len(numbers) != self.levels or min(numbers) < 1):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: give {self.levels} whole numbers from 1, one a level"
                )
        if self.g_arch == "unet" and (self.levels != 1 or self.g_downs < 2):
            raise ValueError("g_arch='unet': it is pix2pix's: set levels=1 and g_downs=8 (2 or more)")
        if self.d_arch == "patch" and self.paints and self.lambda_feat:
            raise ValueError("d_arch='patch': it shows no features: set lambda_feat=0")
        if self.semi_supervised and not self.judge_segmenter:
            raise ValueError("semi_supervised=true: it learns from the discriminator: set judge_segmenter=true")
        if self.perceptual == "vgg19" and not self.vgg_weights:
            raise ValueError(
                "perceptual='vgg19': it needs vgg_weights=PATH, torchvision's vgg19; or set perceptual='none'"
            )
        if self.pseudo_to < self.pseudo_from:
            raise ValueError(
                f"pseudo_from={self.pseudo_from}, pseudo_to={self.pseudo_to}: the first is at most the second"
            )

    @property
    def batches(self) -> tuple[int, ...]:
        """Images of a step, coarsest first; empty: as many as the schedule's batch."""
        return self._numbers("level_batches")

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the run's steps, coarsest first; their sum is 1."""
        each = self._numbers("level_shares") or [1 / m for m in self.batches or (1,) * self.levels]
        return tuple(one / sum(each) for one in each)

    def _numbers(self, name: str) -> tuple[int, ...]:
        text: str = getattr(self, name)
        return tuple(int(word) for word in text.split(",")) if text else ()

    @property
    def paints(self) -> bool:
        """Whether there are generators."""
        return self.g_arch != "none"

    @property
    def judges(self) -> bool:
        """Whether there are discriminators."""
        return self.paints or self.judge_segmenter

    @property
    def uses_pool(self) -> bool:
        """Whether half of a step's images have no labels."""
        return self.semi_supervised or self.lambda_consistency > 0

    @property
    def least_crop_px(self) -> int:
        """Side of the smallest crops that the networks take."""
        coarsest = 1 << self.poolings
        if self.judges:
            # Instance normalisation needs two pixels of the smallest map.
            coarsest = max(coarsest, PATCH_PX if self.d_arch == "patch" else 2 << (self.d_scales - 1))
        if self.perceptual == "vgg19":
            coarsest = max(coarsest, VGG_STRIDE_PX)
        return coarsest << (self.levels - 1)


def align_px(config: Config) -> int:
    """Height and width are multiples of this: the poolings of the coarsest level."""
    halvings = config.g_downs if config.g_arch in ("resnet", "unet") else 0
    return 1 << (max(config.poolings, halvings) + config.levels - 1)


def least_px(config: Config) -> int:
    """Return the smallest side of an image."""
    return config.least_crop_px


def pools(config: Config) -> tuple[str, ...]:
    """Images without labels, where half of the training is on them."""
    return (UNLABELLED,) if config.uses_pool else ()


def takes_class_weights(config: Config) -> str:
    """Return "": they weigh the cross-entropies of the segmenters."""
    return ""


def can_extend(config: Config, done: int, steps: int, more: int) -> str:
    """Return "" if a run can get more steps, else why not: its levels are shares of them."""
    before, after = phase_at(config, done - 1, steps), phase_at(config, done, more)
    if before.level == after.level and not after.first:
        return ""
    return "its levels are shares of all steps, and a level that is finished would begin again"


# ----------------------------------------------------------------------------- the run


@dataclass(frozen=True, slots=True)
class Phase:
    """The level that a step trains, with ``done`` of the level's ``steps``."""

    level: int
    done: int
    steps: int

    @property
    def progress(self) -> float:
        """Share of the level's steps that are done."""
        return self.done / self.steps

    @property
    def first(self) -> bool:
        """Whether this is the level's first step."""
        return self.done == 0


def phase_at(config: Config, step: int, steps: int) -> Phase:
    """Return the phase of a step: levels one after another, each with its share of the steps.

    Raises
    ------
    DataError
        If there are too few steps for the levels.
    """
    ends = [round(steps * part) for part in accumulate(config.shares)]
    starts = [0, *ends[:-1]]
    if any(start == end for start, end in zip(starts, ends, strict=True)):
        raise DataError(
            f"schedule.steps={steps} leaves a level of the pyramid without a step: "
            f"set it higher, there are {config.levels} levels"
        )
    i = next(i for i, end in enumerate(ends) if step < end)
    return Phase(config.levels - 1 - i, step - starts[i], ends[i] - starts[i])


def eligible(config: Config, done: int, steps: int) -> bool:
    """Whether the checkpoint may be best: only while the finest level trains is the pyramid complete."""
    return phase_at(config, done - 1, steps).level == 0


class Progress(nn.Module):
    """State of the run, in buffers, so that checkpoints hold it.

    Attributes
    ----------
    level
        The finest level that was trained.
    amplitudes
        (levels,) of the noise of each, level 0 first; 1 at the coarsest, measured at the others.
    classes, channels
        Of the masks and of the images.
    paintings
        Steps of the level that the next two are running means of.
    painted_square
        Mean square of painted minus true images.
    grey
        (2, channels) mean and mean square of the true images.
    """

    level: Tensor
    amplitudes: Tensor
    paintings: Tensor
    painted_square: Tensor
    grey: Tensor

    def __init__(self, levels: int, classes: int, channels: int) -> None:
        super().__init__()
        self.classes, self.channels = classes, channels
        amplitudes = torch.zeros(levels)
        amplitudes[-1] = 1
        self.register_buffer("level", torch.tensor(levels - 1))
        self.register_buffer("amplitudes", amplitudes)
        self.register_buffer("paintings", torch.tensor(0))
        self.register_buffer("painted_square", torch.tensor(0.0))
        self.register_buffer("grey", torch.zeros(2, channels))

    def restart(self) -> None:
        """Begin the running means anew."""
        self.paintings.zero_()

    @torch.no_grad()
    def update(self, painted: Tensor, images: Tensor) -> None:
        """Add paintings and the true images of the same masks, (N, C, h, w), to the means.

        They are plain means of the first `AVERAGED_STEPS` steps, then exponential ones.
        """
        self.paintings.add_(1)
        share = 1 / min(int(self.paintings), AVERAGED_STEPS)
        square = ((painted - images) ** 2).mean()
        grey = torch.stack([images.mean((0, 2, 3)), (images**2).mean((0, 2, 3))])
        self.painted_square.copy_(torch.lerp(self.painted_square, square, share))
        self.grey.copy_(torch.lerp(self.grey, grey, share))

    def painting_error(self) -> Tensor:
        """Return the RMSE of the paintings in standard deviations of the images.

        1 is what a constant reaches, the mean colour of all images; 0 are the images themselves.
        """
        mean, square = self.grey
        variance = (square - mean**2).mean().clamp(min=EPSILON)
        error: Tensor = (self.painted_square / variance).sqrt()
        return error

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *more: Any) -> None:
        # Older checkpoints have no estimate.
        for name in ("paintings", "painted_square", "grey"):
            state_dict.setdefault(prefix + name, getattr(self, name))
        super()._load_from_state_dict(state_dict, prefix, *more)


def build(config: Config, classes: int, channels: int = 3) -> State:
    """Make the networks of all levels and their optimisers.

    Raises
    ------
    DataError
        If the perceptual loss is to compare images that VGG19 does not take.
    """
    if config.perceptual != "none" and channels not in (1, 3):
        raise DataError(
            f"images of {channels} channels: VGG19, of the perceptual loss, takes RGB or grey; "
            'set method.perceptual="none"'
        )
    levels = range(config.levels - 1, -1, -1)
    modules: dict[str, nn.Module] = {"progress": Progress(config.levels, classes, channels)}
    # Segmenters come first: the comparators of one seed and as many levels start from the same.
    for n in levels:
        modules[f"segmenter_{n}"] = FCDenseNet(
            channels + classes,
            classes,
            first_width=config.first_width,
            growth=config.growth,
            layers=config.layers,
            poolings=config.poolings,
            dropout=config.dropout,
        )
    rates = {"segmenter": config.segmenter_learning_rate}
    if config.paints:
        rates["generator"] = config.generator_learning_rate
        for n in levels:
            modules[f"generator_{n}"] = Generator(_trunk(config, classes, channels))
    if config.judges:
        rates["discriminator"] = config.discriminator_learning_rate
        for n in levels:
            modules[f"discriminator_{n}"] = _discriminator(config, classes + channels)
    optimizers = {
        f"{name}_{n}": adam(modules[f"{name}_{n}"].parameters(), rate, config)
        for name, rate in rates.items()
        for n in levels
    }
    if config.lambda_consistency:
        modules["teacher"] = copy.deepcopy(modules["segmenter_0"]).requires_grad_(False)
    if config.perceptual == "vgg19" and config.paints:
        modules["perceptual"] = VGG19Features()
    return State(config, modules, optimizers, needed=("progress", *(f"segmenter_{n}" for n in levels)))


def _trunk(config: Config, classes: int, channels: int) -> nn.Module:
    into = classes + channels
    if config.g_arch == "resnet":
        return resnet_trunk(into, channels, config.g_width, config.g_downs, config.g_blocks)
    if config.g_arch == "unet":
        return Pix2PixUNet(into, channels, config.g_width, config.g_downs)
    return singan_trunk(into, channels, config.g_width)


def _discriminator(config: Config, in_channels: int) -> nn.Module:
    if config.d_arch == "patch":
        return PatchDiscriminator(in_channels, config.d_width)
    return multi_scale_discriminator(in_channels, config.d_width, config.d_scales)


def before_step(state: State, parts: Parts, step: int, steps: int) -> None:
    """Begin a level: the finished one is frozen, the noise of the next is measured.

    Raises
    ------
    DataError
        If there are too few steps for the levels.
    WeightsError
        If the weights of the VGG cannot be read.
    """
    config: Config = state.config
    vgg = state.modules.get("perceptual")
    if isinstance(vgg, VGG19Features) and not vgg.ready:
        vgg.read(Path(config.vgg_weights).expanduser())
    phase = phase_at(config, step, steps)
    _decay(state, phase)
    if not phase.first:
        return
    run = _progress(state)
    if config.reestimate and phase.level < config.levels - 1:
        reestimate(state, parts, phase.level + 1)
    run.level.fill_(phase.level)
    run.restart()
    if config.paints and phase.level < config.levels - 1:
        samples = [parts.samples[i] for i in parts.split.train]
        run.amplitudes[phase.level] = config.noise * painting_error(state, samples, phase.level)
    if "teacher" in state.modules:
        segmenter = state.modules[f"segmenter_{phase.level}"]
        state.modules["teacher"].load_state_dict(segmenter.state_dict())


def _decay(state: State, phase: Phase) -> None:
    """Lower the learning rates of a level from the schedule's to 0 at the level's end."""
    if state.config.level_decay == "none":
        return
    factor = Schedule(decay=state.config.level_decay).rate(phase.done, phase.steps)
    for name, optimizer in state.optimizers.items():
        if name.endswith(f"_{phase.level}"):
            for group in optimizer.param_groups:
                group["lr"] *= factor


@torch.no_grad()
def painting_error(state: State, samples: Sequence[Sample], level: int) -> float:
    """Root mean square of up2(xt_{n+1}) - x_n over up to 64 training images, evenly chosen.

    SinGAN's rule: the noise of a level is in proportion to what is left for it to paint.
    """
    config, run = state.config, _progress(state)
    squares, values = 0.0, 0
    for sample in evenly_chosen(samples, MAX_MEASURED):
        images, labels = stacked([padded(sample.image, sample.labels, align_px(config))])
        wanted = halved(to_unit_range(images.to(run.amplitudes.device)), level + 1)[level]
        truth = labels.to(wanted.device)
        masks = one_hot_levels(truth, run.classes, config.levels)
        off = _painted_above(state, masks, level)[0] - wanted
        squares, values = squares + float((off**2).sum()), values + off.numel()
    return math.sqrt(squares / values)


def settle(state: State, parts: Parts) -> None:
    """Measure the batch statistics of the level in training anew, as before it is frozen."""
    if state.config.reestimate:
        reestimate(state, parts, finest_level(state))


@torch.no_grad()
def reestimate(state: State, parts: Parts, level: int) -> None:
    """Measure the batch statistics of S_n on clean training images: no noise, no dropout.

    What training gathers is of images with noise, of maps with dropout and of painted images, and
    lags behind the weights. In their place comes the plain mean over batches of whole images as
    they will be segmented, up to 64 evenly chosen ones.

    Parameters
    ----------
    state
        Of the model; the levels above n are finished.
    parts
        The data; the training images are measured.
    level
        n.
    """
    config: Config = state.config

    def pass_images() -> None:
        for images in _whole_image_batches(parts, align_px(config)):
            pyramid = halved(to_unit_range(images.to(_progress(state).amplitudes.device)), config.levels)
            _segment(state, level, pyramid[level], _segmented_above(state, pyramid[::-1], level), 0.0)

    measure_statistics(state.modules[f"segmenter_{level}"], pass_images)


def _whole_image_batches(parts: Parts, align: int) -> Iterator[Tensor]:
    """Yield training images, (m, C, H, W) uint8; up to four of one size together.

    Several at a time, since the variance of a batch includes that between images.
    """
    sizes: dict[tuple[int, ...], list[NDArray[np.uint8]]] = {}
    for sample in evenly_chosen([parts.samples[i] for i in parts.split.train], MAX_MEASURED):
        image = padded(sample.image, sample.labels, align)[0]
        sizes.setdefault(image.shape, []).append(image.transpose(2, 0, 1))
    for images in sizes.values():
        # Batches of sizes as equal as possible, as each counts alike in the mean.
        for batch in np.array_split(np.stack(images), -(-len(images) // MEASURED_BATCH)):
            yield torch.from_numpy(np.ascontiguousarray(batch))


@contextmanager
def _statistics(network: nn.Module, *, move: bool) -> Iterator[None]:
    """Let a pass in training move the running means of batch normalisation, or not."""
    layers = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for layer in layers:
        layer.track_running_stats = move
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


# ----------------------------------------------------------------------------- levels


def _progress(state: State) -> Progress:
    return cast(Progress, state.modules["progress"])


def _noise(state: State, like: Tensor, level: int) -> Tensor:
    """z_n, (N, C, h, w) like an image of the level."""
    return _progress(state).amplitudes[level] * torch.randn_like(like)


def _painted_above(state: State, masks: list[Tensor], level: int) -> tuple[Tensor, list[Tensor]]:
    """Paint the levels above one, without a gradient.

    Returns
    -------
    up2(xt_{n+1}), zeros at the coarsest; and xt_N to xt_{n+1}, coarsest first.
    """
    config, run = state.config, _progress(state)
    coarsest = masks[config.levels - 1]
    painted: list[Tensor] = []
    coarser = coarsest.new_zeros(len(coarsest), run.channels, *coarsest.shape[-2:])
    with torch.no_grad():
        for n in range(config.levels - 1, level, -1):
            generator = state.modules[f"generator_{n}"].eval()
            painted.append(generator(masks[n], _noise(state, coarser, n), coarser))
            coarser = up2(painted[-1])
    return coarser, painted


def _segmented_above(state: State, images: Sequence[Tensor], level: int) -> Tensor:
    """Return up2(yh_{n+1}), (N, K, h, w), of images that are given coarsest first, down to level n + 1 at least.

    The segmenters above level n are frozen. At the coarsest level it is (1, K, 1, 1) zeros.
    """
    coarsest = state.config.levels - 1
    coarser = images[0].new_zeros(1, _progress(state).classes, 1, 1)
    with torch.no_grad():
        for n in range(coarsest, level, -1):
            segmenter = state.modules[f"segmenter_{n}"].eval()
            coarser = up2(segmenter(_with_mask(images[coarsest - n], coarser)).softmax(dim=1))
    return coarser


def _with_mask(image: Tensor, mask: Tensor) -> Tensor:
    """Concatenate along channels; a mask of one pixel, the coarsest level's zeros, is repeated."""
    mask = mask.expand(len(image), -1, *image.shape[-2:])
    return torch.cat([image, mask], dim=1)


# ----------------------------------------------------------------------------- losses


def pseudo_share(config: Config, progress: float) -> float:
    """Share of S's own pairs among those that D is to call true, at a progress of the level."""
    length = config.pseudo_to - config.pseudo_from
    done = progress - config.pseudo_from
    ramp = min(1.0, max(0.0, done / length)) if length else float(done >= 0)
    return config.pseudo_positives * ramp


def consistency_weight(config: Config, progress: float) -> float:
    """Lambda of equation 9 at a progress of the level: exp(-5 (1 - t)^2), as Laine and Aila."""
    ramp = min(1.0, progress / config.consistency_ramp) if config.consistency_ramp else 1.0
    return config.lambda_consistency * math.exp(-5 * (1 - ramp) ** 2)


# ----------------------------------------------------------------------------- training


@dataclass(frozen=True, slots=True)
class LevelBatch:
    """A batch at the size of one level.

    Attributes
    ----------
    images
        x_n, (m, C, h, w) in [-1, 1]: first those with labels, then those without.
    coarser
        up2(yh_{n+1}) of the images, (m, K, h, w).
    truth
        (m_l, h, w) int64.
    masks
        One-hot (m_l, K, h, w) of each level, level 0 first; all 0 where a label is ignored.
    level
        n.
    """

    images: Tensor
    coarser: Tensor
    truth: Tensor
    masks: list[Tensor]
    level: int

    @property
    def mask(self) -> Tensor:
        """y_n, (m_l, K, h, w)."""
        return self.masks[self.level]

    @property
    def labelled(self) -> int:
        """m_l."""
        return len(self.truth)


def step(state: State, batch: Batch) -> dict[str, Tensor]:
    """Train one level on one batch: D on what G and S make now, then G, then S, by equation 8.

    Returns
    -------
    The losses, without their weights, all from the first step on (0 until they are used):
    ``segmentation``, and as far as they are on ``synthetic``, ``segmenter_adversarial``,
    ``consistency``, ``generator_adversarial``, ``reconstruction``, ``features``, ``perceptual``
    and ``discriminator``; and ``painting_error`` where it decides what the segmenter sees.

    Raises
    ------
    DataError
        If the crops do not suit the pyramid.
    """
    config: Config = state.config
    _check_crops(config, batch)
    phase = phase_at(config, batch.step, batch.steps)
    n = phase.level
    _set_modes(state, n)
    level_batch = _at_level(state, batch, n)
    scores = _segment(state, n, level_batch.images, level_batch.coarser, config.segmenter_noise)
    losses: dict[str, Tensor] = {}
    fakes: list[tuple[Tensor, Tensor]] = []
    above: list[Tensor] = []
    if config.paints:
        coarser, above = _painted_above(state, level_batch.masks, n)
        noise = _noise(state, coarser, n)
        painted = state.modules[f"generator_{n}"](level_batch.mask, noise, coarser)
        fakes.append((painted, level_batch.mask))
        above = [*above, painted.detach()]
        if _measures_paintings(config):
            _progress(state).update(painted.detach(), level_batch.images[: level_batch.labelled])
            losses["painting_error"] = _progress(state).painting_error()
    if config.judge_segmenter:
        fakes.append((level_batch.images, _judged_mask(config, level_batch, scores)))
    if config.judges:
        reals = _true_pairs(config, level_batch, scores, phase.progress)
        losses["discriminator"] = _step_discriminator(state, n, reals, fakes)
    if config.paints:
        losses |= _step_generator(state, level_batch, painted)
    losses |= _step_segmenter(state, phase, level_batch, scores, above)
    nothing = torch.zeros_like(losses["segmentation"])
    return {name: losses.get(name, nothing).detach() for name in _loss_names(config)}


def _measures_paintings(config: Config) -> bool:
    return config.paints and config.synthetic_weight > 0 and config.synthetic_rule == "quality"


def _admits_paintings(state: State, phase: Phase) -> bool:
    """Whether S is to learn from painted images: by the share of the steps, or by their quality."""
    config: Config = state.config
    if config.synthetic_rule == "quality":
        return bool(_progress(state).painting_error() < config.synthetic_quality)
    return phase.progress >= config.synthetic_from


def _loss_names(config: Config) -> list[str]:
    used = {
        "segmentation": True,
        "synthetic": config.paints and config.synthetic_weight > 0,
        "painting_error": _measures_paintings(config),
        "segmenter_adversarial": config.judge_segmenter,
        "consistency": config.lambda_consistency > 0,
        "generator_adversarial": config.paints,
        "reconstruction": config.paints and config.lambda_rec > 0,
        "features": config.paints and config.lambda_feat > 0,
        "perceptual": config.paints and config.perceptual != "none",
        "discriminator": config.judges,
    }
    return [name for name, there in used.items() if there]


def _check_crops(config: Config, batch: Batch) -> None:
    """Refuse crops that a level cannot take, with what to set."""
    align, least = align_px(config), config.least_crop_px
    for images in (batch.images, *batch.pools.values()):
        height, width = images.shape[-2:]
        if height % align or width % align or min(height, width) < least:
            raise DataError(
                f"crops are {width} x {height} px, {config.levels} levels take multiples of "
                f"{align} px from {least} px on: set schedule.crop_px, or method.levels"
            )


def _set_modes(state: State, level: int) -> None:
    """Put the level's networks into training mode; the finished ones are frozen."""
    for name, module in state.modules.items():
        _, _, number = name.rpartition("_")
        module.train(number == str(level) or name == "teacher")


def _images_of(config: Config, batch: Batch, level: int) -> tuple[Tensor, int]:
    """Return a level's images of a batch, (m, C, H, W) uint8, and how many of them have labels.

    The first of the batch; half of them from the pool, rounded up, where there is one.
    """
    count = len(batch.images)
    if config.batches:
        # Processes share a level's batch as they share the schedule's.
        share = -(-config.batches[config.levels - 1 - level] // device.processes())
        count = min(count, share)
    if not config.uses_pool:
        return batch.images[:count], count
    half = -(-count // 2)
    return torch.cat([batch.images[:half], batch.pools[UNLABELLED][:half]]), half


def _at_level(state: State, batch: Batch, level: int) -> LevelBatch:
    config = state.config
    images, labelled = _images_of(config, batch, level)
    pyramid = halved(to_unit_range(images), config.levels)
    masks = one_hot_levels(batch.labels[:labelled], _progress(state).classes, config.levels)
    coarser = _segmented_above(state, pyramid[::-1], level)
    truth = masks[level].argmax(dim=1).masked_fill(masks[level].sum(dim=1) == 0, IGNORED)
    return LevelBatch(pyramid[level], coarser, truth, masks, level)


def _segment(state: State, level: int, images: Tensor, coarser: Tensor, noise: float) -> Tensor:
    """Scores of S_n, (m, K, h, w), on images with noise: equation 5."""
    if noise:
        images = images + noise * torch.randn_like(images)
    scores: Tensor = state.modules[f"segmenter_{level}"](_with_mask(images, coarser))
    return scores


def _judged_mask(config: Config, level_batch: LevelBatch, scores: Tensor) -> Tensor:
    """Return the segmenter's masks, (m, K, h, w), as D judges them: 0 where a true mask has no label."""
    mask = discriminator_mask(config.mask_for_discriminator, scores)
    count = level_batch.labelled
    return torch.cat([mask[:count] * level_batch.mask.sum(dim=1, keepdim=True), mask[count:]])


def _true_pairs(config: Config, level_batch: LevelBatch, scores: Tensor, progress: float) -> Tensor:
    """Pairs that D is to call true, (m_l or more, C + K, h, w).

    Algorithm 3 adds some of S's own on images without labels, hard as true masks are. Each is drawn
    with the probability that gives them, on average, their share.
    """
    count = level_batch.labelled
    images, mask = level_batch.images[:count], level_batch.mask
    if config.semi_supervised and (share := pseudo_share(config, progress)):
        drawn = torch.rand(len(scores) - count) < share / (1 - share)
        chosen = [count + i for i, wanted in enumerate(drawn.tolist()) if wanted]
        own = one_hot(scores[chosen].argmax(dim=1), scores.shape[1])
        mask = torch.cat([mask, own.to(mask.dtype)])
        images = torch.cat([images, level_batch.images[chosen]])
    return torch.cat([images, mask], dim=1)


def _step_discriminator(state: State, level: int, reals: Tensor, fakes: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Step D_n: equations 2 and 6, the mean of the kinds of pairs that are not true."""
    kind, judge = state.config.gan, state.modules[f"discriminator_{level}"]
    loss = adversarial_loss(kind, judge(reals), real=True)
    for image, mask in fakes:
        pairs = torch.cat([image, mask], dim=1).detach()
        own = adversarial_loss(kind, judge(pairs), real=False)
        if kind == "wgan-gp":
            count = min(len(reals), len(pairs))
            own = own + PENALTY * gradient_penalty(judge, reals[:count], pairs[:count])
        loss = loss + own / len(fakes)
    descend(loss, state.optimizers[f"discriminator_{level}"])
    return loss


def _step_generator(state: State, level_batch: LevelBatch, painted: Tensor) -> dict[str, Tensor]:
    """Step G_n: equation 2, D frozen."""
    config: Config = state.config
    level, images, mask = level_batch.level, level_batch.images[: level_batch.labelled], level_batch.mask
    with frozen(state.modules[f"discriminator_{level}"]) as judge:
        fake: Judged = judge(torch.cat([painted, mask], dim=1))
        with torch.no_grad():
            real: Judged = judge(torch.cat([images, mask], dim=1)) if config.lambda_feat else []
    losses = {"generator_adversarial": adversarial_loss(config.gan, fake, real=True)}
    total = losses["generator_adversarial"]
    if config.lambda_rec:
        distance = F.l1_loss if config.rec_loss == "l1" else F.mse_loss
        losses["reconstruction"] = distance(painted, images)
        total = total + config.lambda_rec * losses["reconstruction"]
    if config.lambda_feat:
        losses["features"] = feature_loss(real, fake)
        total = total + config.lambda_feat * losses["features"]
    if config.perceptual != "none":
        losses["perceptual"] = perceptual_loss(state.modules["perceptual"], painted, images)
        total = total + config.lambda_perc * losses["perceptual"]
    descend(total, state.optimizers[f"generator_{level}"])
    return losses


def _step_segmenter(
    state: State, phase: Phase, level_batch: LevelBatch, scores: Tensor, painted: list[Tensor]
) -> dict[str, Tensor]:
    """Step S_n: equation 7 and the cross-entropy on painted images, D frozen; or equation 9.

    ``scores`` are those of S_n; ``painted`` is xt_N to xt_n, coarsest first.
    """
    config: Config = state.config
    n, weights = phase.level, state.class_weights
    losses = {"segmentation": cross_entropy(scores[: level_batch.labelled], level_batch.truth, weights)}
    total = config.lambda_ce * losses["segmentation"]
    if config.judge_segmenter:
        mask = _judged_mask(config, level_batch, scores)
        with frozen(state.modules[f"discriminator_{n}"]) as judge:
            judged: Judged = judge(torch.cat([level_batch.images, mask], dim=1))
        losses["segmenter_adversarial"] = adversarial_loss(config.gan, judged, real=True)
        total = total + losses["segmenter_adversarial"]
    if painted and config.synthetic_weight and _admits_paintings(state, phase):
        coarser = _segmented_above(state, painted, n)
        with _statistics(state.modules[f"segmenter_{n}"], move=config.painted_statistics):
            painted_scores = _segment(state, n, painted[-1], coarser, config.segmenter_noise)
        losses["synthetic"] = cross_entropy(painted_scores, level_batch.truth, weights)
        total = total + config.synthetic_weight * losses["synthetic"]
    if config.lambda_consistency:
        losses["consistency"] = _consistency(state, level_batch)
        total = total + consistency_weight(config, phase.progress) * losses["consistency"]
    descend(total, state.optimizers[f"segmenter_{n}"])
    if "teacher" in state.modules:
        follow(state.modules["teacher"], state.modules[f"segmenter_{n}"], config.ema)
    return losses


def _consistency(state: State, level_batch: LevelBatch) -> Tensor:
    """Mean square of teacher minus student, each with noise of its own: L_C of equation 9."""
    noise = state.config.consistency_noise
    with torch.no_grad():
        noisy = level_batch.images + noise * torch.randn_like(level_batch.images)
        wanted = state.modules["teacher"](_with_mask(noisy, level_batch.coarser)).softmax(dim=1)
    student = _segment(state, level_batch.level, level_batch.images, level_batch.coarser, noise).softmax(dim=1)
    return F.mse_loss(student, wanted)


# ----------------------------------------------------------------------------- evaluation


def finest_level(state: State) -> int:
    """Return the number of the finest level that was trained; 0 when a run is over."""
    return int(_progress(state).level)


def segmenters(state: State) -> SegmenterPyramid:
    """Return the levels that are trained, coarsest first, as one network."""
    config = state.config
    levels = range(config.levels - 1, finest_level(state) - 1, -1)
    return SegmenterPyramid([cast(FCDenseNet, state.modules[f"segmenter_{n}"]) for n in levels], config.levels)


def generators(state: State) -> GeneratorPyramid:
    """Return the levels that are trained, coarsest first, as one network."""
    config, run = state.config, _progress(state)
    levels = range(config.levels - 1, int(run.level) - 1, -1)
    amplitudes = [float(run.amplitudes[n]) for n in levels]
    return GeneratorPyramid([state.modules[f"generator_{n}"] for n in levels], amplitudes)


@torch.no_grad()
def validate(state: State, images: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Return the mean cross-entropy, and the predicted labels (N, H, W).

    Of the pyramid as far as it is trained: what a checkpoint of this moment would deploy.
    """
    probability = segmenters(state).eval()(to_unit_range(images))
    own = (probability * one_hot(labels, probability.shape[1])).sum(dim=1, keepdim=True).clamp(min=EPSILON)
    return float(annotated_mean(-own.log(), labels, state.class_weights)), probability.argmax(dim=1)


@torch.no_grad()
def paint(state: State, images: Tensor) -> dict[str, Tensor]:
    """Return what the generators paint from the predicted labels, (N, C, H, W) uint8.

    The noise is the same each time, so that sheets show what training changes.
    """
    config: Config = state.config
    if not config.paints:
        return {}
    run = _progress(state)
    predicted = segmenters(state).eval()(to_unit_range(images)).argmax(dim=1)
    masks = one_hot_levels(predicted, run.classes, config.levels)[int(run.level) :][::-1]
    source = torch.Generator().manual_seed(0)
    noises = [torch.randn(len(m), run.channels, *m.shape[-2:], generator=source).to(m.device) for m in masks]
    small = generators(state).eval()(masks, noises).movedim(-1, 1)
    times = 1 << int(run.level)
    return {"painted": small.repeat_interleave(times, -2).repeat_interleave(times, -1)}


class Deployed(TileModel):
    """S_N to S_0 behind the tile contract."""

    def __init__(self, pyramid: SegmenterPyramid) -> None:
        super().__init__()
        self.pyramid = pyramid

    def scores(self, images: Tensor) -> Tensor:
        """Return the probability of each class."""
        probability: Tensor = self.pyramid(images / HALF_RANGE - 1)
        return probability


def deployed(state: State) -> TileModel:
    """Return the module that export wraps: the segmenters, dropout off, batch statistics frozen."""
    return Deployed(segmenters(state)).eval()
