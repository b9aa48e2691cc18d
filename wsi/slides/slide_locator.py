"""Find the slide that a result was made from, and check that it has not changed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from histostream.wsi.errors import SlideError
from histostream.wsi.slides.sources.base import is_plain_name, is_remote
from histostream.wsi.slides.staging import SlideVersion, sha256_of, version_of


@dataclass(frozen=True, slots=True)
class SlideLocator:
    """Path and version of a slide, as a run recorded them.

    Attributes
    ----------
    source
        Path or URL; empty if none was recorded.
    version
        Size and time of the slide when it was read.
    sha256
        SHA-256 of its content; empty while the run is not finished.
    """

    source: str
    version: SlideVersion
    sha256: str

    @property
    def name(self) -> str:
        """Name of the slide's file; empty if it is not a plain one."""
        # The run may have been made on another system.
        name = PureWindowsPath(PurePosixPath(self.source).name).name
        return name if is_plain_name(name) else ""

    def find(self, folder: Path | None = None) -> Path:
        """Return the slide's path: its recorded one, or its name in ``folder``.

        Raises
        ------
        SlideError
            If it is in neither place, or has changed since.
        """
        problems = []
        if self.source and not is_remote(self.source):
            path = Path(self.source)
            problems.append(self._difference(path))
            if not problems[-1]:
                return path
        if folder is not None and self.name:
            path = folder / self.name
            problems.append(self._difference(path, by_content=True))
            if not problems[-1]:
                return path
        if not problems:
            where = f"is at {self.source}" if self.source else "is not recorded"
            problems.append(f"the slide {where}")
        raise SlideError(f"{'; '.join(problems)}; name the folder that it is in (--slides DIR)")

    def _difference(self, path: Path, *, by_content: bool = False) -> str:
        """Return how a file differs from the recorded slide; "" if it does not."""
        try:
            if not (path.is_file() or path.is_dir()):
                return f"{path} is not there"
            version = version_of(str(path))
            if version.bytes != self.version.bytes:
                return f"{path} has another size than the slide had"
            if version == self.version:
                return ""
            if by_content and self.sha256 and sha256_of(path) == self.sha256:  # copied, or remote
                return ""
        except OSError:
            return f"{path} cannot be read"
        return f"{path} was changed since"
