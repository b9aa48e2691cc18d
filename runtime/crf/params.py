"""Parameters of the dense CRF."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from histostream.wsi.errors import HistoError

MAX_PARAMETER = 1_000_000  # of any weight or width
MAX_ITERATIONS = 1000  # labels stop changing after about ten
HALO_THETAS = 5  # halo of a tile, in units of the widest kernel


class CrfError(HistoError, ValueError):
    """The image, scores or parameters cannot be used for a CRF."""


@dataclass(frozen=True, slots=True)
class CrfParams:
    """Weights and widths of the two kernels, equation 13 of paper 001, and the number of iterations.

    The defaults are common ones; the paper has none. ``theta_alpha`` and ``theta_gamma`` depend on
    the resolution: at half the um per pixel they are twice as large.

    Attributes
    ----------
    w1, theta_alpha, theta_beta
        Weight of the appearance kernel, its width in pixels, and in grey levels of 0..255.
    w2, theta_gamma
        Weight of the smoothness kernel, and its width in pixels.
    n_iter
        Mean-field iterations.
    """

    w1: float = 5.0
    theta_alpha: float = 30.0
    theta_beta: float = 10.0
    w2: float = 3.0
    theta_gamma: float = 3.0
    n_iter: int = 5

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if not abs(value) <= MAX_PARAMETER:  # also true for nan
                raise CrfError(f"{name}={value!r} is not a number up to {MAX_PARAMETER}: use a smaller one")
        for name in ("w1", "w2"):
            if (value := getattr(self, name)) < 0:
                raise CrfError(f"{name}={value!r} is negative: use 0 to leave the kernel out")
        for name in ("theta_alpha", "theta_beta", "theta_gamma"):
            if (value := getattr(self, name)) <= 0:
                kernel = "w2" if name == "theta_gamma" else "w1"
                raise CrfError(
                    f"{name}={value!r} is no width: use more than 0 (and {kernel}=0 to leave the kernel out)"
                )
        if self.n_iter != int(self.n_iter) or not 1 <= self.n_iter <= MAX_ITERATIONS:
            raise CrfError(f"n_iter={self.n_iter!r}: use a whole number, 1 to {MAX_ITERATIONS}; 5 is usual")

    @property
    def halo_px(self) -> int:
        """Width of the halo with which a tile's labels are those of the whole image, in pixels.

        With 4 kernel widths 99.99 % of all labels agree (crf.md section 4), but fewer at the tile's
        border; with 5, these do too.
        """
        widths = [self.theta_alpha] * (self.w1 > 0) + [self.theta_gamma] * (self.w2 > 0)
        return math.ceil(HALO_THETAS * max(widths, default=0))
