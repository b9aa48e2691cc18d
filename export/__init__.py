"""A checkpoint in, a model bundle out."""
