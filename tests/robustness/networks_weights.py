"""Weights for the networks of `tests.robustness.networks`, saved as each library saves a trained network.

They are random, of seed 0. Statistics of batch normalisation are those of tiles of the slide, and the last layer is
scaled so that each class has scores of mean 0 and standard deviation `SPREAD` there: all classes occur, and no label is
decided by the last bits of two scores, as it would be where an untrained network gives the same to every pixel.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
SPREAD = 2.0
CLASSES = ("background", "tumour", "stroma")


@dataclass(frozen=True, slots=True)
class Fit:
    """How a network of torch is fitted to pixels.

    Attributes
    ----------
    mean, std
        The network's input is (pixel / 255 - mean) / std.
    heads
        Names of the last convolutions, whose outputs are added to the scores.
    output
        Key of the scores, if the network returns a mapping.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    heads: tuple[str, ...] = ()
    output: str | None = None

    def __call__(self, network: Any, images: Pixels) -> None:
        """Fit a network to images (N, H, W, 3)."""
        import torch

        x = (images / 255 - np.array(self.mean)) / np.array(self.std)
        batch = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2), np.float32))
        for module in network.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.reset_running_stats()
                module.momentum = None  # the mean over the batches seen
        with torch.no_grad():
            network.train()
            for _ in range(2):
                network(batch)
            network.eval()
            y = network(batch)
            y = y if self.output is None else y[self.output]
            y = getattr(y, "logits", y)
            scale = SPREAD / y.std(dim=(0, 2, 3))
            shift = -y.mean(dim=(0, 2, 3)) * scale
            layers = dict(network.named_modules())
            for number, name in enumerate(self.heads):
                layer = layers[name]
                layer.weight.mul_(scale[:, None, None, None])
                if layer.bias is not None:
                    layer.bias.mul_(scale)
                    if number == 0:
                        layer.bias.add_(shift)


def state_dict(build: Callable[[], Any], path: str, fit: Fit, images: Pixels) -> None:
    """Build a network of torch, fit it, and save its weights."""
    import torch

    torch.manual_seed(0)
    network = build()
    fit(network, images)
    torch.save(network.state_dict(), path)


def segformer(folder: str, fit: Fit, images: Pixels) -> None:
    """Save a SegFormer of the size B0, as ``save_pretrained`` writes it."""
    import torch
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(0)
    network = SegformerForSemanticSegmentation(SegformerConfig(num_labels=len(CLASSES)))
    Fit(fit.mean, fit.std, heads=("decode_head.classifier",), output="logits")(network, images)
    network.save_pretrained(folder)


def nnunet_fold(folder: str, fit: Fit, images: Pixels) -> None:
    """Save a fold of nnU-Net as its trainer leaves it: plans, data set, checkpoint."""
    import torch
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    channels = {"0": "rgb_to_0_1", "1": "rgb_to_0_1", "2": "rgb_to_0_1"}
    data_set = {
        "channel_names": channels,
        "labels": {name: number for number, name in enumerate(CLASSES)},
        "numTraining": 1,
        "file_ending": ".png",
    }
    network = _nnunet_plans()
    plans = {
        "dataset_name": "Dataset001_Tumour",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "NaturalImage2DIO",
        "label_manager": "LabelManager",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "ExperimentPlanner",
        "configurations": {
            "2d": {
                "data_identifier": "nnUNetPlans_2d",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 12,
                "patch_size": [512, 512],
                "spacing": [1.0, 1.0],
                "normalization_schemes": ["RGBTo01Normalization"] * len(channels),
                "use_mask_for_norm": [False] * len(channels),
                "architecture": network,
                "batch_dice": True,
            }
        },
    }
    torch.manual_seed(0)
    model = get_network_from_plans(
        network["network_class_name"],
        network["arch_kwargs"],
        network["_kw_requires_import"],
        len(channels),
        len(CLASSES),
        deep_supervision=True,  # as in training
    )
    model.decoder.deep_supervision = False
    Fit(fit.mean, fit.std, heads=("decoder.seg_layers.4",))(model, images)
    root = Path(folder)
    (root / "fold_0").mkdir(parents=True)
    _write(root / "dataset.json", data_set)
    _write(root / "plans.json", plans)
    checkpoint = {
        "network_weights": model.state_dict(),
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "2d", "fold": 0},
        "inference_allowed_mirroring_axes": (0, 1),
    }
    torch.save(checkpoint, root / "fold_0" / "checkpoint_final.pth")


def keras_unet(path: str, images: Pixels) -> None:
    """Save a U-Net of Keras that takes pixels from 0 to 255 and ends in a softmax."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    image = keras.Input((512, 512, 3), name="image")
    x = layers.Rescaling(1 / 255)(image)
    skips = []
    for width in (16, 32, 64):
        x = _keras_block(x, width)
        skips.append(x)
        x = layers.MaxPooling2D()(x)
    x = _keras_block(x, 128)
    for width, skip in zip((64, 32, 16), reversed(skips), strict=True):
        x = layers.Conv2DTranspose(width, 2, strides=2, padding="same")(x)
        x = _keras_block(layers.Concatenate()([x, skip]), width)
    logits = layers.Conv2D(len(CLASSES), 1, name="logits")(x)
    network = keras.Model(image, layers.Softmax()(logits))
    before = keras.Model(image, logits)
    tiles = np.tile(images, (1, 512 // images.shape[1], 512 // images.shape[2], 1)).astype(np.float32)
    for layer in network.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.0
    before(tiles, training=True)
    y = np.asarray(before(tiles, training=False))
    head = network.get_layer("logits")
    kernel, bias = head.get_weights()
    scale = SPREAD / y.std(axis=(0, 1, 2))
    head.set_weights([kernel * scale, (bias - y.mean(axis=(0, 1, 2))) * scale])
    network.save(path)


def _keras_block(x: Any, width: int) -> Any:
    from keras import layers

    for _ in range(2):
        x = layers.Conv2D(width, 3, padding="same", use_bias=False)(x)
        x = layers.Activation("relu")(layers.BatchNormalization()(x))
    return x


def _nnunet_plans() -> dict[str, Any]:
    widths = (32, 64, 128, 256, 512, 512)
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": len(widths),
            "features_per_stage": list(widths),
            "conv_op": "torch.nn.modules.conv.Conv2d",
            "kernel_sizes": [[3, 3]] * len(widths),
            "strides": [[1, 1], *[[2, 2]] * (len(widths) - 1)],
            "n_conv_per_stage": [2] * len(widths),
            "n_conv_per_stage_decoder": [2] * (len(widths) - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
