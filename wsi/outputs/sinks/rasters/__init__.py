"""Further formats of the label map, for ``--rasters``."""
