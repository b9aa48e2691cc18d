"""Paint images from label maps with the generators of a trained pyramid GAN.

::

    histo-train sample runs/pyramid painted --data glas:PATH --per-mask 3
    histo-train sample runs/pyramid painted --data glas:PATH --swap healthy=adenomatous

``painted`` becomes a data set of its own (``docs/data.md``), for training or to look at: ``sheet.png``.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from histostream.training import checkpoint, preview
from histostream.training.batches import padded
from histostream.training.checkpoint import Checkpoint, CheckpointError
from histostream.training.data import DataError, DataSet, Sample, annotated
from histostream.training.methods.pyramid_gan import method as pyramid_gan
from histostream.training.methods.pyramid_gan.method import Config
from histostream.training.methods.pyramid_gan.networks import GeneratorPyramid, one_hot_levels
from histostream.training.state import State
from histostream.wsi.errors import HistoError, OutputError

METHOD = "pyramid_gan"
SHEET_ROWS = 6
GROUP = r"^(\d+)-"  # pattern of the group: the number of the label map


class SampleError(HistoError, ValueError):
    """The label maps cannot be painted with these options."""


@dataclass(frozen=True, slots=True)
class Painter:
    """The generators of a trained run.

    Attributes
    ----------
    checkpoint
        Header of the checkpoint.
    network
        All levels.
    config
        Of the model.
    """

    checkpoint: Checkpoint
    network: GeneratorPyramid
    config: Config

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in label order."""
        return [name for name, _ in self.checkpoint.classes]

    @property
    def align_px(self) -> int:
        """Sides of what is painted are multiples of this."""
        return pyramid_gan.align_px(self.config)


def open_painter(run: Path, device: torch.device | None = None) -> Painter:
    """Load the generators of a run, or of a checkpoint.

    Raises
    ------
    CheckpointError
        If there is no checkpoint, it is damaged, has no generators, or not all are trained.
    """
    folder = run / "best" if (run / "best").is_dir() else run
    header = checkpoint.read(folder)
    if header.method != METHOD:
        raise CheckpointError(
            f"{folder}: trained by {header.method!r}, which paints no images from labels; use a run of {METHOD!r}"
        )
    try:
        config = Config(**header.config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: its config does not fit {METHOD}: {error}; use the version of HistoStream that trained it"
        ) from error
    if not config.paints:
        raise CheckpointError(f'{folder}: trained with g_arch="none", it has no generator; use another run')
    state = pyramid_gan.build(config, len(header.classes), header.channels)
    generators = tuple(name for name in state.modules if name.startswith("generator_"))
    wanted = {name: state.modules[name] for name in ("progress", *generators)}
    checkpoint.load(folder, State(config, wanted, {}, needed=tuple(wanted)))
    if level := pyramid_gan.finest_level(state):
        raise CheckpointError(
            f"{folder}: saved when level {level} was trained, the finer ones were not; train with "
            'schedule.select="last"'
        )
    network = pyramid_gan.generators(state).eval().to(device or torch.device("cpu"))
    return Painter(header, network, config)


@torch.no_grad()
def paint(painter: Painter, labels: NDArray[np.uint8], seed: Sequence[int]) -> NDArray[np.uint8]:
    """Paint one label map, (H, W) classes, as (H, W, C) uint8; the noise is drawn from the seed alone.

    The label map is mirrored up to what the network takes, and the image is cut back.
    """
    height, width = labels.shape
    _, whole = padded(labels[..., None], labels, painter.align_px)
    truth = torch.from_numpy(whole[None].astype(np.int64))
    levels, channels = painter.config.levels, painter.checkpoint.channels
    rng = np.random.default_rng(seed)
    masks = one_hot_levels(truth, len(painter.checkpoint.classes), levels)[::-1]
    noises = [torch.from_numpy(rng.standard_normal((1, channels, *mask.shape[-2:]), np.float32)) for mask in masks]
    device = next(painter.network.parameters()).device
    image = painter.network([m.to(device) for m in masks], [z.to(device) for z in noises])
    painted: NDArray[np.uint8] = image[0, :height, :width].cpu().numpy()
    return painted


def swapped(labels: NDArray[np.uint8], one: int, other: int) -> NDArray[np.uint8]:
    """Exchange two classes of a label map."""
    table = np.arange(256, dtype=np.uint8)
    table[[one, other]] = other, one
    return table[labels]


