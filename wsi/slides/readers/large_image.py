"""Reader for every other format, through large-image and its sources."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histostream.wsi.errors import DamagedError, HistoError, SlideError, no_longer_readable, reason
from histostream.wsi.slides.bands import ALL_TRANSPARENT, WHITE_IS_ZERO, Bands, color_bands
from histostream.wsi.slides.dicom_series import is_dicom, missing_frames, series_files
from histostream.wsi.slides.image_header import check_plain_image
from histostream.wsi.slides.pixel_size import (
    PixelSize,
    dicom_pixel_size,
    image_pixel_size,
    tiff_pixel_size,
)
from histostream.wsi.slides.reader import WHITE, BlockReader, DeclinedError, Level
from histostream.wsi.slides.tiff_check import check_tiff, is_tiff
from histostream.wsi.slides.tiff_images import TiffImage, choose_image, find_images, missing_tiles
from histostream.wsi.slides.vendor import refuse_scanner_marks, scanner_format

ORDER = 100  # after the fast readers, since it opens everything
SUFFIXES: tuple[str, ...] = ()  # folders are searched for the files of the other readers, and for DICOM

MAX_PLAIN_IMAGE_PX = 65_535  # side of a PNG or JPEG, which is decoded as a whole: JPEG's own limit
# By number of bands, where the file itself does not say what they are: alpha as Pillow and OpenSlide return it.
BANDS = {1: Bands(1, 1), 2: Bands(1, 2, alpha=1), 3: Bands(3, 3), 4: Bands(3, 4, alpha=3)}
TRIED_BLOCKS = 3  # blocks that are decoded when a slide is opened, to see whether any can be
# Compressions that are decoded here: if blocks of them are not, the file is damaged. Of TIFF: none, old and
# new JPEG, LZW, deflate, PackBits, JPEG 2000 in four tags. Of DICOM: none, JPEG, JPEG 2000, RLE.
DECODED_TIFF = frozenset({1, 5, 6, 7, 8, 32773, 32946, 33003, 33004, 33005, 34712})
DECODED_DICOM = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51",
                 "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91", "1.2.840.10008.1.2.5")  # fmt: skip


class LargeImageReader(BlockReader):
    """A large-image tile source; see `SlideReader`.

    Pixels are always read in the source's own blocks: if a level's downsample is not a whole number,
    OpenSlide shifts a region by a fraction of a pixel that depends on where the region begins.
    """

    name = "large_image"

    def __init__(self, path: Path, source: Any, facts: _Facts) -> None:
        self._zs, levels = _levels(source, facts.widths)
        block_px = ((int(source.tileWidth), int(source.tileHeight)),) * len(levels)
        self._bands, self._inverted = facts.bands, facts.inverted
        super().__init__(path, levels, block_px, facts.pixel_size, self._bands.colors)
        self.notes = facts.notes
        self.missing = tuple(self._missing(level, facts.missing) for level in range(len(levels)))
        self._source = source
        self._reopening = threading.Lock()
        self._try_blocks(facts.compression)

    def _missing(self, level: int, known: list[NDArray[np.bool_]]) -> NDArray[np.bool_] | None:
        """Return which blocks of a level the file does not hold, if it says so of blocks of this size."""
        (width, height), size = self.block_px[level], self.levels[level]
        shape = -(-size.height // height), -(-size.width // width)
        return next((missing for missing in known if missing.shape == shape), None)

    def _try_blocks(self, compression: str) -> None:
        """Decode a few blocks; raise SlideError if none can be, and the compression is none that is decoded here."""
        if not compression:
            return
        (width, height), size = self.block_px[0], self.levels[0]
        rows, columns = -(-size.height // height), -(-size.width // width)
        stored = np.ones((rows, columns), np.bool_) if self.missing[0] is None else ~self.missing[0]
        places = np.argwhere(stored)
        for row, column in places[np.linspace(0, len(places) - 1, min(TRIED_BLOCKS, len(places))).astype(int)].tolist():
            try:
                self._block(0, row, column)
            except DamagedError as error:
                problem = reason(error.__cause__ or error)
            else:
                return
        if len(places):
            raise SlideError(
                f"{self.path}: its compression, {compression}, cannot be decoded here ({problem}); "
                "convert it to JPEG or deflate"
            )

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
        block = np.asarray(source.getTile(column, row, self._zs[level], numpyAllowed="always", applyStyle=False))
        block = block[..., None] if block.ndim == 2 else block
        if block.shape[2] == self._bands.count:
            block = self._bands.color_of(block)
        if self._inverted:
            block = WHITE - block
        return self._check(block, level, row, column)

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
        RGB or grey image, or cannot be decoded.
    """
    check_tiff(path)  # OpenSlide and libtiff open such files and fail in the middle
    if path.is_file() and (vendor := scanner_format(path)):  # never as a plain TIFF
        raise DeclinedError(f"its layout is that of {vendor}")
    import large_image

    try:
        source = open_source(path)
        return LargeImageReader(path, source, _facts(path, source))
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
        If it is a folder without one DICOM series, or a plain image whose header cannot be true.
    """
    import large_image
    from cachetools import LRUCache

    # The limit for plain images; the default refuses images above 4096 px.
    large_image.config.setConfig("max_small_image_size", MAX_PLAIN_IMAGE_PX)
    if path.is_dir() or is_dicom(path):
        import large_image_source_dicom

        source = large_image_source_dicom.open([str(file) for file in series_files(path)], noCache=True)
    else:
        check_plain_image(path)
        source = large_image.open(str(path), noCache=True)
    # Nothing is read twice, and the default cache keeps up to 512 tiles for the whole process.
    source.cache, source.cache_lock = LRUCache(maxsize=cached_tiles), threading.Lock()
    return source


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the file says of itself, whichever source decodes it.

    Attributes
    ----------
    bands, pixel_size
        Meaning of its bands, and size of its pixels.
    compression
        Name of its compression, if that is none which is decoded for sure.
    missing
        Blocks that levels do not hold, as `SlideReader.missing`, each of another size.
    notes
        As `SlideReader.notes`.
    inverted
        Whether the source returns grey values of which 0 is white.
    widths
        Widths of the levels of the slide; None: all that the source has.
    """

    bands: Bands
    pixel_size: PixelSize | None
    compression: str = ""
    missing: list[NDArray[np.bool_]] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    inverted: bool = False
    widths: set[int] | None = None


