"""Exact facts of the method by the paper, and that the adversarial term is alive."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from histostream.export.bundle import Options
from histostream.export.trained import export_checkpoint
from histostream.runtime import open_engine, segment_pixels
from histostream.training import checkpoint, datasets, loop, synthetic
from histostream.training.augment import Augmentation
from histostream.training.batches import Batches, divide
from histostream.training.device import Compute, prepare
from histostream.training.methods.imems import method as imems
from histostream.training.methods.imems.networks import TwoDecoderUNet
from histostream.training.recipe import read_recipe
from histostream.training.schedule import Schedule, set_rates
from histostream.training.state import Batch, State
from histostream.training.steps import HALF_RANGE
from tests.training.rates import STILL

ALGORITHMS = {
    "imems": (),
    "unet-c-single": ("unet-c-single",),
    "cgan-c-single": ("cgan-c-single",),
    "unet-r-single": ("unet-r-single",),
    "unet-c-multi": ("unet-c-multi",),
    "unet-c-multi-int": ("unet-c-multi-int",),
}
TINY = ("method.base_width=4", "method.depth=2", "method.discriminator_width=4")


@pytest.mark.parametrize("classes", [2, 5])
def test_every_grey_value_and_label_is_embedded_and_decoded(classes: int) -> None:
    grey = torch.arange(256)[None, None].expand(1, classes, 256)
    labels = torch.arange(classes)[None, :, None].expand(1, classes, 256)
    embedding = imems.embed(labels, grey, classes)
    own = torch.nn.functional.one_hot(labels, classes).movedim(-1, 1).bool()
    assert embedding[own].min() == 128
    assert embedding[own].max() == 255
    assert embedding[~own].min() == 0
    assert embedding[~own].max() == 127
    found, decoded = imems.decode(embedding)
    assert (found == labels).all()
    assert (decoded == grey - grey % 2).all()
    assert len(decoded.unique()) == 128
    top = embedding.topk(2, dim=1).values
    assert (top[:, 0] - top[:, 1] == 2 * (grey // 2) + 1).all()


def test_luma_is_rounded_itu_r_601() -> None:
    images = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0]])
    grey = imems.luma(images.to(torch.uint8).T[None, :, :, None])
    assert grey.flatten().tolist() == [76, 150, 29, 255, 0]


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Batch(images, (images[:, 0] > 127).long())


def tiny(**more: object) -> State:
    torch.manual_seed(0)
    config = imems.Config(base_width=4, depth=2, discriminator_width=4, **more)  # type: ignore[arg-type]
    return imems.build(config, classes=2)


@pytest.mark.parametrize("discriminator", ["encoder", "pix2pix70"])
def test_the_adversarial_gradient_reaches_the_first_convolution(batch: Batch, discriminator: str) -> None:
    state = tiny(discriminator=discriminator, dropout=0.0)
    x = batch.images.float() / HALF_RANGE - 1
    generator = state.modules["generator"]
    before = imems.adversarial_loss(state, x, generator(x))
    before.backward()
    first = next(generator.parameters()).grad
    assert first is not None
    assert first.norm() > 0
    assert all(p.grad is None for p in state.modules["discriminator"].parameters())
    with torch.no_grad():
        for p in generator.parameters():
            if p.grad is not None:
                p.sub_(1e-4 * p.grad / p.grad.norm().clamp(min=1e-12))
        assert imems.adversarial_loss(state, x, generator(x)) < before


def test_without_the_discriminator_training_differs(
    batch: Batch,
) -> None:
    weights = []
    for adversarial in (True, False):
        state = tiny(adversarial=adversarial)
        torch.manual_seed(1)
        for _ in range(5):  # a first step of Adam is only the gradient's sign
            losses = imems.step(state, batch)
        assert ("discriminator" in losses) == adversarial
        weights.append(next(state.modules["generator"].parameters()).detach().clone())
    assert not torch.equal(*weights)


@pytest.mark.full
def test_the_discriminator_learns_to_tell_real_from_painted(
    batch: Batch,
) -> None:
    state = tiny(learning_rate=STILL, dropout=0.0, discriminator_learning_rate=2e-3)
    losses = [float(imems.step(state, batch)["discriminator"]) for _ in range(40)]
    assert losses[-1] < 0.8 * losses[0]


def test_the_deployed_module_keeps_the_tile_contract(
    batch: Batch,
) -> None:
    state = tiny()
    tiles = batch.images.permute(0, 2, 3, 1).contiguous()
    module = imems.deployed(state)
    with torch.no_grad():
        scores = module(tiles)
        again = module(tiles)
    assert scores.dtype == torch.float16
    assert scores.shape == (2, 2, 32, 32)
    assert torch.equal(scores, again)  # dropout is off
    state.modules["generator"].eval()
    with torch.no_grad():
        linear = state.modules["generator"](batch.images.float() / HALF_RANGE - 1)
    wanted = (linear + 1) / 2  # the embedding divided by 255
    assert torch.equal(module.unrounded(tiles), wanted)
    assert (scores.float() - wanted.clamp(0, 1)).abs().max() <= 0.003  # what rounding may change
    assert torch.equal(scores.argmax(dim=1), wanted.argmax(dim=1))


def test_sizes_that_the_network_cannot_take_are_named() -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        tiny().modules["generator"](torch.zeros(1, 3, 30, 32))


def test_the_papers_network_has_the_papers_shape() -> None:
    """U-Net 64..1024 with four poolings; a D map of 1/16."""
    state = imems.build(imems.Config(), classes=5)
    widths = [stage[0].out_channels for stage in state.modules["generator"].encoder.stages]  # type: ignore[union-attr]
    assert widths == [64, 128, 256, 512, 1024]
    with torch.no_grad():
        pair = torch.zeros(1, 8, 64, 64)
        assert state.modules["discriminator"](pair).shape == (1, 1, 4, 4)


def test_an_unknown_discriminator_is_named() -> None:
    with pytest.raises(ValueError, match="'vgg'"):
        imems.Config(discriminator="vgg")  # type: ignore[arg-type]


def algorithm(name: str) -> imems.Config:
    config: imems.Config = read_recipe("imems", imems, ALGORITHMS[name], TINY, mpp=0.5).config
    return config


@pytest.mark.parametrize(
    ("name", "target", "adversarial", "second_task", "score_kind"),
    [
        ("imems", "embedding", True, "none", "embedding"),
        ("unet-c-single", "labels", False, "none", "probability"),
        ("cgan-c-single", "labels", True, "none", "probability"),
        ("unet-r-single", "embedding", False, "none", "embedding"),
        ("unet-c-multi", "labels", False, "image", "probability"),
        ("unet-c-multi-int", "labels", False, "image+features", "probability"),
    ],
)
def test_the_papers_algorithms_ship_as_recipes(
    name: str, target: str, adversarial: bool, second_task: str, score_kind: str
) -> None:
    config = algorithm(name)
    assert (config.target, config.adversarial, config.second_task) == (target, adversarial, second_task)
    assert imems.score_kind(config) == score_kind
    state = imems.build(config, 2)
    assert ("discriminator" in state.modules) == adversarial
    assert isinstance(state.modules["generator"], TwoDecoderUNet) == (second_task != "none")


def test_contradicting_settings_are_named() -> None:
    with pytest.raises(ValueError, match="second_task='image': it goes with target='labels'"):
        imems.Config(second_task="image")
    with pytest.raises(ValueError, match="target='image'"):
        imems.Config(target="image")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="segmentation_weight"):
        imems.Config(segmentation_weight=1.5)


@pytest.mark.full
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_trains_exports_and_runs(name: str, nuclei_folder: Path, tmp_path: Path) -> None:
    """From images to the label map of the streaming runtime, equal to torch's."""
    settings = (
        *TINY,
        "method.dropout=0",
        "schedule.steps=30",
        "schedule.batch=2",
        "schedule.crop_px=32",
        "schedule.validate_every=15",
        "schedule.test=0.25",
        "method.learning_rate=2e-3",
    )
    recipe = read_recipe("imems", imems, ALGORITHMS[name], settings, mpp=0.5)
    found = datasets.open_dataset(str(nuclei_folder))
    logged: list[dict[str, float]] = []
    loop.train(recipe, imems, found, tmp_path / "run", report=lambda p: logged.append(p.losses))
    main_loss = "l1" if "l1" in logged[0] else "cross_entropy"
    first, last = (np.mean([row[main_loss] for row in rows]) for rows in (logged[:5], logged[-5:]))
    assert last < first
    options = Options(precisions=("fp32",), tensorrt="off", tile_px=64)
    export_checkpoint("imems", tmp_path / "run", tmp_path / "bundle", options)
    engine = open_engine(tmp_path / "bundle", backend="cpu")
    assert engine.card.score_kind == imems.score_kind(recipe.config)
    image = found.train[0].image[:64, :64]
    said = checkpoint.read(tmp_path / "run" / "best")
    state = imems.build(recipe.config, len(said.classes))
    checkpoint.load(tmp_path / "run" / "best", state)
    with torch.no_grad():
        scores = imems.deployed(state)(torch.from_numpy(image[None].copy()))
    if imems.score_kind(recipe.config) == "probability":
        assert (scores.float().sum(dim=1) - 1).abs().max() <= 0.003  # what rounding may change
    wanted = scores[0].numpy().argmax(axis=0)
    assert (segment_pixels(image, engine) == wanted).mean() >= 0.9999