def sample(
    painter: Painter,
    data: DataSet,
    out: Path,
    *,
    per_mask: int = 1,
    masks: int = 0,
    swap: str = "",
    seed: int = 0,
) -> int:
    """Paint the label maps of a data set, and write the images as a new data set.

    Parameters
    ----------
    painter
        The generators.
    data
        The data set; its training part is painted.
    out
        Folder to write, which must not exist; it appears once it is complete.
    per_mask
        Images of each label map. They have one group, so that no split divides them.
    masks
        Number of label maps, the first of the data set; 0: all.
    swap
        "A=B" exchanges two classes, by name or number.
    seed
        Source of all noise; an image depends on it and on the image's numbers alone.

    Returns
    -------
    The number of images.

    Raises
    ------
    SampleError
        If there is no such class, or nothing to paint.
    DataError
        If the labels are not those of the model.
    OutputError
        If ``out`` exists or cannot be written.
    """
    if out.exists():
        raise OutputError(f"{out}: exists already; choose another folder")
    if per_mask < 1 or masks < 0:
        raise SampleError(f"per_mask={per_mask}, masks={masks}: paint one image or more")
    samples = data.at_mpp(painter.checkpoint.mpp).train
    samples = samples[:masks] if masks else samples
    if not samples:
        raise SampleError(f"{data.name}: no labelled image to train on, so nothing to paint; use a set with labels")
    _check_labels(painter, data.name, samples)
    exchanged = _classes_of(painter, swap) if swap else None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            _write(painter, samples, part, per_mask, exchanged, seed)
            (part / "dataset.toml").write_text(_dataset_toml(painter, out.name), encoding="utf-8")
            part.chmod(0o755)  # mkdtemp makes it private
            part.rename(out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror}); check its permissions and room") from error
    return len(samples) * per_mask


def _check_labels(painter: Painter, name: str, samples: Sequence[Sample]) -> None:
    names = painter.class_names
    for item in samples:
        if (highest := int(annotated(item.labels).max(initial=0))) >= len(names):
            raise DataError(
                f"{name}: label {highest} in {item.name}; the model paints {len(names)} classes "
                f"({', '.join(names)}): "
                "use data of these classes"
            )


def _classes_of(painter: Painter, swap: str) -> tuple[int, int]:
    """Read "A=B"."""
    names = painter.class_names
    first, equals, second = swap.partition("=")
    if not equals:
        raise SampleError(f"--swap {swap!r}: write A=B")
    classes = []
    for text in (first, second):
        if text in names:
            classes.append(names.index(text))
        elif text.isdecimal() and int(text) < len(names):
            classes.append(int(text))
        else:
            raise SampleError(f"--swap {swap!r}: no class {text!r}; there are {', '.join(names)}")
    return classes[0], classes[1]


def _write(
    painter: Painter,
    samples: Sequence[Sample],
    folder: Path,
    per_mask: int,
    exchanged: tuple[int, int] | None,
    seed: int,
) -> None:
    colors = [color for _, color in painter.checkpoint.classes]
    rows: list[preview.Row] = []
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for number, item in enumerate(samples):
        labels = swapped(item.labels, *exchanged) if exchanged else item.labels
        row = {"true": item.image, "labels": preview.colored(labels, colors)}
        stem = re.sub(r"[^\w.-]+", "_", Path(item.name).stem)
        for k in range(per_mask):
            image = paint(painter, labels, (seed, number, k))
            row[f"painted {k + 1}"] = image
            file = f"{number:05d}-{stem}_{k + 1}"
            if image.shape[2] in (1, 3):
                Image.fromarray(np.squeeze(image)).save(folder / "images" / f"{file}.png")
            else:
                np.save(folder / "images" / f"{file}.npy", image)
            Image.fromarray(labels).save(folder / "labels" / f"{file}.png")
        if len(rows) < SHEET_ROWS:
            rows.append(row)
    preview.sheet(rows).save(folder / "sheet.png")


def _dataset_toml(painter: Painter, name: str) -> str:
    """Return the text of ``dataset.toml``; a JSON string is a TOML string."""
    header = painter.checkpoint
    lines = [
        f"name = {json.dumps(name, ensure_ascii=False)}",
        f"mpp = {float(header.mpp)!r}",
        f"group = '{GROUP}'",
    ]
    for class_name, color in header.classes:
        lines += [
            "",
            "[[classes]]",
            f"name = {json.dumps(class_name, ensure_ascii=False)}",
            f"color = {list(color)}",
        ]
    return "\n".join(lines) + "\n"
