"""``histo-infer``: slides in, label maps out."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from histostream.runtime.blend import WINDOWS
from histostream.runtime.card import PRECISIONS, default_bundle, read_card
from histostream.runtime.cohort import (
    AT_ONCE,
    DAMAGED,
    DONE,
    ELSEWHERE,
    FAILED,
    NOT_BEGUN,
    STOPPED,
    UNCHANGED,
    Crew,
    LocalCrew,
    Outcome,
    Report,
    Task,
    run_cohort,
)
from histostream.runtime.crf.options import CrfOptions, read_params
from histostream.runtime.crf.params import CrfError
from histostream.runtime.engine import BACKENDS, BF16, open_engine
from histostream.runtime.fleet import Fleet
from histostream.runtime.inputs import SlideInput, find_inputs
from histostream.runtime.memory import return_buffers_at_once
from histostream.runtime.options import Options
from histostream.wsi.console import fail, memory_mib, show_only_our_warnings
from histostream.wsi.errors import HistoError, printable
from histostream.wsi.optional import require
from histostream.wsi.sinks import rasters as raster_files
from histostream.wsi.sinks.objects import ANNOTATIONS, check_installed
from histostream.wsi.staging import shown

console = Console(stderr=True)


class _OrView(click.Command):
    """``histo-infer``; ``histo-infer view`` is another command, a slide of that name ``./view``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args[:1] == ["view"]:
            from histostream.runtime.viewer.command import view

            view.main(args[1:], prog_name="histo-infer view")
        return super().parse_args(ctx, args)


@click.command(cls=_OrView, context_settings={"show_default": True})
@click.version_option(package_name="histostream")
@click.argument("slides", nargs=-1, required=True)
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
    "--max-memory", "max_memory_mib", type=memory_mib, metavar="1GiB",
    help="Bound on memory, plain numbers are MiB; wide slides are run in column bands.",
)  # fmt: skip
@click.option("--probabilities", is_flag=True, help="Write probabilities.tif too.")
@click.option(
    "--rasters", default="", metavar="ome-tiff,ome-tiff-rgb,ome-zarr,dicom-seg",
    help="Write the label map as OME-TIFF (rgb: its colours, for QuPath), OME-Zarr or DICOM too.",
)  # fmt: skip
@click.option("--geojson", is_flag=True, help="Write objects.geojson.gz, outlines for QuPath.")
@click.option(
    "--annotations", type=click.Choice(tuple(ANNOTATIONS)), multiple=True,
    help="Write outlines: dsa is annotations.json, qupath the same as --geojson.",
)  # fmt: skip
@click.option(
    "--objects", default="", metavar="csv,parquet",
    help="Write a table of objects: area, perimeter, eccentricity.",
)  # fmt: skip
@click.option(
    "--min-area", "min_area_um2", default=0.0, metavar="UM2", help="Leave smaller objects out."
)
@click.option(
    "--simplify", "simplify_um", default=0.0, metavar="UM",
    help="How far outlines may deviate, to have fewer points; 0 follows the pixels.",
)  # fmt: skip
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
@click.option(
    "--strict", is_flag=True, help="Stop a slide at a damaged block; default: leave it out."
)
@click.option(
    "--restart", is_flag=True, help="Do slides again that are done or were begun; default: go on."
)
@click.option(
    "--stage", type=click.Path(path_type=Path), metavar="DIR",
    help="Copy each slide to this fast local folder first, while the one before it is run.",
)  # fmt: skip
@click.option(
    "--ray", "cluster", metavar="ADDRESS|local",
    help="Run on a Ray cluster, an engine for each GPU; paths must be the same on all hosts.",
)  # fmt: skip
@click.option("--workers", type=int, help="Engines on the cluster; default: as many as fit.")
def main(
    slides: tuple[str, ...],
    bundle: Path | None,
    out: Path,
    backend: str,
    precision: str,
    devices: str | None,
    threads: int | None,
    geojson: bool,
    annotations: tuple[str, ...],
    objects: str,
    rasters: str,
    crf: bool,
    crf_params: str | None,
    crf_uncertain: float | None,
    restart: bool,
    stage: Path | None,
    cluster: str | None,
    workers: int | None,
    **options: Any,
) -> None:
    """Segment whole slides; results go to OUT/<slide name>/.

    SLIDES are files, folders, patterns in quotes, URLs (s3://, gs://, https://), and .csv files
    with the columns path, and maybe mpp, roi and name.

    The same command again goes on where it was stopped, and leaves out what is done. A slide that
    fails does not stop the others; OUT/cohort.csv says how each went. Exit status: 0 all done, 1
    some failed, 3 some have damaged places, 130 stopped.

    histo-infer view OUT shows results in a browser, also while they are being written; see
    histo-infer view --help.
    """
    show_only_our_warnings("histo-infer")
    return_buffers_at_once()
    try:
        inputs = find_inputs(slides)
        settings = Options(
            threads=threads,
            annotations=(("qupath",) if geojson else ()) + annotations,
            objects=_names(objects),
            rasters=_names(rasters),
            **options,
        )
        check_installed(settings.objects, settings.simplify_um)
        raster_files.check_installed(settings.rasters)
        if not crf and (crf_params is not None or crf_uncertain is not None):
            raise HistoError("--crf-params and --crf-uncertain are of --crf: add it")
        bundle = bundle or default_bundle()
        if crf:
            settings = replace(settings, crf=_crf(bundle, crf_params or "", crf_uncertain))
            # Read when numba is imported, which is at the first cell.
            os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning starves busy machines
            if threads is not None:
                os.environ.setdefault("NUMBA_NUM_THREADS", str(threads))
        asked = {"backend": backend, "precision": precision}
        tasks = [
            Task(slide, out, _of_slide(settings, slide), asked, stage, restart) for slide in inputs
        ]
        chosen: list[str] = []
        crew = _crew(
            bundle, devices, cluster, workers, len(tasks), settings, chosen.append,
            backend=backend, precision=precision, threads=threads,
        )  # fmt: skip
    except HistoError as error:
        _fail(str(error))
        sys.exit(1)
    card = crew.card
    console.print(
        f"model: {card.method} ({', '.join(c.name for c in card.classes)}) at {card.mpp:g} um/px; "
        f"{''.join(chosen) or crew.name}",
        highlight=False,
        markup=False,  # names of classes may have brackets
        emoji=False,
        soft_wrap=True,  # one line, however narrow the terminal
    )
    with _stopped_by_signals() as stop:
        try:
            counts, damaged = _run(tasks, crew, out if len(tasks) > 1 else None, stop.asked)
        except HistoError as error:
            _fail(str(error))
            sys.exit(1)
        finally:
            crew.close()
    if len(tasks) > 1:
        _sum_up(counts, out)
    if stop.signal is not None:
        _fail("stopped; what is finished is kept, and the same command goes on from there")
        sys.exit(128 + stop.signal)
    sys.exit(1 if counts[FAILED] else 3 if damaged else 0)


