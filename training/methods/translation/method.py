"""Segmentation by image-to-image translation: few masks, and images with and without the target.

"Towards semi-supervised segmentation via image-to-image translation" (Vorontsov et al.). The
encoder divides an image into what it has in common with images of the absence domain A and what is
unique to the presence domain P, as tumours or digits are. Decoding the common part alone takes the
target out of an image; the decoder of the difference segments too.

=====================  ==========================================================
paper                  here
=====================  ==========================================================
x_P, x_A               pools "presence" and "absence", (N, C, H, W)
f; c, u                ``encoder``; its code, u the last channels
g_com, g_res           ``common``, ``residual``
g_seg, MLP             ``residual`` with "labels"; or ``segmenter``, its own decoder
Delta_PA               ``Translated.d_pa``
D_A, D_P               ``discriminator_absence``, ``discriminator_presence``
y                      probability of each class but the background, a sigmoid each
=====================  ==========================================================

Labelled images are images of P (crop them so that the target is in view). Their share of a step's P
images, where they replace images of the pool, is their share of all P images of the data: with 1 %
and batches of 20, one image in every fifth step. The rest of the labelled batch is not used. L_seg is
the Dice loss of these images together, and 0 in a step without any.

Errors in the paper: equation 4 composes the classification s into the decoder, where s is applied
to its result. Equation 8 writes the Dice coefficient itself, which is to be maximised. Equation 12
has the terms of D with a minus sign under a maximum, which would reward a bad discriminator; it is
the hinge loss of the work that it cites. Its last term is what G minimises. Section 4.3 says that
all kinds of long skips are better than the baselines; its table says that "none" is not.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histostream.training.batches import Parts
from histostream.training.checks import Decaying, LearningRate, Range, Share, Weight, Width, check_fields
from histostream.training.data import DataError
from histostream.training.losses import known, one_hot, soft_dice
from histostream.training.methods.translation.networks import (
    AdaptiveNorms,
    Decoder,
    Encoder,
    ResidualDecoder,
    SeparateNorms,
    fold_spectral_norm,
    multi_scale_discriminator,
)
from histostream.training.networks.tile_model import TileModel
from histostream.training.state import Batch, State
from histostream.training.steps import HALF_RANGE, descend, evaluating, frozen

PRESENCE, ABSENCE = "presence", "absence"  # names of the pools
EXPLAINED_BY = ("encoder", "common")  # the modules of `explained`


@dataclass(frozen=True, slots=True)
class Config:
    """What defines a model; the defaults are the paper's for 48 x 48 px, and ours where it says so.

    The paper's comparators (table 1) differ in these fields:

    =====================  ============  ==============  ========  =============
    name                   objective     shared_decoder  skips     spectral_norm
    =====================  ============  ==============  ========  =============
    proposed               translation   True            compress  True
    proposed (sep dec)     translation   False           compress  True
    concat, sum, no skip   translation   True            ...       True
    AE baseline            autoencoder   -               compress  False
    only segmentation      segmentation  -               compress  False
    =====================  ============  ==============  ========  =============

    The AE baseline reconstructs all images, by a decoder without long skips, and segments the
    labelled ones by another. "Only segmentation" trains on full batches of labelled images.

    Images are of one size with ``segmentation_norm="adain"``, whose MLP reads the whole code:
    ``image_px``, which is the tile of the deployed model too; a larger image is segmented in such
    tiles. With "layer" they are of any size.
    """

    objective: Literal["translation", "autoencoder", "segmentation"] = "translation"
    shared_decoder: bool = True  # paper: the residual decoder segments; False: one of its own does
    skips: Literal["compress", "concat", "sum", "none"] = "compress"  # paper
    normalise_skips: bool = True  # paper; authors' code leaves "concat" and "sum" as they are
    segmentation_norm: Literal["adain", "layer"] = "adain"  # paper, MNIST; "layer": own layer norm (BraTS)
    image_px: Annotated[int, Range(1, 16384)] = 48  # paper, MNIST; side of the images, with "adain" only
    width: Width = 32  # paper, tables 2 to 4; 16 for 128 px and BraTS, tables 5 to 7
    depth: Annotated[int, Range(1, 8)] = 4  # paper: halvings; 5 for 128 px and BraTS
    unique_channels: Annotated[int, Range(1, 2**20)] = 128  # paper: of 512, the last ones (authors' code)
    # "authors_code": a layer more in each decoder, the last one 7 x 7.
    head: Literal["paper", "authors_code"] = "paper"
    # "paper": ReLU between its 4 layers (ours); "authors_code": none, 2 are the same.
    mlp: Literal["paper", "authors_code"] = "paper"
    mlp_width: Annotated[int, Range(1, 65536)] = 256  # paper
    image_activation: Literal["tanh", "none"] = "tanh"  # authors' code, of each decoder before the sum
    pixel_range: Literal["0..1", "-1..1"] = "0..1"  # authors' code, MNIST; "-1..1": all of the tanh
    spectral_norm: bool = True  # paper; baselines: not (authors' code)
    discriminator: Literal["paper", "authors_code"] = "paper"  # tables 8 and 9; "authors_code": a layer less
    discriminator_width: Width = 128  # paper, table 8; 64 for BraTS, table 9
    discriminator_stages: Annotated[int, Range(1, 8)] = 3  # paper, table 8; 4 for BraTS, table 9
    # Authors' code; translation-paper: "mean_first", as printed.
    hinge: Literal["per_pixel", "mean_first"] = "per_pixel"
    lambda_adv: Weight = 3.0  # paper, as all lambdas
    lambda_rec: Weight = 50.0  # AE baseline: 1
    lambda_lat: Weight = 1.0
    lambda_cyc: Weight = 50.0  # its term is "optional"
    lambda_seg: Weight = 0.01  # appendix, missing in equation 7; AE baseline: 1
    labelled_share: Share = 0.0  # ours: of the P images that have a mask; 0: as in the data
    learning_rate: LearningRate = 1e-4  # paper
    discriminator_learning_rate: LearningRate = 1e-3  # paper
    beta1: Decaying = 0.5  # paper
    beta2: Decaying = 0.999  # paper
    weight_decay: Share = 1e-4  # authors' code

    def __post_init__(self) -> None:
        check_fields(self)
        if self.unique_channels >= self.code_channels:
            raise ValueError(
                f"unique_channels={self.unique_channels}: the code has {self.code_channels} channels "
                f"(width={self.width}, depth={self.depth}), use 1 to {self.code_channels - 1}"
            )
        if self.fixed_px and (self.image_px % self.stride_px or self.image_px < self.least_px):
            raise ValueError(
                f"image_px={self.image_px}: use a multiple of {self.stride_px}, {self.least_px} or "
                'more; or segmentation_norm="layer", which takes any size'
            )

    @property
    def stride_px(self) -> int:
        """Pixels of the image for each of the code."""
        return 1 << self.depth

    @property
    def code_channels(self) -> int:
        """Channels of c and u together, 512 at the paper's widths."""
        return self.width << self.depth

    @property
    def fixed_px(self) -> int:
        """Side that images must have, 0 for any: the AdaIN of a shared decoder fixes it."""
        shared = self.objective == "translation" and self.shared_decoder
        return self.image_px if shared and self.segmentation_norm == "adain" else 0

    @property
    def least_px(self) -> int:
        """Smallest side of an image: a code of two pixels, and a patch for each discriminator."""
        least = 2 * self.stride_px
        if self.objective == "translation" and self.lambda_adv:
            least = max(least, 4 << self.discriminator_stages)
        return least


