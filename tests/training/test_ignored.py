"""A pixel that is not annotated (255) has no part in losses, scores and variations, in every method."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from histostream.training import losses, preview
from histostream.training.augment import Augmentation, draw_crop, restain, warp
from histostream.training.data import IGNORED, StoredSample, class_count
from histostream.training.methods import METHODS, load_method
from histostream.training.methods.apma_net import method as apma_net
from histostream.training.methods.imems import method as imems
from histostream.training.methods.pyramid_gan import method as pyramid_gan
from histostream.training.methods.translation import method as translation
from histostream.training.methods.uda_self_ensembling import method as uda
from histostream.training.metrics import Confusion
from histostream.training.state import Batch, State

SIDE = 64
LOSSES = {  # of scores (N, 2, H, W), or the logit of class 1, and labels (N, H, W)
    "cross_entropy": losses.cross_entropy,
    "apma cross_entropy": lambda scores, labels: apma_net.segmentation_loss(apma_net.Config(), scores, labels),
    "apma dice": lambda scores, labels: apma_net.segmentation_loss(apma_net.Config(seg_loss="dice"), scores, labels),
    "imems l1": lambda scores, labels: imems._painting_loss(
        State(imems.Config(), {}, {}), scores.tanh(), images(), labels
    )[1],
    "imems l1 of labels": lambda scores, labels: imems._painting_loss(
        State(imems.Config(target="labels", label_loss="l1"), {}, {}), scores, images(), labels
    )[1],
    "uda dice": lambda scores, labels: uda.dice_loss(
        scores[:, 1:].sigmoid(), labels[:, None].float(), losses.known(labels)
    ),
    "translation dice": lambda scores, labels: translation.dice_loss(scores[:, 1:].sigmoid(), labels),
}
TINY: dict[str, dict[str, Any]] = {
    "apma_net": {"base_width": 4, "discriminator_width": 4, "source_only_steps": 0.0},
    "imems": {"base_width": 4, "depth": 2, "discriminator_width": 4},
    "pyramid_gan": {"levels": 2, "first_width": 4, "growth": 2, "layers": 1, "g_width": 4, "d_width": 4, "poolings": 2},
    "translation": {
        "width": 4,
        "depth": 3,
        "unique_channels": 8,
        "mlp_width": 8,
        "discriminator_width": 4,
        "image_px": 64,
    },
    "uda_self_ensembling": {"base_width": 4, "discriminator_width": 4},
}


def images(count: int = 2) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, SIDE, SIDE)).astype(np.uint8))


def partly_annotated() -> tuple[Tensor, Tensor]:
    """Labels of two images of which a part is not annotated, and where they are."""
    rng = np.random.default_rng(1)
    labels = torch.from_numpy(rng.integers(0, 2, (2, SIDE, SIDE)))
    known = torch.ones(2, SIDE, SIDE, dtype=torch.bool)
    known[0, 10:40, 5:50] = False
    known[1, :, 30:] = False
    return labels.masked_fill(~known, IGNORED), known


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_pixels_have_no_gradient_and_change_no_loss(name: str) -> None:
    labels, known = partly_annotated()
    scores = torch.randn(2, 2, SIDE, SIDE, generator=torch.Generator().manual_seed(2)).requires_grad_(True)
    loss = LOSSES[name](scores, labels)
    loss.backward()
    assert scores.grad is not None
    assert (scores.grad.movedim(1, -1)[~known] == 0).all()
    assert scores.grad.movedim(1, -1)[known].abs().sum() > 0
    changed = torch.where(known[:, None], scores.detach(), torch.full_like(scores, 50.0))
    torch.testing.assert_close(LOSSES[name](changed, labels), loss.detach())


def test_losses_are_those_of_the_annotated_pixels_worked_by_hand() -> None:
    labels, known = partly_annotated()
    scores = torch.randn(2, 2, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    chosen, truth = scores.movedim(1, -1)[known], labels[known]  # (M, 2) and (M,)
    expected = {
        "cross_entropy": F.cross_entropy(chosen, truth),
        "imems l1 of labels": (chosen.softmax(dim=1) - F.one_hot(truth, 2)).abs().mean(),
    }
    p, y = chosen[:, 1].sigmoid(), truth.float()
    dice = (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
    expected |= {"uda dice": 1 - dice, "translation dice": -dice}
    p, y = chosen.softmax(dim=1), F.one_hot(truth, 2).float()
    expected["apma dice"] = 1 - (2 * (p * y).sum(dim=0) / (p.sum(dim=0) + y.sum(dim=0))).mean()
    expected["apma cross_entropy"] = expected["cross_entropy"]
    # Equation 1 of iMEMS, pixel by pixel: floor(G/2) + 128 of the class that is right, 127 - floor(G/2) of the other.
    grey = imems.luma(images())[known]
    target = torch.stack([torch.where(truth == k, grey // 2 + 128, 127 - grey // 2) for k in (0, 1)], dim=1)
    expected["imems l1"] = (chosen.tanh() - (target / 127.5 - 1)).abs().mean()
    assert expected.keys() == LOSSES.keys()
    for name, value in expected.items():
        torch.testing.assert_close(LOSSES[name](scores, labels), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_an_image_without_any_annotation_has_a_loss_without_gradient(name: str) -> None:
    scores = torch.randn(2, 2, SIDE, SIDE).requires_grad_(True)
    loss = LOSSES[name](scores, torch.full((2, SIDE, SIDE), IGNORED))
    loss.backward()
    assert torch.isfinite(loss)
    assert scores.grad is not None
    assert not scores.grad.any()


def tiny(name: str, **more: Any) -> tuple[Any, State]:
    method = load_method(name)
    torch.manual_seed(0)
    return method, method.build(method.Config(**{**TINY[name], **more}), 2, 3)


def batch_of(labels: Tensor, step: int = 7) -> Batch:
    pools = dict.fromkeys(("target", "unlabelled", "presence", "absence"), images().flip(-1))
    return Batch(images(), labels, pools, step, 8)


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_trains_on_and_is_judged_by_what_is_annotated(name: str) -> None:
    """A step and a validation take labels with 255, and the score counts the annotated pixels alone."""
    labels, known = partly_annotated()
    method, state = tiny(name)
    found = method.step(state, batch_of(labels))
    assert all(torch.isfinite(loss) for loss in found.values())
    loss, predicted = method.validate(state, images(), labels)
    assert np.isfinite(loss)
    confusion = Confusion(2)
    confusion.add(predicted.numpy(), labels.numpy())
    assert confusion.counts.sum() == known.sum()
    right = (predicted == labels)[known].float().mean()
    assert confusion.accuracy() == pytest.approx(float(right))


@pytest.mark.parametrize("more", [{}, {"target": "labels"}], ids=str)
def test_the_discriminator_of_imems_sees_nothing_where_there_is_no_label(more: dict[str, Any]) -> None:
    """What the generator paints there changes neither its loss nor the discriminator's."""
    labels, known = partly_annotated()
    method, state = tiny("imems", dropout=0.0, **more)
    seen: list[Tensor] = []
    state.modules["discriminator"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    method.step(state, batch_of(labels))
    for pairs in seen:
        maps = pairs[:, 3:].movedim(1, -1).reshape(-1, *known.shape, 2)
        assert not maps[:, ~known].any()
        assert maps[:, known].abs().sum() > 0


@pytest.mark.parametrize("kind", ["softmax", "straight_through"])
def test_the_discriminator_of_the_pyramid_sees_nothing_where_there_is_no_label(kind: str) -> None:
    labels, known = partly_annotated()
    method, state = tiny("pyramid_gan", mask_for_discriminator=kind, g_arch="none")
    seen: list[Tensor] = []
    state.modules["discriminator_0"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    method.step(state, batch_of(labels))
    assert seen
    for pairs in seen:
        masks = pairs[:, 3:].movedim(1, -1)
        assert not masks[~known].any()
        assert masks[known].sum() > 0


def test_the_pyramids_coarse_masks_ignore_what_the_fine_ones_do() -> None:
    labels, _ = partly_annotated()
    state = tiny("pyramid_gan")[1]
    level_batch = pyramid_gan._at_level(state, batch_of(labels, step=0), 1)
    torch.testing.assert_close(level_batch.truth, labels[:, 1::2, 1::2])


# ----------------------------------------------------------------------------- variations


@pytest.mark.parametrize(
    "augmentation",
    [Augmentation(rotate=30.0), Augmentation(elastic=20.0), Augmentation(rotate=10.0, elastic=5.0, motion_blur=5)],
    ids=["rotate", "elastic", "both"],
)
def test_a_warp_moves_ignored_pixels_with_the_image(augmentation: Augmentation) -> None:
    """Where the image is white the label is 255: after the warp too, but for pixels on the border between both."""
    labels = torch.zeros(2, SIDE, SIDE, dtype=torch.int64)
    labels[:, 20:50, 12:44] = IGNORED
    labels[:, :10, :10] = 1
    pixels = torch.where(labels == IGNORED, 255, 0).to(torch.uint8)[:, None].expand(2, 3, SIDE, SIDE)
    torch.manual_seed(0)
    images, moved = warp(pixels.contiguous(), labels, augmentation)
    assert set(moved.unique().tolist()) <= {0, 1, IGNORED}
    assert not torch.equal(moved, labels)
    white, black = images[:, 0] > 250, images[:, 0] < 5
    assert (moved[white] == IGNORED).float().mean() > 0.98
    assert (moved[black] != IGNORED).float().mean() > 0.98


def test_crops_zooms_and_mirrors_keep_the_ignore_value() -> None:
    labels = np.zeros((40, 40), np.uint8)
    labels[5:30, 5:30] = IGNORED
    image = np.where(labels[..., None] == IGNORED, 255, 0).repeat(3, axis=2).astype(np.uint8)
    one = StoredSample("a", "a", image, labels)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        pixels, cut = draw_crop(one, SIDE, Augmentation(flips=True, zoom=1.5), float("nan"), rng)
        assert set(np.unique(cut)) == {0, IGNORED}
        assert ((pixels[..., 0] > 250) <= (cut == IGNORED)).mean() > 0.98


def test_restaining_takes_an_ignored_pixel_for_no_object() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.uniform(150, 220, (SIDE, SIDE, 3)).astype(np.float32)
    labels = np.zeros((SIDE, SIDE), np.uint8)
    labels[8:30, 8:30] = 1
    pixels[8:30, 8:30] = 60
    ignored = labels.copy()
    ignored[40:60, 40:60] = IGNORED
    plain = restain(pixels, labels, np.random.default_rng(5))
    np.testing.assert_allclose(restain(pixels, ignored, np.random.default_rng(5)), plain, atol=12)


def test_an_ignored_pixel_is_no_class_and_grey_on_sheets() -> None:
    labels = np.array([[0, 1], [IGNORED, 1]], np.uint8)
    assert class_count([StoredSample("a", "a", np.zeros((2, 2, 3), np.uint8), labels)]) == 2
    colors = preview.colored(labels, [(1, 2, 3), (4, 5, 6)])
    assert colors.tolist() == [[[1, 2, 3], [4, 5, 6]], [[128, 128, 128], [4, 5, 6]]]