def test_the_second_task_reaches_the_shared_encoder(batch: Batch) -> None:
    """Each term alone moves the encoder; the features' term moves both of its sides."""
    torch.manual_seed(0)
    state = imems.build(algorithm("unet-c-multi-int"), 2)
    network = state.modules["generator"]
    assert isinstance(network, TwoDecoderUNet)
    x = batch.images.float() / HALF_RANGE - 1
    scores, image, encoded, decoded = network(x)
    assert scores.shape == (2, 2, 32, 32)
    assert image.shape == x.shape
    assert [e.shape for e in encoded] == [d.shape for d in decoded]
    losses = (
        F.cross_entropy(scores, batch.labels),
        F.mse_loss(image, x),
        sum(F.mse_loss(e, d) for e, d in zip(encoded, decoded, strict=True)),
    )
    decoders = ("segmenter.decoder", "image_decoder", "image_decoder")
    for loss, decoder in zip(losses, decoders, strict=True):
        network.zero_grad()
        assert isinstance(loss, torch.Tensor)
        loss.backward(retain_graph=True)
        assert gradient(network, "segmenter.encoder") > 0
        for name in ("segmenter.decoder", "image_decoder"):
            assert (gradient(network, name) > 0) == (name == decoder)


def gradient(network: torch.nn.Module, part: str) -> float:
    """Sum of the gradients' norms of a part."""
    grads = [p.grad for p in network.get_submodule(part).parameters()]
    return sum(float(g.norm()) for g in grads if g is not None)


