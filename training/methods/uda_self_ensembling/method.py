"""UDA with self-ensembling: nuclei of a target set without labels, learnt from a labelled source.

The paper on unsupervised domain adaptation (UDA) by self-ensembling. S segments images of both
domains. D tells the source's label maps from the target's, and S learns to deceive it. R repaints
the target's image from its label map. S is trained to agree with itself on turned images, and to
be certain.

==========  ===========================================================
paper       here
==========  ===========================================================
X_s, X_t    ``batch.images``, ``batch.pools["target"]``, normalised per set
Y_s         ``batch.labels``, (N, H, W), 0 ground and 1 nuclei
S           ``segmenter``, (N, C, H, W) to logits (N, 1, H, W); Y^ is their sigmoid
D           ``discriminator``, Y^ to logits (N, 1, H/32, W/32) of "source"
R           ``reconstructor``, Y^ to (N, C, H, W), linear
pi          `turned`: quarter turns and mirroring
lambda(E)   `ramp`
==========  ===========================================================

Equations 2, 3, 5, 7, 8 and 9 cannot be meant as they are printed; `entropy_loss`, `Config`,
`ramp`, `step_discriminator`, `reconstruction_loss` and `step` describe what is done instead. (Equation 11 is
equation 10 printed twice.) The paper's CRF is applied to what is deployed, outside of the network:
its ablation "-CRF" is inference without that option.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histostream.training import device
from histostream.training.batches import Parts, padded, stacked, unannotated
from histostream.training.checks import Decaying, LearningRate, Range, Share, Weight, Width, check_fields
from histostream.training.data import DataError, Picture
from histostream.training.losses import EPSILON, known, logit_loss, soft_dice
from histostream.training.methods.uda_self_ensembling.networks import STRIDE_PX, BatchNormUNet
from histostream.training.networks.discriminator import DomainDiscriminator
from histostream.training.networks.tile_model import TileModel
from histostream.training.networks.unet import widths_of
from histostream.training.state import Batch, State
from histostream.training.steps import HALF_RANGE, adam, descend, evaluating, follow, frozen, measure_statistics

SOURCE, TARGET = 0, 1  # rows of the measurements in `Domains`
MIN_PX = 32  # what the discriminator halves five times
FRACTION_PIXELS = 1 << 22  # pixels that CBST's thresholds are read from


@dataclass(frozen=True, slots=True)
class Config:
    """What defines a model; the defaults are the paper's, and ours where it is silent.

    Slides as the target have glass on their tiles, which their mean and deviation then describe as
    much as the tissue: choose ``normalise="source"`` there, and leave ``bn_recalibrate`` off.

    The methods that it is compared with, its ablations, the floor and the ceiling differ in these
    fields only; the weights are those of L_em, L_mse, L_adv, L_rec:

    ====================  ================  ===============================
    name                  weights           else
    ====================  ================  ===============================
    full                  1, 1, 1e-3, 1e-2
    without EM loss       0, 1, 1e-3, 1e-2
    without SE            1, 0, 1e-3, 1e-2
    CellSegUDA            0, 0, 1e-3, 1e-2
    DA-ADV                0, 0, 1e-3, 0
    source-only           0, 0, 0, 0
    source, target seen   0, 0, 0, 0        ``forward_target=True``
    CBST                  0, 0, 0, 0        ``self_training=True``
    oracle                0, 0, 0, 0        the target's labels as the data
    ====================  ================  ===============================
    """

    em_form: Literal["printed", "binary"] = "printed"  # eq. 2 prints -p log p; "binary": what its text calls for
    em_domains: Literal["source", "both"] = "source"  # eq. 2 prints the source; its text is on the target
    entropy_weight: Weight = 1.0  # paper, below eq. 4
    # Paper: not ramped. At weight 1 and p about .5, where a run begins, eq. 2 has a gradient as
    # large as Dice's and confirms early errors (docs/methods.md); True: times lambda(E), as eq. 5.
    entropy_ramp: bool = False
    # Abstract; eq. 3 and 9 print "source", which adapts nothing.
    consistency_domains: Literal["both", "source"] = "both"
    consistency_weight: Weight = 1.0  # paper: k of eq. 5
    stop_gradient: bool = True  # ours: Y^ is a fixed target in eq. 3, as in the cited work
    flips: bool = False  # paper: pi rotates; True mirrors too
    ema: Decaying = 0.0  # paper: teacher and student share weights; 0.99 or 0.999: a mean teacher
    ramp: Literal["gaussian_up", "gaussian_peak", "none"] = "gaussian_up"  # ours, of eq. 5: Laine and Aila
    ramp_epochs: Annotated[int, Range(1, 10**6)] = 30  # paper: e of eq. 5
    lambda_adv: Weight = 0.001  # paper
    lambda_rec: Weight = 0.01  # paper
    self_training: bool = False  # CBST (Zou et al. 2018)
    rounds: Annotated[int, Range(1, 10**6)] = 4  # ours: of self-training, the last of the run
    round_epochs: Annotated[int, Range(1, 10**6)] = (
        2  # ours: length of a round; together they take half of a run at most
    )
    # CBST: most confident pixels of each class, kept in round 1.
    first_fraction: Annotated[float, Range(0, 1, above=True)] = 0.2
    fraction_step: Share = 0.05  # CBST: more in each further round
    max_fraction: Annotated[float, Range(0, 1, above=True)] = 0.5  # CBST
    # Control: S sees the target's batch without a loss, so that running statistics mix both sets.
    forward_target: bool = False
    bn_recalibrate: bool = False  # ours: what is judged and ships has the target's statistics alone
    normalise: Literal["each", "source"] = "each"  # cited code: each set by its own mean and deviation
    # Whose statistics normalise validation images.
    validation_domain: Literal["source", "target"] = "source"
    base_width: Width = 64  # cited code: U-Net of 14.79 M parameters
    discriminator_width: Width = 64  # Tsai et al. 2018, as the cited code
    learning_rate: LearningRate = 1e-4  # paper
    discriminator_learning_rate: LearningRate = 1e-3  # paper
    reconstructor_learning_rate: LearningRate = 1e-3  # paper
    beta1: Decaying = 0.9  # cited code: PyTorch's
    beta2: Decaying = 0.999  # cited code: PyTorch's

    def __post_init__(self) -> None:
        check_fields(self)
        if self.first_fraction > self.max_fraction:
            raise ValueError(
                f"first_fraction={self.first_fraction}, max_fraction={self.max_fraction}: "
                "the first is at most the second"
            )


class Domains(nn.Module):
    """Measurements of both training sets and state of the run, in buffers, so that checkpoints hold them.

    Attributes
    ----------
    mean, std
        (2, C) grey levels of the source's and the target's training images.
    epoch_images
        Images in the larger of the two sets: an epoch passes over it once.
    steps_per_epoch
        Known from the first step on; rounded up.
    round
        Of self-training; 0 while S learns from the source alone.
    thresholds
        (2,) least absolute logit of the pixels of ground and nuclei that are kept.
    finished
        1 where training is over, so that images are normalised as in deployment.
    """

    mean: Tensor
    std: Tensor
    epoch_images: Tensor
    steps_per_epoch: Tensor
    round: Tensor
    thresholds: Tensor
    finished: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((2, channels), HALF_RANGE))
        self.register_buffer("std", torch.full((2, channels), HALF_RANGE))
        self.register_buffer("thresholds", torch.full((2,), torch.inf))
        self.register_buffer("epoch_images", torch.tensor(1))
        self.register_buffer("steps_per_epoch", torch.tensor(1))
        self.register_buffer("round", torch.tensor(0))
        self.register_buffer("finished", torch.tensor(0))

    def normalised(self, images: Tensor, domain: int) -> Tensor:
        """Subtract the mean of a set and divide by its standard deviation, per channel."""
        mean, std = self.mean[domain, :, None, None], self.std[domain, :, None, None]
        return (images.to(torch.float32) - mean) / std


def align_px(config: Config) -> int:
    """Height and width are multiples of this."""
    return STRIDE_PX


def least_px(config: Config) -> int:
    """Return the smallest side of an image."""
    return MIN_PX


def pools(config: Config) -> tuple[str, ...]:
    """Images of the target, where a step sees them."""
    return ("target",) if _sees_target(config) or config.self_training else ()


def takes_class_weights(config: Config) -> str:
    """Return why class weights are not taken: the loss is a Dice coefficient."""
    return "its loss is the Dice coefficient of the nuclei, which does not count the ground: leave them out"


def can_extend(config: Config, done: int, steps: int, more: int) -> str:
    """Return "" if a run can get more steps, else why not: the rounds of self-training are its last steps."""
    if not config.self_training or done <= steps - steps // 2:
        return ""
    return "the rounds of self-training are the last steps of a run, and would begin again"


def _sees_target(config: Config) -> bool:
    return config.forward_target or _trains_on_target(config)


def _trains_on_target(config: Config) -> bool:
    return (
        config.lambda_adv > 0
        or config.lambda_rec > 0
        or (config.entropy_weight > 0 and config.em_domains == "both")
        or (config.consistency_weight > 0 and config.consistency_domains == "both")
    )


def build(config: Config, classes: int, channels: int = 3) -> State:
    """Make the networks and their optimisers.

    Raises
    ------
    DataError
        If there are not two classes.
    """
    if classes != 2:
        raise DataError(
            f"{classes} classes: uda_self_ensembling tells one class from a ground; merge the labels into 2 classes"
        )
    segmenter = BatchNormUNet(channels, 1, base_width=config.base_width)
    modules: dict[str, nn.Module] = {"segmenter": segmenter, "domains": Domains(channels)}
    rates = {"segmenter": config.learning_rate}
    if config.lambda_adv:
        modules["discriminator"] = DomainDiscriminator(1, widths_of(config.discriminator_width, 3))
        rates["discriminator"] = config.discriminator_learning_rate
    if config.lambda_rec:
        modules["reconstructor"] = BatchNormUNet(1, channels, base_width=config.base_width)
        rates["reconstructor"] = config.reconstructor_learning_rate
    optimizers = {name: adam(modules[name].parameters(), rate, config) for name, rate in rates.items()}
    if config.ema and config.consistency_weight:
        modules["teacher"] = copy.deepcopy(segmenter).requires_grad_(False)
    if config.self_training:
        modules["labeller"] = copy.deepcopy(segmenter).requires_grad_(False).eval()
    return State(config, modules, optimizers, needed=("segmenter", "domains"))


def before_step(state: State, parts: Parts, step: int, steps: int) -> None:
    """Measure both sets before the first step; relabel the target where a round begins."""
    domains = _domains(state)
    if step == 0:
        if "teacher" in state.modules:  # of the weights that the run starts from, whichever
            state.modules["teacher"].load_state_dict(state.modules["segmenter"].state_dict())
        source = [parts.samples[i] for i in parts.split.train]
        target = parts.pools.get("target") or source  # source-only: normalised as itself
        like = target if state.config.normalise == "each" else source
        for domain, pictures in ((SOURCE, source), (TARGET, like)):
            mean, std = channel_statistics(pictures)
            domains.mean[domain] = mean.to(domains.mean)
            domains.std[domain] = std.to(domains.std)
        used = target if pools(state.config) else source
        domains.epoch_images.fill_(max(len(source), len(used)))
    if state.config.self_training and step > 0:
        number = round_at(state.config, step, steps, int(domains.steps_per_epoch))
        if number != int(domains.round):
            domains.round.fill_(number)
            _relabel(state, parts.pools["target"], number)


def channel_statistics(pictures: Sequence[Picture]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of all pixels of a set, per channel, in grey levels.

    Returns
    -------
    (C,) and (C,) float64; a standard deviation is at least 1.
    """
    pixels, total, squares = 0, np.zeros(()), np.zeros(())
    for picture in pictures:
        image = picture.image.reshape(-1, picture.image.shape[-1]).astype(np.float64)
        pixels += len(image)
        total, squares = total + image.sum(axis=0), squares + (image**2).sum(axis=0)
    mean = total / pixels
    std = np.sqrt(np.maximum(squares / pixels - mean**2, 1.0))
    return torch.from_numpy(mean), torch.from_numpy(std)


