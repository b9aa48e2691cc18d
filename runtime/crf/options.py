"""Options of the dense CRF on a slide, from ``histo-infer --crf`` and the model card."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from histostream.runtime.crf.params import CrfError, CrfParams
from histostream.runtime.process_memory import MIB, MemoryLimitError, physical_bytes
from histostream.wsi.outputs.memory_needs import MemoryNeeds

MIN_CELL_PX = 1024
CELL_ALIGN_PX = 512  # column bands begin at multiples of this
# Memory for each pixel of a cell, if every pixel has its own vertex of the lattice: for pixels,
# vertices and neighbours; and for each class: scores, sums and the last result.
BYTES_PER_PX, BYTES_PER_CLASS = 160, 40


@dataclass(frozen=True, slots=True)
class CrfOptions:
    """Options of the CRF on a slide.

    Attributes
    ----------
    params
        Kernels and iterations; thetas in pixels at the resolution of inference.
    uncertain
        Only pixels whose two best scores differ by less than this share of full scale may change,
        and cells without such a pixel are skipped; None: all pixels may change.
    backend
        As in `dense_crf`.
    """

    params: CrfParams = field(default_factory=CrfParams)
    uncertain: float | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.uncertain is not None and not 0 < self.uncertain <= 1:
            raise CrfError(f"--crf-uncertain {self.uncertain}: use more than 0, up to 1")

    @property
    def halo_px(self) -> int:
        """Width of the halo that a cell is computed with."""
        return self.params.halo_px

    @property
    def cell_px(self) -> int:
        """Side of a cell, large enough that the halo is the smaller part of the work."""
        least = max(MIN_CELL_PX, 4 * self.halo_px)
        return -(-least // CELL_ALIGN_PX) * CELL_ALIGN_PX

    def cell_bytes(self, classes: int) -> int:
        """Return the memory that one cell needs."""
        side = self.cell_px + 2 * self.halo_px
        return side * side * (BYTES_PER_PX + classes * BYTES_PER_CLASS)

    def needs(self, classes: int, channels: int, tile_px: int) -> MemoryNeeds:
        """Return the needs for a column band: whole cells, and memory for rows that wait for their halo."""
        rows = self.cell_px + 2 * self.halo_px + tile_px
        return MemoryNeeds(
            align_px=self.cell_px,
            margin_px=self.halo_px,
            # Twice, because rows are copied when more are added.
            bytes_per_column=2 * rows * (channels + 2 * classes + 1),
            bytes_at_once=self.cell_bytes(classes),
        )


def check_memory(options: CrfOptions, classes: int, max_memory_mib: int | None) -> None:
    """Refuse kernels that are so wide that a cell with its halo does not fit into memory.

    Raises
    ------
    MemoryLimitError
        If it does not fit; the message names the widest theta.
    """
    needed = options.cell_bytes(classes)
    room = physical_bytes() if max_memory_mib is None else max_memory_mib * MIB
    if needed > room:
        widest = max(options.params.theta_alpha, options.params.theta_gamma)
        raise MemoryLimitError(
            f"--crf: a theta of {widest:g} px needs a halo of {options.halo_px} px, and so "
            f"{needed / MIB:.0f} MiB of memory; {room / MIB:.0f} MiB are available: use a smaller theta, or "
            "a model of coarser resolution"
        )


LENGTHS = ("theta_alpha", "theta_gamma")  # may be given in um


def read_params(text: str, stored: Mapping[str, Any], *, mpp: float) -> CrfParams:
    """Read parameters such as ``w1=5,theta_alpha=30px,theta_gamma=1.5um``.

    Parameters
    ----------
    text
        Parameters of the command line; may be empty.
    stored
        Parameters of the model's card, for those not in ``text``. The rest are the defaults.
    mpp
        Resolution of inference, um per pixel.

    Raises
    ------
    CrfError
        If a name is unknown, or a value is not a number or out of range.

    Examples
    --------
    >>> read_params("w1=5, theta_alpha=15um", {}, mpp=0.5).theta_alpha  # in pixels
    30.0
    """
    known = [f.name for f in fields(CrfParams)]
    values = asdict(CrfParams())
    for name, value in stored.items():
        if name not in known or isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CrfError(f"card: crf {name}={value!r} is not a parameter; tune the model again")
        values[name] = value
    for setting in filter(None, (word.strip() for word in text.split(","))):
        name, equals, value = (part.strip() for part in setting.partition("="))
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use {', '.join(known)}"
            raise CrfError(f"--crf-params: no parameter {name!r}; {hint}")
        if not equals:
            raise CrfError(f"--crf-params: {setting!r}: write {name}=VALUE")
        values[name] = _parse_number(name, value, mpp)
    return CrfParams(**values)


def _parse_number(name: str, text: str, mpp: float) -> float:
    number, unit_px = text, 1.0
    for unit, size_px in (("px", 1.0), ("um", 1 / mpp)):
        if text.endswith(unit) and name in LENGTHS:
            number, unit_px = text.removesuffix(unit), size_px
    try:
        value = float(number)
    except ValueError:
        units = ", optionally with px or um" if name in LENGTHS else ""
        raise CrfError(f"--crf-params: {name}={text!r}: give a number{units}") from None
    return int(value) if name == "n_iter" and value.is_integer() else value * unit_px
