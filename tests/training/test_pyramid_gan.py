"""Exact facts of the method by the paper, that every term is alive, and what a small pyramid learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from histostream.export import cli as export_cli
from histostream.export import generator
from histostream.export.bundle import Options
from histostream.export.graph.model import GraphError, open_session
from histostream.export.graph.operators import FORBIDDEN
from histostream.export.trained import export_checkpoint
from histostream.runtime import open_engine, segment_pixels
from histostream.training import checkpoint, cli, datasets, loop, preview, synthetic
from histostream.training.augment import Augmentation
from histostream.training.batches import Batches, Parts, check_pools, divide
from histostream.training.checkpoint import Checkpoint, CheckpointError
from histostream.training.data import DataError, DataSet, Picture
from histostream.training.device import Compute, prepare
from histostream.training.methods import hook
from histostream.training.methods.pyramid_gan import method as pyramid_gan
from histostream.training.methods.pyramid_gan import sample
from histostream.training.methods.pyramid_gan.fc_densenet import FCDenseNet
from histostream.training.methods.pyramid_gan.losses import (
    adversarial_loss,
    discriminator_mask,
    feature_loss,
    gradient_penalty,
    perceptual_loss,
)
from histostream.training.methods.pyramid_gan.method import Config
from histostream.training.methods.pyramid_gan.networks import (
    Generator,
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
from histostream.training.methods.pyramid_gan.vgg import LAYERS, VGG19Features, WeightsError
from histostream.training.recipe import Recipe, read_recipe
from histostream.training.schedule import Schedule, set_rates
from histostream.training.state import Batch, State
from histostream.wsi.errors import OutputError
from tests.training.rates import STILL
from tests.training.regions import colored_regions
from tests.training.resuming import killed_and_resumed, logged, weights_of

SMALL: dict[str, Any] = {
    "levels": 2,
    "poolings": 2,
    "layers": 1,
    "first_width": 4,
    "growth": 4,
    "g_width": 4,
    "d_width": 4,
    "d_scales": 2,
}
SEGMENTERS: dict[str, Any] = {"g_arch": "none", "judge_segmenter": False}
STEPS = 8  # of a run of two levels: 0 to 3 are level 1, 4 to 7 level 0
FINE = 7  # the last step: painted pairs and pseudo-positives are on


def tiny_config(**more: Any) -> Config:
    return Config(**{**SMALL, **more})


def tiny(classes: int = 2, channels: int = 3, **more: Any) -> State:
    torch.manual_seed(0)
    return pyramid_gan.build(tiny_config(**more), classes, channels)


@pytest.fixture
def batch() -> Batch:
    """Return four images with labels and four without, in the last step."""
    return batch_of(4, 32)


def batch_of(count: int, side: int, channels: int = 3, step: int = FINE) -> Batch:
    source = torch.Generator().manual_seed(0)
    shape = (count, channels, side, side)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=source)
    others = torch.randint(0, 200, shape, dtype=torch.uint8, generator=source)
    return Batch(images, (images[:, 0] > 127).long(), {"unlabelled": others}, step, STEPS)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, torch.Tensor], module: torch.nn.Module) -> bool:
    now = module.state_dict()
    return any(not torch.equal(before[name], now[name]) for name in before)


def moved_by(state: State, batch: Batch) -> set[str]:
    """Names of the networks that a step changes in any way."""
    before = {name: weights(module) for name, module in state.modules.items()}
    pyramid_gan.step(state, batch)
    return {name for name, module in state.modules.items() if changed(before[name], module)}


def still(state: State) -> State:
    """Take the noise and the dropout away, so that a step can be worked out by hand."""
    state.modules["progress"].amplitudes.zero_()  # type: ignore[operator]
    return state


QUIET: dict[str, Any] = {"segmenter_noise": 0.0, "dropout": 0.0}


# ----------------------------------------------------------------------------- networks


def convolution(kernel: int, before: int, after: int) -> int:
    return kernel**2 * before * after + after


def test_m_fcdensenet_has_42_layers_and_966050_parameters() -> None:
    with torch.device("meta"):
        network = FCDenseNet(5, 2)
    layers = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    rising = [m for m in network.modules() if isinstance(m, torch.nn.ConvTranspose2d)]
    assert (len(layers), len(rising)) == (40, 3)  # 42 and the classifier
    assert count(network) == 966_050
    widths = [s[0].num_features for s in network.shrink]  # type: ignore[index]
    assert widths == [108, 168, 228]
    assert network.head.in_channels == 228
    assert {m.in_channels for m in rising} == {60}


def test_the_cited_networks_have_their_parameters() -> None:
    """pix2pix and pix2pixHD print 54.41 M and 182.5 M; the others follow from their layers."""
    conv = convolution
    with torch.device("meta"):
        singan = singan_trunk(5, 3, 64)
        judge = multi_scale_discriminator(5, 64, 3)
        unet, resnet = Pix2PixUNet(3, 3, 64, 8), resnet_trunk(36, 3, 64, 4, 9)
        patch = PatchDiscriminator(6, 64)
    assert count(singan) == conv(3, 5, 64) + 3 * conv(3, 64, 64) + conv(3, 64, 3) + 4 * 128
    one = conv(4, 5, 64) + conv(4, 64, 128) + conv(4, 128, 256) + conv(4, 256, 512)
    assert count(judge) == 3 * (one + conv(4, 512, 1))
    assert round(count(unet) / 1e6, 1) == 54.4
    assert round(count(resnet) / 1e6, 1) == 182.5
    assert round(count(patch) / 1e6, 2) == 2.77


def seen_columns(network: torch.nn.Module, x: torch.Tensor, position: int) -> list[int]:
    """Columns of the input that an output pixel of the middle row depends on."""
    x.requires_grad_(True)
    out = network.eval()(x)
    (slope,) = torch.autograd.grad(out[0, 0, out.shape[2] // 2, position], x)
    return slope.abs().sum(dim=(0, 1, 2)).nonzero().flatten().tolist()


@pytest.mark.full
def test_one_level_sees_240_px_and_the_pyramid_all_512() -> None:
    torch.manual_seed(0)
    one = FCDenseNet(3, 2)
    widths = []
    for position in range(252, 260):  # all phases of the poolings
        columns = seen_columns(one, torch.rand(1, 3, 8, 512), position)
        assert columns == list(range(columns[0], columns[-1] + 1))
        widths.append(len(columns))
    assert (min(widths), max(widths)) == (232, 240)
    small = [FCDenseNet(5, 2, first_width=8, growth=4, layers=5) for _ in range(4)]
    shown = torch.rand(1, 3, 64, 512, dtype=torch.float64)
    pyramid = SegmenterPyramid(small, 4).double()
    assert seen_columns(pyramid, shown, 256) == list(range(512))
    finest = torch.rand(1, 5, 64, 512, dtype=torch.float64)
    assert len(seen_columns(small[-1], finest, 256)) <= 240


def test_levels_are_means_of_pixels_and_masks_their_nearest() -> None:
    x = torch.rand(2, 3, 16, 24)
    for n, level in enumerate(halved(x, 4)):
        torch.testing.assert_close(level, F.interpolate(x, (16 >> n, 24 >> n), mode="area"))
    labels = torch.randint(3, (2, 16, 24))
    for n, mask in enumerate(one_hot_levels(labels, 3, 4)):
        assert mask.shape == (2, 3, 16 >> n, 24 >> n)
        assert (mask.sum(dim=1) == 1).all()
        near = labels[:, (1 << n) // 2 :: 1 << n, (1 << n) // 2 :: 1 << n]
        assert torch.equal(mask.argmax(dim=1), near)
    stripe = torch.zeros(1, 8, 8, dtype=torch.long)
    stripe[:, 4:] = 1  # halves of a mask stay halves
    assert all(float(m[:, 1].mean()) == 0.5 for m in one_hot_levels(stripe, 2, 4)[:3])


def test_a_generator_adds_a_residual_to_the_coarser_image() -> None:
    """Equation 1: what the trunk sees is mask and noise + image, what comes out image + trunk."""
    network = Generator(singan_trunk(5, 3, 4)).eval()
    mask, noise, coarser = torch.rand(1, 2, 8, 8), torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        added = network.trunk(torch.cat([mask, noise + coarser], dim=1))
    assert torch.equal(network(mask, noise, coarser), coarser + added)
    assert 0 < float(added.abs().max()) < 1
    last = network.trunk[-2]  # type: ignore[index]
    torch.nn.init.zeros_(last.weight)
    assert torch.equal(network(mask, noise, coarser), coarser)


def test_discriminators_judge_the_pair_at_three_sizes() -> None:
    judge = multi_scale_discriminator(5, 4, 3)
    pair = torch.rand(2, 5, 64, 64)
    judged = judge(pair)
    assert [len(maps) for maps in judged] == [5, 5, 5]
    assert [tuple(maps[-1].shape) for maps in judged] == [(2, 1, 11, 11), (2, 1, 7, 7), (2, 1, 5, 5)]
    smaller = F.avg_pool2d(pair, 3, 2, 1, count_include_pad=False)
    for found, wanted in zip(judged[1], judge.scales[1](smaller), strict=True):
        assert torch.equal(found, wanted)
    sets_of = [{id(p) for p in scale.parameters()} for scale in judge.scales]
    assert not sets_of[0] & sets_of[1]
    assert [len(maps) for maps in PatchDiscriminator(5, 4)(pair)] == [1]


# ----------------------------------------------------------------------------- levels and steps


@pytest.mark.parametrize("batches", ["", "8,6,4,4", "8,6,4,4,3", "2,2"])
def test_levels_follow_one_another_and_pass_as_often_over_the_images(batches: str) -> None:
    levels = batches.count(",") + 1 if batches else 4
    config = Config(levels=levels, level_batches=batches)
    steps = 2375
    phases = [pyramid_gan.phase_at(config, step, steps) for step in range(steps)]
    order = [phase.level for phase in phases if phase.first]
    assert order == list(range(levels - 1, -1, -1))
    assert [p.level for p in phases] == sorted((p.level for p in phases), reverse=True)
    sizes = config.batches or (1,) * levels
    images = [size * sum(p.level == level for p in phases) for size, level in zip(sizes, order, strict=True)]
    assert max(images) - min(images) <= 2 * max(sizes)
    for a, b in pairwise(phases):
        assert b.progress > a.progress or b.first
    assert max(p.progress for p in phases) < 1


def test_too_few_steps_for_the_levels_are_named() -> None:
    with pytest.raises(DataError, match=r"schedule.steps=3 leaves a level .* there are 4 levels"):
        pyramid_gan.phase_at(Config(), 0, 3)


ALL_KINDS = ("segmenter", "generator", "discriminator")


@pytest.mark.parametrize("more", [{}, {"semi_supervised": True}, {"gan": "wgan-gp"}], ids=str)
def test_a_step_trains_one_level_and_leaves_the_finished_frozen(more: dict[str, Any]) -> None:
    """Not even the batch statistics of a finished level move."""
    state = tiny(**more)
    for step, level in ((0, 1), (3, 1), (4, 0), (7, 0)):
        moved = moved_by(state, batch_of(2, 32, step=step))
        assert moved == {f"{kind}_{level}" for kind in ALL_KINDS}
    assert all(p.requires_grad for m in state.modules.values() for p in m.parameters())


def test_each_network_is_moved_by_its_own_optimiser_only(batch: Batch) -> None:
    names = ("segmenter", "generator", "discriminator")
    for kind in names:
        rates: dict[str, Any] = {f"{other}_learning_rate": STILL for other in names if other != kind}
        state = tiny(**rates)
        before = {n: [p.clone() for p in m.parameters()] for n, m in state.modules.items()}
        pyramid_gan.step(state, batch)
        moved = set()
        for name, module in state.modules.items():
            pairs = zip(before[name], module.parameters(), strict=True)
            if any(not torch.equal(a, b) for a, b in pairs):
                moved.add(name)
        assert moved == {f"{kind}_0"}


def test_a_level_takes_the_first_images_of_the_batch() -> None:
    """Batch 4 with level_batches="2,3" trains as batches of 2, then of 3, would."""
    whole, parts = tiny(level_batches="2,3"), tiny()
    for step, size in ((0, 2), (7, 3)):
        one = batch_of(4, 32, step=step)
        torch.manual_seed(step)
        pyramid_gan.step(whole, one)
        pools = {name: pool[:size] for name, pool in one.pools.items()}
        torch.manual_seed(step)
        part = replace(one, images=one.images[:size], labels=one.labels[:size], pools=pools)
        pyramid_gan.step(parts, part)
    for name, module in whole.modules.items():
        assert not changed(weights(parts.modules[name]), module)


def test_painted_pairs_are_withheld_from_the_segmenter_at_first() -> None:
    state = tiny()
    said = [float(pyramid_gan.step(state, batch_of(2, 32, step=step))["synthetic"]) for step in range(STEPS)]
    assert [value > 0 for value in said] == [False, False, True, True] * 2


def running(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights(module).items() if "running" in name}


@pytest.mark.parametrize("moved_by_painted", [True, False])
def test_painted_images_move_the_batch_statistics_only_where_they_are_to(batch: Batch, moved_by_painted: bool) -> None:
    """With weight 0 no painted image is seen: the statistics are those of the true ones."""
    still_: dict[str, Any] = {**QUIET, "segmenter_learning_rate": STILL}
    alone, both = (
        tiny(**still_, synthetic_weight=0.0),
        tiny(**still_, synthetic_weight=0.5, painted_statistics=moved_by_painted),
    )
    for state in (alone, both):
        pyramid_gan.step(state, batch)
    one, two = running(alone.modules["segmenter_0"]), running(both.modules["segmenter_0"])
    assert all(torch.equal(one[name], two[name]) for name in one) != moved_by_painted
    # Later passes, of true images, move them still.
    pyramid_gan.step(both, batch)
    later = running(both.modules["segmenter_0"])
    assert any(not torch.equal(two[name], later[name]) for name in two)


def test_statistics_of_a_level_are_measured_anew_on_clean_images_before_it_is_frozen() -> None:
    """The first normalisation by hand: mean and variance of the first maps, of 6 and of 2 images.

    The images have two sizes, those of one are measured together, and noise and dropout are off.
    """
    torch.manual_seed(0)
    large = colored_regions(6, 1, side_px=32)
    small = colored_regions(2, 1, side_px=24, seed=1)
    renamed = tuple(replace(s, name=f"small {s.name}") for s in small.train)  # type: ignore[type-var]
    parts = divide(replace(large, train=(*large.train, *renamed)), Schedule(validation=0.1))
    state = tiny(reestimate=True, dropout=0.5, segmenter_noise=3.0)
    segmenter = state.modules["segmenter_1"]
    for step in range(4):
        pyramid_gan.before_step(state, parts, step, STEPS)
        pyramid_gan.step(state, batch_of(2, 32, step=step))
    gathered, learned_ = running(segmenter), [p.clone() for p in segmenter.parameters()]
    pyramid_gan.before_step(state, parts, 4, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(learned_, segmenter.parameters(), strict=True))
    first = segmenter.down[0].layers[0][0]  # type: ignore[index, union-attr]
    batches: dict[int, list[torch.Tensor]] = {}
    for i in parts.split.train:
        x = torch.from_numpy(parts.samples[i].image.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        batches.setdefault(x.shape[-1], []).append(F.avg_pool2d(x, 2))
    means, variances = [], []
    for same in batches.values():
        for some in torch.cat(same).tensor_split(-(-len(same) // 4)):
            with torch.no_grad():
                maps = segmenter.first(F.pad(some, (0, 0, 0, 0, 0, 2)))  # type: ignore[operator]
            means.append(maps.mean((0, 2, 3)))
            variances.append(maps.var((0, 2, 3)))
    torch.testing.assert_close(first.running_mean, torch.stack(means).mean(dim=0))
    torch.testing.assert_close(first.running_var, torch.stack(variances).mean(dim=0))
    now = running(segmenter)
    assert all(not torch.equal(gathered[name], now[name]) for name in now)
    assert first.momentum == 0.1
    # Nothing is random in it, and the level is frozen with what was measured.
    pyramid_gan.reestimate(state, parts, 1)
    pyramid_gan.step(state, batch_of(2, 32, step=4))
    assert all(torch.equal(value, running(segmenter)[name]) for name, value in now.items())


@pytest.mark.parametrize("on", [True, False])
def test_what_ships_has_the_statistics_that_were_measured(on: bool) -> None:
    parts = parts_of(colored_regions(4, 1, side_px=32))
    state = tiny(reestimate=on)
    for step in (0, 4):
        pyramid_gan.before_step(state, parts, step, STEPS)
    pyramid_gan.step(state, batch_of(4, 32, step=4))
    before = {n: running(m) for n, m in state.modules.items() if n.startswith("segmenter")}
    pyramid_gan.settle(state, parts)
    settled = {n: running(m) for n, m in state.modules.items() if n.startswith("segmenter")}
    same = {n for n in before if all(torch.equal(before[n][k], settled[n][k]) for k in before[n])}
    assert same == ({"segmenter_1"} if on else {"segmenter_0", "segmenter_1"})
    assert all(
        torch.equal(value, running(state.modules["segmenter_0"])[name])
        for name, value in settled["segmenter_0"].items()
    )


@pytest.mark.parametrize("kind", ["none", "cosine", "poly"])
def test_rates_fall_within_each_level_alone(kind: str) -> None:
    parts = parts_of(colored_regions(4, 1, side_px=32))
    state = tiny(level_decay=kind)
    for optimizer in state.optimizers.values():
        optimizer.param_groups[0]["initial_lr"] = optimizer.param_groups[0]["lr"]
    falls: dict[str, list[float]] = {
        "none": [1, 1, 1, 1],
        "cosine": [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)],
        "poly": [1, 0.75**0.9, 0.5**0.9, 0.25**0.9],
    }
    for step in range(STEPS):
        set_rates(state.optimizers, 0.5)  # of the schedule
        pyramid_gan.before_step(state, parts, step, STEPS)
        level = 1 - step // 4
        for name, base in (("segmenter", 5e-4), ("generator", 1e-4), ("discriminator", 5e-4)):
            rate, other = (state.optimizers[f"{name}_{n}"].param_groups[0]["lr"] for n in (level, 1 - level))
            assert rate == pytest.approx(0.5 * base * falls[kind][step % 4])
            assert other == 0.5 * base


class Painter(torch.nn.Module):
    """Paints mean + share (x - mean) for the images that it was given, whatever the mask."""

    def __init__(self, images: torch.Tensor, share: float) -> None:
        super().__init__()
        self.x, self.share = images, torch.nn.Parameter(torch.tensor(share))

    def forward(self, *_: torch.Tensor) -> torch.Tensor:
        mean = self.x.mean((0, 2, 3), keepdim=True)
        return mean + self.share * (self.x - mean)


@pytest.mark.parametrize(
    ("share", "error", "admitted"),
    [(0.0, 1, False), (0.25, 0.75, False), (0.35, 0.65, True), (1.0, 0, True)],
)
def test_painted_pairs_are_admitted_by_their_quality(batch: Batch, share: float, error: float, admitted: bool) -> None:
    """The RMSE of mean + a (x - mean) is 1 - a deviations; a constant has 1."""
    state = tiny(synthetic_rule="quality", synthetic_from=0.0)
    before = pyramid_gan.step(state, batch)  # an untrained painter, at the end of the level
    assert float(before["painting_error"]) > 0.7
    assert float(before["synthetic"]) == 0
    state.modules["progress"].restart()  # type: ignore[operator]
    state.modules["generator_0"] = Painter(batch.images / 127.5 - 1, share)
    said = pyramid_gan.step(state, replace(batch, step=4))  # at the begin of the level
    assert float(said["painting_error"]) == pytest.approx(error, abs=1e-4)
    assert (float(said["synthetic"]) > 0) == admitted


def test_the_error_of_paintings_is_a_running_mean_that_begins_anew_with_each_level() -> None:
    run = pyramid_gan.Progress(2, 2, 1)
    bright, dark = torch.full((1, 1, 2, 2), 1.0), torch.full((1, 1, 2, 2), -1.0)
    run.update(torch.zeros(1, 1, 2, 2), bright)
    run.update(torch.zeros(1, 1, 2, 2), dark)
    assert run.painting_error().item() == pytest.approx(1)  # the images deviate by 1 from 0
    run.update(bright, bright)
    run.update(dark, dark)
    assert run.painting_error().item() == pytest.approx(math.sqrt(0.5))
    for _ in range(200):  # long ago does not count
        run.update(bright, bright)
        run.update(dark, dark)
    assert run.painting_error().item() < 0.2
    state = tiny(synthetic_rule="quality")
    measured = state.modules["progress"]
    parts = parts_of(colored_regions(4, 1, side_px=32))
    pyramid_gan.before_step(state, parts, 0, STEPS)
    pyramid_gan.step(state, batch_of(2, 32, step=0))
    for step, wanted in ((1, 1), (4, 0)):
        pyramid_gan.before_step(state, parts, step, STEPS)
        assert int(measured.paintings) == wanted  # type: ignore[arg-type]


def test_a_checkpoint_without_the_estimate_of_the_paintings_still_loads() -> None:
    run, other = pyramid_gan.Progress(2, 2, 3), pyramid_gan.Progress(2, 2, 3)
    other.amplitudes[0] = 0.25
    old = {name: other.state_dict()[name] for name in ("level", "amplitudes")}
    run.load_state_dict(old)
    assert run.amplitudes.tolist() == [0.25, 1]
    with pytest.raises(RuntimeError, match="amplitudes"):
        run.load_state_dict({"level": old["level"]})


def parts_of(found: DataSet, **more: Any) -> Parts:
    return divide(found, Schedule(validation=0.25, **more))


def test_the_noise_is_measured_when_a_level_begins() -> None:
    """A tenth of the RMSE of what the coarser level painted; kept until the end."""
    parts = parts_of(colored_regions(4, 1, side_px=32))
    state = tiny()
    run = state.modules["progress"]
    assert isinstance(run, pyramid_gan.Progress)
    pyramid_gan.before_step(state, parts, 0, STEPS)
    assert (int(run.level), run.amplitudes.tolist()) == (1, [0, 1])
    torch.manual_seed(5)
    pyramid_gan.before_step(state, parts, 4, STEPS)
    assert int(run.level) == 0
    torch.manual_seed(5)
    errors = []
    for i in parts.split.train:
        sample_ = parts.samples[i]
        x = torch.from_numpy(sample_.image).permute(2, 0, 1)[None] / 127.5 - 1
        mask = one_hot_levels(torch.from_numpy(sample_.labels[None]).long(), 2, 2)[1]
        nothing = torch.zeros(1, 3, 16, 16)
        with torch.no_grad():
            painted = state.modules["generator_1"](mask, torch.randn(1, 3, 16, 16), nothing)
        errors.append(float(((up2(painted) - x) ** 2).mean()))
    assert float(run.amplitudes[0]) == pytest.approx(0.1 * math.sqrt(np.mean(errors)), rel=1e-4)
    kept = run.amplitudes.clone()
    pyramid_gan.before_step(state, parts, 5, STEPS)
    assert torch.equal(run.amplitudes, kept)


# ----------------------------------------------------------------------------- losses and signs

Judged = list[list[torch.Tensor]]


def test_undecided_discriminators_lose_ln_2() -> None:
    nothing: Judged = [[torch.zeros(2, 1, 3, 3)], [torch.zeros(2, 1, 2, 2)]]
    for real in (True, False):
        loss = adversarial_loss("bce", nothing, real=real)
        assert float(loss) == pytest.approx(math.log(2))
    assert float(adversarial_loss("lsgan", nothing, real=True)) == 1
    assert float(adversarial_loss("lsgan", nothing, real=False)) == 0


def test_adversarial_losses_are_means_of_the_scales() -> None:
    a, b = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([0.25])
    judged: Judged = [[torch.rand(1), a], [torch.rand(1), b]]

    def of(formula: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return (formula(a).mean() + formula(b).mean()) / 2

    for kind, real, formula in (
        ("bce", True, lambda x: -x.sigmoid().log()),
        ("bce", False, lambda x: -(1 - x.sigmoid()).log()),
        ("lsgan", True, lambda x: (x - 1) ** 2),
        ("lsgan", False, lambda x: x**2),
        ("wgan-gp", True, lambda x: -x),
        ("wgan-gp", False, lambda x: x),
    ):
        found = adversarial_loss(kind, judged, real=real)
        torch.testing.assert_close(found, of(formula))


def test_the_feature_loss_is_equation_4() -> None:
    """1/3 of each scale, 4 / layers, and no gradient for the true pair."""
    real = [[torch.rand(1, 2, 4, 4, requires_grad=True) for _ in range(5)] for _ in range(3)]
    fake = [[torch.rand(1, 2, 4, 4, requires_grad=True) for _ in range(5)] for _ in range(3)]
    wanted = sum(
        (4 / 4) * (a - b).abs().mean() / 3
        for of_real, of_fake in zip(real, fake, strict=True)
        for a, b in zip(of_real[:4], of_fake[:4], strict=True)
    )
    loss = feature_loss(real, fake)
    torch.testing.assert_close(loss, torch.as_tensor(wanted))
    loss.backward()
    assert all(m.grad is None for maps in real for m in maps)
    assert all(m.grad is not None for maps in fake for m in maps[:4])
    assert all(maps[4].grad is None for maps in fake)  # the logits are no feature


def test_the_gradient_penalty_wants_a_slope_of_1() -> None:
    slope = torch.tensor([0.6, 0.8])

    def linear(times: float) -> Any:
        return lambda pair: [[(times * slope[:, None, None] * pair).sum(dim=1, keepdim=True)]]

    real, fake = torch.rand(3, 2, 5, 5), torch.rand(3, 2, 5, 5)
    for times, wanted in ((1.0, 0.0), (3.0, 4.0)):
        penalty = gradient_penalty(linear(times), real, fake)
        assert float(penalty) == pytest.approx(wanted, abs=1e-6)


def test_shares_rise_over_a_level() -> None:
    config = Config()
    found = [pyramid_gan.pseudo_share(config, t) for t in (0, 0.25, 0.375, 0.5, 0.9)]
    assert found == [0, 0, 0.25, 0.5, 0.5]
    at_once = Config(pseudo_from=0.5)
    assert [pyramid_gan.pseudo_share(at_once, t) for t in (0.4, 0.5)] == [0, 0.5]
    teacher = Config(lambda_consistency=2.0)
    weights_ = [pyramid_gan.consistency_weight(teacher, t) for t in (0, 0.1, 0.2, 1)]
    assert weights_ == pytest.approx([2 * math.exp(-5), 2 * math.exp(-1.25), 2, 2])


def random_vgg() -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    found = {}
    for number, before, after in LAYERS:
        if after:
            scale = math.sqrt(2 / (9 * before))
            shape = (after, before, 3, 3)
            found[f"features.{number}.weight"] = scale * torch.randn(shape, generator=source)
            found[f"features.{number}.bias"] = torch.zeros(after)
    return found


def test_the_perceptual_loss_reads_its_weights_and_no_checkpoint_holds_them(
    tmp_path: Path,
) -> None:
    tensors = random_vgg()
    save_file(tensors, tmp_path / "vgg19.safetensors")
    torch.save(tensors, tmp_path / "vgg19.pth")
    one, other = VGG19Features(), VGG19Features()
    one.read(tmp_path / "vgg19.safetensors")
    other.read(tmp_path / "vgg19.pth")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    maps = one(images)
    assert [tuple(m.shape) for m in maps] == [
        (2, 64, 32, 32),
        (2, 128, 16, 16),
        (2, 256, 8, 8),
        (2, 512, 4, 4),
        (2, 512, 2, 2),
    ]
    assert all(torch.equal(a, b) for a, b in zip(maps, other(images), strict=True))
    grey = images[:, :1]
    assert torch.equal(one(grey)[0], one(grey.repeat(1, 3, 1, 1))[0])
    painted = torch.rand(2, 3, 32, 32, requires_grad=True)
    loss = perceptual_loss(one, painted, images)
    scale = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1)
    wanted = sum(w * (a - b).abs().mean() for w, a, b in zip(scale, one(painted), maps, strict=True))
    torch.testing.assert_close(loss, torch.as_tensor(wanted))
    assert float(perceptual_loss(one, images, images)) == 0
    state = tiny(levels=1, perceptual="vgg19", vgg_weights=str(tmp_path / "vgg19.safetensors"))
    parts = parts_of(colored_regions(4, 1, side_px=32))
    pyramid_gan.before_step(state, parts, 3, STEPS)  # a run that goes on reads them too
    losses = pyramid_gan.step(state, batch_of(2, 32))
    assert float(losses["perceptual"]) > 0
    assert not state.modules["perceptual"].state_dict()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"not weights", "damaged, or not a state dict"),
        ({"a": torch.zeros(1)}, r"features.0.weight is missing, VGG19 has \(64, 3, 3, 3\)"),
        (
            {**random_vgg(), "features.5.bias": torch.zeros(64)},
            r"features.5.bias is of shape \(64,\), VGG19 has \(128,\)",
        ),
        ([1, 2], "not a state dict"),
    ],
    ids=["missing", "damaged", "another", "other shape", "a list"],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_that_cannot_be_read_are_named(tmp_path: Path, content: Any, said: str, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict) and suffix == ".safetensors":
        save_file(content, path)
    elif content is not None:
        torch.save(content, path)
        said = "damaged" if suffix == ".safetensors" else said
    with pytest.raises(WeightsError, match=f"weights{suffix}: {said}"):
        VGG19Features().read(path)


def test_a_file_of_weights_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"features.0.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match="damaged"):
        VGG19Features().read(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


GAME: dict[str, Any] = {
    "lambda_rec": 0.0,
    "lambda_feat": 0.0,
    "synthetic_weight": 0.0,
    "lambda_ce": 0.0,
    **QUIET,
}


@pytest.mark.full
@pytest.mark.parametrize("gan", ["bce", "lsgan", "wgan-gp"])
def test_the_discriminator_learns_to_tell_pairs_apart(batch: Batch, gan: str) -> None:
    state = tiny(
        gan=gan, generator_learning_rate=STILL, segmenter_learning_rate=STILL, discriminator_learning_rate=2e-3, **QUIET
    )
    losses = [float(pyramid_gan.step(state, batch)["discriminator"]) for _ in range(25)]
    assert losses[-1] < losses[0] - 0.2 * abs(losses[0])


@pytest.mark.full
@pytest.mark.parametrize("player", ["generator", "segmenter"])
@pytest.mark.parametrize("gan", ["bce", "lsgan", "wgan-gp"])
def test_the_players_learn_to_pass_for_true(batch: Batch, gan: str, player: str) -> None:
    """The adversarial term alone: what D believes of their pairs rises."""
    rates: dict[str, Any] = {
        "generator_learning_rate": STILL,
        "segmenter_learning_rate": STILL,
        "discriminator_learning_rate": STILL,
        f"{player}_learning_rate": 2e-3,
    }
    state = still(tiny(gan=gan, **GAME, **rates))
    name = f"{player}_adversarial"
    losses = [float(pyramid_gan.step(state, batch)[name]) for _ in range(12)]
    assert losses[-1] < losses[0]


def gradients(state: State, name: str, batch: Batch) -> list[torch.Tensor]:
    """Gradients that an optimiser sees in one step."""
    seen: list[torch.Tensor] = []

    def look(*_: object) -> None:
        seen.extend(p.grad.clone() for p in state.modules[name].parameters() if p.grad is not None)

    state.optimizers[name].register_step_pre_hook(look)
    pyramid_gan.step(state, batch)
    return seen


def by_hand(loss: torch.Tensor, module: torch.nn.Module) -> list[torch.Tensor]:
    return [g for g in torch.autograd.grad(loss, list(module.parameters()), allow_unused=True) if g is not None]


def yes(judged: Judged) -> torch.Tensor:
    """-log D, the mean of the scales."""
    return torch.stack([-maps[-1].sigmoid().log().mean() for maps in judged]).mean()


def no(judged: Judged) -> torch.Tensor:
    return torch.stack([-(1 - maps[-1].sigmoid()).log().mean() for maps in judged]).mean()


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("semi", [False, True], ids=["supervised", "semi-supervised"])
@pytest.mark.parametrize("mask", ["softmax", "straight_through"])
def test_the_gradients_are_those_of_equation_8(batch: Batch, kind: str, semi: bool, mask: str) -> None:
    """All terms of level 0, by hand: the coarser level is frozen, its images are for S alone."""
    options: dict[str, Any] = {
        **QUIET,
        "lambda_rec": 0.5,
        "lambda_feat": 2.0,
        "lambda_ce": 0.7,
        "synthetic_weight": 0.3,
        "discriminator_learning_rate": STILL,
        "generator_learning_rate": STILL,
        "segmenter_learning_rate": STILL,
        "semi_supervised": semi,
        "mask_for_discriminator": mask,
    }
    state = still(tiny(**options))
    m = state.modules
    for name, module in m.items():
        module.train(name.endswith("_0"))
    labelled = 2 if semi else 4
    shown = batch.images[:labelled]
    if semi:
        shown = torch.cat([shown, batch.pools["unlabelled"][:2]])
    x = shown / 127.5 - 1
    y = one_hot_levels(batch.labels[:labelled], 2, 2)
    half = F.avg_pool2d(x, 2)
    with torch.no_grad():
        y_above = up2(m["segmenter_1"](F.pad(half, (0, 0, 0, 0, 0, 2))).softmax(dim=1))
        nothing = torch.zeros(labelled, 3, 16, 16)
        x_coarse = m["generator_1"](y[1], nothing, nothing)
        above = up2(x_coarse)
    scores = m["segmenter_0"](torch.cat([x, y_above], dim=1))
    painted = m["generator_0"](y[0], torch.zeros_like(above), above)
    judge = m["discriminator_0"]
    real_pair = torch.cat([x[:labelled], y[0]], dim=1)
    fake_pair = torch.cat([painted, y[0]], dim=1)
    said = scores.softmax(dim=1)
    if mask == "straight_through":
        said = (scores == scores.amax(dim=1, keepdim=True)).float() + said - said.detach()
    said_pair = torch.cat([x, said], dim=1)
    if kind == "generator":
        real, fake = judge(real_pair), judge(fake_pair)
        off = [
            (a.detach() - b).abs().mean() * 4 / 4
            for one, two in zip(real, fake, strict=True)
            for a, b in zip(one[:-1], two[:-1], strict=True)
        ]
        mse = ((painted - x[:labelled]) ** 2).mean()
        loss = yes(fake) + 0.5 * mse + 2 * torch.stack(off).sum() / 2
    elif kind == "segmenter":
        with torch.no_grad():
            coarse = m["segmenter_1"](F.pad(x_coarse, (0, 0, 0, 0, 0, 2))).softmax(dim=1)
        on_painted = m["segmenter_0"](torch.cat([painted.detach(), up2(coarse)], dim=1))
        truth = batch.labels[:labelled]
        loss = 0.7 * F.cross_entropy(scores[:labelled], truth) + yes(judge(said_pair))
        loss = loss + 0.3 * F.cross_entropy(on_painted, truth)
    else:
        if semi:  # in the last step all pairs without labels join the true ones
            found = F.one_hot(scores[2:].argmax(dim=1), 2).movedim(-1, 1).float()
            real_pair = torch.cat([real_pair, torch.cat([x[2:], found], dim=1)])
        loss = yes(judge(real_pair)) + (no(judge(fake_pair)) + no(judge(said_pair))) / 2
    wanted = by_hand(loss, m[f"{kind}_0"])
    seen = gradients(still(tiny(**options)), f"{kind}_0", batch)
    assert len(seen) == len(wanted) > 5
    for a, b in zip(seen, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-6)


class JudgeOfSureness(torch.nn.Module):
    """D that looks at how sure a mask is and at nothing else: 10 (``|y_0 - y_1|`` - 0.8).

    A leaky rectifier on a convolution of the pair is enough for it.
    """

    def forward(self, pair: torch.Tensor) -> Judged:
        return [[10 * ((pair[:, 3:4] - pair[:, 4:5]).abs() - 0.8)]]


def test_a_discriminator_can_judge_how_sure_a_mask_is_but_not_of_straight_through_masks() -> None:
    """One pixel of class 0: p = (.8, .2) is right and soft, p = (0, 1) is wrong and sure."""
    judge, image = JudgeOfSureness(), torch.zeros(1, 3, 1, 1)
    true = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1)
    right = torch.tensor([math.log(4), 0.0]).reshape(1, 2, 1, 1).requires_grad_(True)
    wrong = torch.tensor([-50.0, 50.0]).reshape(1, 2, 1, 1)

    def said(kind: str, scores: torch.Tensor) -> torch.Tensor:
        shown = discriminator_mask(kind, scores)
        logits: torch.Tensor = judge(torch.cat([image, shown], dim=1))[0][0]
        return logits

    # The defect: a mask that is all wrong passes as the true one does, a right one does not.
    real = float(judge(torch.cat([image, true], dim=1))[0][0])
    assert real == pytest.approx(2)  # 10 (1 - 0.8)
    assert float(said("softmax", wrong)) == pytest.approx(2)
    assert said("softmax", right).item() == pytest.approx(-2, abs=1e-5)  # 10 (0.6 - 0.8)
    # The right mask is the true one: no D, however good, tells them apart.
    assert torch.equal(discriminator_mask("straight_through", right), true)
    assert said("straight_through", right).item() == real
    # Yet S is moved, as by p: d logit / d s_0 = 10 (1 - -1) p_0 p_1 = 20 * .8 * .2.
    (slope,) = torch.autograd.grad(said("straight_through", right).sum(), right)
    torch.testing.assert_close(slope.flatten(), torch.tensor([3.2, -3.2]))


@pytest.mark.parametrize("kind", ["softmax", "straight_through"])
def test_the_discriminator_is_discriminator_masks_of_the_kind_asked_for(
    batch: Batch, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    state = tiny(mask_for_discriminator=kind, lambda_ce=0.0, synthetic_weight=0.0)
    shown: list[torch.Tensor] = []
    original = pyramid_gan._step_discriminator

    def watch(state: State, level: int, reals: torch.Tensor, fakes: Any) -> torch.Tensor:
        shown.append(fakes[-1][1].detach())
        return original(state, level, reals, fakes)

    monkeypatch.setattr(pyramid_gan, "_step_discriminator", watch)
    slopes = gradients(state, "segmenter_0", batch)
    hard = bool(((shown[0] == 0) | (shown[0] == 1)).all())
    assert hard == (kind == "straight_through")
    torch.testing.assert_close(shown[0].sum(dim=1), torch.ones(4, 32, 32))
    assert sum(float(g.abs().sum()) for g in slopes) > 0  # all of it through D


def test_pairs_without_labels_join_the_true_ones_by_and_by(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tiny(semi_supervised=True, pseudo_positives=0.25)
    sizes: list[int] = []
    original = pyramid_gan._step_discriminator

    def watch(state: State, level: int, reals: torch.Tensor, fakes: Any) -> torch.Tensor:
        sizes.append(len(reals))
        assert (reals[:, 3:].sum(dim=1) == 1).all()  # hard masks only
        assert set(reals[:, 3:].unique().tolist()) <= {0.0, 1.0}
        return original(state, level, reals, fakes)

    monkeypatch.setattr(pyramid_gan, "_step_discriminator", watch)
    first = batch_of(24, 32, step=0)
    pyramid_gan.step(state, first)
    assert sizes == [12]  # half of the batch has labels
    for seed in range(6):
        torch.manual_seed(seed)
        pyramid_gan.step(state, replace(first, step=FINE))
    joined = np.mean(sizes[1:]) - 12
    assert len(set(sizes[1:])) > 1  # drawn at random
    assert 0.1 < joined / (12 + joined) < 0.4  # a quarter is expected


def test_images_without_labels_change_what_is_learned(batch: Batch) -> None:
    other = replace(batch, pools={"unlabelled": batch.images.flip(-1)})
    for more in ({"semi_supervised": True}, {**SEGMENTERS, "lambda_consistency": 1.0}):
        found = []
        for one in (batch, other):
            state = tiny(**more)
            torch.manual_seed(0)
            pyramid_gan.step(state, one)
            found.append(weights(state.modules["segmenter_0"]))
        assert any(not torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_the_teacher_is_a_mean_of_the_student(batch: Batch) -> None:
    state = tiny(**SEGMENTERS, lambda_consistency=1.0, ema=0.75)
    parts = parts_of(colored_regions(4, 1, side_px=32))
    teacher, student = state.modules["teacher"], state.modules["segmenter_1"]
    assert changed(weights(student), teacher)
    pyramid_gan.before_step(state, parts, 0, STEPS)
    assert not changed(weights(student), teacher)  # it starts as the student
    before = [p.clone() for p in teacher.parameters()]
    losses = pyramid_gan.step(state, replace(batch, step=0))
    assert float(losses["consistency"]) > 0  # noise and dropout of their own
    for old, mean, new in zip(before, teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(mean, 0.75 * old + 0.25 * new)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(key.startswith("teacher") for key in state.optimizers)


# ----------------------------------------------------------------------------- switches

SWITCHES: dict[str, dict[str, Any]] = {
    "full": {},
    "resnet": {"g_arch": "resnet", "g_blocks": 1},
    "lsgan": {"gan": "lsgan"},
    "wgan-gp": {"gan": "wgan-gp", "semi_supervised": True},
    "l1": {"rec_loss": "l1", "lambda_rec": 1.0},
    "semi": {"semi_supervised": True},
    "judged by pix2pix": {"d_arch": "patch", "lambda_feat": 0.0, "levels": 1},
    "pyramid": SEGMENTERS,
    "pyramid with D": {"g_arch": "none"},
    "generators with D": {"judge_segmenter": False},
    "one level": {**SEGMENTERS, "levels": 1},
    "consistency": {**SEGMENTERS, "levels": 1, "lambda_consistency": 1.0},
    "consistency, two levels": {"lambda_consistency": 1.0},
    "pix2pix": {
        "g_arch": "unet",
        "g_downs": 3,
        "d_arch": "patch",
        "lambda_feat": 0.0,
        "rec_loss": "l1",
        "lambda_rec": 100.0,
        "levels": 1,
        "judge_segmenter": False,
    },
    "pix2pixHD": {
        "g_arch": "resnet",
        "g_downs": 2,
        "g_blocks": 2,
        "gan": "lsgan",
        "levels": 1,
        "judge_segmenter": False,
    },
    "three levels": {"levels": 3},
    "admitted by quality": {"synthetic_rule": "quality", "synthetic_quality": 9.0},
    "clean statistics": {"reestimate": True, "painted_statistics": False},
    "straight through": {"mask_for_discriminator": "straight_through", "gan": "wgan-gp"},
}


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_trains(name: str) -> None:
    state = tiny(**SWITCHES[name])
    config = state.config
    early = pyramid_gan.step(state, batch_of(4, 32, step=0))
    moved = moved_by(state, batch_of(4, 32))
    late = pyramid_gan.step(state, batch_of(4, 32))
    wanted = {"segmenter_0"}
    wanted |= {"generator_0"} if config.paints else set()
    wanted |= {"discriminator_0"} if config.judges else set()
    wanted |= {"teacher"} if config.lambda_consistency else set()
    wanted |= {"progress"} if config.synthetic_rule == "quality" else set()
    assert moved == wanted
    assert list(early) == list(late)  # the columns of the log
    assert all(math.isfinite(float(v)) and not v.requires_grad for v in late.values())
    zero = {name for name, v in late.items() if float(v) == 0}
    assert not zero
    loss, labels = pyramid_gan.validate(state, batch_of(1, 32).images, batch_of(1, 32).labels)
    assert math.isfinite(loss)
    assert labels.shape == (1, 32, 32)
    painted = pyramid_gan.paint(state, batch_of(1, 32).images)
    assert set(painted) == ({"painted"} if config.paints else set())
    assert all(p.shape == (1, 3, 32, 32) and p.dtype == torch.uint8 for p in painted.values())


def test_grey_images_of_four_classes_train() -> None:
    state = tiny(classes=4, channels=1)
    grey = batch_of(4, 32, channels=1)
    batch = replace(grey, labels=(grey.images[:, 0] // 64).long())
    losses = pyramid_gan.step(state, batch)
    assert all(math.isfinite(float(v)) for v in losses.values())
    assert pyramid_gan.paint(state, batch.images)["painted"].shape == batch.images.shape
    assert pyramid_gan.deployed(state)(batch.images.movedim(1, -1)).shape == (4, 4, 32, 32)


def test_bfloat16_trains(batch: Batch) -> None:
    state = tiny()
    prepare(state, torch.device("cpu"), Compute("cpu", "bf16"))
    before = weights(state.modules["segmenter_0"])
    losses = pyramid_gan.step(state, batch)
    assert all(v.dtype == torch.float32 for v in losses.values())
    assert changed(before, state.modules["segmenter_0"])


def test_comparators_of_as_many_levels_start_from_the_same_segmenters() -> None:
    found = [
        {n: weights(m) for n, m in tiny(**more).modules.items() if n.startswith("segmenter")}
        for more in ({}, SEGMENTERS, {"g_arch": "none"}, {"semi_supervised": True})
    ]
    for other in found[1:]:
        for name, tensors in found[0].items():
            assert all(torch.equal(other[name][key], value) for key, value in tensors.items())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"g_arch": "vgg"}, "g_arch='vgg': use 'singan'"),
        ({"gan": "hinge"}, "gan='hinge'"),
        ({"mask_for_discriminator": "hard"}, "use 'softmax' or 'straight_through'"),
        ({"level_decay": "step"}, "use 'none' or 'cosine' or 'poly'"),
        ({"levels": 0}, "levels=0: use a whole number, 1 to 8"),
        ({"noise": -1.0}, "noise=-1.0: use 0"),
        ({"level_batches": "8,6"}, "level_batches='8,6': give 4 whole numbers"),
        ({"level_batches": "8,6,4,0"}, "give 4 whole numbers from 1"),
        ({"level_batches": "8;6"}, "level_batches='8;6': use whole numbers with commas"),
        ({"g_arch": "unet"}, "set levels=1"),
        ({"d_arch": "patch"}, "set lambda_feat=0"),
        ({"semi_supervised": True, "judge_segmenter": False}, "set judge_segmenter"),
        ({"perceptual": "vgg19"}, "needs vgg_weights=PATH"),
        ({"synthetic_rule": "all"}, "use 'epochs' or 'quality'"),
        ({"synthetic_from": 1.5}, "synthetic_from=1.5: use 0 to 1"),
        ({"pseudo_positives": 0.6}, "use 0 to 0.5"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"pseudo_from": 0.5, "pseudo_to": 0.2}, "pseudo_from=0.5, pseudo_to=0.2: the first"),
    ],
)
def test_settings_that_cannot_be_are_named(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Config(**more)


def test_crops_that_the_levels_cannot_take_are_named() -> None:
    assert [pyramid_gan.align_px(c) for c in (Config(), Config(levels=5), tiny_config())] == [64, 128, 8]
    assert pyramid_gan.align_px(Config(levels=1, g_arch="unet", g_downs=8)) == 256
    with pytest.raises(DataError, match="crops are 36 x 36 px, 2 levels take multiples of 8 px"):
        pyramid_gan.step(tiny(), batch_of(2, 36))
    with pytest.raises(DataError, match="8 x 8 px, 2 levels take multiples of 8 px from 16 px on"):
        pyramid_gan.step(tiny(d_scales=3), batch_of(2, 8))
    pyramid_gan.step(tiny(d_scales=3), batch_of(2, 16))


# ----------------------------------------------------------------------------- what is deployed


def test_the_pyramid_is_one_graph_of_all_levels(batch: Batch) -> None:
    """Equation 5, coarse to fine, against a loop of plain functions."""
    state = tiny(levels=3, classes=3)
    state.modules["progress"].level.fill_(0)  # type: ignore[operator]
    module = pyramid_gan.deployed(state)
    tiles = batch.images.movedim(1, -1).contiguous()
    with torch.no_grad():
        x, seen = batch.images / 127.5 - 1, torch.zeros(4, 3, 8, 8)
        for n in (2, 1, 0):
            level = F.interpolate(x, scale_factor=1 / (1 << n), mode="area")
            inside = torch.cat([level, seen], dim=1)
            wanted = state.modules[f"segmenter_{n}"].eval()(inside).softmax(dim=1)
            seen = F.interpolate(wanted, scale_factor=2, mode="bilinear")
        scores = module(tiles)
    assert scores.dtype == torch.float16
    assert (scores.float() - wanted).abs().max() <= 0.003  # what rounding may change
    loss, labels = pyramid_gan.validate(state, batch.images, batch.labels)
    assert torch.equal(labels, wanted.argmax(dim=1))
    assert loss == pytest.approx(float(F.nll_loss(wanted.log(), batch.labels)), rel=1e-4)
    assert hook(pyramid_gan, "score_kind")(state.config) == "probability"
    kinds = {type(m) for m in module.modules()}
    assert torch.nn.InstanceNorm2d not in kinds  # no discriminator
    assert not module.training


def test_a_checkpoint_of_an_early_level_deploys_what_is_trained(batch: Batch) -> None:
    state = tiny()
    parts = parts_of(colored_regions(4, 1, side_px=32))
    pyramid_gan.before_step(state, parts, 0, STEPS)
    with torch.no_grad():
        half = F.avg_pool2d(batch.images / 127.5 - 1, 2)
        coarse = state.modules["segmenter_1"].eval()(F.pad(half, (0, 0, 0, 0, 0, 2)))
        wanted = up2(coarse.softmax(dim=1))
        scores = pyramid_gan.deployed(state)(batch.images.movedim(1, -1).contiguous())
    assert (scores.float() - wanted).abs().max() <= 0.003  # what rounding may change
    labels = pyramid_gan.validate(state, batch.images, batch.labels)[1]
    assert torch.equal(labels, wanted.argmax(dim=1))
    pyramid_gan.before_step(state, parts, 4, STEPS)
    later = pyramid_gan.deployed(state)(batch.images.movedim(1, -1).contiguous())
    assert not torch.equal(later, scores)


# ----------------------------------------------------------------------------- recipes and runs


def read(*names: str, settings: tuple[str, ...] = ()) -> Recipe:
    configs = ("pyramid-paper", *names)
    return read_recipe("pyramid_gan", pyramid_gan, configs, settings, mpp=0.5)


RECIPES = {
    "pyramid-paper": (4, "singan", True, False, 0.0),
    "pyramid-recommended": (4, "singan", True, False, 0.0),
    "pyramid-resnet": (4, "resnet", True, False, 0.0),
    "pyramid-five-levels": (5, "singan", True, False, 0.0),
    "pyramid-semi": (4, "singan", True, True, 0.0),
    "pyramid-m-fcdensenet": (1, "none", False, False, 0.0),
    "pyramid-segmenters": (4, "none", False, False, 0.0),
    "pyramid-consistency": (1, "none", False, False, 1.0),
    "pyramid-pix2pix": (1, "unet", False, False, 0.0),
    "pyramid-pix2pixhd": (1, "resnet", False, False, 0.0),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_papers_comparators_ship_as_recipes(name: str) -> None:
    recipe = read(*(() if name == "pyramid-paper" else (name,)))
    config, schedule = recipe.config, recipe.schedule
    terms = (config.levels, config.g_arch, config.judge_segmenter, config.semi_supervised, config.lambda_consistency)
    assert terms == RECIPES[name]
    weights_ = (config.lambda_ce, config.beta1, config.beta2, config.segmenter_learning_rate)
    assert weights_ == (1.0, 0.5, 0.999, 5e-4)
    assert config.batches in ((), (8, 6, 4, 4), (8, 6, 4, 4, 3))
    assert max((*config.batches, 1)) <= schedule.batch
    assert schedule.crop_px % pyramid_gan.align_px(config) == 0
    uses = bool(pyramid_gan.pools(config))
    assert uses == (schedule.labelled < 1)
    with torch.device("meta"):
        state = pyramid_gan.build(config, 2, 3)
    assert count(state.modules["segmenter_0"]) == 966_050
    if config.batches:  # 200 epochs of 500 or 1000 tiles at every level
        phases = [pyramid_gan.phase_at(config, i, schedule.steps) for i in (0, schedule.steps - 1)]
        assert [p.level for p in phases] == [config.levels - 1, 0]
        tiles = 1000 if config.levels == 5 else 500
        whole = sum(200 * tiles / size for size in config.batches)
        assert schedule.steps == pytest.approx(whole, rel=1e-3)


TINY = (
    *(f"method.{key}={value}" for key, value in SMALL.items()),
    "method.level_batches=",
    "schedule.steps=8",
    "schedule.crop_px=32",
    "schedule.batch=2",
    "schedule.validate_every=3",
    "schedule.validation=0.25",
    "augmentation.color_jitter=0",
    "method.segmenter_learning_rate=3e-3",
)


@pytest.mark.full
@pytest.mark.parametrize("stop", [1, 3, 5], ids=["coarse", "between levels", "fine"])
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("method.semi_supervised=true", "schedule.labelled=0.5"),
        (
            "method.g_arch=none",
            "method.judge_segmenter=false",
            "method.lambda_consistency=1.0",
            "schedule.labelled=0.5",
        ),
        ("method.gan=wgan-gp", "method.g_arch=resnet", "method.g_blocks=1"),
    ],
    ids=["full", "semi-supervised", "consistency", "wgan-gp, resnet"],
)
def test_a_killed_run_goes_on_as_if_it_never_stopped(tmp_path: Path, more: tuple[str, ...], stop: int) -> None:
    recipe = read(settings=(*TINY, *more, f"schedule.validate_every={stop}"))
    found = colored_regions(6, 2, side_px=48)
    killed_and_resumed(recipe, pyramid_gan, found, tmp_path, step=stop + 1)
    for name in ("last", "best"):
        one = weights_of(tmp_path / "broken", name)
        assert int(one["progress.level"]) == 0
        if recipe.config.paints:
            assert 0 < float(one["progress.amplitudes"][0]) < 0.5
    rows = logged(tmp_path / "broken")
    assert [row["step"] for row in rows] == [str(i) for i in range(1, 9)]


def test_labels_are_kept_of_whole_patients_or_of_images() -> None:
    """Ten images of two patients, 30 % of them: one patient's five, or any three."""
    drawn = colored_regions(10, 1, side_px=8)
    found = replace(
        drawn,
        train=tuple(replace(s, group=f"patient {i % 2}") for i, s in enumerate(drawn.train)),  # type: ignore[type-var]
    )

    def kept(share: float, by: Literal["patient", "image"], seed: int = 0) -> set[str]:
        schedule = Schedule(validation=0, select="last", labelled=share, labelled_by=by, seed=seed)
        parts = divide(found, schedule)
        names = {parts.samples[i].name for i in parts.split.train}
        assert not names & {p.name for p in parts.pools["unlabelled"]}
        assert len(names) + len(parts.pools["unlabelled"]) == 10
        return names

    group_of = {s.name: s.group for s in found.train}
    by_patient, by_image = kept(0.3, "patient"), kept(0.3, "image")
    assert len(by_patient) == 5
    assert len({group_of[name] for name in by_patient}) == 1
    assert len(by_image) == 3
    assert by_image < kept(0.6, "image")
    assert len({frozenset(kept(0.3, "image", seed)) for seed in range(5)}) > 1
    assert Schedule().labelled_by == "patient"
    with pytest.raises(ValueError, match="labelled_by='slide': use 'patient' or 'image'"):
        Schedule(labelled_by="slide")  # type: ignore[arg-type]


