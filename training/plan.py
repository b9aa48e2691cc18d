"""What a run is going to do, said before its first step: data, parts, networks, device and length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from histostream.training.batches import Parts
from histostream.training.class_weights import PixelCounts
from histostream.training.data import Classes, listed
from histostream.training.recipe import Recipe
from histostream.training.schedule import Schedule
from histostream.training.state import State
from histostream.wsi.report.figures import percent

COLORS = {1: "grey", 3: "RGB"}
MAX_CLASSES = 20  # that are listed with their shares


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is going to do.

    Attributes
    ----------
    images
        Number of labelled images, of which parts are made.
    channels, sizes
        Of the images; (height, width) of the smallest and the largest.
    mpp
        Resolution of training, in micrometres per pixel.
    shares
        Share of the pixels of ``counted`` training images, by the name of each class.
    weights
        Of the classes in the loss; () where all are alike.
    parts, pools
        Number of images of each part and pool.
    division
        How the parts were made.
    parameters
        Number of parameters of each network.
    deployed
        The networks that are exported.
    machine
        Device, threads and precision.
    start, steps
        Steps that are done, and of all steps.
    batch, crop_px
        Crops of a step, and their side; 0: whole images.
    validations, patience
        Number of validations that are to come, and of those after which the run ends if none of them
        is better; 0: it does not.
    notes
        Further remarks: what the run started from, and what changed.
    """

    images: int
    channels: int
    sizes: tuple[tuple[int, int], tuple[int, int]]
    mpp: float
    shares: dict[str, float]
    counted: int
    weights: tuple[float, ...]
    parts: dict[str, int]
    pools: dict[str, int]
    division: str
    parameters: dict[str, int]
    deployed: tuple[str, ...]
    machine: str
    start: int
    steps: int
    batch: int
    crop_px: int
    validations: int
    patience: int = 0
    notes: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """What the images are, by their channels."""
        return COLORS.get(self.channels, f"{self.channels} channels")

    @property
    def extent(self) -> str:
        """Sizes of the smallest and the largest image."""
        return " to ".join(f"{width} x {height}" for height, width in dict.fromkeys(self.sizes)) + " px"

    def lines(self, source: str) -> list[str]:
        """Return the plan as lines of text; ``source`` names the data as the user did."""
        parts = [f"{count} {name}" for name, count in self.parts.items() if count or name != "test"]
        parts += [f"{count} without labels ({name})" for name, count in self.pools.items()]
        shares = [f"{name} {percent(share)}" for name, share in self.shares.items()]
        weights = zip(self.shares, self.weights, strict=True) if self.weights else ()
        networks = [f"{name} {_amount(count)}" for name, count in self.parameters.items() if count]
        lines = {
            "data": f"{source}: {self.images} images, {self.kind}, {self.extent}, trained at {self.mpp:g} um per pixel",
            "classes": f"{listed(shares, MAX_CLASSES)} of the pixels of {self.counted} training images",
            "weights": listed([f"{name} {weight:.3g}" for name, weight in weights], MAX_CLASSES),
            "parts": f"{', '.join(parts)}: {self.division}",
            "networks": f"{', '.join(networks)} parameters; {', '.join(self.deployed)} will be exported",
            "device": self.machine,
            "training": self._length(),
        }
        return [f"{name:<9} {text}" for name, text in lines.items() if text] + [f"note      {n}" for n in self.notes]

    def _length(self) -> str:
        crops = f"crops of {self.crop_px} px" if self.crop_px else "whole images"
        every = f"{self.steps} steps, a batch of {self.batch} {crops}"
        if self.start >= self.steps:
            return f"is finished: {every}"
        if self.start:
            return f"goes on after step {self.start} of {every}, {self.validations} validations to come"
        ends = f" (the run ends after {self.patience} in a row that are not better)" if self.patience else ""
        return f"{every}, {self.validations} validations{ends}"


def make_plan(
    recipe: Recipe,
    parts: Parts,
    classes: Classes,
    state: State,
    counted: PixelCounts,
    *,
    division: str,
    machine: str,
    start: int,
    steps: int,
    weights: tuple[float, ...],
    notes: Sequence[str],
) -> Plan:
    """Put together what is known before the first step; the arguments are those of `Plan`."""
    samples, split = parts.samples, parts.split
    schedule, images = recipe.schedule, len(split.train)
    shapes = sorted((sample.shape for sample in samples), key=lambda shape: (shape[0] * shape[1], shape))
    shares = counted.shares
    return Plan(
        images=len(samples),
        channels=int(samples[0].image.shape[2]),
        sizes=(shapes[0], shapes[-1]),
        mpp=recipe.mpp,
        shares={name: float(shares[i]) for i, (name, _) in enumerate(classes)},
        counted=counted.images,
        weights=weights,
        parts={"training": images, "validation": len(split.validation), "test": len(split.test)},
        pools={name: len(pool) for name, pool in parts.pools.items()},
        division=division,
        parameters={name: parameter_count(module) for name, module in state.modules.items()},
        deployed=state.needed,
        machine=machine,
        start=start,
        steps=steps,
        batch=schedule.batch,
        crop_px=schedule.crop_px,
        validations=validations(schedule, start, steps, images),
        patience=schedule.patience,
        notes=tuple(notes),
    )


def parameter_count(module: nn.Module) -> int:
    """Return the number of a network's parameters."""
    return sum(p.numel() for p in module.parameters())


def validations(schedule: Schedule, start: int, steps: int, images: int) -> int:
    """Return the number of validations after step ``start``, with that after the last step."""
    due = sum(schedule.validates(done, images) for done in range(start + 1, steps))
    return due + (steps > start)


def _amount(count: int) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def machine_text(record: dict[str, Any], device: str) -> str:
    """Return device, machine and precision of a training record."""
    processes = f", {record['processes']} processes" if record["processes"] > 1 else ""
    return f"{device} ({record['machine']}), {record['precision']}{processes}"