def _names(listed: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in listed.split(",") if name.strip())


def _of_slide(settings: Options, slide: SlideInput) -> Options:
    """Return the options of one slide: what a .csv says of it goes first."""
    mpp = settings.mpp if slide.mpp is None else slide.mpp
    roi = settings.roi if slide.roi is None else Path(slide.roi)
    return replace(settings, mpp=mpp, roi=roi)


def _crf(bundle: Path, params: str, uncertain: float | None) -> CrfOptions:
    """Read how the CRF is to be run, before anything is opened.

    Raises
    ------
    CardError, CrfError
        If there is no card, a parameter cannot be, or numba is not installed.
    """
    require("numba", "--crf needs", "crf", CrfError)
    card = read_card(bundle)
    return CrfOptions(read_params(params, card.crf, mpp=card.mpp), uncertain)


def _crew(
    bundle: Path,
    devices: str | None,
    cluster: str | None,
    workers: int | None,
    slides: int,
    settings: Options,
    say: Callable[[str], None],
    **how: Any,
) -> Crew:
    """Open what the slides are run on.

    Raises
    ------
    CardError, EngineError, OptionError
        If it cannot be opened, or options contradict each other.
    """
    if cluster is None and workers is not None:
        raise HistoError("--workers is of --ray: add it")
    # Two slides at once would take twice the memory that is allowed.
    at_once = AT_ONCE if settings.max_memory_mib is None else 1
    if cluster is not None:
        if devices is not None:
            raise HistoError(
                "--devices and --ray exclude each other: --ray takes all that it has; leave one out"
            )
        from histostream.runtime.ray_crew import RayCrew

        return RayCrew(bundle, cluster, workers=workers, at_once=at_once, **how)
    if devices is None:
        return LocalCrew(lambda: open_engine(bundle, say=say, **how), at_once)
    names = tuple(d.strip() for d in devices.split(",") if d.strip())
    if 1 < len(names) <= slides:
        return Fleet(bundle, names, at_once=at_once, **how)
    return LocalCrew(lambda: Fleet(bundle, names, **how), 1)