@pytest.mark.full
@pytest.mark.parametrize("select", ["loss", "dice", "last"])
def test_the_best_checkpoint_is_one_of_the_finest_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, select: str
) -> None:
    """Steps 1 to 4 are of the coarser level, whose scores here are the best of all."""
    found = colored_regions(6, 2, side_px=32)
    values = iter([0.1, 0.2, 0.3, 0.4, 0.9, 0.6, 0.7, 0.8])

    def judged(state: State, images: torch.Tensor, labels: torch.Tensor) -> Any:
        value = next(values, 1.0)
        kept = torch.arange(labels.numel()).reshape(labels.shape) >= value * labels.numel()
        return value, torch.where(kept, labels, 1 - labels)

    monkeypatch.setattr(pyramid_gan, "validate", judged)
    settings = (*TINY, f"schedule.select={select}", "schedule.validate_every=1", "schedule.validation=0.01")
    best = loop.train(read(settings=settings), pyramid_gan, found, tmp_path)
    assert best.step == (8 if select == "last" else 6)
    assert int(weights_of(tmp_path, "best")["progress.level"]) == 0


@pytest.mark.full
def test_no_image_is_held_back_where_the_last_checkpoint_counts(tmp_path: Path) -> None:
    found = colored_regions(6, 2, side_px=32)
    recipe = read(settings=(*TINY, "schedule.validation=0"))
    assert recipe.schedule.select == read().schedule.select == "last"
    assert read().schedule.validation == 0
    best = loop.train(recipe, pyramid_gan, found, tmp_path)
    assert best.step == 8
    assert best.record["images"] == {"train": 6, "validation": 0, "test": 2}
    assert set(best.record["scores"]) == {"test"}
    assert best.record["validation_loss"] is None
    assert {row["validation_loss"] for row in logged(tmp_path)} == {""}
    # Where one is chosen, a group is held back, whatever the share; an official part stays.
    chosen = divide(found, replace(recipe.schedule, select="dice"))
    assert len(chosen.split.validation) == 1
    official = divide(replace(found, validation=found.test[:1], test=found.test[1:]), recipe.schedule)
    assert [len(part) for part in (official.split.train, official.split.validation)] == [6, 1]


