"""Where the slide of a result is by now, if it is still the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from histostream.wsi.errors import SlideError
from histostream.wsi.slides.staging import SlideVersion, is_plain, is_remote, sha256_of, version_of


@dataclass(frozen=True, slots=True)
class SlidePlace:
    """Where a run says that its slide is.

    Attributes
    ----------
    source
        Path or URL; empty if it does not say.
    version
        Size and time that it had.
    sha256
        Of its content; empty while the run is not finished.
    """

    source: str
    version: SlideVersion
    sha256: str

    @property
    def name(self) -> str:
        """The file's name; empty if it is not a plain one."""
        # The run may have been made on another system.
        name = PureWindowsPath(PurePosixPath(self.source).name).name
        return name if is_plain(name) else ""

    def find(self, folder: Path | None = None) -> Path:
        """Return the slide: where it was, or in ``folder``, under its name.

        Raises
        ------
        SlideError
            If it is in neither place as it was then; the message is for people.
        """
        said = []
        if self.source and not is_remote(self.source):
            path = Path(self.source)
            said.append(self._differs(path))
            if not said[-1]:
                return path
        if folder is not None and self.name:
            path = folder / self.name
            said.append(self._differs(path, by_content=True))
            if not said[-1]:
                return path
        if not said:
            where = f"is at {self.source}" if self.source else "is not recorded"
            said.append(f"the slide {where}")
        raise SlideError(f"{'; '.join(said)}; name the folder that it is in (--slides DIR)")

    def _differs(self, path: Path, *, by_content: bool = False) -> str:
        """Say in what a file is not the slide; nothing if it is."""
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
