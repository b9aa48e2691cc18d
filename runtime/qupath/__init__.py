"""``histo-infer qupath``: results in QuPath."""
