"""Wrap a segmentation network from elsewhere so that it keeps the tile contract."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from histostream.export.bundle import Export, Network, Options, Say, check_options, write_bundle
from histostream.export.external.activation import LABELS, Activation, Evidence, choose_activation
from histostream.export.external.description import DescriptionError, ExternalModel
from histostream.export.external.dynamic_batch import with_dynamic_batch
from histostream.export.external.file import OLDEST_OPSET, convert, prune
from histostream.export.external.formats import open_network
from histostream.export.external.metadata import read_metadata, with_defaults
from histostream.export.external.network import (
    ExternalNetwork,
    InputFormat,
    Tiles,
    choose_tensors,
    takes_bytes,
    trial_tiles,
)
from histostream.export.external.output import OutputFormat
from histostream.export.external.processing import try_out, with_processing
from histostream.export.external.reference import Reference
from histostream.export.external.scoring import Scoring, choose_scoring
from histostream.export.graph.model import GraphError, open_session, opset_of
from histostream.export.receptive_field.measure import receptive_field
from histostream.export.receptive_field.perturbation import receptive_field_of
from histostream.export.tiles import collect_tiles
from histostream.wsi.outputs.label_rows import BACKGROUND, ClassInfo

REAL_TILES = 2  # of either kind that `collect_tiles` gives, to find the activation on
MAX_REPEATED = 8  # at most 1 / MAX_REPEATED of a tile may repeat its last row and column
WHITE = (255, 255, 255)
# Okabe and Ito's colours, which people with any colour vision tell apart.
PALETTE = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (0, 0, 0),
)


@dataclass(frozen=True, slots=True)
class WrappedModel:
    """A network from elsewhere behind the tile contract.

    Attributes
    ----------
    model
        The graph: input ``tiles`` uint8 (N, tile_px, tile_px, C), output ``scores`` float16 (N, K, tile_px, tile_px),
        N dynamic, all weights inside.
    reference
        The unchanged file in ONNX Runtime on the CPU, with pre- and post-processing in NumPy: the same input, and
        scores in float32 that are not rounded.
    options
        As given, with the defaults of the file's metadata and the names of the tensors.
    source, output, scoring
        What was found out about input and output, and how scores are made of it.
    opset
        Operator set of ``model``.
    decisions
        What was decided for the user and why, a line each.
    changes
        What was changed inside the network, for the record.
    mpp
        Resolution, um per pixel.
    note
        As the file's metadata say; "" if they do not.
    """

    model: onnx.ModelProto
    reference: Callable[[Tiles], NDArray[np.float32]]
    options: ExternalModel
    source: InputFormat
    output: OutputFormat
    scoring: Scoring
    opset: int
    decisions: tuple[str, ...]
    changes: tuple[str, ...]
    mpp: float
    note: str = ""

    @property
    def border_px(self) -> int:
        """Pixels at each side of a tile that have no scores of their own."""
        border = self.output.border_px
        return border and border + max(self.source.tile_px - self.source.side, 0)

    def classes(self) -> tuple[ClassInfo, ...]:
        """Return the classes with their colours: as given, else of a palette, and white for the background."""
        names, background = self.scoring.classes, self.scoring.background
        given = dict(zip(self.options.classes, self.options.colors, strict=False))
        palette = iter(range(len(names)))
        classes = []
        for label, name in enumerate(names):
            color = WHITE if label == background else PALETTE[next(palette) % len(PALETTE)]
            classes.append(ClassInfo(name, given.get(name, color), BACKGROUND if label == background else ""))
        return tuple(classes)

    def as_dict(self) -> dict[str, Any]:
        """Return how it was wrapped, for the card."""
        source, scoring = self.source, self.scoring
        return {
            "wrapped_with": {
                "input": source.name,
                "output": self.options.output_name,
                "layout": source.layout,
                "order": source.order,
                "mean": source.mean,
                "std": source.std,
                "scale": source.scale,
                "activation": scoring.activation,
                "threshold": scoring.threshold,
                "background_below": scoring.background_below,
                "network_px": source.side,
                "border_px": self.output.border_px,
            },
            "decisions": list(self.decisions),
            "changes": list(self.changes),
        }


def wrap_onnx(
    path: Path,
    out: Path,
    external: ExternalModel,
    options: Options | None = None,
    *,
    mpp: float | None = None,
    note: str = "",
    say: Say = lambda text: None,
) -> Export:
    """Write a segmentation network from elsewhere to the bundle ``out``.

    Parameters
    ----------
    path
        An ONNX file, with its external data beside it, or a file of ``torch.export.save``.
    out
        Folder to write; an existing bundle there is replaced once the new one is complete.
    external
        Properties of the network; its ``tile_px`` counts, not that of ``options``.
    options
        How to export it.
    mpp
        Resolution that the network was trained at, in um per pixel; None: as the file's metadata say.
    note
        What the network is for and where it fails, for the card; "": as the file's metadata say.
    say
        Called with each line of progress, and each decision that was made for the user.

    Raises
    ------
    DescriptionError
        If ``external`` cannot be, or does not fit the network, or more needs to be said.
    GraphError
        If the file is no such network, or may not be deployed.
    HistoError
        As `write_bundle`.
    """
    options = options or Options()
    check_options(out, options)
    network = external_network(path, external, mpp=mpp, note=note, calibrate=options.calibrate, say=say)
    return write_bundle(network, out, options, say=say)


def external_network(
    path: Path,
    options: ExternalModel,
    *,
    mpp: float | None = None,
    note: str = "",
    calibrate: Path | None = None,
    say: Say = lambda text: None,
) -> Network:
    """Wrap a network for `write_bundle`; parameters and errors as `wrap_onnx`."""
    wrapped = wrap_graph(path, options, mpp=mpp, calibrate=calibrate)
    for line in wrapped.decisions:
        say(line)
    return Network(
        model=wrapped.model,
        reference=wrapped.reference,
        method="foreign",
        classes=wrapped.classes(),
        mpp=wrapped.mpp,
        channels=wrapped.source.channels,
        tile_px=wrapped.source.tile_px,
        score_kind="label" if wrapped.scoring.activation == LABELS else "probability",
        training={
            "file": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            **wrapped.as_dict(),
        },
        note=note or wrapped.note,
        channel_names=wrapped.options.channel_names,
        border_px=wrapped.border_px,
    )


def wrap_graph(path: Path, options: ExternalModel, *, mpp: float | None, calibrate: Path | None = None) -> WrappedModel:
    """Turn a segmentation network into a graph that keeps the tile contract.

    The network's nodes keep their names; added nodes begin with ``histostream/``. The result is tried on two tiles: it
    must compute what the file does, and give the same scores for two tiles together as for each alone. That takes about
    ten inferences of a tile on the CPU.

    Parameters
    ----------
    path, options, mpp
        As for `wrap_onnx`.
    calibrate
        Slide or folder on whose tiles the output is looked at; None: the synthetic slide.

    Raises
    ------
    DescriptionError, GraphError
        As `wrap_onnx`.
    """
    if mpp is not None and not 0 < mpp < math.inf:
        raise DescriptionError(f"mpp={mpp!r} is not a positive number; pass --mpp in um per pixel")
    original, session = open_network(path)
    defaults = read_metadata(original)
    options = choose_tensors(session, options)
    options, decisions = with_defaults(options, defaults, takes_bytes=takes_bytes(session, options))
    decisions += [f"metadata left out: {text}" for text in defaults.ignored]
    if not options.classes:
        raise DescriptionError("the file's metadata do not name the classes: pass --classes with a name for each label")
    mpp, line = _resolution(mpp, defaults.mpp)
    decisions += line
    model = prune(original, str(options.input_name), str(options.output_name))
    if len(session.get_inputs()) > 1:  # the file's session would need all of them
        session = open_session(model)
    source = InputFormat.inspect(session, options)
    network = ExternalNetwork(session, source, str(options.output_name))
    trial = network.run(source.normalised(trial_tiles(source.tile_px, source.channels)))
    output = OutputFormat.inspect(model, trial, options, source.layout, source.side)
    activation = _choose_activation(model, network, output, options, trial, mpp, calibrate)
    scoring, lines = choose_scoring(options, output, activation)
    if activation.name != LABELS:
        decisions.append(f"activation {activation.name}: {activation.why}")
    decisions += lines
    reference = Reference(network, output, scoring)
    graph, changes = _build(model, reference)
    field = receptive_field(graph)
    if field.unknown:
        field = receptive_field_of(graph, output.border_px)
    reference, line = _with_whole_strides(reference, field.align_px)
    if line:
        decisions += line
        graph, changes = _build(model, reference)
    return WrappedModel(
        graph,
        reference,
        options,
        reference.network.source,
        output,
        scoring,
        opset_of(graph),
        tuple(decisions),
        changes,
        mpp,
        defaults.note,
    )


def _resolution(mpp: float | None, of_file: float | None) -> tuple[float, list[str]]:
    if mpp is not None:
        return mpp, []
    if of_file is None:
        raise DescriptionError("the file's metadata do not say the resolution: pass --mpp in um per pixel")
    return of_file, [f"resolution from the file's metadata: {of_file:g} um/px"]


def _choose_activation(
    model: onnx.ModelProto,
    network: ExternalNetwork,
    output: OutputFormat,
    options: ExternalModel,
    trial: NDArray[Any],
    mpp: float,
    calibrate: Path | None,
) -> Activation:
    """Look at the output on real tiles, besides those that were tried, and choose what makes probabilities of it."""
    if output.labels:
        if options.activation not in ("auto", "none"):
            raise DescriptionError(
                f"the output is labels, so --activation {options.activation} cannot be: leave it out, or export the "
                "model without its arg-max"
            )
        return Activation(LABELS, "the output is labels")
    source = network.source
    tiles = collect_tiles(
        calibrate,
        tile_px=source.tile_px,
        channels=source.channels,
        mpp=mpp,
        classes=options.classes,
        count=REAL_TILES,
    )
    real = np.concatenate([tiles.gate, tiles.calibration])
    outputs = [
        output.channels_first(part) for part in (trial, *(network.run(source.normalised(t[None])) for t in real))
    ]
    text = f"{len(real)} tiles of {tiles.source} and {len(trial)} of noise"
    evidence = Evidence.gather(model, network.output_name, np.concatenate(outputs), text)
    is_added = bool(options.background_below) or 1 < output.channels < len(options.classes)
    return choose_activation(options.activation, evidence, output.channels, background_is_added=is_added)


def _build(model: onnx.ModelProto, reference: Reference) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Return the wrapped graph, and what was changed inside the network."""
    source = reference.network.source
    tiles = trial_tiles(source.tile_px, source.channels)
    expected = reference(tiles)

    def wrapped(candidate: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
        dynamic, changed, fixed = with_dynamic_batch(candidate, source.shape)
        graph = with_processing(dynamic, source, reference.output_format, reference.scoring)
        try_out(graph, tiles, expected, fixed)
        return graph, tuple(f"{name}: freed of the fixed batch" for name in changed)

    converted = convert(model)
    try:
        return wrapped(converted)
    except GraphError:
        if converted is model or opset_of(model) < OLDEST_OPSET:
            raise
        # The converter between operator sets has gaps.
        return wrapped(model)


def _with_whole_strides(reference: Reference, align_px: int) -> tuple[Reference, list[str]]:
    """Give tiles a size that is a multiple of the network's strides, where its own size is none.

    A network with convolutions without padding gets larger tiles, whose last rows and columns it does not see; its
    output does not cover them anyway. Another network gets smaller tiles, which are extended to its size.

    Raises
    ------
    GraphError
        If the size can be chosen, or the strides leave too little of the tile.
    """
    source, output = reference.network.source, reference.output_format
    side = source.side
    if side % align_px == 0:
        return reference, []
    smaller, larger = side // align_px * align_px, -(-side // align_px) * align_px
    if not source.has_fixed_side and not output.border_px:
        sizes = " or ".join(f"--tile {size}" for size in (smaller, larger) if size)
        raise DescriptionError(f"the network's strides need tiles of a multiple of {align_px} px: pass {sizes}")
    tile_px = larger if output.border_px else smaller
    if abs(tile_px - side) * MAX_REPEATED > side:
        raise GraphError(
            f"the network takes {side} px, on which its strides are not whole (multiples of {align_px} px would be): "
            "export it for another size, as 512 px"
        )
    network = replace(reference.network, source=replace(source, tile_px=tile_px))
    how = "the rest is not covered by its output" if output.border_px else "the last row and column are repeated"
    return replace(reference, network=network), [
        f"the network takes {side} px, no multiple of its strides ({align_px} px): tiles of {tile_px} px; {how}"
    ]
