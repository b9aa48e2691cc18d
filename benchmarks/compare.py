"""Compare one network in every installed library: ``histo-bench compare``.

Every contender gets the same tiles from host memory and returns scores to host memory, so that all have the same
copies. They take turns, and ratios are formed within a turn.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from histostream.benchmarks.report import table_lines
from histostream.benchmarks.stages import BenchError
from histostream.benchmarks.timing import paired_ratio, time_in_turns
from histostream.export.tiles import collect_tiles
from histostream.export.trained import load_deployed, read_checkpoint
from histostream.runtime.bundle.card import ModelCard, Scores, read_card
from histostream.runtime.choices import BACKENDS, PRECISIONS
from histostream.runtime.engines.onnxruntime import quiet
from histostream.runtime.engines.opener import open_engine
from histostream.runtime.hardware import cpu_flags, hardware
from histostream.runtime.record import versions
from histostream.training.checkpoint import CheckpointError
from histostream.wsi.errors import HistoError, reason

Pixels = NDArray[np.uint8]
Plain = dict[str, Any]
Call = Callable[[Pixels], Scores]
Say = Callable[[str], None]
BASELINE = "torch eager fp32"
# Instructions without which a processor computes bfloat16 several times slower than single precision.
BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"})


class NotUsableError(Exception):
    """A contender cannot run here, for the reason given."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One library and precision, warm.

    Attributes
    ----------
    name
        Library and precision.
    ran
        What ran, with its version.
    call
        Maps tiles (N, H, W, C) to scores (N, K, H, W), both in host memory.
    close
        Releases the device.
    """

    name: str
    ran: str
    call: Call
    close: Callable[[], None] = lambda: None


def compare(
    bundle: Path,
    *,
    method: str = "imems",
    checkpoint: Path | None = None,
    slide: Path | None = None,
    tiles: int = 4,
    batch: int = 1,
    repeats: int = 5,
    threads: int | None = None,
    compiled: bool = False,
    say: Say = lambda text: None,
) -> Plain:
    """Time one network in torch and in every backend, and compare their labels.

    Parameters
    ----------
    bundle
        The exported model.
    method, checkpoint
        The same network in torch; without a checkpoint, the weights that ship for the method.
    slide
        Slide that tiles are cut from; None: a synthetic one.
    tiles, batch
        Number of tiles, and of tiles at once.
    repeats
        Number of repeats; the figures are medians.
    threads
        CPU threads of every contender; None: all cores.
    compiled
        Whether to try ``torch.compile`` too, which takes minutes.
    say
        Called with each line of progress.

    Returns
    -------
    Rates and label agreement of the contenders, and the reason for each that could not run.

    Raises
    ------
    CardError, CheckpointError, BenchError
        If bundle or checkpoint cannot be read, or are not of one network.
    """
    for name, value in (("tiles", tiles), ("batch", batch), ("repeats", repeats)):
        if value < 1:
            raise BenchError(f"--{name} {value}: use 1 or more")
    card = read_card(bundle)
    module = torch_network(method, checkpoint, card)
    pixels = collect_tiles(
        slide, tile_px=card.tile_px, channels=card.channels, mpp=card.mpp, classes=(), count=tiles
    ).gate
    machine = hardware()
    batches = [pixels[i : i + batch] for i in range(0, len(pixels), batch)]
    with _torch_threads(threads):
        contenders, refused = _open(bundle, card, module, threads, compiled, batches, say)
        scores = {c.name: np.concatenate([c.call(b) for b in batches]) for c in contenders}
        timings = time_in_turns({c.name: partial(_call_each, c.call, batches) for c in contenders}, repeats, say=say)
    for contender in contenders:
        contender.close()
    seconds = timings.wall
    reference = scores[BASELINE].argmax(axis=1)
    mpx = len(pixels) * card.tile_px**2 / 1e6
    return {
        "hardware": machine,
        "versions": {**versions(), "torch": torch.__version__},
        "model": bundle.name,
        "method": method,
        "tile_px": card.tile_px,
        "tiles": len(pixels),
        "batch": batch,
        "repeats": repeats,
        "threads": threads,
        "contenders": [
            {
                "name": c.name,
                "ran": c.ran,
                "mpx_per_s": round(mpx / statistics.median(seconds[c.name]), 3),
                "ratio_to_torch_eager": round(paired_ratio(seconds[BASELINE], seconds[c.name]), 3),
                "label_agreement": round(float((scores[c.name].argmax(axis=1) == reference).mean()), 6),
                "cores_busy": round(timings.cores_busy(c.name), 2),
                "every_seconds": [round(s, 4) for s in seconds[c.name]],
            }
            for c in contenders
        ],
        "not_usable": refused,
    }


def _call_each(call: Call, batches: list[Pixels]) -> None:
    for batch in batches:
        call(batch)


def torch_network(method_name: str, run: Path | None, card: ModelCard) -> nn.Module:
    """Load the network that a bundle was exported from.

    Raises
    ------
    CheckpointError
        If the checkpoint cannot be read, is of another method, or does not fit the card.
    """
    folder, saved = read_checkpoint(method_name, run)
    ours = (saved.channels, [name for name, _ in saved.classes])
    theirs = (card.channels, [c.name for c in card.classes])
    if ours != theirs:
        raise CheckpointError(
            f"{folder}: has {ours[0]} channels and classes {', '.join(ours[1])}, the bundle "
            f"{theirs[0]} and {', '.join(theirs[1])}; pass the --checkpoint that it was made of"
        )
    return load_deployed(folder, saved)


def _open(
    bundle: Path,
    card: ModelCard,
    module: nn.Module,
    threads: int | None,
    compiled: bool,
    batches: list[Pixels],
    say: Say,
) -> tuple[list[Contender], list[Plain]]:
    """Open and warm every contender; the first is the baseline."""
    contenders: list[Contender] = []
    refused: list[Plain] = []
    for name, opened in (
        *_torch_contenders(module, compiled),
        *_engine_contenders(bundle, card, threads),
    ):
        say(f"opening {name}")
        try:
            contender = opened()
            for batch in {len(b): b for b in batches}.values():  # a last batch may be smaller
                contender.call(batch)
        except (HistoError, NotUsableError) as error:
            refused.append({"name": name, "reason": str(error)})
        except Exception as error:  # of torch, its compiler, or a library: none has a common base
            if name == BASELINE:
                raise
            refused.append({"name": name, "reason": reason(error)})
        else:
            contenders.append(contender)
    return contenders, refused


def _torch_contenders(module: nn.Module, compiled: bool) -> Iterator[tuple[str, Callable[[], Contender]]]:
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    half = torch.float16 if on_gpu else torch.bfloat16
    half_is_fast = on_gpu or bool(BFLOAT16 & cpu_flags())

    def eager() -> Contender:
        return _torch_contender(BASELINE, module, device, None, compiled=False)

    def mixed() -> Contender:
        if not half_is_fast:
            raise NotUsableError("this processor has no bfloat16 instructions: it would be slower")
        return _torch_contender("torch AMP", module, device, half, compiled=False)

    def with_compiler() -> Contender:
        if not compiled:
            raise NotUsableError("needs --compile (takes minutes)")
        return _torch_contender("torch compile", module, device, half if half_is_fast else None, compiled=True)

    yield BASELINE, eager
    yield "torch AMP", mixed
    yield "torch compile", with_compiler


def _torch_contender(
    name: str, module: nn.Module, device: str, half: torch.dtype | None, *, compiled: bool
) -> Contender:
    on_device = module.to(device)
    run = torch.compile(on_device) if compiled else on_device
    kind = "fp32" if half is None else f"autocast {str(half).removeprefix('torch.')}"

    def call(tiles: Pixels) -> Scores:
        with (
            torch.inference_mode(),
            torch.autocast(device, dtype=half or torch.bfloat16, enabled=half is not None),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # of the compiler, about this machine
            scores: Scores = run(torch.from_numpy(tiles).to(device)).cpu().numpy()
        return scores

    suffix = ", compiled" if compiled else ""
    return Contender(name, f"torch {torch.__version__} {device} {kind}{suffix}", call)


def _engine_contenders(
    bundle: Path, card: ModelCard, threads: int | None
) -> Iterator[tuple[str, Callable[[], Contender]]]:
    for backend in BACKENDS[1:]:  # without "auto"
        library = "onnxruntime " if backend in ("cpu", "cuda") else ""
        for precision in PRECISIONS:
            name = f"{library}{backend} {precision}"

            def opened(name: str = name, backend: str = backend, precision: str = precision) -> Contender:
                if precision not in card.precisions:
                    raise NotUsableError(f"the bundle has no {precision} graph")
                with quiet():
                    engine = open_engine(bundle, backend=backend, precision=precision, threads=threads)
                return Contender(name, engine.name, engine.infer, engine.close)

            yield name, opened


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def markdown(result: Plain) -> str:
    """Return the result as a page with one table."""
    machine = result["hardware"]
    gpus = "".join(f", {gpu['name']}" for gpu in machine["gpus"])
    lines = [
        f"# {result['model']}: {result['tiles']} tiles of {result['tile_px']} px, batch {result['batch']}",
        "",
        f"{machine['cpu']}, {machine['cores']} cores{gpus}; load before {machine['load_before']}. "
        f"Medians of {result['repeats']} repeats in turns, host memory to host memory; Mpx are "
        "pixels of tiles.",
        "",
    ]
    rows = [
        [
            c["name"],
            c["ran"],
            f"{c['mpx_per_s']:.3g}",
            f"{c['ratio_to_torch_eager']:.2f} x",
            f"{c['label_agreement']:.3%}",
            f"{c['cores_busy']:.1f}",
        ]
        for c in result["contenders"]
    ]
    lines += table_lines(
        ["", "what ran", "Mpx/s", "of torch eager", "labels that agree with torch", "cores busy"], rows
    )
    if result["not_usable"]:
        lines += ["", "Not run here:", ""]
        lines += [f"- {refused['name']}: {refused['reason']}" for refused in result["not_usable"]]
    return "\n".join([*lines, ""])