def _run(
    tasks: list[Task], crew: Crew, record: Path | None, stopping: Callable[[], bool]
) -> tuple[Counter[str], bool]:
    """Segment the slides and say how each went.

    Returns
    -------
    How often each status was, and whether any slide has damaged places.
    """
    counts: Counter[str] = Counter()
    damaged = False  # now or before
    with _Progress() as progress:
        for i, outcome in run_cohort(
            tasks, crew, report=lambda i: progress.of(tasks[i].slide.name), stopping=stopping,
            record=record,
        ):  # fmt: skip
            progress.end(tasks[i].slide.name)
            counts[outcome.status] += 1
            damaged = damaged or bool(outcome.run and outcome.run.get("damaged"))
            _tell(tasks[i], outcome)
    counts[NOT_BEGUN] = len(tasks) - counts.total()
    return counts, damaged


def _tell(task: Task, outcome: Outcome) -> None:
    """Say what became of a slide, in a line."""
    name = printable(shown(task.slide.source).rstrip("/").rpartition("/")[2])
    run, summary = outcome.run, outcome.summary
    if outcome.status in (DONE, DAMAGED) and run is not None and summary is not None:
        areas = ", ".join(
            f"{c['name']} {c['area_mm2']:.3g} mm2 ({100 * (c['share'] or 0):.1f} %)"
            for c in summary["classes"]
        )
        click.echo(
            f"{name}: {areas}; {run['mpx']:.1f} Mpx in {run['seconds']['total']:.1f} s "
            f"({run['mpx_per_s']:.2f} Mpx/s) -> {task.folder}"
        )
    if outcome.status == UNCHANGED:
        click.echo(f"{name}: {outcome.reason} -> {task.folder}")
    elif outcome.status == FAILED:
        _fail(outcome.reason)
    elif outcome.reason:
        _fail(f"{name}: {outcome.reason}")


def _sum_up(counts: Counter[str], out: Path) -> None:
    total = counts.total()
    if counts[FAILED]:
        _fail(f"{counts[FAILED]} of {total} slides failed")
    said = {
        "done": counts[DONE] + counts[DAMAGED], "unchanged": counts[UNCHANGED],
        "elsewhere": counts[ELSEWHERE], "not finished": counts[STOPPED] + counts[NOT_BEGUN],
        "failed": counts[FAILED],
    }  # fmt: skip
    listed = ", ".join(f"{n} {word}" for word, n in said.items() if n)
    click.echo(f"{total} slides: {listed} -> {out / 'cohort.csv'}")


class _Stop:
    """Whether the user has asked to stop, and by which signal."""

    signal: int | None = None

    def asked(self) -> bool:
        """Whether to stop."""
        return self.signal is not None

    def ask(self, number: int, *_: object) -> None:
        """Take a signal: the first asks to stop, the second ends the process."""
        if self.signal is not None:
            os._exit(128 + number)  # the journal bears it
        self.signal = number
        _fail("finishing the strip in hand; once more stops at once")


@contextmanager
def _stopped_by_signals() -> Iterator[_Stop]:
    """Turn Ctrl-C, and the SIGTERM of a scheduler, into a wish to stop."""
    stop = _Stop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():  # only that one may
        yield stop
        return
    before = {number: signal.signal(number, stop.ask) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Progress:
    """A progress bar for each slide, with Mpx/s and time left; silent where nobody watches."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def of(self, name: str) -> Report:
        """Return what is told how far a slide is; its bar appears with the first word of it."""
        start = before = None

        def report(done: int, total: int) -> None:
            nonlocal start, before
            now = time.perf_counter()
            if start is None or before is None:
                start, before = now, done  # what a former run did does not count for the rate
                self._tasks[name] = self._bar.add_task(name, total=None, rate="")
            rate = (done - before) / 1e6 / (now - start) if now > start else 0.0
            text = f"{rate:.2f} Mpx/s" if rate else ""
            self._bar.update(self._tasks[name], completed=done, total=total, rate=text)

        return report

    def end(self, name: str) -> None:
        """Take the bar of a slide away."""
        if name in self._tasks:
            self._bar.remove_task(self._tasks.pop(name))


def _fail(message: str) -> None:
    fail("histo-infer", message)


if __name__ == "__main__":
    main()
