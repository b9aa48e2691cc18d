"""Exact facts of the method by the paper, that every term is alive, and a small adaptation."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from histostream.export.bundle import Options
from histostream.export.trained import export_checkpoint
from histostream.runtime import open_engine, segment_pixels
from histostream.training import checkpoint, loop, synthetic
from histostream.training.augment import Augmentation
from histostream.training.batches import Batches, divide
from histostream.training.data import DataError, DataSet, StoredSample
from histostream.training.device import Compute, prepare
from histostream.training.methods.apma_net import method as apma_net
from histostream.training.methods.apma_net.method import Config
from histostream.training.methods.apma_net.networks import (
    GroupNormUNet,
    ReconstructionDecoder,
    damt_classifier,
    ganin_classifier,
    reverse_gradient,
)
from histostream.training.recipe import Recipe, read_recipe
from histostream.training.schedule import Schedule, set_rates
from histostream.training.state import Batch, State
from histostream.wsi.slides.reader import open_slide
from tests.training.rates import STILL
from tests.training.resuming import killed_and_resumed, logged, weights_of

TERMS = {
    "apma-paper": (True, "adversarial", True),
    "apma-en-de-feat": (True, "adversarial", False),
    "apma-de-pred": (False, "none", True),
    "apma-de-feat": (False, "adversarial", False),
    "apma-roels": (True, "none", False),
    "apma-ganin": (False, "reversal", False),
    "apma-none": (False, "none", False),
}
MM_PER_PX = 5e-6  # 5 nm


def tiny(classes: int = 2, channels: int = 1, **more: Any) -> State:
    torch.manual_seed(0)
    return apma_net.build(tiny_config(**more), classes, channels)


def tiny_config(**more: Any) -> Config:
    return Config(**{"base_width": 4, "discriminator_width": 4, **more})


def adapting(terms: tuple[bool, str, bool], **more: Any) -> dict[str, Any]:
    reconstruct, features, predictions = terms
    return {"reconstruct": reconstruct, "adapt_features": features, "adapt_predictions": predictions, **more}


@pytest.fixture
def batch() -> Batch:
    """Return source and target of two sizes, in the last step of four: a joint one."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8, generator=generator)
    target = torch.randint(0, 160, (2, 1, 48, 32), dtype=torch.uint8, generator=generator)
    return Batch(images, (images[:, 0] > 127).long(), {"target": target}, step=3, steps=4)


def resized(batch: Batch, side: int) -> Batch:
    """Repeat the images of a batch up to a side."""
    times = (1, 1, side // 32, side // 32)
    target = batch.pools["target"][..., :32, :].repeat(times)
    images, labels = batch.images.repeat(times), batch.labels.repeat(times[1:])
    return replace(batch, images=images, labels=labels, pools={"target": target})


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, torch.Tensor], module: torch.nn.Module) -> bool:
    now = module.state_dict()
    return any(not torch.equal(before[name], now[name]) for name in before)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ----------------------------------------------------------------------------- networks