def test_the_weights_of_the_two_tasks_are_the_papers(batch: Batch) -> None:
    """``l_seg CE + (1 - l_seg) MSE + l_int sum MSE``, by the gradients that the optimiser sees."""
    torch.manual_seed(0)
    config = algorithm("unet-c-multi-int")
    state = imems.build(config, 2)
    network = state.modules["generator"].eval()  # dropout off
    x = batch.images.float() / HALF_RANGE - 1
    scores, image, encoded, decoded = network(x)
    wanted = (
        0.6 * F.cross_entropy(scores, batch.labels)
        + 0.4 * F.mse_loss(image, x)
        + 0.8 * torch.stack([F.mse_loss(e, d) for e, d in zip(encoded, decoded, strict=True)]).sum()
    )
    wanted.backward()
    expected = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    seen: dict[str, torch.Tensor] = {}
    state.optimizers["generator"].register_step_pre_hook(
        lambda *_: seen.update({n: p.grad.clone() for n, p in network.named_parameters()})  # type: ignore[union-attr]
    )
    imems.step(state, batch)
    assert expected.keys() == seen.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(seen[name], grad)


def test_instance_normalisation_is_a_switch() -> None:
    state = imems.build(imems.Config(base_width=4, depth=2, norm="instance"), 2)
    kinds = {type(m).__name__ for m in state.modules["generator"].modules()}
    assert "InstanceNorm2d" in kinds
    plain = imems.build(imems.Config(base_width=4, depth=2), 2)
    assert "InstanceNorm2d" not in {type(m).__name__ for m in plain.modules["generator"].modules()}


def learn_textures(config: imems.Config, seed: int = 0) -> tuple[float, float]:
    """Train 240 steps on textures; accuracy, and correlation of the decoded grey with the image."""
    found = synthetic.textures(64, 16, seed=3 + seed)
    schedule = Schedule(steps=240, batch=8, crop_px=64, validation=0.1, decay="cosine", warmup=20)
    torch.manual_seed(seed)
    state = imems.build(config, 3)
    prepare(state, torch.device("cpu"), Compute("cpu"))
    draw = Batches(divide(found, schedule), schedule, Augmentation(), (), align_px=16)
    for batch in draw(0, schedule.steps):
        set_rates(state.optimizers, schedule.rate(batch.step, batch.steps))
        imems.step(state, batch)
    images = torch.from_numpy(np.stack([s.image for s in found.test])).permute(0, 3, 1, 2)
    labels = torch.from_numpy(np.stack([s.labels for s in found.test]).astype(np.int64))
    with torch.no_grad():
        scores = 255 * imems.deployed(state).unrounded(images.permute(0, 2, 3, 1))
    predicted, grey = imems.decode(scores)
    truth = imems.luma(images).float()
    correlation = np.corrcoef(grey.flatten().numpy(), truth.flatten().numpy())[0, 1]
    return float((predicted == labels).float().mean()), float(correlation)


