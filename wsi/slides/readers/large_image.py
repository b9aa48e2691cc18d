"""Reader for every other format, through large-image and its sources."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.errors import HistoError, SlideError, reason
from histostream.wsi.geometry import Box
from histostream.wsi.slides.channels import refuse_channels
from histostream.wsi.slides.image_header import check_plain_image
from histostream.wsi.slides.reader import BlockReader, DeclinedError, Level, square_mpp
from histostream.wsi.slides.tiff_check import check_tiff

ORDER = 100  # after the fast readers, since it opens everything
SUFFIXES = (".ndpi", ".scn", ".mrxs", ".bif", ".svslide", ".vms", ".vmu", ".czi")

MAX_PLAIN_IMAGE_PX = 65_535  # side of a PNG or JPEG, which is decoded as a whole: JPEG's own limit
CHANNELS = {1: 1, 2: 1, 3: 3, 4: 3}  # bands -> channels: an even number of bands ends with alpha


class LargeImageReader(BlockReader):
    """A large-image tile source; see `SlideReader`.

    Pixels are always read in the source's own blocks: if a level's downsample is not a whole number,
    OpenSlide shifts a region by a fraction of a pixel that depends on where the region begins.
    """

    name = "large_image"

    def __init__(self, path: Path, source: Any) -> None:
        metadata = source.getMetadata()
        self._zs, levels = _levels(source)
        block_px = ((int(source.tileWidth), int(source.tileHeight)),) * len(levels)
        mm = (metadata.get("mm_x"), metadata.get("mm_y"))
        mpp = square_mpp(path, *(1000 * side if side else None for side in mm))
        super().__init__(path, levels, block_px, mpp, CHANNELS[metadata["bandCount"]])
        bounds = getattr(source, "_bounds", None)  # of the OpenSlide source, which crops to them
        self.bounds = Box(**bounds) if bounds else None
        self._source = source
        self._reopening = threading.Lock()

    def _decode(self, level: int, row: int, column: int) -> NDArray[np.uint8]:
        try:
            return self._tile(self._source, level, row, column)
        except MemoryError:  # not a fault of the file
            raise
        except Exception:  # the sources' errors have no common base class
            # After a damaged block OpenSlide refuses all other blocks too, in every thread that shares
            # the handle, until large-image has opened the file again.
            with self._reopening:
                _refuse_unreadable(self.path)
                return self._tile(open_source(self.path), level, row, column)

    def _tile(self, source: Any, level: int, row: int, column: int) -> NDArray[np.uint8]:
        # Without style, since large-image would apply ICC profiles.
        block = source.getTile(column, row, self._zs[level], numpyAllowed="always", applyStyle=False)
        return self._check(without_alpha(np.asarray(block)), level, row, column)

    def close(self) -> None:
        """Release the file; large-image closes it when nothing refers to it."""
        image = getattr(self._source, "_pilImage", None)  # but it does not close a PNG or JPEG
        if image is not None:
            image.close()
        self._source = None


def open_reader(path: Path) -> LargeImageReader:
    """Open a file with the source that large-image prefers for it.

    Raises
    ------
    DeclinedError
        If no source of large-image opens it.
    SlideError
        If it is a TIFF that was cut off or claims what cannot be true, or does not hold one 8-bit
        RGB or grey image.
    """
    check_tiff(path)  # OpenSlide and libtiff open such files and fail in the middle
    import large_image

    try:
        refuse_channels(_file_of(path))
        source = open_source(path)
        _refuse_other_than_image(path, source.getMetadata())
        return LargeImageReader(path, source)
    except (HistoError, MemoryError):
        raise
    except Exception as error:  # the sources' errors have no common base class
        message = reason(error).replace(f" for {path}", "")
        if not isinstance(error, large_image.exceptions.TileGeneralError):
            message = f"{type(error).__name__}: {message}"
        raise DeclinedError(message) from error


def open_source(path: Path, cached_tiles: int = 1) -> Any:
    """Open a file with large-image; the source caches ``cached_tiles`` decoded tiles.

    Raises
    ------
    SlideError
        If it is a folder without DICOM, or a plain image whose header cannot be true.
    """
    import large_image
    from cachetools import LRUCache

    # The limit for plain images; the default refuses images above 4096 px.
    large_image.config.setConfig("max_small_image_size", MAX_PLAIN_IMAGE_PX)
    file = _file_of(path)
    check_plain_image(file)
    source = large_image.open(str(file), noCache=True)
    # Nothing is read twice, and the default cache keeps up to 512 tiles for the whole process.
    source.cache, source.cache_lock = LRUCache(maxsize=cached_tiles), threading.Lock()
    return source


def _refuse_unreadable(path: Path) -> None:
    """Raise SlideError if a file can no longer be read."""
    try:
        with _file_of(path).open("rb") as file:
            file.read(1)
    except OSError as error:
        raise SlideError(
            f"{path}: cannot be read any more ({error.strerror or error}); check the drive that it is on"
        ) from error


def _file_of(path: Path) -> Path:
    """Return the path, or one file of the DICOM series in a folder."""
    if path.is_file():
        return path
    files = sorted(path.glob("*.dcm"))
    if not files:
        raise SlideError(f"{path}: a folder without .dcm files; name a slide file")
    return files[0]


def _refuse_other_than_image(path: Path, metadata: dict[str, Any]) -> None:
    frames, bands, dtype = len(metadata.get("frames", ())), metadata["bandCount"], metadata["dtype"]
    if frames > 1 or bands not in CHANNELS:
        raise SlideError(
            f"{path}: it holds {frames or 1} frames of {bands} bands (channels, planes or times); "
            "export one RGB or grey image from it"
        )
    if np.dtype(dtype) != np.uint8:
        raise SlideError(f"{path}: its pixels are {dtype}; convert it to 8 bits per channel")


def _levels(source: Any) -> tuple[tuple[int, ...], tuple[Level, ...]]:
    """Return large-image's number of each stored level, and the levels, finest first."""
    zs = [z for z, stored in enumerate(source._nonemptyLevelsList()) if stored is not None]
    if source.name == "dicom":  # large-image does not know which levels it has
        pyramid = source._dicom.pyramids[0]
        widths = [round(source.sizeX / level.size.width) for level in pyramid]
        zs = [z for z in zs if 2 ** (source.levels - 1 - z) in widths]
    levels = []
    for z in reversed(zs):
        downsample = 2 ** (source.levels - 1 - z)
        # Rounded down: some formats round up, but then the last pixel is partly padding.
        width, height = source.sizeX // downsample, source.sizeY // downsample
        levels.append((z, Level(max(width, 1), max(height, 1), float(downsample))))
    return tuple(z for z, _ in levels), tuple(level for _, level in levels)


def without_alpha(block: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Blend a block (H, W, C) uint8 with white if its last band is alpha."""
    if block.ndim == 2:
        block = block[..., None]
    if block.shape[2] in (1, 3):
        return block
    colours, alpha = block[..., :-1], block[..., -1:]
    if alpha.min() == 255:
        return colours
    over_white = colours.astype(np.uint16) * alpha + 255 * (255 - alpha.astype(np.uint16))
    return ((over_white + 127) // 255).astype(np.uint8)
