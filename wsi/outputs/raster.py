"""Read labels.tif and probabilities.tif as arrays; only the pixels that are indexed are read."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from histostream.wsi.errors import SlideError
from histostream.wsi.slides.reader import DeclinedError
from histostream.wsi.slides.readers.tiff import TiffReader, open_values

Index = int | np.integer[Any] | slice


class Raster:
    """A pyramid on disk, indexed like a numpy array of its finest level.

    ::

        labels = Raster(Path("out/slide/labels.tif"))
        labels[1000:2000, 3000:4000]   # reads some tiles
        labels[::64, ::64]             # reads the level that holds these pixels
        np.asarray(labels)             # reads everything

    Slices go forwards. Several threads may read at once.

    Parameters
    ----------
    path
        A file that HistoStream wrote.

    Attributes
    ----------
    path
        The file.
    levels
        Height and width of each level, finest first; sides are halved and rounded up.
    mpp
        Micrometres per pixel of the finest level; None if the file does not store it.
    dtype
        uint8 for labels, and uint16 for scores; uint8 for scores of versions before 0.2.

    Raises
    ------
    SlideError
        If it is not such a file, or damaged.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise SlideError(f"{path}: there is no such file; check its name")
        try:
            self._reader: TiffReader = open_values(path)
        except DeclinedError as error:
            raise SlideError(f"{path}: no label map or scores ({error}); give a file that histo-infer wrote") from error
        except OSError as error:
            raise SlideError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
        # In notebooks results are dropped without closing them.
        self._close = weakref.finalize(self, self._reader.close)
        self.path, self.mpp, self.dtype = path, self._reader.mpp, np.dtype(self._reader.dtype)
        self.levels = tuple((level.height, level.width) for level in self._reader.levels)
        # Reduced labels are every second pixel, reduced scores an average.
        self._exact = self._reader.channels == 1

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W) of labels, (H, W, K) of scores."""
        channels = self._reader.channels
        return self.levels[0] if channels == 1 else (*self.levels[0], channels)

    @property
    def ndim(self) -> int:
        """2 for labels, 3 for scores."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.shape))
        return f"<{self.path.name}: {size} {self.dtype}, {len(self.levels)} levels>"

    def __getitem__(self, index: Index | tuple[Index, ...]) -> NDArray[Any]:
        """Read pixels, ``raster[rows, columns]`` or ``raster[rows, columns, classes]``.

        Raises
        ------
        IndexError
            If the index lies outside of the array, or a slice goes backwards.
        SlideError
            If a tile cannot be decoded.
        """
        indices = index if isinstance(index, tuple) else (index,)
        if len(indices) > self.ndim:
            raise IndexError(f"{len(indices)} indices: this has {self.ndim} axes")
        rows, columns = (
            _span(indices[axis] if axis < len(indices) else slice(None), self.shape[axis]) for axis in (0, 1)
        )
        level = self._level(rows, columns)
        rows, columns = (range(r.start >> level, -(-r.stop >> level), max(r.step >> level, 1)) for r in (rows, columns))
        pixels = self.read(level, columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)
        selected = pixels[:: rows.step, :: columns.step]
        scalars = tuple(
            0 if axis < len(indices) and not isinstance(indices[axis], slice) else slice(None) for axis in (0, 1)
        )
        cut: NDArray[Any] = selected[(*scalars, *indices[2:])]
        return cut

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("the pixels are on disk: reading them makes a copy")
        return self[:].astype(dtype or self.dtype, copy=False)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[Any]:
        """Read a box of one level, in pixels of that level.

        Returns
        -------
        (H, W) labels or (H, W, K) scores, of size 0 if the box is empty.

        Raises
        ------
        SlideError
            If a tile cannot be decoded.
        ValueError
            If the box does not lie inside the level.
        """
        if not width or not height:
            return np.empty((height, width, *self.shape[2:]), self.dtype)
        pixels = self._reader.read(level, x, y, width, height)
        return pixels[..., 0] if self.ndim == 2 else pixels

    def close(self) -> None:
        """Close the file; it can no longer be read."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _level(self, rows: range, columns: range) -> int:
        """Return the coarsest level that holds all the pixels of an index."""
        level = 0
        while self._exact and level + 1 < len(self.levels):
            step = 2 << level
            if any(number % step for r in (rows, columns) for number in (r.start, r.step)):
                break
            level += 1
        return level


def _span(index: Index, size: int) -> range:
    """Return the positions that an index selects on an axis; a number is a range of one.

    Raises
    ------
    IndexError
        If it lies outside of the axis, or goes backwards.
    """
    if isinstance(index, slice):
        start, stop, step = index.indices(size)
        if step < 1:
            raise IndexError(f"step {step}: read forwards and turn the result round")
        return range(start, max(start, stop), step)
    position = int(index)
    if not -size <= position < size:
        raise IndexError(f"index {position} lies outside of an axis of {size}")
    position %= size
    return range(position, position + 1)
