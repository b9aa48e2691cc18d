"""What a user says of a network from elsewhere, as far as its file does not contain it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from histostream.export.graph.model import GraphError
from histostream.wsi.outputs.label_rows import is_background_name

LAYOUTS = ("auto", "nchw", "nhwc")
ACTIVATIONS = ("auto", "softmax", "sigmoid", "none")
ORDERS = ("rgb", "bgr")
MAX_CLASSES = 254
MAX_CHANNELS = 64  # a larger second or last dimension is a side, not channels
MIN_SIDE = 16  # of an image; a smaller dimension is channels, not a side
SMALLEST_THRESHOLD = 1 / 1024  # the 14-bit integers that are blended tell smaller scores poorly from 0


class DescriptionError(GraphError):
    """An option cannot be, or does not fit another one."""

    exit_status = 2


@dataclass(frozen=True, slots=True)
class ExternalModel:
    """Properties of a network from elsewhere; None or "auto": taken from the file, or found out by running it.

    Attributes
    ----------
    classes
        Names in label order. A network with one output channel has two classes: without and with; or one, and a
        background is added.
    tile_px
        Side of the tiles; None: the side that the network is built for, else 512.
    mean, std
        Per channel, in the network's own order of channels: its input is (scale * pixel - mean) / std. One number
        stands for all channels; None: 0 and 1.
    scale
        Factor of the raw pixels, 0 to 255; None: 1/255, or 1 for a network that takes uint8.
    layout
        Layout of the network's input: "nchw", "nhwc", or "auto" to infer it from the shape.
    activation
        How its output becomes probabilities: "softmax"; "sigmoid"; "none" if the output is probabilities already; or
        "auto": see `choose_activation`.
    order
        Order of the network's input channels: "rgb" or "bgr".
    resize_output
        Whether an output of lower resolution is enlarged to the tile, before the activation.
    crop_output
        Whether an output that is smaller than the tile is its centre, as of convolutions without padding.
    background
        Name of the class that is the background, where its name does not say so.
    background_below
        A background class is added, and is the label where every score is below this number. None: 0.5 for several
        independent sigmoids without a background class; 0: none is added.
    threshold
        Of two classes, the second is the label where its probability is at least this number; None: 0.5.
    channel_names
        Names of the input channels; empty: RGB, or grey.
    colors
        Red, green, blue of each of ``classes``; empty: a palette.
    input_name, output_name
        Names of the tensors, if the network has several.
    """

    classes: tuple[str, ...] = ()
    tile_px: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None
    layout: str = "auto"
    activation: str = "auto"
    order: str = "rgb"
    resize_output: bool = False
    crop_output: bool = False
    background: str | None = None
    background_below: float | None = None
    threshold: float | None = None
    channel_names: tuple[str, ...] = ()
    colors: tuple[tuple[int, int, int], ...] = ()
    input_name: str | None = None
    output_name: str | None = None

    def __post_init__(self) -> None:
        classes, mean, std = self.classes, self.mean, self.std
        for name, valid, requirement in (
            ("classes", len(classes) <= MAX_CLASSES, f"at most {MAX_CLASSES} names"),
            ("classes", len(set(classes)) == len(classes), "different names"),
            ("tile_px", self.tile_px is None or self.tile_px > 0, "a positive number"),
            ("mean", mean is None or (mean and all(map(math.isfinite, mean))), "a number for each channel"),
            ("std", std is None or (std and all(0 < s < math.inf for s in std)), "a positive number for each channel"),
            ("scale", self.scale is None or 0 < self.scale < math.inf, "a positive number"),
            ("layout", self.layout in LAYOUTS, f"one of {LAYOUTS}"),
            ("activation", self.activation in ACTIVATIONS, f"one of {ACTIVATIONS}"),
            ("order", self.order in ORDERS, f"one of {ORDERS}"),
            ("background_below", not self.background_below or _is_threshold(self.background_below), _THRESHOLD),
            ("threshold", self.threshold is None or _is_threshold(self.threshold), _THRESHOLD),
            ("channel_names", len(set(self.channel_names)) == len(self.channel_names), "different names"),
        ):
            if not valid:
                raise DescriptionError(f"{name}={getattr(self, name)!r} is not {requirement}; pass {_option(name)}")
        self._check_together()

    def _check_together(self) -> None:
        counts = {len(v) for v in (self.mean, self.std, self.channel_names) if v and len(v) > 1}
        if len(counts) > 1:
            raise DescriptionError(
                "--mean, --std and --channel-names have different numbers of channels: pass one number or name for "
                "each channel, or one number for all"
            )
        if self.order == "bgr" and counts - {3}:
            raise DescriptionError(f"--bgr needs 3 channels, not {counts.pop()}; leave it out")
        if self.resize_output and self.crop_output:
            raise DescriptionError("--resize-output and --crop-output exclude each other: pass one of them")
        if self.background_below is not None and self.threshold is not None:
            raise DescriptionError(
                "--threshold is for two classes, --background-below for more: pass the one that fits the network"
            )
        if self.background is not None and self.classes and self.background not in self.classes:
            raise DescriptionError(
                f"--background {self.background!r} is none of the classes {', '.join(self.classes)}: pass one of them"
            )
        if self.colors and self.classes and len(self.colors) != len(self.classes):
            raise DescriptionError(
                f"--colors has {len(self.colors)} colours for {len(self.classes)} classes: pass one for each"
            )

    @property
    def channels(self) -> int | None:
        """Number of input channels that is said; None if it is not."""
        return next((len(v) for v in (self.channel_names, self.mean, self.std) if v and len(v) > 1), None) or (
            len(self.channel_names) or None
        )

    def background_index(self) -> int | None:
        """Return which of ``classes`` is the background; None if none is."""
        if self.background is not None:
            return self.classes.index(self.background)
        return next((k for k, name in enumerate(self.classes) if is_background_name(name)), None)


def check_normalisation(mean: Sequence[float], std: Sequence[float], scale: float) -> None:
    """Refuse a mean or a standard deviation that is of other pixels than those that the scale makes.

    Raises
    ------
    DescriptionError
        Naming the values that fit.
    """
    if _fits(mean, std, scale):
        return
    top = 255 * scale
    if max(*mean, *std) > top:
        problem = f"are of pixels from 0 to 255, but the scale of {scale:.6g} makes them 0 to {top:.3g}"
        other, text, factor = 1.0, "--scale 1", 1 / 255
    else:
        problem = f"are of pixels from 0 to 1, but the scale of {scale:.6g} leaves them 0 to {top:.3g}"
        other, text, factor = 1 / 255, "--scale 1/255", 255.0
    advice = [text] if _fits(mean, std, other) else []
    means, stds = ([value * factor for value in values] for values in (mean, std))
    if _fits(means, stds, scale):
        advice.append(f"--mean {_list(means)} --std {_list(stds)}")
    raise DescriptionError(
        f"--mean {_list(mean)} and --std {_list(std)} {problem}: pass {' or '.join(advice) or 'a --scale that fits'}"
    )


def _fits(mean: Sequence[float], std: Sequence[float], scale: float) -> bool:
    """Whether the mean lies within the scaled pixels, and neither is far too small for them."""
    top = 255 * scale * (1 + 1e-6)
    untouched = not any(mean) and set(std) == {1}
    tiny = max(*map(abs, mean), *std) <= top / 100
    return untouched or (max(*mean, *std) <= top and not tiny)


def _list(values: Sequence[float]) -> str:
    return ",".join(f"{value:.6g}" for value in values)


def _is_threshold(value: float) -> bool:
    return SMALLEST_THRESHOLD <= value <= 1 - SMALLEST_THRESHOLD


_THRESHOLD = "between 0.001 and 0.999"


def _option(name: str) -> str:
    return {"tile_px": "--tile", "order": "--bgr or not"}.get(name, f"--{name.replace('_', '-')} so")