def _facts(path: Path, source: Any) -> _Facts:
    """Ask a file what it is.

    Raises
    ------
    SlideError
        If it does not hold one 8-bit image of colours with square pixels.
    """
    metadata = source.getMetadata()
    frames, count, dtype = len(metadata.get("frames", ())), metadata["bandCount"], metadata["dtype"]
    if is_tiff(path):
        facts = _tiff_facts(path, source)
    elif source.name == "dicom":
        facts = _dicom_facts(path, source)
    else:
        bands, notes = _plain_bands(path, source, count)
        facts = _Facts(bands, image_pixel_size(path), notes=notes)
    if frames > 1:
        raise SlideError(
            f"{path}: it holds {frames} frames of {count} bands (channels, planes or times); "
            "export one RGB or grey image from it"
        )
    if np.dtype(dtype) != np.uint8:
        raise SlideError(f"{path}: its pixels are {dtype}; convert it to 8 bits per channel")
    return facts


def _tiff_facts(path: Path, source: Any) -> _Facts:
    import tifffile

    with tifffile.TiffFile(path, _multifile=False) as file:
        refuse_scanner_marks(path, file)
        images = find_images(file)
        image, notes = choose_image(images) if images else (TiffImage([file.pages.first]), ())
        base = image.base
        bands, of_bands = color_bands(path, file, base)
        if (source.sizeX, source.sizeY) != (base.imagewidth, base.imagelength):
            raise SlideError(
                f"{path}: it holds several images, of which only the largest could be read; export the one to "
                "analyse to a file of its own"
            )
        if source.name == "openslide":  # it returns alpha, whatever the file has
            bands = replace(BANDS[4], colors=bands.colors) if bands.alpha is not None else BANDS[4]
        known = int(base.compression) in DECODED_TIFF
        missing = [missing_tiles([page]) for page in image.pages if page.is_tiled]
        return _Facts(
            bands,
            tiff_pixel_size(path, file, base),
            "" if known else getattr(base.compression, "name", str(base.compression)),
            [m for m in missing if m is not None],
            (*notes, *of_bands),
            int(base.photometric) == WHITE_IS_ZERO and source.name == "tifffile",  # the others turn them round
            {page.imagewidth for page in image.pages} if images else None,
        )


def _dicom_facts(path: Path, source: Any) -> _Facts:
    pyramids = source._dicom.pyramids
    notes = (f"the series holds {len(pyramids)} pyramids; the first is analysed, not the others",)
    base = pyramids[0][0]  # the finest; files of a series may have any order
    syntax = base.default_instance.image_data.transfer_syntax
    missing = [missing_frames(level) for level in pyramids[0]]
    return _Facts(
        BANDS[int(source.getMetadata()["bandCount"])],
        dicom_pixel_size(path, base.datasets[0].as_dataset()),
        "" if syntax in DECODED_DICOM else syntax.name,
        [m for m in missing if m is not None],
        notes if len(pyramids) > 1 else (),
        widths={level.size.width for level in pyramids[0]},
    )


def _plain_bands(path: Path, source: Any, count: int) -> tuple[Bands, tuple[str, ...]]:
    """Return the meaning of the bands of a PNG or similar image, which is decoded as a whole, and notes."""
    if count not in BANDS:
        raise SlideError(f"{path}: it has {count} bands; export an RGB or grey image from it")
    bands = BANDS[count]
    if bands.alpha is not None and source.levels == 1:
        block = np.asarray(source.getTile(0, 0, 0, numpyAllowed="always", applyStyle=False))
        if not block[..., bands.alpha].any():
            return replace(bands, alpha=None), (ALL_TRANSPARENT,)
    return bands, ()


def _refuse_unreadable(path: Path) -> None:
    """Raise SlideError if a file can no longer be read."""
    try:
        file_path = series_files(path)[0] if path.is_dir() else path
        with file_path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise no_longer_readable(path, error) from error


def _levels(source: Any, widths: set[int] | None) -> tuple[tuple[int, ...], tuple[Level, ...]]:
    """Return large-image's number of each stored level, and the levels, finest first.

    Parameters
    ----------
    source
        The source.
    widths
        Widths of the levels of the slide; None: large-image knows them.
    """
    zs = [z for z, stored in enumerate(source._nonemptyLevelsList()) if stored is not None]
    if widths is not None:
        factors = {round(source.sizeX / width) for width in widths}
        zs = [z for z in zs if 2 ** (source.levels - 1 - z) in factors]
    levels = []
    for z in reversed(zs):
        downsample = 2 ** (source.levels - 1 - z)
        # Rounded down: some formats round up, but then the last pixel is partly padding.
        width, height = source.sizeX // downsample, source.sizeY // downsample
        levels.append((z, Level(max(width, 1), max(height, 1), float(downsample))))
    return tuple(z for z, _ in levels), tuple(level for _, level in levels)
