"""A slide to segment: where it is, where its results go, and how it is run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from histostream.runtime.bundle.card import ModelCard
from histostream.runtime.options import Options
from histostream.runtime.record import fingerprint, read_run
from histostream.wsi.outputs.lock import Process
from histostream.wsi.slides.sources.base import file_name, is_remote, redact_url
from histostream.wsi.slides.staging import version_of


@dataclass(frozen=True, slots=True)
class SlideInput:
    """One slide of a cohort.

    Attributes
    ----------
    source
        Local path or URL; that of a remote DICOM series ends with ``/``.
    name
        Name of the folder of its results. Empty where `name_folders` is to find one.
    mpp
        Micrometres per pixel of level 0; None: as the file says.
    roi
        Path of a GeoJSON file with the regions to analyse.
    further
        Other columns of the list that names the slide.
    note
        What a user should know about the name or the path; empty if they are as given.
    problem
        Why the slide cannot be run at all; empty if it can be tried.
    mask
        Path of an image or GeoJSON file of what is to be analysed.
    """

    source: str
    name: str
    mpp: float | None = None
    roi: str | None = None
    further: Mapping[str, str] = field(default_factory=dict, hash=False)
    note: str = ""
    problem: str = ""
    mask: str | None = None


@dataclass(frozen=True, slots=True)
class SlideJob:
    """One slide to segment.

    Attributes
    ----------
    slide
        Where the slide is, and the name of its results.
    out
        Folder for results; the slide's own folder is made in it.
    options
        How to run.
    requested
        Requests beside ``options``, as ``{"precision": "auto"}``; another request is another result.
    stage
        Folder that the slide is copied to first; None: a local slide is read where it is.
    restart
        Whether results and interrupted runs of before are forgotten.
    skip_done
        Whether nothing is done where the folder holds the result of the same inputs.
    dead_processes
        Processes that are known to have ended, and may have been at work on the slide.
    """

    slide: SlideInput
    out: Path
    options: Options = field(default_factory=Options)
    requested: Mapping[str, str] = field(default_factory=dict)
    stage: Path | None = None
    restart: bool = False
    skip_done: bool = True
    dead_processes: tuple[Process, ...] = ()

    @property
    def folder(self) -> Path:
        """The slide's output folder."""
        return self.out / self.slide.name

    @property
    def source(self) -> str:
        """Where the slide is, for messages and tables: as named, without the signature of a URL."""
        return redact_url(self.slide.source)

    @property
    def location(self) -> str:
        """Where the slide is, for records: an absolute path, or a URL without its signature."""
        return absolute_source(self.slide.source)

    def is_done(self, card: ModelCard) -> bool:
        """Whether nothing is to be done: the folder holds the result of the same inputs.

        Raises
        ------
        SlideError
            If there is no such slide.
        """
        if self.restart or not self.skip_done:
            return False
        run = read_run(self.folder)
        return run is not None and run.inputs == fingerprint(
            version_of(self.slide.source), card, self.options, self.requested
        )


def absolute_source(source: str) -> str:
    """Return a slide's absolute path, or its URL without the signature, as records have it."""
    return redact_url(source) if is_remote(source) else os.path.abspath(source)  # noqa: PTH100  (removes .. too)


def stem_of(source: str) -> str:
    """Return the name of a slide's output folder: the file's without suffix, or the folder's.

    Raises
    ------
    SlideError
        If a URL does not end with a file name.
    """
    if is_remote(source):
        name = file_name(source)
        return name if source.endswith("/") else PurePosixPath(name).stem
    path = Path(source)
    is_folder = os.path.isdir(source)  # noqa: PTH112  (Path's raises where a parent is not to be searched)
    if is_folder:
        return path.resolve().name
    return path.name if path.suffix[1:].isdigit() else path.stem  # a DICOM file's name is often a UID, 1.2.840.1