@pytest.mark.full
def test_imems_learns_labels_and_image_together_and_a_classifier_labels_only() -> None:
    """A classifier dressed up as iMEMS fails the second check."""
    small = {"base_width": 12, "depth": 3, "dropout": 0.0, "discriminator_width": 4}
    accuracy, correlation = learn_textures(imems.Config(learning_rate=2e-3, **small))  # type: ignore[arg-type]
    assert accuracy >= 0.95
    assert correlation >= 0.7  # .81 to .90 with three seeds, FP32, AVX2 alone
    accuracy, correlation = learn_textures(
        imems.Config(target="labels", adversarial=False, learning_rate=2e-3, **small)  # type: ignore[arg-type]
    )
    assert accuracy >= 0.95
    assert abs(correlation) < 0.3


class Perfect(torch.nn.Module):
    """A generator that paints what it is told to."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output


def test_inverted_grey_gives_dark_pixels_the_weight_of_the_label() -> None:
    """Equation 1 by hand with G' = 255 - G; the grey image comes back within its lowest bit."""
    levels = torch.arange(256, dtype=torch.uint8)
    images = levels.repeat(1, 3, 2, 1)
    labels = torch.tensor([0, 1])[None, :, None].expand(1, 2, 256).contiguous()
    state = tiny(grey="inverted", adversarial=False)
    inverted = [255 - g for g in range(256)]
    own, other = ([128 + g // 2 for g in inverted], [127 - g // 2 for g in inverted])
    wanted = torch.tensor([[own, other], [other, own]])[None].float()
    output = wanted / HALF_RANGE - 1
    state.modules["generator"] = Perfect(output)
    loss, predicted = imems.validate(state, images, labels)
    assert loss == pytest.approx(0, abs=1e-6)
    assert torch.equal(predicted, labels)
    margin = (wanted[0, 0, 0] - wanted[0, 1, 0]).tolist()
    assert margin[0] == 255  # black: a wrong label costs most
    assert margin[255] == 1
    painted = imems.paint(state, images)["grey"].int()
    assert (painted - images[:, :1].int()).abs().max() == 1
    plain = tiny(adversarial=False)
    plain.modules["generator"] = Perfect(output)
    assert imems.validate(plain, images, labels)[0] > 0.1
    scores = imems.Deployed(Perfect(output), embedding=True)(images.movedim(1, -1))
    assert torch.equal(scores.argmax(dim=1), labels)


def test_cgan_c_learns_by_cross_entropy_beside_its_discriminator(batch: Batch) -> None:
    """``100 CE + L_adv``, by the gradients; L1 and the former rule remain as switches."""
    config = algorithm("cgan-c-single")
    assert config.label_loss == "cross_entropy"

    def gradients(**more: object) -> tuple[set[str], list[torch.Tensor]]:
        state = tiny(target="labels", dropout=0.0, discriminator_learning_rate=STILL, **more)
        network = state.modules["generator"]
        seen: list[torch.Tensor] = []
        state.optimizers["generator"].register_step_pre_hook(
            lambda *_: seen.extend(p.grad.clone() for p in network.parameters())  # type: ignore[union-attr]
        )
        return set(imems.step(state, batch)), seen

    names, found = gradients()
    assert names == {"cross_entropy", "adversarial", "discriminator"}
    state = tiny(target="labels", dropout=0.0)
    x = batch.images.float() / HALF_RANGE - 1
    scores = state.modules["generator"](x)
    loss = 100 * F.cross_entropy(scores, batch.labels) + imems.adversarial_loss(state, x, scores.softmax(dim=1))
    wanted = torch.autograd.grad(loss, list(state.modules["generator"].parameters()))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert gradients(label_loss="l1")[0] == gradients(label_loss="auto")[0] == {"l1", "adversarial", "discriminator"}


@pytest.mark.parametrize("name", ["unet-c-multi", "unet-c-multi-int"])
def test_two_tasks_choose_their_checkpoint_by_the_joint_loss(name: str, batch: Batch) -> None:
    torch.manual_seed(0)
    state = imems.build(algorithm(name), 2)
    loss, predicted = imems.validate(state, batch.images, batch.labels)
    x = batch.images.float() / HALF_RANGE - 1
    with torch.no_grad():
        scores, image, encoded, decoded = state.modules["generator"].eval()(x)
    wanted = 0.6 * F.cross_entropy(scores, batch.labels) + 0.4 * F.mse_loss(image, x)
    if name == "unet-c-multi-int":
        wanted = wanted + 0.8 * sum(F.mse_loss(e, d) for e, d in zip(encoded, decoded, strict=True))
    assert loss == pytest.approx(float(wanted), rel=1e-5)
    assert torch.equal(predicted, scores.argmax(dim=1))
