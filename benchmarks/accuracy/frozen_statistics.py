r"""Measure the cost and the benefit of freezing the statistics of instance and group normalisation.

::

    python -m histostream.benchmarks.accuracy.frozen_statistics --data ../shared/data \
        --out benchmarks/results/frozen-statistics.json

Two small U-Nets, one with instance and one with group normalisation after each convolution, learn nuclei from the
brightfield images of the 2018 Data Science Bowl. Each is exported unchanged, with its statistics frozen over the
training images, and with its statistics frozen over the images that are scored, without their labels, as a user would
with a slide of their own laboratory. TNBC and the MoNuSeg test set are scored, and a slide, on which two tiles that lie
half a tile apart should agree.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histostream.benchmarks.accuracy.nuclei import SETS, score
from histostream.benchmarks.report import write_result
from histostream.export.bundle import Options, write_bundle
from histostream.export.trained import trained_network
from histostream.runtime import Engine, open_engine
from histostream.runtime.hardware import hardware
from histostream.training.augment import Augmentation, draw_crop
from histostream.training.batches import typical_object_px
from histostream.training.data import Sample
from histostream.training.datasets.folder import read_folder
from histostream.training.networks.tile_model import TileModel
from histostream.training.networks.unet import UNet
from histostream.training.splits import split
from histostream.wsi.outputs.label_rows import ClassInfo
from histostream.wsi.slides.reader import open_slide
from histostream.wsi.slides.resolution import at_mpp

CLASSES = (ClassInfo("background", (255, 255, 255)), ClassInfo("nucleus", (30, 100, 220)))
MPP = 0.5
TILE_PX = 256
WIDTH = 16
BATCH, CROP_PX = 8, 128
AUGMENTATION = Augmentation(
    flips=True, object_px=11.0, zoom=1.5, stain=0.25, restain=0.65, light=0.25, focus=1.0, noise=6.0, jpeg=0.3
)


class NormedUNet(TileModel):
    """A U-Net with a normalisation after each 3x3 convolution, behind the tile contract."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.network = UNet(3, 2, base_width=WIDTH, depth=4, dropout=0.1)
        for parent in list(self.network.modules()):
            for name, conv in list(parent.named_children()):
                if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                    width = conv.out_channels
                    layer = nn.InstanceNorm2d(width, affine=True) if norm == "instance" else nn.GroupNorm(8, width)
                    setattr(parent, name, nn.Sequential(conv, layer))

    def scores(self, images: Tensor) -> Tensor:
        """Map (N, 3, H, W), 0..255, to probabilities (N, 2, H, W)."""
        probabilities: Tensor = self.network(images / 127.5 - 1).softmax(1)
        return probabilities


def train(network: NormedUNet, samples: list[Sample], steps: int) -> None:
    """Train with cross-entropy and Adam; the learning rate falls to zero along a cosine."""
    rng = np.random.default_rng(0)
    typical = typical_object_px(samples)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    network.train()
    for _ in range(steps):
        chosen = rng.integers(len(samples), size=BATCH)
        crops = [draw_crop(samples[i], CROP_PX, AUGMENTATION, typical, rng) for i in chosen]
        x = torch.from_numpy(np.stack([c[0] for c in crops])).to(torch.float32)
        labels = torch.from_numpy(np.stack([c[1] for c in crops])).long()
        loss = F.cross_entropy(network.network(x.permute(0, 3, 1, 2) / 127.5 - 1), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    network.eval()


def disagreement_of_tiles(engine: Engine, slide: Path) -> float:
    """Return the share of a slide's pixels whose label depends on the tile that they lie in.

    Each tile is compared with one that lies half a tile away along both axes, in their overlap, at least an eighth of a
    tile away from the border of either.
    """
    side, half, quarter = TILE_PX, TILE_PX // 2, TILE_PX // 4
    with open_slide(slide) as reader:
        view = at_mpp(reader, MPP)
        pixels = view.read(0, 0, view.width, view.height)

    def labels(x: int, y: int) -> np.ndarray:
        tile = np.ascontiguousarray(pixels[y : y + side, x : x + side])
        return np.asarray(engine.infer(tile[None])[0].argmax(axis=0))

    differ = total = 0
    for y in range(0, pixels.shape[0] - side - half, side):
        for x in range(0, pixels.shape[1] - side - half, side):
            one, other = labels(x, y), labels(x + half, y + half)
            # The middle of the overlap, which is half a tile wide.
            a = one[half + quarter // 2 : -quarter // 2, half + quarter // 2 : -quarter // 2]
            b = other[quarter // 2 : half - quarter // 2, quarter // 2 : half - quarter // 2]
            differ += int((a != b).sum())
            total += a.size
    return differ / total


@click.command()
@click.option("--data", "data_dir", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON to write.")
@click.option("--steps", default=600, show_default=True, help="Training steps of each network.")
def main(data_dir: Path, out: Path, steps: int) -> None:
    """Train, freeze, score, compare."""
    folder = data_dir / "nuclei-dsb2018" / "brightfield"
    samples = read_folder(folder)
    chosen = [samples[i] for i in split(samples, validation=0.12, test=0.2, seed=1).train]
    slide = data_dir / "wsi-slides" / "CMU-1-Small-Region.svs"
    scored = {**{name: data_dir / folder_name for name, folder_name in SETS.items()}, "slide": slide}
    results: dict[str, object] = {}
    for norm in ("instance", "group"):
        torch.manual_seed(0)
        module = NormedUNet(norm)
        start = time.perf_counter()
        train(module, chosen, steps)
        seconds = time.perf_counter() - start
        network = trained_network(
            module, method=f"unet_{norm}_norm", classes=CLASSES, mpp=MPP, channels=3, tile_px=TILE_PX
        )
        rows: dict[str, dict[str, object]] = {}
        for kind in ("live", "frozen over training images", "frozen over what is scored"):
            rows[kind] = {}
            for name, path in scored.items():
                freeze = {"live": None, "frozen over training images": folder}.get(kind, path)
                with tempfile.TemporaryDirectory() as scratch:
                    options = Options(
                        precisions=("fp32",), tensorrt="off", tile_px=TILE_PX, calibrate=slide, freeze=freeze
                    )
                    write_bundle(network, Path(scratch) / "bundle", options)
                    engine = open_engine(Path(scratch) / "bundle", backend="cpu")
                if path == slide:
                    share = disagreement_of_tiles(engine, slide)
                    rows[kind]["labels_that_depend_on_the_tile"] = round(share, 6)
                else:
                    rows[kind][f"dice_{name}"] = score(read_folder(path), engine)["dice_pooled"]
        results[norm] = {"training_steps": steps, "training_seconds": round(seconds), **rows}
        click.echo(f"{norm}: {json.dumps(rows)}")
    write_result(out, {"hardware": hardware(), "tile_px": TILE_PX, "width": WIDTH, "networks": results})


if __name__ == "__main__":
    main()