def test_a_run_needs_images_without_labels_only_where_it_says_so() -> None:
    found = colored_regions(4, 1, side_px=32)
    for config, needs in (
        (Config(), False),
        (Config(semi_supervised=True), True),
        (Config(lambda_consistency=1.0), True),
    ):
        assert pyramid_gan.pools(config) == (("unlabelled",) if needs else ())
    with pytest.raises(DataError, match=r"--pool unlabelled=SET, or set schedule.labelled below"):
        check_pools(parts_of(found), ("unlabelled",), "pyramid_gan")
    check_pools(parts_of(found, labelled=0.5), ("unlabelled",), "pyramid_gan")


def test_transductive_learning_adds_the_test_images_to_the_pool() -> None:
    found = colored_regions(8, 3, side_px=32)
    pools: dict[str, tuple[Picture, ...]] = {"unlabelled": found.test}
    parts = parts_of(replace(found, pools=pools), labelled=0.5)
    hidden = [p.name for p in parts.pools["unlabelled"]]
    assert hidden[:3] == [s.name for s in found.test]
    train = {parts.samples[i].name for i in parts.split.train}
    assert len(hidden) == 3 + 3
    assert len(train) == 3
    assert not train & set(hidden)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of a tiny pyramid that has learned something."""
    run = tmp_path_factory.mktemp("pyramid") / "run"
    recipe = read(settings=(*TINY, "schedule.steps=80", "schedule.validate_every=80"))
    loop.train(recipe, pyramid_gan, colored_regions(12, 2, side_px=48), run)
    return run


@pytest.mark.full
def test_a_bundle_gives_torchs_labels_in_every_precision(trained: Path, tmp_path: Path) -> None:
    over = tmp_path / "images"
    over.mkdir()
    found = colored_regions(12, 1, side_px=64, seed=5)
    for one in found.train:
        Image.fromarray(one.image).save(over / f"{one.name}.png")
    options = Options(tensorrt="off", tile_px=64, calibrate=over)
    done = export_checkpoint("pyramid_gan", trained, tmp_path / "bundle", options)
    assert {"model.onnx", "model.fp16.onnx"} <= set(done.card.files)
    assert done.card.align_px == 8
    assert not done.card.tile_statistics
    said = checkpoint.read(trained / "best")
    state = pyramid_gan.build(Config(**said.config), 2, 3)
    checkpoint.load(trained / "best", state)
    image = found.test[0].image
    with torch.no_grad():
        module = pyramid_gan.deployed(state)
        wanted = module(torch.from_numpy(image[None]))[0].numpy().argmax(axis=0)
    assert (wanted == found.test[0].labels).mean() > 0.8
    least = {"fp32": 0.9999, "fp16": 0.999, "int8": 0.98}
    for precision, agreement in least.items():
        if precision == "int8" and "model.int8.onnx" not in done.card.files:
            assert any(f.startswith("int8") for f in done.failures)  # with its reason
            continue
        engine = open_engine(tmp_path / "bundle", backend="cpu", precision=precision)
        assert (segment_pixels(image, engine) == wanted).mean() >= agreement
    graph = onnx.load(tmp_path / "bundle" / "model.onnx").graph
    kinds = {node.op_type for node in graph.node}
    assert "AveragePool" in kinds
    assert not kinds & FORBIDDEN


@pytest.mark.full
def test_an_engine_is_built(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    options = Options(precisions=("fp32",), tensorrt="rtx", tile_px=32)
    done = export_checkpoint("pyramid_gan", trained, tmp_path / "bundle", options)
    assert not done.failures
    assert any(name.startswith("engines/") for name in done.card.files)


# ----------------------------------------------------------------------------- sampling


@pytest.mark.full
def test_painted_images_are_a_data_set_of_their_own(trained: Path, tmp_path: Path) -> None:
    painter = sample.open_painter(trained)
    found = colored_regions(3, 1, side_px=50, seed=2)  # no multiple of 8
    out = tmp_path / "painted"
    assert sample.sample(painter, found, out, per_mask=2) == 6
    assert sorted(p.name for p in out.iterdir()) == [
        "dataset.toml",
        "images",
        "labels",
        "sheet.png",
    ]
    again = datasets.open_dataset(str(out))
    assert (again.name, again.mpp) == ("painted", 0.5)
    assert again.classes == found.classes
    assert len({s.group for s in again.train}) == 3
    assert len(again.train) == 6
    for i, one in enumerate(again.train):
        np.testing.assert_array_equal(one.labels, found.train[i // 2].labels)
        assert one.image.shape == (50, 50, 3)
    a, b = again.train[:2]
    assert (a.image != b.image).any()


@pytest.mark.full
def test_the_seed_alone_says_how_an_image_looks(trained: Path, tmp_path: Path) -> None:
    painter = sample.open_painter(trained)
    found = colored_regions(2, 1, side_px=48, seed=2)
    for name, count, seed in (("a", 1, 0), ("b", 3, 0), ("c", 1, 1)):
        sample.sample(painter, found, tmp_path / name, per_mask=count, seed=seed)
    a, b, c = ({p.name: p.read_bytes() for p in (tmp_path / name / "images").iterdir()} for name in "abc")
    assert len(b) == 3 * len(a) == 6
    assert all(b[name] == content for name, content in a.items())
    assert all(c[name] != content for name, content in a.items())


@pytest.mark.full
def test_classes_can_be_exchanged_by_name_or_number(trained: Path, tmp_path: Path) -> None:
    painter = sample.open_painter(trained)
    found = colored_regions(1, 1, side_px=48, seed=2)
    for name, swap in (("by name", "stroma=gland"), ("by number", "1=0")):
        sample.sample(painter, found, tmp_path / name, swap=swap)
        (one,) = datasets.open_dataset(str(tmp_path / name)).train
        np.testing.assert_array_equal(one.labels, 1 - found.train[0].labels)
    labels = np.array([[0, 1, 2]], np.uint8)
    np.testing.assert_array_equal(sample.swapped(labels, 2, 1), [[0, 2, 1]])


def saved_run(folder: Path, state: State, method: str = "pyramid_gan") -> Path:
    classes = [("stroma", (225, 170, 200)), ("gland", (110, 80, 150))]
    config = loop.to_jsonable(state.config)
    said = Checkpoint(method, config, classes, 3, 0.5, 1, {})
    checkpoint.save(folder / "best", said, state, optimizers=False)
    return folder


@pytest.mark.full
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("RUN", "--swap", "stroma"), "--swap 'stroma': write A=B"),
        (("RUN", "--swap", "stroma=lumen"), "no class 'lumen'; there are stroma, gland"),
        (("nowhere",), "nowhere: no checkpoint in it"),
        (("early",), "saved when level 1 was trained"),
        (("unpainted",), "it has no generator"),
        (("foreign",), "trained by 'imems', which paints no images"),
        (("RUN", "--data", "nowhere"), "nowhere: there is no such folder"),
        (("RUN", "--out", "set"), "set: exists already; choose another folder"),
        (("RUN", "--data", "many"), "label 2 in b.png; the model paints 2 classes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_users_mistake_is_one_line(trained: Path, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for name, values in (("set", 2), ("many", 3)):
            for part in ("images", "labels"):
                (Path(name) / part).mkdir(parents=True)
            for k, file in enumerate("ab"):
                pixels = np.full((32, 32), 0, np.uint8)
                pixels[: 8 + k] = values - 1 if k else 1
                pixels[8 + k : 12] = 1
                Image.fromarray(pixels).save(f"{name}/labels/{file}.png")
                shown = np.repeat(pixels[..., None] * 40, 3, axis=2)
                Image.fromarray(shown).save(f"{name}/images/{file}.png")
        saved_run(Path("early"), tiny())
        saved_run(Path("unpainted"), tiny(**SEGMENTERS))
        saved_run(Path("foreign"), tiny(), method="imems")
        run, *more = arguments
        out = more[1] if more[:1] == ["--out"] else "out"
        given = [str(trained) if run == "RUN" else run, out]
        given += more if more and more[0] != "--out" else []
        if "--data" not in given:
            given += ["--data", "set"]
        done = CliRunner().invoke(cli.main, ["sample", *given])
        assert done.exit_code == 1
        assert done.stderr.startswith("histo-train: ")
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
        assert not Path("out").exists()
        ready = CliRunner().invoke(cli.main, ["sample", str(trained), "out", "--data", "set"])
        assert ready.exit_code == 0, ready.stderr
        assert "2 images and their labels: out" in ready.stdout


@pytest.mark.full
def test_nothing_is_left_of_a_set_that_could_not_be_written(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(rows: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preview, "sheet", full)
    found = colored_regions(1, 1, side_px=32)
    with pytest.raises(OutputError, match=r"cannot be written .No space left"):
        sample.sample(sample.open_painter(trained), found, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_the_exported_generators_paint_what_torch_paints(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "generator.onnx"
    model = generator.export_generator(trained, path, tile_px=32)
    assert onnx.load(path) == model
    names = [value.name for value in model.graph.input]
    assert names == ["mask_1", "mask_0", "noise_1", "noise_0"]
    assert not {node.op_type for node in model.graph.node} & FORBIDDEN
    assert not any("Random" in node.op_type for node in model.graph.node)
    painter = sample.open_painter(trained)
    labels = (np.add.outer(np.arange(32), np.arange(32)) % 20 > 9).astype(np.uint8)
    masks = one_hot_levels(torch.from_numpy(labels[None]).long(), 2, 2)[::-1]
    session = open_session(model)
    seen = []
    for seed in (3, 3, 4):
        rng = np.random.default_rng(seed)
        noises = [rng.standard_normal((1, 3, *m.shape[-2:]), np.float32) for m in masks]
        values = [*(m.numpy() for m in masks), *noises]
        (found,) = session.run(["images"], dict(zip(names, values, strict=True)))
        wanted = sample.paint(painter, labels, (seed,))
        off = np.abs(found[0].astype(int) - wanted.astype(int))
        assert off.max() <= 1
        assert (off == 0).mean() > 0.999
        seen.append(found)
    assert (seen[0] == seen[1]).all()
    assert (seen[0] != seen[2]).any()
    with pytest.raises(GraphError, match="tile of 30 px: these generators take multiples of 8"):
        generator.export_generator(trained, path, tile_px=30)
    done = CliRunner().invoke(export_cli.main, ["generator", str(tmp_path), str(tmp_path / "x.onnx")])
    assert done.exit_code == 1
    assert "no checkpoint in it" in done.stderr


def test_a_painter_says_what_is_missing(tmp_path: Path) -> None:
    run = saved_run(tmp_path, tiny())
    with pytest.raises(CheckpointError, match="level 1 was trained, the finer ones were not"):
        sample.open_painter(run)


# ----------------------------------------------------------------------------- learning


def test_the_cue_is_far_from_the_disc_and_says_its_class() -> None:
    found = synthetic.long_range_cue(20, 10, side_px=64)
    assert [int(s.labels.max()) for s in found.test] == [1, 2] * 5
    for one in (*found.train, *found.test):
        red, _, blue = (one.image[..., c].astype(int) for c in range(3))
        kind = int(one.labels.max())
        patch = np.argwhere((red - blue if kind == 1 else blue - red) > 100)
        disc = np.argwhere(one.labels > 0)
        assert len(patch) == 16
        assert patch[:, 1].max() < 8
        assert disc[:, 1].min() - patch[:, 1].max() > 24
        strong = (np.abs(red - blue) > 100) & (one.labels > 0)
        assert not strong.any()


def disc_accuracy(levels: int, steps: int, batches: str = "") -> float:
    """Train segmenters of a reach of 40 px; share of the discs' pixels of the right class."""
    found = synthetic.long_range_cue(400, 40, side_px=64, seed=3)
    config = Config(
        **SEGMENTERS,
        levels=levels,
        level_batches=batches,
        poolings=2,
        layers=2,
        first_width=8,
        growth=6,
        dropout=0.0,
        segmenter_noise=0.0,
        segmenter_learning_rate=5e-3,
        beta1=0.9,
    )
    state = learned(found, config, Schedule(steps=steps, batch=8, crop_px=64, validation=0.02))
    images = torch.from_numpy(np.stack([s.image for s in found.test])).movedim(-1, 1)
    truth = torch.from_numpy(np.stack([s.labels for s in found.test]).astype(np.int64))
    labels = pyramid_gan.validate(state, images, truth)[1]
    disc = truth > 0
    assert float((labels > 0)[disc].float().mean()) > 0.9  # the disc is found in any case
    return float((labels == truth)[disc].float().mean())


