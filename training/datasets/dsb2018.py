"""2018 Data Science Bowl (BBBC038), stage 1 with corrected masks: nuclei; no pixel size.

``brightfield/`` (stained tissue) and ``fluorescence/``, each with ``images/`` and
``labels_instance/``.
"""

from __future__ import annotations

from pathlib import Path

from histostream.training.data import DataSet
from histostream.training.datasets._files import NUCLEI, check_option, read_object_folder


def read(path: Path, *, kind: str = "brightfield") -> DataSet:
    """Read one kind of image; ``path`` is the folder of both, or that of the kind.

    Raises
    ------
    DataError
        If there is no such kind, or a file is missing or cannot be used.
    """
    check_option("kind", kind, ("brightfield", "fluorescence"))
    folder = path / kind if (path / kind).is_dir() else path
    return DataSet("dsb2018", NUCLEI, None, tuple(read_object_folder(folder)))