def ramp(kind: str, epoch: Tensor, peak: int) -> Tensor:
    """Weight of the consistency loss: equation 5 without its k.

    Printed is ``k e^||e - E||``, where e is the base and the peak at once and no sign makes it
    fall: it starts at e^30 and overflows. "gaussian_up" is what such methods use, and 1 from the
    peak on, ``exp(-5 (1 - min(E, e) / e)^2)``; "gaussian_peak" falls again, as "slowly drop down"
    may mean, ``exp(-5 ((E - e) / e)^2)``.

    Parameters
    ----------
    kind
        "gaussian_up", "gaussian_peak" or "none", which is 1 always.
    epoch
        E, a number from 0.
    peak
        e, in epochs.
    """
    away = epoch / peak - 1
    if kind == "none":
        return torch.ones_like(away)
    return torch.exp(-5 * (away if kind == "gaussian_peak" else away.clamp(max=0)) ** 2)


def turned(images: Tensor, turns: Sequence[int], mirrored: Sequence[bool]) -> Tensor:
    """Turn each image (N, C, H, W) by quarter turns, then mirror it: pi of equation 3."""
    return torch.stack(
        [
            torch.rot90(image, k, (-2, -1)).flip(-1) if flip else torch.rot90(image, k, (-2, -1))
            for image, k, flip in zip(images, turns, mirrored, strict=True)
        ]
    )


