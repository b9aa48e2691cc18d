"""``histo-infer``: slides in, label maps out."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from histostream.runtime.blend import WINDOWS
from histostream.runtime.card import PRECISIONS, default_bundle, read_card
from histostream.runtime.crf.options import CrfOptions, read_params
from histostream.runtime.crf.params import CrfError
from histostream.runtime.engine import BACKENDS, BF16, Engine, open_engine
from histostream.runtime.fleet import Fleet
from histostream.runtime.infer import Options, SlideResult, segment_slide, slide_stem
from histostream.runtime.memory import return_buffers_at_once
from histostream.wsi.console import fail, show_only_our_warnings
from histostream.wsi.errors import HistoError

console = Console(stderr=True)


@click.command(context_settings={"show_default": True})
@click.version_option(package_name="histostream")
@click.argument("slides", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--model", "bundle", type=click.Path(path_type=Path), help="Model bundle; default: nuclei."
)
@click.option("--out", default="out", type=click.Path(path_type=Path), help="Folder for results.")
@click.option("--backend", default="auto", type=click.Choice(BACKENDS), help="What to run on.")
@click.option(
    "--precision", default="auto", type=click.Choice(("auto", *PRECISIONS, BF16)),
    help="Which graph of the model is run; int8 is the fastest on a CPU. bf16: OpenVINO only.",
)  # fmt: skip
@click.option(
    "--overlap", "overlap_px", type=int, metavar="PX", help="Pixels that tiles share; default 64."
)
@click.option("--blend", default="hann", type=click.Choice(WINDOWS), help="How tiles are joined.")
@click.option("--mpp", type=float, help="Resolution of the slide, um per pixel at full size.")
@click.option(
    "--roi", type=click.Path(path_type=Path), help="GeoJSON polygons (full-size pixels) to analyse."
)
@click.option("--tissue/--no-tissue", default=True, help="Leave glass out, or analyse it too.")
@click.option("--batch", type=int, help="Tiles per inference; default: what suits the device.")
@click.option(
    "--devices", metavar="0,1,...",
    help="GPUs that share the work, a process each: slides, or the columns of one slide.",
)  # fmt: skip
@click.option("--threads", type=int, help="CPU threads; default: all cores.")
@click.option(
    "--max-memory", "max_memory_mib", type=int, metavar="MIB",
    help="Bound on memory; wide slides are run in column bands.",
)  # fmt: skip
@click.option("--probabilities", is_flag=True, help="Write probabilities.tif too.")
@click.option(
    "--crf", is_flag=True, help="Refine the labels by a dense CRF with the model's parameters."
)
@click.option(
    "--crf-params", metavar="w1=5,theta_alpha=15um,...",
    help="Other parameters: w1, theta_alpha, theta_beta, w2, theta_gamma, n_iter; with --crf.",
)  # fmt: skip
@click.option(
    "--crf-uncertain", type=float, metavar="P",
    help="Refine only where the two best scores are nearer than P, 0 to 1; with --crf.",
)  # fmt: skip
@click.option("--force-upsampling", is_flag=True, help="Enlarge slides coarser than the model.")
def main(
    slides: tuple[Path, ...],
    bundle: Path | None,
    out: Path,
    backend: str,
    precision: str,
    devices: str | None,
    threads: int | None,
    crf: bool,
    crf_params: str | None,
    crf_uncertain: float | None,
    **options: Any,
) -> None:
    """Segment whole slides; results go to OUT/<slide name>/.

    Exit status 0 only if every slide was done whole; a slide that fails does not stop the others.
    """
    show_only_our_warnings("histo-infer")
    return_buffers_at_once()
    try:
        _check_names(slides)
        settings = Options(threads=threads, **options)
        if not crf and (crf_params is not None or crf_uncertain is not None):
            raise HistoError("--crf-params and --crf-uncertain are of --crf: add it")
        bundle = bundle or default_bundle()
        if crf:
            settings = replace(settings, crf=_crf(bundle, crf_params or "", crf_uncertain))
            # Read when numba is imported, which is at the first cell.
            os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning starves busy machines
            if threads is not None:
                os.environ.setdefault("NUMBA_NUM_THREADS", str(threads))
        chosen: list[str] = []
        engine = _open(
            bundle, devices, chosen.append,
            backend=backend, precision=precision, threads=threads,
        )  # fmt: skip
    except HistoError as error:
        _fail(str(error))
        sys.exit(1)
    card = engine.card
    console.print(
        f"model: {card.method} ({', '.join(c.name for c in card.classes)}) at {card.mpp:g} um/px; "
        f"{''.join(chosen) or engine.name}",
        highlight=False,
        soft_wrap=True,  # one line, however narrow the terminal
    )
    try:
        if isinstance(engine, Fleet) and 1 < engine.devices <= len(slides):
            failed = _share(slides, engine, out, settings)
        else:
            failed = sum(not _run(slide, engine, out, settings) for slide in slides)
    except KeyboardInterrupt:
        _fail("stopped; nothing half-written is left")
        sys.exit(130)
    finally:
        engine.close()
    if failed and len(slides) > 1:
        _fail(f"{failed} of {len(slides)} slides failed")
    sys.exit(1 if failed else 0)


def _crf(bundle: Path, params: str, uncertain: float | None) -> CrfOptions:
    """Read how the CRF is to be run, before anything is opened.

    Raises
    ------
    CardError, CrfError
        If there is no card, a parameter cannot be, or numba is not installed.
    """
    if importlib.util.find_spec("numba") is None:
        raise CrfError("--crf needs numba: pip install 'histostream[crf]'")
    card = read_card(bundle)
    return CrfOptions(read_params(params, card.crf, mpp=card.mpp), uncertain)


def _open(
    bundle: Path, devices: str | None, say: Callable[[str], None], **how: Any
) -> Engine | Fleet:
    if devices is None:
        return open_engine(bundle, say=say, **how)
    return Fleet(bundle, tuple(d.strip() for d in devices.split(",") if d.strip()), **how)


def _share(slides: tuple[Path, ...], fleet: Fleet, out: Path, options: Options) -> int:
    """Segment slides on several devices, a slide on each; returns how many failed."""
    failed = 0
    for slide, result in fleet.segment_slides(slides, out, options):
        if isinstance(result, HistoError):
            failed += 1
            _fail_slide(slide, result)
        else:
            _tell(slide, result)
    return failed


def _run(slide: Path, engine: Engine | Fleet, out: Path, options: Options) -> bool:
    """Segment one slide and say how it went."""
    try:
        with _progress(slide.name) as report:
            result = segment_slide(slide, engine, out, options, report=report)
    except MemoryError:
        _fail(f"{slide}: out of memory; pass --max-memory MIB, or a smaller --batch")
        return False
    except HistoError as error:
        _fail_slide(slide, error)
        return False
    _tell(slide, result)
    return True


def _fail_slide(slide: Path, error: HistoError) -> None:
    text = str(error)
    _fail(text if slide.name in text else f"{slide}: {text}")


def _tell(slide: Path, result: SlideResult) -> None:
    run = result.run
    areas = ", ".join(
        f"{c['name']} {c['area_mm2']:.3g} mm2 ({100 * (c['share'] or 0):.1f} %)"
        for c in result.summary["classes"]
    )
    click.echo(
        f"{slide.name}: {areas}; {run['mpx']:.1f} Mpx in {run['seconds']['total']:.1f} s "
        f"({run['mpx_per_s']:.2f} Mpx/s) -> {result.folder}"
    )


class _progress:
    """A progress bar with Mpx/s and time left; silent where nobody watches."""

    def __init__(self, name: str) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=None, rate="")
        self._start: float | None = None

    def __enter__(self) -> Callable[[int, int], None]:
        self._bar.start()
        return self._report

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _report(self, done: int, total: int) -> None:
        now = time.perf_counter()
        self._start = self._start or now
        rate = done / 1e6 / (now - self._start) if now > self._start else 0.0
        text = f"{rate:.2f} Mpx/s" if rate else ""
        self._bar.update(self._task, completed=done, total=total, rate=text)


def _check_names(slides: tuple[Path, ...]) -> None:
    """Refuse two slides whose results would overwrite each other."""
    seen: dict[str, Path] = {}
    for slide in slides:
        stem = os.path.normcase(slide_stem(slide))
        if stem in seen:
            raise HistoError(
                f"{seen[stem]} and {slide} would both write to {stem}/: "
                "run them with different --out folders"
            )
        seen[stem] = slide


def _fail(message: str) -> None:
    fail("histo-infer", message)


if __name__ == "__main__":
    main()
