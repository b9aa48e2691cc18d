"""A model that is ready to segment, for notebooks and scripts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from histostream.runtime.bundle.card import ModelCard, default_bundle
from histostream.runtime.choices import AUTO
from histostream.runtime.cohort.inputs import find_inputs
from histostream.runtime.cohort.worker import Worker
from histostream.runtime.engines.base import Engine
from histostream.runtime.engines.opener import open_engine
from histostream.runtime.options import Options
from histostream.runtime.outcome import DAMAGED, DONE, NO_TISSUE, UNCHANGED
from histostream.runtime.pixels import segment_pixels
from histostream.runtime.result import ResultError, SlideResult
from histostream.runtime.slide_job import SlideJob
from histostream.runtime.slide_run import ManyDevices


class Segmenter:
    """A model that is ready to segment slides and images.

    ::

        segmenter = Segmenter.load("bundles/mine")
        result = segmenter.run("slide.svs")
        result.areas, result.labels[:1000, :1000], result.plot()

    It holds the network, and the GPU's memory if there is one, until it is closed. It may also be
    used in a ``with`` block.

    Parameters
    ----------
    open_engine
        Opens the network; called once, in the thread that will run it.
    requested
        Options of the engine, as ``{"backend": "cpu"}``; results of other options are run again.
    """

    def __init__(
        self,
        open_engine: Callable[[], Engine],
        requested: Mapping[str, str] | None = None,
    ) -> None:
        self._worker, self._requested = Worker(open_engine), dict(requested or {})

    @classmethod
    def load(
        cls,
        bundle: str | Path | None = None,
        *,
        backend: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
    ) -> Self:
        """Open a model bundle.

        Parameters
        ----------
        bundle
            Its folder; None: the nucleus model that ships.
        backend, precision, threads
            As of `open_engine`.

        Raises
        ------
        CardError
            If the bundle is missing something or damaged.
        EngineError
            If the backend is not usable on this machine.
        """
        folder = default_bundle() if bundle is None else Path(bundle)
        return cls(
            lambda: open_engine(folder, backend=backend, precision=precision, threads=threads),
            {"backend": backend, "precision": precision},
        )

    @property
    def card(self) -> ModelCard:
        """The model's card."""
        return self._worker.engine.card

    def run(
        self,
        slide: str | Path,
        out: str | Path = "out",
        options: Options | None = None,
        *,
        restart: bool = False,
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> SlideResult:
        """Segment a slide into ``out/<slide's name>/``, as ``histo-infer`` does.

        If that folder has the result of another slide of this name, which still exists, the name of the
        slide's own folder is put before it.

        An existing result of the same slide, model and options is returned at once; an interrupted
        run is continued.

        Parameters
        ----------
        slide
            A file, the folder of a DICOM series, or the URL of a slide.
        out
            Folder for results.
        options
            How to run; see `Options`.
        restart
            Whether the slide is run again in any case.
        report
            Called in another thread with the number of pixels that are done, and of all pixels, at the
            model's resolution.

        Raises
        ------
        ResultError
            If the slide cannot be segmented; the message says why.
        InputError
            If a folder or pattern cannot be used.
        """
        slides = find_inputs([str(slide)], Path(out))
        if len(slides) != 1:
            raise ResultError(f"{slide}: these are {len(slides)} slides; run them one by one")
        job = SlideJob(slides[0], Path(out), options or Options(), self._requested, restart=restart)
        stop = threading.Event()
        with ThreadPoolExecutor(1, thread_name_prefix="slide") as pool:
            running = pool.submit(self._worker.segment, job, report, stop.is_set)
            try:
                outcome = running.result()
            finally:
                stop.set()  # after Ctrl-C, or a notebook's stop: what is finished is kept
        if outcome.status not in (DONE, DAMAGED, NO_TISSUE, UNCHANGED):
            raise ResultError(outcome.reason)
        return SlideResult.read(job.folder)

    def segment(self, pixels: NDArray[np.uint8], *, blend: str = AUTO) -> NDArray[np.uint8]:
        """Segment an image that is in memory, at the model's resolution.

        Parameters
        ----------
        pixels
            (H, W, C) uint8, of ``card.mpp`` um a pixel.
        blend
            As in `Options`.

        Returns
        -------
        (H, W) uint8, the class of each pixel.

        Raises
        ------
        BlendError
            If the blending does not fit the model.
        """
        engine = self._worker.engine
        assert not isinstance(engine, ManyDevices)
        return self._worker.on_device(lambda: segment_pixels(pixels, engine, blend=blend))

    def close(self) -> None:
        """Free the device and its memory."""
        self._worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        card = self.card
        names = ", ".join(entry.name for entry in card.classes)
        return f"<Segmenter: {card.method} ({names}) at {card.mpp:g} um/px, {self._worker.engine.name}>"
