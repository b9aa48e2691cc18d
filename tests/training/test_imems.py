"""Exact facts of methods.md 1.10, and that the adversarial term is alive."""

from __future__ import annotations

import pytest
import torch

from histostream.training.methods import State, imems


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
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images, (images[:, 0] > 127).long()


def tiny(**more: object) -> State:
    torch.manual_seed(0)
    config = imems.Config(base_width=4, depth=2, discriminator_width=4, **more)  # type: ignore[arg-type]
    return imems.build(config, classes=2)


@pytest.mark.parametrize("discriminator", ["encoder", "pix2pix70"])
def test_the_adversarial_gradient_reaches_the_first_convolution(
    batch: tuple[torch.Tensor, torch.Tensor], discriminator: str
) -> None:
    state = tiny(discriminator=discriminator, dropout=0.0)
    x = batch[0].float() / imems.HALF_RANGE - 1
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
    batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    weights = []
    for adversarial in (True, False):
        state = tiny(adversarial=adversarial)
        torch.manual_seed(1)
        for _ in range(5):  # a first step of Adam is only the gradient's sign
            losses = imems.step(state, *batch)
        assert ("discriminator" in losses) == adversarial
        weights.append(next(state.modules["generator"].parameters()).detach().clone())
    assert not torch.equal(*weights)


def test_the_discriminator_learns_to_tell_real_from_painted(
    batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    state = tiny(learning_rate=0.0, dropout=0.0, discriminator_learning_rate=2e-3)
    losses = [imems.step(state, *batch)["discriminator"] for _ in range(40)]
    assert losses[-1] < 0.8 * losses[0]


def test_the_deployed_module_keeps_the_tile_contract(
    batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    state = tiny()
    tiles = batch[0].permute(0, 2, 3, 1).contiguous()
    module = imems.deployed(state)
    with torch.no_grad():
        scores = module(tiles)
        again = module(tiles)
    assert scores.dtype == torch.uint8
    assert scores.shape == (2, 2, 32, 32)
    assert torch.equal(scores, again)  # dropout is off
    state.modules["generator"].eval()
    with torch.no_grad():
        linear = state.modules["generator"](batch[0].float() / imems.HALF_RANGE - 1)
    wanted = ((linear + 1) * imems.HALF_RANGE).clamp(0, 255)
    assert (scores.float() - wanted).abs().max() <= 0.501


def test_sizes_that_the_network_cannot_take_are_named() -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        tiny().modules["generator"](torch.zeros(1, 3, 30, 32))


def test_the_papers_network_has_the_papers_shape() -> None:
    """U-Net 64..1024 with four poolings; a D map of 1/16 (methods.md 1.2)."""
    state = imems.build(imems.Config(), classes=5)
    widths = [stage[0].out_channels for stage in state.modules["generator"].encoder.stages]  # type: ignore[union-attr]
    assert widths == [64, 128, 256, 512, 1024]
    with torch.no_grad():
        pair = torch.zeros(1, 8, 64, 64)
        assert state.modules["discriminator"](pair).shape == (1, 1, 4, 4)


def test_an_unknown_discriminator_is_named() -> None:
    with pytest.raises(ValueError, match="'vgg'"):
        imems.Config(discriminator="vgg")