def learned(found: DataSet, config: Config, schedule: Schedule, augmentation: Augmentation | None = None) -> State:
    parts = divide(found, schedule)
    torch.manual_seed(0)
    state = pyramid_gan.build(config, len(found.classes), 3)
    prepare(state, torch.device("cpu"), Compute("cpu"))
    align_px = pyramid_gan.align_px(config)
    draw = Batches(parts, schedule, augmentation or Augmentation(), (), align_px=align_px)
    for batch in draw(0, schedule.steps):
        torch.manual_seed(batch.step)
        set_rates(state.optimizers, schedule.rate(batch.step, batch.steps))
        pyramid_gan.before_step(state, parts, batch.step, batch.steps)
        pyramid_gan.step(state, batch)
    return state


@pytest.mark.full
def test_a_cue_beyond_the_reach_of_one_level_is_seen_by_the_pyramid() -> None:
    """At 64 px, three levels; half of the discs are of either class."""
    assert 0.4 < disc_accuracy(1, 120) < 0.6
    assert disc_accuracy(3, 900, batches="3,8,8") >= 0.95


@pytest.mark.full
def test_generators_paint_the_colours_of_the_labels() -> None:
    """Painting at 32 px, two levels: colours, exchanged classes, noise."""
    found = colored_regions(64, 8, side_px=32, seed=3)
    config = tiny_config(g_width=16, d_width=8, generator_learning_rate=2e-3, discriminator_learning_rate=5e-4)
    schedule = Schedule(steps=360, batch=4, crop_px=32, validation=0.05, decay="cosine")
    state = learned(found, config, schedule, Augmentation(flips=True))
    network = pyramid_gan.generators(state).eval()
    images = torch.from_numpy(np.stack([s.image for s in found.test])) / 127.5 - 1
    truth = torch.from_numpy(np.stack([s.labels for s in found.test]).astype(np.int64))

    @torch.no_grad()
    def painted(labels: torch.Tensor, seed: int) -> torch.Tensor:
        source = torch.Generator().manual_seed(seed)
        masks = one_hot_levels(labels, 2, 2)[::-1]
        noises = [torch.randn(len(m), 3, *m.shape[-2:], generator=source) for m in masks]
        return torch.as_tensor(network(masks, noises) / 127.5 - 1)

    one, exchanged = painted(truth, 0), painted(1 - truth, 0)
    for k in (0, 1):
        real = images[truth == k].mean(dim=0)
        assert (one[truth == k].mean(dim=0) - real).abs().max() < 0.1
        assert (exchanged[truth == 1 - k].mean(dim=0) - real).abs().max() < 0.1
    apart = (images[truth == 0].mean(dim=0) - images[truth == 1].mean(dim=0)).abs().min()
    assert apart > 0.3
    assert torch.equal(painted(truth, 0), one)
    assert float((painted(truth, 1) - one).abs().mean()) > 0.01