def test_the_papers_networks_have_their_parameters() -> None:
    """The counts follow from the layers, on paper."""
    with torch.device("meta"):
        network = GroupNormUNet(1, 2, base_width=64)
        assert count(network.encoder) == 18_842_048
        assert count(network.segmenter) == 10_099_650
        assert count(ReconstructionDecoder(64, 1)) == 9_402_305
        damt = damt_classifier(64, 512)
        assert damt.layers[13].weight.shape == (288, 196_608)
        assert ganin_classifier(64, 512).layers[21].weight.shape == (128, 16 * 16 * 16)
        state = apma_net.build(Config(), 2, 1)
    assert count(state.modules["discriminator_pred"]) == 2_763_713
    shapes = [
        tuple(m.weight.shape) for m in state.modules["discriminator_feat"].modules() if isinstance(m, torch.nn.Conv2d)
    ]
    assert shapes == [(64, 64, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (1, 256, 4, 4)]
    groups = {m.num_groups for m in network.modules() if isinstance(m, torch.nn.GroupNorm)}
    assert groups == {32}


def test_features_are_64_full_size_maps_and_the_image_has_no_skips() -> None:
    torch.manual_seed(0)
    network, rebuild = GroupNormUNet(1, 2, base_width=64), ReconstructionDecoder(64, 1)
    x = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        scores, features, encoding = network(x)
        assert scores.shape == (1, 2, 32, 32)
        assert features.shape == (1, 64, 32, 32)
        assert encoding.shape == (1, 1024, 2, 2)
        maps = network.encoder(x)
        without = [torch.zeros_like(m) for m in maps[:-1]] + maps[-1:]
        assert not torch.allclose(network.segmenter(without)[0], scores)
        assert torch.equal(rebuild(without[-1]), rebuild(encoding))
        assert rebuild(encoding).shape == x.shape


@pytest.mark.parametrize("width", [1, 4, 12])
def test_narrow_networks_have_fewer_groups(width: int) -> None:
    network = GroupNormUNet(3, 5, base_width=width)
    assert network(torch.rand(1, 3, 32, 32))[0].shape == (1, 5, 32, 32)
    plain = GroupNormUNet(3, 5, base_width=width, norm="none")
    assert not any(isinstance(m, torch.nn.GroupNorm) for m in plain.modules())
    assert count(plain) == count(network)  # the norm has no weights


def test_reversal_negates_and_scales_the_gradient() -> None:
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    out = reverse_gradient(x, 0.25)
    assert torch.equal(out, x)
    (out * torch.tensor([3.0, 5.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [-0.75, -1.25]


@pytest.mark.parametrize("make", [damt_classifier, ganin_classifier])
def test_a_classifier_says_one_logit_an_image(make: Callable[..., Any]) -> None:
    assert make(4, 64)(torch.rand(3, 4, 64, 64)).shape == (3, 1)


# ----------------------------------------------------------------------------- losses and signs


def test_undecided_discriminators_lose_ln_2() -> None:
    nothing = torch.zeros(2, 1, 3, 3)
    assert apma_net.domain_loss(nothing, nothing[:, :, :1]) == pytest.approx(math.log(2))
    assert apma_net.fooling_loss(nothing) == pytest.approx(math.log(2))


def test_the_discriminators_loss_is_equations_4_and_5() -> None:
    source, target = torch.tensor([2.0, -1.0]), torch.tensor([0.5])
    told = source.sigmoid().log().mean() + (1 - target.sigmoid()).log().mean()
    torch.testing.assert_close(apma_net.domain_loss(source, target), -told / 2)
    torch.testing.assert_close(apma_net.fooling_loss(target), -target.sigmoid().log().mean())


@pytest.mark.parametrize("term", ["feat", "pred"])
@pytest.mark.parametrize("slip", [False, True], ids=["equation 7", "equation 4 in 6"])
def test_the_generator_learns_to_pass_the_target_for_source(
    batch: Batch, monkeypatch: pytest.MonkeyPatch, term: str, slip: bool
) -> None:
    """One step with the adversarial term alone: D(target) rises; with the slip, it falls."""
    state = tiny(
        reconstruct=False,
        adapt_features="adversarial" if term == "feat" else "none",
        adapt_predictions=term == "pred",
        lambda_feat=1.0,
        lambda_pred=1.0,
        learning_rate=1e-4,
        discriminator_learning_rate=STILL,
    )
    monkeypatch.setattr(apma_net, "segmentation_loss", lambda config, s, labels, weights: 0 * s.sum())
    if slip:

        def equation_4(target: torch.Tensor) -> torch.Tensor:
            return -(1 - target.sigmoid()).log().mean()

        monkeypatch.setattr(apma_net, "fooling_loss", equation_4)

    @torch.no_grad()
    def believed() -> float:
        y = state.modules["scale"](batch.pools["target"], "target")
        scores, features, _ = state.modules["generator"](y)
        maps = features if term == "feat" else scores.softmax(dim=1)
        return float(state.modules[f"discriminator_{term}"](maps).sigmoid().mean())

    before = believed()
    apma_net.step(state, batch)
    assert (believed() < before) == slip
    assert believed() != before


@pytest.mark.full
@pytest.mark.parametrize("term", ["feat", "pred"])
def test_the_discriminators_learn_to_tell_the_domains_apart(batch: Batch, term: str) -> None:
    state = tiny(learning_rate=STILL, discriminator_learning_rate=5e-3)
    losses = [float(apma_net.step(state, batch)[f"discriminator_{term}"]) for _ in range(40)]
    assert losses[-1] < 0.8 * losses[0]


def gradients(state: State, batch: Batch) -> dict[str, torch.Tensor]:
    """Gradients that the generator's optimiser sees in one step, by parameter."""
    seen: dict[str, torch.Tensor] = {}

    def look(*_: object) -> None:
        for name in ("generator", "reconstructor"):
            if name in state.modules:
                for key, p in state.modules[name].named_parameters():
                    if p.grad is not None:
                        seen[f"{name}.{key}"] = p.grad.clone()

    state.optimizers["generator"].register_step_pre_hook(look)
    apma_net.step(state, batch)
    return seen


@pytest.mark.parametrize("name", [n for n in TERMS if n != "apma-none"])
def test_the_generators_gradient_is_that_of_equation_6(batch: Batch, name: str) -> None:
    """L_seg + lambda_rec L_rec - lambda_feat L'_feat - lambda_pred L'_pred, by hand."""
    reconstruct, features, predictions = TERMS[name]
    options = adapting(TERMS[name], lambda_rec=0.5, lambda_feat=0.3, lambda_pred=0.2)
    state = tiny(**options)
    network, scale = state.modules["generator"], state.modules["scale"]
    x, y = scale(batch.images, "source"), scale(batch.pools["target"], "target")
    p_s, f_s, e_s = network(x)
    p_t, f_t, e_t = network(y)
    total = torch.nn.functional.cross_entropy(p_s, batch.labels)
    if reconstruct:
        rebuild = state.modules["reconstructor"]
        total = total + 0.5 * ((rebuild(e_s) - x) ** 2).mean()
        total = total + 0.5 * ((rebuild(e_t) - y) ** 2).mean()
    if features == "adversarial":
        judge = state.modules["discriminator_feat"]
        total = total - 0.3 * judge(f_t).sigmoid().log().mean()
    if features == "reversal":
        judge = state.modules["discriminator_feat"]
        strength = 0.3 * (2 / (1 + math.exp(-10 * 2 / 3)) - 1)  # two of the three joint steps
        told = judge(f_s).sigmoid().log().mean() + (1 - judge(f_t).sigmoid()).log().mean()
        total = total + strength * told / 2
    if predictions:
        judge = state.modules["discriminator_pred"]
        total = total - 0.2 * judge(p_t.softmax(dim=1)).sigmoid().log().mean()
    total.backward()
    expected = {
        f"{part}.{key}": p.grad.clone()
        for part in ("generator", "reconstructor")
        if part in state.modules
        for key, p in state.modules[part].named_parameters()
        if p.grad is not None
    }
    seen = gradients(tiny(**options), batch)
    assert seen.keys() == expected.keys()
    for key, wanted in expected.items():
        torch.testing.assert_close(seen[key], wanted, rtol=2e-3, atol=2e-5)


def test_the_reversal_grows_over_the_joint_steps() -> None:
    config = tiny_config(adapt_features="reversal", lambda_feat=0.5)
    nothing = torch.zeros(1)

    def strength(step: int) -> float:
        return apma_net.reversal_strength(config, Batch(nothing, nothing, {}, step, 400))

    assert strength(100) == 0  # a quarter is source only
    assert strength(250) == pytest.approx(0.5 * (2 / (1 + math.exp(-5)) - 1))
    assert 0.499 < strength(399) < 0.5


@pytest.mark.full
def test_reversal_trains_its_classifier_forwards(batch: Batch) -> None:
    """The classifier descends on the loss that the generator ascends, at either place."""
    for place, side in (("last", 32), ("bottleneck", 256)):
        state = tiny(
            **adapting((False, "reversal", False)), grl_at=place, learning_rate=STILL, discriminator_learning_rate=2e-2
        )
        sized = resized(batch, side)
        losses = [float(apma_net.step(state, sized)["discriminator_feat"]) for _ in range(12)]
        assert losses[-1] < 0.8 * losses[0]


def test_dice_is_a_loss_too(batch: Batch) -> None:
    config = tiny_config(seg_loss="dice")
    labels = batch.labels
    sure = 100.0 * torch.nn.functional.one_hot(labels, 2).movedim(-1, 1).float()
    assert apma_net.segmentation_loss(config, sure, labels) < 1e-4
    assert apma_net.segmentation_loss(config, -sure, labels) > 0.999
    even = torch.zeros_like(sure)  # p = 1/2: 2 (n/2) / (N/2 + n) of each class
    shares = [float((labels == k).float().mean()) for k in (0, 1)]
    wanted = 1 - np.mean([s / (0.5 + s) for s in shares])
    assert float(apma_net.segmentation_loss(config, even, labels)) == pytest.approx(wanted)


def test_the_reconstruction_is_a_mean_or_a_sum_over_an_images_pixels() -> None:
    """Equation 2 leaves it open; the sum at 128 x 128 px and 1e-3 is the mean at 16.4."""
    rebuilt, images = torch.full((3, 1, 4, 8), 0.5), torch.zeros(3, 1, 4, 8)
    mean = apma_net.reconstruction_loss(apma_net.Config(), rebuilt, images)
    total = apma_net.Config(reconstruction_reduction="sum")
    assert float(mean) == 0.25
    assert float(apma_net.reconstruction_loss(total, rebuilt, images)) == 0.25 * 32
    with pytest.raises(ValueError, match="reconstruction_reduction='median'"):
        apma_net.Config(reconstruction_reduction="median")  # type: ignore[arg-type]


def test_the_two_phases_ship_as_two_recipes() -> None:
    source = read("apma-source")
    assert not source.config.adapts
    assert source.config.validation_domain == "source"
    assert apma_net.pools(source.config) == ()
    joint = read("apma-from-source")
    assert apma_net._first_joint_step(joint.config, joint.schedule.steps) == 0
    assert (joint.schedule.select, joint.schedule.validate_every) == ("jaccard", 300)
    paper = read("apma-paper").schedule
    assert source.schedule.steps + joint.schedule.steps == paper.steps
    assert (source.schedule.batch, source.schedule.decay) == (paper.batch, paper.decay)


# ----------------------------------------------------------------------------- steps


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_the_first_steps_train_the_segmentation_alone(batch: Batch, terms: tuple[bool, str, bool]) -> None:
    state = tiny(**adapting(terms))
    before = {name: weights(module) for name, module in state.modules.items()}
    early = apma_net.step(state, replace(batch, step=0))
    moved = {name for name, module in state.modules.items() if changed(before[name], module)}
    assert moved == {"generator"}
    late = apma_net.step(state, batch)
    moved = {name for name, module in state.modules.items() if changed(before[name], module)}
    assert moved == set(state.modules) - {"scale"}
    assert list(early) == list(late)  # the columns of the log
    assert not any(float(early[name]) for name in early if name != "segmentation")
    assert all(float(loss) > 0 for loss in late.values())
    assert not any(loss.requires_grad for loss in late.values())


def test_all_comparators_start_from_the_same_source_only_weights(batch: Batch) -> None:
    found = []
    for terms in TERMS.values():
        state = tiny(**adapting(terms))
        apma_net.step(state, replace(batch, step=0))
        found.append(weights(state.modules["generator"]))
    assert all(torch.equal(f[key], found[0][key]) for f in found for key in f)


def test_each_network_is_moved_by_its_own_equation_only(batch: Batch) -> None:
    """D must not be updated by equation 6, nor the rest by equation 3."""
    generator_side = tiny(learning_rate=STILL)
    before = {name: weights(module) for name, module in generator_side.modules.items()}
    apma_net.step(generator_side, batch)
    moved = {n for n, m in generator_side.modules.items() if changed(before[n], m)}
    assert moved == {"discriminator_feat", "discriminator_pred"}
    judges = tiny(discriminator_learning_rate=STILL)
    apma_net.step(judges, batch)
    moved = {n for n, m in judges.modules.items() if changed(before[n], m)}
    assert moved == {"generator", "reconstructor"}


@pytest.mark.parametrize(
    "more",
    [
        {"feat_disc": "damt", "feat_crop": 32},
        {"feat_disc": "ganin", "feat_crop": 32},
        {"pred_disc_norm": "group"},
        {"norm": "none"},
        {"seg_loss": "dice"},
        {"normalise": "per_image"},
        {"adapt_features": "reversal", "feat_disc": "ganin", "feat_crop": 64},
        {"adapt_features": "reversal", "grl_at": "bottleneck"},
    ],
    ids=str,
)
def test_every_switch_trains(batch: Batch, more: dict[str, Any]) -> None:
    side = 256 if "grl_at" in more else int(str(more.get("feat_crop", 64)))
    state = tiny(**more)
    before = {name: weights(module) for name, module in state.modules.items()}
    losses = apma_net.step(state, resized(batch, side))
    assert all(math.isfinite(float(v)) for v in losses.values())
    moved = {name for name, module in state.modules.items() if changed(before[name], module)}
    assert moved == set(state.modules) - {"scale"}


def test_a_crop_of_another_size_is_named(batch: Batch) -> None:
    with pytest.raises(DataError, match=r"crops are 32 x 32 px, feat_disc='damt' .*feat_crop=64"):
        apma_net.step(tiny(feat_disc="damt", feat_crop=64), batch)
    small = replace(batch, pools={"target": batch.pools["target"][..., :16, :16]})
    with pytest.raises(DataError, match="16 x 16 px, the networks take 32 px"):
        apma_net.step(tiny(), small)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"feat_disc": "vgg"}, "feat_disc='vgg'"),
        ({"adapt_features": "mmd"}, "'mmd'"),
        ({"source_only_steps": 2.0}, "source_only_steps=2.0"),
        ({"lambda_rec": -1.0}, "lambda_rec=-1.0: use 0 to 1000000"),
        ({"feat_disc": "ganin", "feat_crop": 100}, "feat_crop=100: use a multiple of 32"),
        ({"base_width": 0}, "base_width=0: use a whole number, 1 to 4096"),
    ],
)
def test_settings_that_cannot_be_are_named(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tiny_config(**more)


def test_three_channels_and_four_classes_train(batch: Batch) -> None:
    state = tiny(classes=4, channels=3)
    colours = batch.images.repeat(1, 3, 1, 1)
    target = batch.pools["target"].repeat(1, 3, 1, 1)
    losses = apma_net.step(state, replace(batch, images=colours, pools={"target": target}))
    assert all(math.isfinite(float(v)) for v in losses.values())
    loss, labels = apma_net.validate(state, colours, batch.labels)
    assert math.isfinite(loss)
    assert labels.shape == (2, 32, 32)
    assert apma_net.paint(state, colours)["reconstruction"].shape == colours.shape
    assert not apma_net.paint(tiny(**adapting(TERMS["apma-none"])), batch.images)


def test_bfloat16_trains(batch: Batch) -> None:
    state = tiny()
    prepare(state, torch.device("cpu"), Compute("cpu", "bf16"))
    before = weights(state.modules["generator"])
    losses = apma_net.step(state, batch)
    assert all(v.dtype == torch.float32 for v in losses.values())
    assert changed(before, state.modules["generator"])


# ----------------------------------------------------------------------------- grey levels


def em(**more: int) -> DataSet:
    return synthetic.em_pair(4, 2, side_px=64, **more)


def test_the_scale_of_each_domain_is_measured_once() -> None:
    found = em()
    parts = divide(found, Schedule(validation=0.25))
    state = tiny()
    scale = state.modules["scale"]
    assert isinstance(scale, apma_net.DomainScale)
    apma_net.before_step(state, parts, 1, 4)
    assert (scale.low.tolist(), scale.high.tolist()) == ([0, 0], [255, 255])
    apma_net.before_step(state, parts, 0, 4)
    source = [parts.samples[i].image for i in parts.split.train]
    target = [p.image for p in found.pools["target"]]
    for place, images in enumerate((source, target)):
        assert float(scale.low[place]) == pytest.approx(np.mean([i.min() for i in images]))
        assert float(scale.high[place]) == pytest.approx(np.mean([i.max() for i in images]))
    image = torch.from_numpy(target[0]).permute(2, 0, 1)[None]
    scaled = scale(image, "target")
    assert torch.equal(scale.undo(scaled, image, "target"), image)
    assert not torch.equal(scaled, scale(image, "source"))


def test_each_image_can_be_scaled_by_its_own_range() -> None:
    images = torch.tensor([[10, 30], [200, 200]], dtype=torch.uint8)[:, None, None]
    scale = apma_net.DomainScale(per_image=True)
    assert scale(images, "target").flatten().tolist() == [0, 1, 0, 0]
    assert torch.equal(scale.undo(scale(images, "source"), images, "source"), images)


def test_the_deployed_network_has_the_targets_scale(batch: Batch) -> None:
    tiles = batch.images.permute(0, 2, 3, 1).contiguous()
    for more, domain in (
        ({}, "target"),
        ({"validation_domain": "source"}, "target"),
        (adapting(TERMS["apma-none"]), "target"),
        (adapting(TERMS["apma-none"], validation_domain="source"), "source"),
    ):
        state = tiny(**more)
        assert apma_net.pools(state.config) == (("target",) if domain == "target" else ())
        scale = state.modules["scale"]
        assert isinstance(scale, apma_net.DomainScale)
        scale.low[:], scale.high[:] = torch.tensor([0.0, 40.0]), torch.tensor([255.0, 90.0])
        module = apma_net.deployed(state)
        with torch.no_grad():
            scores = module(tiles)
            wanted = state.modules["generator"](scale(batch.images, domain))[0].softmax(dim=1)
        assert scores.dtype == torch.float16
        assert scores.shape == (2, 2, 32, 32)
        assert (scores.float() - wanted).abs().max() <= 0.003  # what rounding may change


def test_validation_has_the_scale_that_the_config_names(batch: Batch) -> None:
    losses = []
    for domain in ("source", "target"):
        state = tiny(validation_domain=domain)
        scale = state.modules["scale"]
        assert isinstance(scale, apma_net.DomainScale)
        # GroupNorm undoes a change of scale but at the image's border, where zeros are padded.
        scale.low[1], scale.high[1] = 40.0, 90.0
        losses.append(apma_net.validate(state, batch.images, batch.labels)[0])
    assert losses[0] != losses[1]


# ----------------------------------------------------------------------------- recipes and runs


def read(name: str, *settings: str, mpp: float = 0.005) -> Recipe:
    names = ("apma-paper",) if name == "apma-paper" else ("apma-paper", name)
    return read_recipe("apma_net", apma_net, names, settings, mpp=mpp)


@pytest.mark.parametrize("name", TERMS)
def test_the_papers_comparators_ship_as_recipes(name: str) -> None:
    recipe = read(name)
    config, schedule = recipe.config, recipe.schedule
    terms = (config.reconstruct, config.adapt_features, config.adapt_predictions)
    assert terms == TERMS[name]
    assert (config.lambda_rec, config.lambda_feat, config.lambda_pred) == (1e-3,) * 3
    assert (config.learning_rate, schedule.decay) == (2e-4, "poly")
    assert (schedule.steps, schedule.batch, schedule.crop_px) == (40_000, 2, 512)
    assert config.source_only_steps * schedule.steps == 10_000
    assert config.feat_disc == ("ganin" if name == "apma-ganin" else "fcn")
    assert apma_net.pools(config) == ("target",)
    with torch.device("meta"):
        state = apma_net.build(config, 2, 1)
    assert ("reconstructor" in state.modules) == terms[0]
    assert ("discriminator_feat" in state.modules) == (terms[1] != "none")
    assert ("discriminator_pred" in state.modules) == terms[2]


def test_the_oracle_needs_no_target_but_its_own_data() -> None:
    config = read("apma-none", "method.validation_domain=source").config
    assert apma_net.pools(config) == ()
    assert apma_net.pools(read("apma-none", "method.normalise=per_image").config) == ()


TINY = (
    "method.base_width=4",
    "method.discriminator_width=4",
    "method.source_only_steps=0.34",
    "schedule.steps=6",
    "schedule.crop_px=32",
    "schedule.validate_every=3",
    "method.learning_rate=2e-3",
    "augmentation.elastic=0",
    "schedule.validation=0.25",
)


@pytest.mark.full
@pytest.mark.parametrize("stop", [1, 4], ids=["source only", "joint"])
def test_a_killed_run_goes_on_as_if_it_never_stopped(tmp_path: Path, stop: int) -> None:
    recipe, found = read("apma-paper", *TINY, f"schedule.validate_every={stop}"), em()
    killed_and_resumed(recipe, apma_net, found, tmp_path, step=stop + 1)
    for name in ("last", "best"):
        one = weights_of(tmp_path / "broken", name)
        assert 0 < float(one["scale.low"][1]) < float(one["scale.high"][1]) < 255
    rows = logged(tmp_path / "broken")
    assert [row["step"] for row in rows] == [str(i) for i in range(1, 7)]
    assert float(rows[1]["fooling_pred"]) == 0 < float(rows[2]["fooling_pred"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of a tiny network that has learned something."""
    run = tmp_path_factory.mktemp("apma") / "run"
    recipe = read(
        "apma-paper",
        *TINY,
        "schedule.steps=60",
        "schedule.validate_every=60",
        "augmentation.rotate=0",
        "augmentation.motion_blur=0",
    )
    loop.train(recipe, apma_net, em(), run)
    return run


def images_folder(folder: Path, found: DataSet) -> Path:
    folder.mkdir(parents=True)
    for sample in (*found.train, *found.test):
        Image.fromarray(sample.image[..., 0]).save(folder / f"{sample.name}.png")
    return folder


@pytest.mark.full
def test_a_bundle_gives_torchs_labels_in_every_precision(trained: Path, tmp_path: Path) -> None:
    options = Options(tensorrt="off", tile_px=64, calibrate=images_folder(tmp_path / "images", em(seed=5)))
    done = export_checkpoint("apma_net", trained, tmp_path / "bundle", options)
    assert {"model.onnx", "model.fp16.onnx"} <= set(done.card.files)
    assert done.card.channels == 1
    assert done.card.tile_statistics
    assert done.card.score_kind == "probability"
    said = checkpoint.read(trained / "best")
    state = apma_net.build(Config(**said.config), 2, 1)
    checkpoint.load(trained / "best", state)
    image = em(seed=6).test[0].image
    with torch.no_grad():
        wanted = apma_net.deployed(state)(torch.from_numpy(image[None]))[0].numpy().argmax(axis=0)
    assert 0.02 < wanted.mean() < 0.98
    # Of the 4096 pixels up to eight may lie so near to a tie that FP16 turns them: five did once.
    least = {"fp32": 0.9999, "fp16": 0.998, "int8": 0.98}
    for precision, agreement in least.items():
        if precision == "int8" and "model.int8.onnx" not in done.card.files:
            assert any(f.startswith("int8") for f in done.failures)  # with its reason
            continue
        engine = open_engine(tmp_path / "bundle", backend="cpu", precision=precision)
        assert (segment_pixels(image, engine) == wanted).mean() >= agreement


@pytest.mark.full
def test_frozen_statistics_make_a_tile_independent_of_itself(trained: Path, tmp_path: Path) -> None:
    over = images_folder(tmp_path / "images", em(seed=5))
    options = Options(precisions=("fp32",), tensorrt="off", tile_px=64, calibrate=over, freeze=over)
    done = export_checkpoint("apma_net", trained, tmp_path / "bundle", options)
    assert not done.card.tile_statistics
    assert done.card.align_px == 16


@pytest.mark.full
def test_own_ranges_of_tiles_can_be_frozen_too(tmp_path: Path) -> None:
    state = tiny(normalise="per_image")
    classes = [("rest", (255, 255, 255)), ("mitochondrion", (230, 75, 53))]
    said = checkpoint.Checkpoint("apma_net", asdict(state.config), classes, 1, 0.005, 0, {})
    checkpoint.save(tmp_path / "run", said, state, optimizers=False)
    over = images_folder(tmp_path / "images", em(seed=5))
    options = Options(precisions=("fp32",), tensorrt="off", tile_px=64, calibrate=over, freeze=over)
    done = export_checkpoint("apma_net", tmp_path / "run", tmp_path / "bundle", options)
    assert not done.card.tile_statistics


@pytest.mark.full
def test_an_engine_is_built(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    over = images_folder(tmp_path / "images", em(seed=5))
    options = Options(precisions=("fp32", "fp16"), tensorrt="rtx", tile_px=64, calibrate=over)
    done = export_checkpoint("apma_net", trained, tmp_path / "bundle", options)
    assert not done.failures
    assert any(name.startswith("engines/") for name in done.card.files)


def run(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.full
def test_grey_micrographs_go_from_a_folder_to_labels_of_a_tiff(tmp_path: Path) -> None:
    """histo-train, histo-export and histo-infer, at 5 nm per pixel."""
    found = synthetic.em_pair(4, 2, side_px=80)
    for part, name in (("images", "image"), ("labels", "labels"), ("target", "image")):
        (tmp_path / "set" / part).mkdir(parents=True)
        chosen = found.pools["target"] if part == "target" else found.train
        for i, sample in enumerate(chosen):
            pixels = np.squeeze(getattr(sample, name))
            Image.fromarray(pixels).save(tmp_path / "set" / part / f"{i}.png")
    (tmp_path / "set" / "dataset.toml").write_text("mpp = 0.005\n")
    # Fewer steps leave a network whose two probabilities are nearly equal in many pixels.
    more = ("schedule.steps=60", "schedule.validate_every=60")
    settings = [f"--set={setting}" for setting in (*TINY, *more)]
    done = run(
        "histostream.training.cli",
        "--method",
        "apma_net",
        "--data",
        tmp_path / "set",
        "--out",
        tmp_path / "run",
        "--config",
        "apma-paper",
        *settings,
    )
    assert done.returncode == 0, done.stderr
    assert checkpoint.read(tmp_path / "run" / "best").channels == 1
    options = Options(precisions=("fp32",), tensorrt="off", tile_px=64, calibrate=tmp_path / "set" / "target")
    export_checkpoint("apma_net", tmp_path / "run", tmp_path / "bundle", options)
    section = found.test[0].image[..., 0]
    Image.fromarray(section).save(tmp_path / "section.tif")
    done = run(
        "histostream.runtime.cli",
        tmp_path / "section.tif",
        "--model",
        tmp_path / "bundle",
        "--out",
        tmp_path / "out",
        "--mpp",
        0.005,
    )
    assert done.returncode == 0, done.stderr
    assert "no tissue" not in done.stderr
    with open_slide(tmp_path / "out" / "section" / "labels.tif") as labels:
        assert (labels.levels[0].height, labels.levels[0].width) == section.shape


# ----------------------------------------------------------------------------- learning


def learn(found: DataSet, terms: tuple[bool, str, bool]) -> float:
    """Train 60 steps on the source and 150 joint ones; DSC in percent, pooled, on the target."""
    config = Config(
        **adapting(terms),
        base_width=8,
        discriminator_width=16,
        source_only_steps=60 / 210,
        learning_rate=2e-3,
        discriminator_learning_rate=1e-3,
        lambda_feat=0.1,
        lambda_pred=0.1,
    )
    schedule = Schedule(steps=210, batch=4, crop_px=64, decay="poly", validation=0.1)
    parts = divide(found, schedule)
    torch.manual_seed(0)
    state = apma_net.build(config, 2, 1)
    prepare(state, torch.device("cpu"), Compute("cpu"))
    draw = Batches(parts, schedule, Augmentation(flips=True), apma_net.pools(config), align_px=16)
    for batch in draw(0, schedule.steps):
        set_rates(state.optimizers, schedule.rate(batch.step, batch.steps))
        apma_net.before_step(state, parts, batch.step, batch.steps)
        apma_net.step(state, batch)
    images = torch.from_numpy(np.stack([s.image for s in found.test])).permute(0, 3, 1, 2)
    truth = np.stack([s.labels for s in found.test]).astype(np.int64)
    labels = apma_net.validate(state, images, torch.from_numpy(truth))[1].numpy()
    return 100 * 2 * float((labels * truth).sum()) / float(labels.sum() + truth.sum())


@pytest.mark.full
def test_adaptation_recovers_part_of_what_the_target_costs() -> None:
    """A small adaptation at 1/8 of the widths and 210 steps: DE_feat between none and the oracle.

    Not asserted: that EN helps, which in so few steps it does not, and the order of DE_feat,
    DE_pred and the full model, which differs from seed to seed.
    """
    found = synthetic.em_pair(24, 8, seed=10)
    none = learn(found, TERMS["apma-none"])
    target = tuple(p for p in found.pools["target"] if isinstance(p, StoredSample))
    oracle = learn(replace(found, train=target), TERMS["apma-none"])
    adapted = learn(found, TERMS["apma-de-feat"])
    assert oracle - none >= 15
    assert none + 0.25 * (oracle - none) <= adapted <= oracle