def draw_turns(images: Tensor, *, flips: bool) -> tuple[list[int], list[bool]]:
    """Draw `turned`'s arguments by torch's seed; images that are not square turn by 180 degrees."""
    count, square = len(images), images.shape[-1] == images.shape[-2]
    # Drawn on the host: a loop over a GPU's numbers would wait for each.
    turns = torch.randint(4, (count,)) if square else 2 * torch.randint(2, (count,))
    mirrored = torch.randint(2, (count,)).bool() if flips else torch.zeros(count).bool()
    return turns.tolist(), mirrored.tolist()


def dice_loss(probability: Tensor, truth: Tensor, kept: Tensor | None = None) -> Tensor:
    """One minus the Dice coefficient of the whole batch: equation 1, smoothed by 1 as in the cited code.

    The equation has no smoothing: 0/0 without nuclei.

    Parameters
    ----------
    probability, truth
        (N, 1, H, W); truth is 0 or 1.
    kept
        (N, 1, H, W), 1 where a pixel counts; others have no part in it, and no gradient.
    """
    if kept is not None:
        probability, truth = probability * kept, truth * kept
    return 1 - soft_dice(probability, truth).mean()


def entropy_loss(probability: Tensor, form: str) -> Tensor:
    """Mean entropy of the pixels: equation 2.

    Printed is half of the binary entropy, ``-p log p``, over one row and column too many. Its
    maximum is at 1/e, so that it makes nuclei of every pixel above 0.37; "binary",
    ``-p log p - (1 - p) log(1 - p)``, has it at 1/2.
    """
    p = probability.clamp(EPSILON, 1 - EPSILON)
    entropy = -p * p.log()
    if form == "binary":
        entropy = entropy - (1 - p) * (1 - p).log()
    return entropy.mean()


