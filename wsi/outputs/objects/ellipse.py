"""The ellipse with the same second moments as an object: how long it is, and how much of it the object fills."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def variances(area: NDArray[np.int64], moments: NDArray[np.object_]) -> tuple[Floats, Floats]:
    """Return the variance of objects along their longest axis and across it, in pixels squared.

    Pixels are squares, which adds 1/12 to their variance along each axis, as in scikit-image.

    Parameters
    ----------
    area, moments
        (n,) and (n, 5), as of `Complete`.
    """
    n = area.astype(object)
    x, y, xx, yy, xy = moments.T
    # Integers up to the division: far from the origin the difference is lost in floating point.
    along_x, along_y, both = (
        ((n * square - product) / (n * n)).astype(np.float64)
        for square, product in ((xx, x * x), (yy, y * y), (xy, x * y))
    )
    along_x, along_y = along_x + 1 / 12, along_y + 1 / 12
    half = np.hypot((along_x - along_y) / 2, both)
    middle = (along_x + along_y) / 2
    return middle + half, middle - half


def eccentricity(area: NDArray[np.int64], moments: NDArray[np.object_]) -> Floats:
    """Return the eccentricity of the ellipses: 0 is round, near 1 is thin."""
    longest, shortest = variances(area, moments)
    eccentric: Floats = np.sqrt(np.clip(1 - shortest / longest, 0, 1))
    return eccentric


def filled(area: NDArray[np.int64], moments: NDArray[np.object_]) -> Floats:
    """Return the area of objects as a share of that of their ellipses: 1 for an ellipse, less for any other shape.

    Two touching discs of one size have 2 / sqrt(5) = 0.894. It is the square root of the ellipticity of Rosin,
    "Measuring shape: ellipticity, rectangularity, and triangularity", Machine Vision and Applications 14 (2003).
    """
    longest, shortest = variances(area, moments)
    share: Floats = area / (4 * np.pi * np.sqrt(longest * shortest))
    return share
