"""Open the network of a bundle with the engine that is named, or with the best one here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from histostream.runtime.bundle.card import OLD_SCHEMA, CardError, ModelCard, graph_file, read_card
from histostream.runtime.choices import ENGINES, RUN_PRECISIONS
from histostream.runtime.engines.base import Engine, EngineModule
from histostream.runtime.errors import EngineError
from histostream.wsi.errors import HistoError, reason
from histostream.wsi.optional import install_command

log = logging.getLogger(__name__)


def open_engine(
    bundle: Path,
    *,
    backend: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    device: int = 0,
    say: Callable[[str], None] = log.info,
) -> Engine:
    """Open the network of a model bundle.

    Parameters
    ----------
    bundle
        Folder with ``card.json``.
    backend
        Name of an engine: "cpu" and "cuda" (ONNX Runtime), "openvino", "tensorrt", or one that
        another package adds. "auto" takes TensorRT where an engine fits or can be built, else ONNX
        Runtime on the GPU where one is usable, else the CPU. An engine that is named is used or is
        an error, never silently replaced.
    precision
        "fp32", "fp16" or "int8": which graph of the bundle is run. "auto" takes FP32 on a CPU,
        where FP16 is not faster; INT8 with OpenVINO and FP16 on a GPU, where the bundle has it.
        "bf16", with OpenVINO only, computes the FP32 graph in bfloat16; no parity check covers it.
    threads
        CPU threads for inference; None leaves it to the library (all cores).
    device
        Which GPU, as the driver counts.
    say
        Called with a line that names the engine and why it was chosen.

    Raises
    ------
    CardError
        If the bundle is damaged or incomplete, or has no graph in that precision.
    EngineError
        If the backend is unknown or not usable on this machine.
    """
    names = ENGINES.names()
    if backend not in ("auto", *names):
        raise EngineError(f"no backend is called {backend!r}: use auto, {', '.join(names)}")
    if precision not in RUN_PRECISIONS:
        raise EngineError(f"no precision is called {precision!r}: use {', '.join(RUN_PRECISIONS)}")
    modules = _load(names if backend == "auto" else [backend])
    candidates = {
        name: module
        for name, module in modules.items()
        if (backend == name or module.AUTO_PRIORITY > 0) and precision in ("auto", *module.PRECISIONS)
    }
    if not candidates:
        offering = [name for name, module in _load(names).items() if precision in module.PRECISIONS]
        raise EngineError(f"precision {precision} is not offered by {backend}: pass --backend {' or '.join(offering)}")
    card = read_card(bundle)
    if card.schema == OLD_SCHEMA:
        log.warning(
            "%s: its scores have 8 bits, which changes labels where classes are close; "
            "histo-export upgrade %s makes it a bundle of today",
            bundle,
            bundle,
        )
    if precision != "auto" and graph_file(precision) not in card.files:
        raise CardError(
            f"{bundle}: has no {precision} graph, but {', '.join(card.precisions) or 'none'}; "
            "export the model with --precision"
        )

    def open_with(name: str) -> Engine:
        return _open(name, candidates[name], bundle, card, precision, threads, device)

    if backend != "auto":
        engine = open_with(backend)
        say(f"{engine.name} (requested)")
        return engine
    *best, fallback = sorted(candidates, key=lambda name: -candidates[name].AUTO_PRIORITY)
    hardware, failures = "", []
    for name in best:
        if not (hardware_of_engine := candidates[name].available_hardware()):
            continue
        hardware = hardware or hardware_of_engine
        try:
            engine = open_with(name)
        except CardError:
            raise
        except HistoError as error:
            failures.append(f"{name}: {error}")
            continue
        say(f"{engine.name} ({'; '.join((f'{hardware} is here', *(f'not {failure}' for failure in failures)))})")
        return engine
    if failures:
        log.warning("%s is here but cannot be used, running on the CPU: %s", hardware, "; ".join(failures))
    engine = open_with(fallback)
    say(f"{engine.name} ({'the GPU cannot be used' if failures else 'no GPU is here'})")
    return engine


def _load(names: Sequence[str]) -> dict[str, EngineModule]:
    """Import the modules of engines; one of several that cannot be imported is left out."""
    modules = {}
    for name in names:
        try:
            modules[name] = cast(EngineModule, ENGINES.load(name))
        except ImportError as error:
            message = f"backend {name!r} cannot be loaded ({reason(error)}); install it again"
            if len(names) == 1:
                raise EngineError(message) from error
            log.warning("%s", message)
    return modules


def _open(
    name: str,
    module: EngineModule,
    bundle: Path,
    card: ModelCard,
    precision: str,
    threads: int | None,
    device: int,
) -> Engine:
    if precision == "auto":
        precision = next((offered for offered in module.PRECISIONS if offered in card.precisions), "fp32")
    try:
        return module.open(bundle, card, precision=precision, threads=threads, device=device)
    except ImportError as error:
        advice = install_command(module.EXTRA) if module.EXTRA else "install it"
        raise EngineError(f"backend {name!r} needs a package ({reason(error)}): {advice}") from error