def adversarial_loss(state: State, probability: Tensor) -> Tensor:
    """``-mean log D(S(X_t))``, equation 6; the discriminator gets no gradient."""
    with frozen(state.modules["discriminator"]) as discriminator:
        return logit_loss(discriminator(probability), real=True)


def reconstruction_loss(state: State, probability: Tensor, images: Tensor) -> Tensor:
    """``mean (X_t - R(S(X_t)))^2``: equation 8, whose square is printed on R alone."""
    return F.mse_loss(state.modules["reconstructor"](probability), images)


def consistency_loss(state: State, images: Tensor, probability: Tensor) -> Tensor:
    """``mean (S(pi X) - pi S(X))^2``, equation 3, with another pi for each image.

    ``images`` are X, (N, C, H, W), normalised, and ``probability`` is S(X); where there is a mean
    teacher T, T(X) takes its place.
    """
    turns, mirrored = draw_turns(images, flips=state.config.flips)
    if "teacher" in state.modules:
        with torch.no_grad():
            probability = state.modules["teacher"](images).sigmoid()
    wanted = turned(probability, turns, mirrored)
    if state.config.stop_gradient:
        wanted = wanted.detach()
    predicted = state.modules["segmenter"](turned(images, turns, mirrored)).sigmoid()
    return F.mse_loss(predicted, wanted)


