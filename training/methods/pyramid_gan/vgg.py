"""The first layers of VGG19 (Simonyan and Zisserman 2014), for perceptual losses.

Its ImageNet weights are not ours to ship, and nothing is downloaded: they are read from a file.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from histostream.wsi.errors import HistoError

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB in [0, 1]; torchvision's pretrained models
IMAGENET_STD = (0.229, 0.224, 0.225)
# (number in torchvision's "features", input and output channels) up to relu5_1; 0 channels: pooling
LAYERS = (
    (0, 3, 64),
    (2, 64, 64),
    (4, 0, 0),
    (5, 64, 128),
    (7, 128, 128),
    (9, 0, 0),
    (10, 128, 256),
    (12, 256, 256),
    (14, 256, 256),
    (16, 256, 256),
    (18, 0, 0),
    (19, 256, 512),
    (21, 512, 512),
    (23, 512, 512),
    (25, 512, 512),
    (27, 0, 0),
    (28, 512, 512),
)
RETURNED = (0, 5, 10, 19, 28)  # relu1_1 to relu5_1
STRIDE_PX = 16  # of the last of them


class WeightsError(HistoError, ValueError):
    """A file of weights is missing, damaged, or of another network."""


class VGG19Features(nn.Module):
    """Maps of relu1_1, relu2_1, relu3_1, relu4_1 and relu5_1.

    The weights are buffers that no checkpoint holds: they never change, and a trained model is
    exported without them. `read` brings them in.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.ready = False
        for number, before, after in LAYERS:
            if after:
                weight, bias = torch.zeros(after, before, 3, 3), torch.zeros(after)
                self.register_buffer(f"weight_{number}", weight, persistent=False)
                self.register_buffer(f"bias_{number}", bias, persistent=False)
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def read(self, path: Path) -> None:
        """Read the state dict that torchvision publishes, as .safetensors or .pth.

        Raises
        ------
        WeightsError
            If the file is missing, is not a state dict, or holds another network.
        """
        tensors = _state_dict(path)
        for number, _, after in LAYERS:
            for kind in ("weight", "bias") if after else ():
                name, own = f"features.{number}.{kind}", self.get_buffer(f"{kind}_{number}")
                tensor = tensors.get(name)
                if tensor is None or tensor.shape != own.shape:
                    state = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
                    raise WeightsError(
                        f"{path}: {name} is {state}, VGG19 has {tuple(own.shape)}; take the "
                        "weights of torchvision's vgg19"
                    )
                own.copy_(tensor)
        self.ready = True

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images (N, 3 or 1, H, W) in [-1, 1] to five maps, of H, H/2, ... H/16."""
        x = ((images.expand(-1, 3, -1, -1) + 1) / 2 - self.mean) / self.std
        maps = []
        for number, _, after in LAYERS:
            if not after:
                x = F.max_pool2d(x, 2)
                continue
            weight, bias = self.get_buffer(f"weight_{number}"), self.get_buffer(f"bias_{number}")
            x = F.conv2d(x, weight, bias, padding=1).relu()
            if number in RETURNED:
                maps.append(x)
        return maps


def _state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise WeightsError(
            f'{path}: no such file; save the weights of torchvision\'s vgg19 there, or set method.perceptual="none"'
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise WeightsError(f"{path}: damaged, or not a state dict in .safetensors or .pth; save it again") from error
    if not (isinstance(tensors, dict) and all(isinstance(v, Tensor) for v in tensors.values())):
        raise WeightsError(f"{path}: not a state dict (names and tensors); save it again")
    return tensors
