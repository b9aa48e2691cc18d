"""Dense CRF: sharpens class probabilities along the edges that the image shows."""

from histostream.runtime.crf.dense import BACKENDS, dense_crf
from histostream.runtime.crf.params import CrfError, CrfParams

__all__ = ["BACKENDS", "CrfError", "CrfParams", "dense_crf"]
