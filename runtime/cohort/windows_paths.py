"""Windows paths in lists of slides, read on a system with other paths."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

MOUNTS = Path("/mnt")  # where the Windows Subsystem for Linux has drives, as /mnt/c


def is_windows_path(path: str) -> bool:
    r"""Whether a path can only have been written on Windows: it has backslashes, or begins with a drive.

    Examples
    --------
    >>> [is_windows_path(path) for path in (r"C:\slides\a.svs", r"sub\a.svs", "C:/slides/a.svs", "sub/a.svs")]
    [True, True, True, False]
    """
    return os.name != "nt" and ("\\" in path or path[1:3] == ":/")


def find_windows_path(path: str, folder: Path) -> tuple[str, str]:
    r"""Find what a Windows path names on this system.

    The path is taken as it is if a file is called so. Otherwise its parts are looked for: with the
    drive where the Windows Subsystem for Linux has it, then below ``folder``, first the complete path,
    then without its first folders: of ``C:\study\case 1\a.svs`` the files ``study/case 1/a.svs``,
    ``case 1/a.svs`` and ``a.svs``.

    Parameters
    ----------
    path
        A path for which `is_windows_path` is true.
    folder
        The folder of the list, or the current folder.

    Returns
    -------
    The path on this system, or "" if nothing is found; and what was looked for, for a message.
    """
    if os.path.lexists(folder / path):
        return str(folder / path), ""
    tried = list(_places(PureWindowsPath(path), folder))
    found = next((place for place in tried if os.path.lexists(place)), None)
    if found is not None:
        return str(found), ""
    below = [str(place.relative_to(folder)) for place in tried if place.is_relative_to(folder)]
    return "", f"{' nor '.join(below) or path} in {folder.absolute()}"


def _places(path: PureWindowsPath, folder: Path) -> Iterator[Path]:
    parts = [part for part in path.parts if part != path.anchor]
    drive = path.drive
    if len(drive) == 2 and path.root:
        yield MOUNTS.joinpath(drive[0].lower(), *parts)
    elif drive.startswith("\\\\"):  # \\server\share: the share may be mounted beside the list
        parts = [*drive.strip("\\").split("\\")[1:], *parts]
    for first in range(len(parts)):
        if ".." not in parts[first:]:
            yield folder.joinpath(*parts[first:])