def align_px(config: Config) -> int:
    """Whole images are mirrored up to multiples of this: of the tile, where the size is fixed."""
    return config.fixed_px or 1


def least_px(config: Config) -> int:
    """Return the smallest side of an image."""
    return config.least_px


def only_px(config: Config) -> int:
    """Return the only side of an image, 0 for any."""
    return config.fixed_px


def pools(config: Config) -> tuple[str, ...]:
    """Images with and without the target, unless the segmentation is learned alone."""
    return () if config.objective == "segmentation" else (PRESENCE, ABSENCE)


def takes_class_weights(config: Config) -> str:
    """Return why class weights are not taken: the loss is a Dice coefficient."""
    return "its loss is the mean of the Dice coefficients of the classes, whatever their areas: leave them out"


class LabelledShare(nn.Module):
    """The share of the P images of the data that have a mask; a buffer, so checkpoints have it."""

    share: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("share", torch.ones((), dtype=torch.float64))


def build(config: Config, classes: int, channels: int = 3) -> State:
    """Make the networks and their optimisers."""
    # The encoder comes first: all comparators of one seed start from the same.
    modules: dict[str, nn.Module] = {
        "encoder": Encoder(channels, config.width, config.depth, spectral=config.spectral_norm)
    }
    code, targets = config.code_channels, classes - 1
    if config.objective == "translation":
        common = code - config.unique_channels
        modules["common"] = _decoder(config, common, channels, kernel=3, image=True)
        image = _decoder(config, code, channels, kernel=5, image=True)
        modules["residual"] = (
            ResidualDecoder(image, _label_norms(config, image), targets, head=config.head, channels=channels)
            if config.shared_decoder
            else image
        )
    if config.objective == "autoencoder":
        modules["reconstructor"] = _decoder(config, code, channels, kernel=3, image=True, skips="none")
    if not (config.objective == "translation" and config.shared_decoder):
        modules["segmenter"] = _decoder(config, code, targets, kernel=3, image=False)
    generator = [p for module in modules.values() for p in module.parameters()]
    optimizers = {"generator": _optimizer(config, generator, config.learning_rate)}
    if config.objective == "translation" and config.lambda_adv:
        for domain in (ABSENCE, PRESENCE):
            modules[f"discriminator_{domain}"] = multi_scale_discriminator(
                channels,
                config.discriminator_width,
                config.discriminator_stages,
                layout=config.discriminator,
                spectral=config.spectral_norm,
            )
        judges = [p for module in _discriminators(modules) for p in module.parameters()]
        optimizers["discriminator"] = _optimizer(config, judges, config.discriminator_learning_rate)
    modules["labelled"] = LabelledShare()
    segmenter = "segmenter" if "segmenter" in modules else "residual"
    return State(config, modules, optimizers, needed=("encoder", segmenter))