def step(state: State, batch: Batch) -> dict[str, Tensor]:
    """Train on one batch: D on what S predicts now, then S and R with D frozen.

    Equation 9 adds L_dis to what S minimises, against L_adv in the same sum; it trains D only.

    Returns
    -------
    The losses, without their weights: ``dice``, and as far as they are on ``entropy``,
    ``consistency``, ``adversarial``, ``discriminator``, ``reconstruction`` and ``pseudo``.
    """
    config, domains = state.config, _domains(state)
    _check_sides(batch)
    if batch.step == 0:
        batch_images = len(batch.images) * device.processes()
        domains.steps_per_epoch.copy_(-(-domains.epoch_images // batch_images))
    source = domains.normalised(batch.images, SOURCE)
    p_source = state.modules["segmenter"](source).sigmoid()
    losses = {"dice": dice_loss(p_source, batch.labels[:, None].to(p_source.dtype), known(batch.labels))}
    total = losses["dice"]
    predictions = [(source, p_source)]
    epoch = torch.div(batch.step, domains.steps_per_epoch, rounding_mode="floor")
    rising = ramp(config.ramp, epoch, config.ramp_epochs)
    if _trains_on_target(config):
        target = domains.normalised(batch.pools["target"], TARGET)
        p_target = state.modules["segmenter"](target).sigmoid()
        predictions.append((target, p_target))
    elif config.forward_target:
        with torch.no_grad():
            state.modules["segmenter"](domains.normalised(batch.pools["target"], TARGET))
    if config.lambda_adv:
        losses["discriminator"] = step_discriminator(state, p_source, p_target)
        losses["adversarial"] = adversarial_loss(state, p_target)
        total = total + config.lambda_adv * losses["adversarial"]
    if config.lambda_rec:
        losses["reconstruction"] = reconstruction_loss(state, p_target, target)
        total = total + config.lambda_rec * losses["reconstruction"]
    if config.entropy_weight:
        # Over both sets it is their mean, so that its weight means the same.
        chosen = predictions if config.em_domains == "both" else predictions[:1]
        losses["entropy"] = torch.stack([entropy_loss(p, config.em_form) for _, p in chosen]).mean()
        weight = config.entropy_weight * (rising if config.entropy_ramp else 1)
        total = total + weight * losses["entropy"]
    if config.consistency_weight:
        chosen = predictions if config.consistency_domains == "both" else predictions[:1]
        losses["consistency"] = torch.stack([consistency_loss(state, x, p) for x, p in chosen]).mean()
        total = total + config.consistency_weight * rising * losses["consistency"]
    if config.self_training:
        losses["pseudo"] = pseudo_loss(state, batch.pools["target"])
        total = total + losses["pseudo"]
    descend(total, *(state.optimizers[name] for name in ("segmenter", "reconstructor") if name in state.optimizers))
    if "teacher" in state.modules:
        follow(state.modules["teacher"], state.modules["segmenter"], config.ema)
    return {name: loss.detach() for name, loss in losses.items()}


def step_discriminator(state: State, p_source: Tensor, p_target: Tensor) -> Tensor:
    """Step D by the cross-entropy of its patches on the maps of both sets: equation 7.

    Printed are two terms ``log D(Y^)``, so that the label z would have no effect; the second is
    meant as ``log(1 - D(Y^))``.
    """
    # Two passes, for images of the two sets may differ in size.
    discriminator = state.modules["discriminator"]
    loss = logit_loss(discriminator(p_source.detach()), real=True) + logit_loss(
        discriminator(p_target.detach()), real=False
    )
    descend(loss, state.optimizers["discriminator"])
    return loss


def _check_sides(batch: Batch) -> None:
    shapes = (batch.images.shape, *(pool.shape for pool in batch.pools.values()))
    smallest = min(min(shape[-2:]) for shape in shapes)
    if smallest < MIN_PX:
        raise DataError(
            f"crops of {smallest} px: uda_self_ensembling takes {MIN_PX} px or more; "
            "set schedule.crop_px, or leave out the smaller images"
        )


def round_at(config: Config, step: int, steps: int, steps_per_epoch: int) -> int:
    """Round of self-training at a step, 0 before the first.

    The rounds are the last of the run, ``round_epochs`` each, and take half of it at most.
    """
    wanted = config.rounds * config.round_epochs * steps_per_epoch
    length = max(1, min(wanted, steps // 2) // config.rounds)
    start = steps - config.rounds * length
    return 0 if step < start else min(config.rounds, 1 + (step - start) // length)


def kept_fraction(config: Config, number: int) -> float:
    """Share of each class that is kept in a round, from 1."""
    return min(config.max_fraction, config.first_fraction + config.fraction_step * (number - 1))


def class_thresholds(logits: Tensor, fraction: float) -> Tensor:
    """Absolute logit above which the most confident ``fraction`` of each class lies.

    CBST's class-wise thresholds, with which it keeps as large a share of a rare class. Logits
    instead of probabilities, whose single precision ends at 1 - 6e-8.

    Returns
    -------
    (2,) of ground and nuclei; infinite for a class of no pixel.
    """
    thresholds = torch.full((2,), torch.inf)
    for label in (0, 1):
        confident = logits[(logits > 0) == bool(label)].abs()
        if len(confident):
            kept = max(1, round(fraction * len(confident)))
            thresholds[label] = confident.kthvalue(len(confident) - kept + 1).values
    return thresholds


def _relabel(state: State, pool: Sequence[Picture], number: int) -> None:
    """Freeze a copy of S, and find the thresholds with which it labels the target."""
    domains, labeller = _domains(state), state.modules["labeller"]
    labeller.load_state_dict(state.modules["segmenter"].state_dict())
    every = max(1, sum(int(np.prod(p.shape)) for p in pool) // FRACTION_PIXELS)
    with torch.no_grad():
        logits = [
            labeller(domains.normalised(image, TARGET))[0, 0, :height, :width].flatten()[::every]
            for image, (height, width) in _whole_images(pool, domains.mean.device)
        ]
    fraction = kept_fraction(state.config, number)
    domains.thresholds.copy_(class_thresholds(torch.cat(logits).cpu(), fraction))


def pseudo_loss(state: State, images: Tensor) -> Tensor:
    """Dice loss of S on the pixels that the labeller is sure of; 0 before the first round."""
    domains = _domains(state)
    if int(domains.round) == 0:  # S is not to see the target: its batch statistics would
        return torch.zeros((), device=images.device)
    x = domains.normalised(images, TARGET)
    with torch.no_grad():
        logits = state.modules["labeller"](x)
    truth = (logits > 0).to(x.dtype)
    kept = (logits.abs() >= domains.thresholds[(logits > 0).long()]).to(x.dtype)
    return dice_loss(state.modules["segmenter"](x).sigmoid(), truth, kept)


@torch.no_grad()
def settle(state: State, parts: Parts) -> None:
    """Measure the batch statistics of S anew on whole images of the target, where that is configured.

    In training they are gathered over both sets and over turned images. Those of the target alone
    are what S meets once it is deployed (docs/methods.md).
    """
    domains = _domains(state)
    if not state.config.bn_recalibrate:
        return
    segmenter = state.modules["segmenter"]
    pictures = parts.pools.get("target") or [parts.samples[i] for i in parts.split.train]

    def pass_images() -> None:
        for image, _ in _whole_images(pictures, domains.mean.device):
            segmenter(domains.normalised(image, TARGET))

    measure_statistics(segmenter, pass_images)


def finish(state: State, parts: Parts) -> None:
    """From here on, normalise images as in deployment."""
    _domains(state).finished.fill_(1)


def _whole_images(pictures: Sequence[Picture], device: torch.device) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """Yield whole images (1, C, H, W), mirrored up to what S takes, and their own (h, w)."""
    for picture in pictures:
        sample = unannotated(picture)
        images, _ = stacked([padded(sample.image, sample.labels, STRIDE_PX)])
        yield images.to(device), picture.shape


@torch.no_grad()
def validate(state: State, images: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Return the Dice loss, and the predicted labels (N, H, W).

    Images are normalised as images of ``validation_domain``; once training is over, as in deployment.
    """
    probability = _predicted(state, images)
    loss = dice_loss(probability, labels[:, None].float(), known(labels))
    return float(loss), (probability[:, 0] > 0.5).long()


@torch.no_grad()
def paint(state: State, images: Tensor) -> dict[str, Tensor]:
    """Return the map of probabilities, and the image that R repaints from it.

    Returns
    -------
    Images, uint8: "probability" (N, 1, H, W), and "reconstruction" (N, C, H, W) where there is an
    R.
    """
    probability = _predicted(state, images)
    painted = {"probability": (probability * 255).round().to(torch.uint8)}
    if "reconstructor" in state.modules:
        domains, domain = _domains(state), _judged_domain(state)
        with evaluating(state.modules["reconstructor"]):
            image = state.modules["reconstructor"](probability)
        levels = image * domains.std[domain, :, None, None] + domains.mean[domain, :, None, None]
        painted["reconstruction"] = levels.round().clamp(0, 255).to(torch.uint8)
    return painted


def _predicted(state: State, images: Tensor) -> Tensor:
    x = _domains(state).normalised(images, _judged_domain(state))
    with evaluating(state.modules["segmenter"]):
        probability: Tensor = state.modules["segmenter"](x).sigmoid()
        return probability


def _judged_domain(state: State) -> int:
    """Return the domain as whose images those of `validate` and `paint` are normalised."""
    return TARGET if _domains(state).finished or state.config.validation_domain == "target" else SOURCE


def _domains(state: State) -> Domains:
    return cast(Domains, state.modules["domains"])


class Deployed(TileModel):
    """S behind the tile contract, for ground and nuclei.

    The mean and the standard deviation of the target's training images are constants of the graph.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, segmenter: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.segmenter = segmenter
        self.register_buffer("mean", mean.detach().clone()[:, None, None])
        self.register_buffer("std", std.detach().clone()[:, None, None])

    def scores(self, images: Tensor) -> Tensor:
        """Return the probability of each class."""
        logits = self.segmenter((images - self.mean) / self.std)
        return torch.cat([-logits, logits], dim=1).sigmoid()


def deployed(state: State) -> TileModel:
    """Return the module that export wraps: S only, its batch statistics frozen."""
    domains = _domains(state)
    module = Deployed(state.modules["segmenter"], domains.mean[TARGET], domains.std[TARGET])
    return module.eval()
