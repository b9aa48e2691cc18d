"""How much memory an output or a further stage takes, beside the network and the blending."""

from __future__ import annotations

from dataclasses import dataclass

BAND_ALIGN_PX = 512  # column bands begin at multiples of the tiles of the output files


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """Memory and alignment that something needs of a column band.

    Attributes
    ----------
    align_px
        Bands begin at multiples of this, which is a multiple of `BAND_ALIGN_PX`.
    margin_px
        Columns that are read beyond each edge of a band.
    bytes_per_column
        Memory for each column of pixels of a band.
    bytes_at_once
        Memory that does not depend on the width of a band.
    """

    align_px: int = BAND_ALIGN_PX
    margin_px: int = 0
    bytes_per_column: int = 0
    bytes_at_once: int = 0

    def __add__(self, other: MemoryNeeds) -> MemoryNeeds:
        return MemoryNeeds(
            max(self.align_px, other.align_px),
            max(self.margin_px, other.margin_px),
            self.bytes_per_column + other.bytes_per_column,
            self.bytes_at_once + other.bytes_at_once,
        )