def _decoder(
    config: Config, in_channels: int, out_channels: int, *, kernel: int, image: bool, skips: str | None = None
) -> Decoder:
    return Decoder(
        in_channels,
        out_channels,
        config.width,
        config.depth,
        kernel=kernel,
        short_skips=kernel == 3,
        skips=skips or config.skips,
        normalise_skips=config.normalise_skips,
        head=config.head,
        bounded=image and config.image_activation == "tanh",
        spectral=image and config.spectral_norm,  # a separate segmenter: not (authors' code)
    )


def _label_norms(config: Config, image: Decoder) -> AdaptiveNorms | SeparateNorms:
    if config.segmentation_norm == "layer":
        return SeparateNorms(image.merged)
    return AdaptiveNorms(
        config.code_channels,
        config.image_px // config.stride_px,
        image.merged,
        width=config.mlp_width,
        layout=config.mlp,
    )


def _optimizer(config: Config, weights: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(weights, rate, (config.beta1, config.beta2), weight_decay=config.weight_decay, amsgrad=True)


def _discriminators(modules: dict[str, nn.Module]) -> list[nn.Module]:
    names = (f"discriminator_{domain}" for domain in (ABSENCE, PRESENCE))
    return [modules[name] for name in names if name in modules]


def before_step(state: State, parts: Parts, step: int, steps: int) -> None:
    """Count the P images and those with a mask before the first step."""
    if step or not pools(state.config):
        return
    # A labelled image may be in the pool too, as it is in cluttered MNIST.
    labelled = {parts.samples[i].name for i in parts.split.train}
    everything = labelled | {picture.name for picture in parts.pools[PRESENCE]}
    share = state.config.labelled_share or len(labelled) / len(everything)
    cast(LabelledShare, state.modules["labelled"]).share.fill_(share)


# ----------------------------------------------------------------------------- losses


def dice_loss(probability: Tensor, labels: Tensor) -> Tensor:
    """Minus the soft Dice coefficient of all images together, smoothed by 1 (authors' code): equation 8.

    The mean over the classes without the background; -1 is best.

    Parameters
    ----------
    probability
        (N, K - 1, H, W), of each class but the background.
    labels
        (N, H, W), 0..K-1 or `IGNORED`.
    """
    truth = one_hot(labels, probability.shape[1] + 1)[:, 1:]
    return -soft_dice(probability * known(labels), truth).mean()


def judging_loss(real: Sequence[Tensor], fake: Sequence[Tensor], hinge: str) -> Tensor:
    """Return what D minimises: E max(0, 1 - D(x)) + E max(0, 1 + D(G)), equation 12.

    Parameters
    ----------
    real, fake
        Its maps (N, 1, h, w) of each scale.
    hinge
        "per_pixel" (authors' code): the hinge of each pixel, then the mean of a map, then of the
        scales. "mean_first" (paper, appendix): "first, all pixels in this map are averaged and
        second, the resulting discriminator values are averaged across all scales"; equation 12 is
        then of the one value D(x) of each image.
    """
    return _hinged(real, hinge, -1) + _hinged(fake, hinge, 1)


def fooling_loss(fake: Sequence[Tensor]) -> Tensor:
    """Return what the generator side minimises: -E D(G), in either order of the hinge."""
    return -torch.stack([m.mean() for m in fake]).mean()


def _hinged(maps: Sequence[Tensor], hinge: str, sign: int) -> Tensor:
    if hinge == "mean_first":
        maps = [torch.stack([m.mean((1, 2, 3)) for m in maps]).mean(dim=0)]
    return torch.stack([F.relu(1 + sign * m).mean() for m in maps]).mean()


# ----------------------------------------------------------------------------- translation


@dataclass(frozen=True, slots=True)
class Translated:
    """What the networks make of images of P and of A: equations 1, 2, 3 and 6.

    Attributes
    ----------
    x_p, x_a
        The images, (N, C, H, W).
    c_p, u_p, c_a
        Their codes.
    maps_p
        The encoder's maps of x_p.
    u
        What was sampled in the place of u_a.
    x_pa, d_pa, x_aa, x_ap
        x_p without its target, the target alone, x_a again, and x_a with a target.
    """

    x_p: Tensor
    x_a: Tensor
    c_p: Tensor
    u_p: Tensor
    c_a: Tensor
    maps_p: list[Tensor]
    u: Tensor
    x_pa: Tensor
    d_pa: Tensor
    x_aa: Tensor
    x_ap: Tensor

    @property
    def x_pp(self) -> Tensor:
        """x_p again: without its target, and the target (equation 3)."""
        return self.x_pa + self.d_pa


def translate(state: State, x_p: Tensor, x_a: Tensor) -> Translated:
    """Take the target out of images of P and put one into images of A.

    Both pass through the networks as one batch, which is the same as one after the other: each
    image is normalised by itself. Each decoder gets the maps of the image whose code it gets.
    """
    count, unique = len(x_p), state.config.unique_channels
    code, maps = state.modules["encoder"](torch.cat([x_p, x_a]))
    c, u_p = code[:, :-unique], code[:count, -unique:]
    u = torch.randn((len(x_a), *u_p.shape[1:]), device=code.device)
    x_pa, x_aa = _divided(state.modules["common"](c, maps), count)
    sampled = torch.cat([code[:count], torch.cat([c[count:], u], dim=1)])
    d_pa, d_ap = _divided(state.modules["residual"](sampled, maps), count)
    return Translated(
        x_p=x_p,
        x_a=x_a,
        c_p=c[:count],
        u_p=u_p,
        c_a=c[count:],
        maps_p=[m[:count] for m in maps],
        u=u,
        x_pa=x_pa,
        d_pa=d_pa,
        x_aa=x_aa,
        x_ap=x_aa + d_ap,
    )


def _divided(both: Tensor, count: int) -> tuple[Tensor, Tensor]:
    return both[:count], both[count:]


def translation_losses(state: State, t: Translated) -> dict[str, Tensor]:
    """Losses of the generator side: equations 9, 10 and 11, and what is left for G of 12."""
    config = state.config
    losses = {"reconstruction": F.l1_loss(t.x_pp, t.x_p) + F.l1_loss(t.x_aa, t.x_a)}
    if config.lambda_lat or config.lambda_cyc:
        # Only the cycle needs x_AP alone.
        images = [t.x_ap, t.x_pa, t.x_pp, t.x_aa] if config.lambda_lat else [t.x_ap]
        code, maps = state.modules["encoder"](torch.cat(images))
        c, u = code[:, : -config.unique_channels], code[:, -config.unique_channels :]
        count = len(t.x_ap)
        if config.lambda_lat:
            sizes = [len(x) for x in images]
            (c_ap, c_pa, c_pp, c_aa), (u_ap, _, u_pp, _) = c.split(sizes), u.split(sizes)
            pairs = ((t.c_p, c_pa), (t.c_a, c_ap), (t.c_a, c_aa), (t.c_p, c_pp), (t.u_p, u_pp), (t.u, u_ap))
            # The authors stop no gradient: either code of a pair moves to the other.
            losses["latent"] = torch.stack([F.l1_loss(a, b) for a, b in pairs]).sum()
        if config.lambda_cyc:
            x_apa = state.modules["common"](c[:count], [m[:count] for m in maps])
            losses["cycle"] = F.l1_loss(x_apa, t.x_a)
    if config.lambda_adv:
        losses["adversarial"] = _fool(state, ABSENCE, t.x_pa) + _fool(state, PRESENCE, t.x_ap)
    return losses


def _fool(state: State, domain: str, fake: Tensor) -> Tensor:
    """Return the loss of images that shall pass for those of a domain; D gets no gradient."""
    with frozen(state.modules[f"discriminator_{domain}"]) as discriminator:
        return fooling_loss(discriminator(fake))


def judge(state: State, t: Translated) -> Tensor:
    """Return the sum of both discriminators' losses; no gradient reaches the images."""
    losses = []
    for domain, real, fake in ((ABSENCE, t.x_a, t.x_pa), (PRESENCE, t.x_p, t.x_ap)):
        maps = state.modules[f"discriminator_{domain}"](torch.cat([real, fake.detach()]))
        halves = [_divided(m, len(real)) for m in maps]
        losses.append(judging_loss([a for a, _ in halves], [b for _, b in halves], state.config.hinge))
    return torch.stack(losses).sum()


# ----------------------------------------------------------------------------- training


def step(state: State, batch: Batch) -> dict[str, Tensor]:
    """Train on one batch: the discriminators, then all others by equation 7, from one pass.

    Returns
    -------
    The losses, without their weights: ``segmentation`` (0 in a step without a labelled image), and
    as far as they are on ``reconstruction``, ``latent``, ``cycle``, ``adversarial`` and
    ``discriminator``, the last two summed over both domains.

    Raises
    ------
    DataError
        If images are too small, of several sizes, or not of the size that the model is built for.
    """
    config: Config = state.config
    _check_images(config, batch)
    if config.objective == "segmentation":
        code, maps = state.modules["encoder"](scaled(batch.images, config))
        losses = {"segmentation": _segmentation_loss(state, code, maps, batch.labels)}
    elif config.objective == "autoencoder":
        losses = _autoencoder_losses(state, batch)
    else:
        losses = _step_translation(state, batch)
    weights = {
        "segmentation": config.lambda_seg,
        "reconstruction": config.lambda_rec,
        "latent": config.lambda_lat,
        "cycle": config.lambda_cyc,
        "adversarial": config.lambda_adv,
    }
    total = torch.stack([w * losses[name] for name, w in weights.items() if name in losses]).sum()
    descend(total, state.optimizers["generator"])
    return {name: loss.detach() for name, loss in losses.items()}


def _step_translation(state: State, batch: Batch) -> dict[str, Tensor]:
    """Step the discriminators; return all losses, with that of the discriminators."""
    x_p, x_a, labels = _both_domains(state, batch)
    t = translate(state, x_p, x_a)
    judged = {}
    if state.config.lambda_adv:
        judged["discriminator"] = judge(state, t)
        # Times lambda, as in equations 7 and 12; with a weight decay Adam is not blind to it.
        descend(state.config.lambda_adv * judged["discriminator"], state.optimizers["discriminator"])
    code = torch.cat([t.c_p, t.u_p], dim=1)
    losses = {"segmentation": _segmentation_loss(state, code, t.maps_p, labels)}
    return losses | translation_losses(state, t) | judged


def _autoencoder_losses(state: State, batch: Batch) -> dict[str, Tensor]:
    """Losses of the AE baseline: reconstruct all images, segment the labelled ones."""
    x_p, x_a, labels = _both_domains(state, batch)
    x = torch.cat([x_p, x_a])
    code, maps = state.modules["encoder"](x)
    return {
        "segmentation": _segmentation_loss(state, code, maps, labels),
        "reconstruction": F.l1_loss(state.modules["reconstructor"](code, maps), x),
    }


def labelled_count(share: float, batch: int, step: int) -> int:
    """Return how many P images of a step have masks: spread evenly, so all processes agree."""
    before, after = (int(n * batch * share + 1e-9) for n in (step, step + 1))
    return after - before


def _both_domains(state: State, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the images of P, those of A, and the masks of the first images of P."""
    share = float(cast(LabelledShare, state.modules["labelled"]).share)
    count = labelled_count(share, len(batch.images), batch.step)
    present = torch.cat([batch.images[:count], batch.pools[PRESENCE][count:]])
    x_p, x_a = scaled(present, state.config), scaled(batch.pools[ABSENCE], state.config)
    return x_p, x_a, batch.labels[:count]


def _segmentation_loss(state: State, code: Tensor, maps: list[Tensor], labels: Tensor) -> Tensor:
    """Return the Dice loss of the images that have labels, the first ones of a batch."""
    count = len(labels)
    if not count:
        return torch.zeros((), device=code.device)
    logits = segment(_segmenter(state), code[:count], [m[:count] for m in maps])
    return dice_loss(logits.sigmoid(), labels)


def segment(segmenter: nn.Module, code: Tensor, maps: list[Tensor]) -> Tensor:
    """Return the logits (N, K - 1, H, W) of the decoder that segments."""
    if isinstance(segmenter, ResidualDecoder):
        logits: Tensor = segmenter(code, maps, "labels")
    else:
        logits = segmenter(code, maps)
    return logits


def _segmenter(state: State) -> nn.Module:
    return state.modules[state.needed[1]]


def _check_images(config: Config, batch: Batch) -> None:
    """Refuse images that the networks cannot take, with what to set."""
    shapes = {images.shape[-2:] for images in (batch.images, *batch.pools.values())}
    for height, width in sorted(shapes):
        crops = f"crops are {width} x {height} px"
        if config.fixed_px and (height, width) != (config.fixed_px, config.fixed_px):
            raise DataError(
                f"{crops}, the model is built for image_px={config.fixed_px}: set method.image_px "
                'and schedule.crop_px alike, or method.segmentation_norm="layer"'
            )
        if min(height, width) < config.least_px:
            raise DataError(f"{crops}, the networks take {config.least_px} px or more: set schedule.crop_px higher")
    if len(shapes) > 1:
        sizes = ", ".join(f"{width} x {height}" for height, width in sorted(shapes))
        raise DataError(
            f"images of several sizes ({sizes}) do not stack: set a schedule.crop_px, or bring "
            "labelled images and pools to one size"
        )


# ----------------------------------------------------------------------------- evaluation


def scaled(images: Tensor, config: Config) -> Tensor:
    """Map (N, C, H, W), 0..255, to float32 in the range that the networks take."""
    x = images.to(torch.float32)
    return x / 255 if config.pixel_range == "0..1" else x / HALF_RANGE - 1


def levels(x: Tensor, config: Config) -> Tensor:
    """Map back to grey levels, uint8; what is beyond black or white is cut off."""
    return torch.clamp(_grey(x, config) + 0.5, 0, 255).to(torch.uint8)


def _grey(x: Tensor, config: Config) -> Tensor:
    return x * 255 if config.pixel_range == "0..1" else (x + 1) * HALF_RANGE


@torch.no_grad()
def probabilities(state: State, images: Tensor) -> Tensor:
    """Return the probability of each class but the background, (N, K - 1, H, W).

    Where the networks take one size, the image is cut into tiles of it.

    Raises
    ------
    DataError
        If the image is too small, or cannot be cut into whole tiles.
    """
    tiles = _cut(images, state.config)
    with evaluating(*state.modules.values()):
        code, maps = state.modules["encoder"](scaled(tiles, state.config))
        tile_probabilities = segment(_segmenter(state), code, maps).sigmoid()
    return _joined(tile_probabilities, images.shape[-2:])


@torch.no_grad()
def validate(state: State, images: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Return the Dice loss, and the predicted labels (N, H, W).

    The other terms are left out: they do not measure the segmentation.
    """
    probability = probabilities(state, images)
    return float(dice_loss(probability, labels)), with_background(probability).argmax(dim=1)


def with_background(probability: Tensor) -> Tensor:
    """Put the background before the other classes: 1 - p of the most probable of them.

    So the arg-max is the background where no class has more than one half.
    """
    return torch.cat([1 - probability.amax(dim=1, keepdim=True), probability], dim=1)


@torch.no_grad()
def paint(state: State, images: Tensor) -> dict[str, Tensor]:
    """Return the image without its target (x_PA), the residual, and the image again (x_PP).

    Returns
    -------
    Images, (N, C, H, W) uint8: "absence", "residual" (grey is 0, white 1) and "reconstruction";
    of the AE baseline the last alone.
    """
    config = state.config
    if config.objective == "segmentation":
        return {}
    with evaluating(*state.modules.values()):
        code, maps = state.modules["encoder"](scaled(_cut(images, config), config))
        if config.objective == "autoencoder":
            painted = {"reconstruction": state.modules["reconstructor"](code, maps)}
        else:
            x_pa = state.modules["common"](code[:, : -config.unique_channels], maps)
            d_pa = state.modules["residual"](code, maps)
            painted = {"absence": x_pa, "reconstruction": x_pa + d_pa}
    columns = {name: levels(x, config) for name, x in painted.items()}
    if config.objective == "translation":
        grey = torch.clamp((d_pa + 1) * HALF_RANGE + 0.5, 0, 255)
        columns["residual"] = grey.to(torch.uint8)
    return {name: _joined(x, images.shape[-2:]) for name, x in columns.items()}


def _cut(images: Tensor, config: Config) -> Tensor:
    """Cut images (N, C, H, W) into the tiles that the networks take, (M, C, h, w)."""
    (count, channels, height, width), side = images.shape, config.fixed_px
    if min(height, width) < config.least_px:
        raise DataError(f"image of {width} x {height} px: this model takes {config.least_px} px or more; leave it out")
    if not side:
        return images
    if height % side or width % side:
        raise DataError(f"image of {width} x {height} px: mirror it to multiples of {side} px")
    grid = images.reshape(count, channels, height // side, side, width // side, side)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, side, side)


def _joined(tiles: Tensor, shape: torch.Size) -> Tensor:
    """Put tiles (M, K, h, w) together again, row by row, to (N, K, H, W)."""
    (_, channels, h, w), (height, width) = tiles.shape, shape
    grid = tiles.reshape(-1, height // h, width // w, channels, h, w)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)


class Deployed(TileModel):
    """Encoder and segmenting decoder behind the tile contract.

    Attributes
    ----------
    tile_px
        Side of the tiles where it takes one only, else 0.
    """

    def __init__(self, encoder: nn.Module, segmenter: nn.Module, config: Config) -> None:
        super().__init__()
        self.encoder = encoder
        self.segmenter = segmenter
        self.config = config
        self.tile_px = config.fixed_px

    def scores(self, images: Tensor) -> Tensor:
        """Return the probability of each class."""
        code, maps = self.encoder(scaled(images, self.config))
        return with_background(segment(self.segmenter, code, maps).sigmoid())


def deployed(state: State) -> TileModel:
    """Return the module that export wraps, its convolutions made plain.

    No common decoder, no discriminator, no noise; of the residual decoder the segmentation alone.
    """
    encoder, segmenter = copy.deepcopy((state.modules["encoder"], _segmenter(state)))
    return fold_spectral_norm(Deployed(encoder, segmenter, state.config)).eval()


class Explained(nn.Module):
    """The image without its target, x_PA: uint8 (N, H, W, C) in, uint8 (N, C, H, W) out."""

    def __init__(self, encoder: nn.Module, common: nn.Module, config: Config) -> None:
        super().__init__()
        self.encoder = encoder
        self.common = common
        self.config = config
        self.tile_px = config.fixed_px

    def forward(self, tiles: Tensor) -> Tensor:
        """Return the grey levels of what is common to both domains."""
        images = tiles.to(torch.float32).permute(0, 3, 1, 2)
        code, maps = self.encoder(scaled(images, self.config))
        grey = _grey(self.common(code[:, : -self.config.unique_channels], maps), self.config)
        return torch.clamp(grey + 0.5, 0, 255).to(torch.uint8)


def explained(state: State) -> nn.Module:
    """Return the second graph that can be exported: the image without its target.

    Raises
    ------
    DataError
        If the model does not translate.
    """
    if state.config.objective != "translation":
        raise DataError(
            f'objective="{state.config.objective}": the model does not translate; use a run of another objective'
        )
    parts = copy.deepcopy([state.modules[name] for name in EXPLAINED_BY])
    return fold_spectral_norm(Explained(parts[0], parts[1], state.config)).eval()
