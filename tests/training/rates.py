"""A learning rate for tests of networks that must not move."""

STILL = 1e-300  # more than 0, as a configuration asks for, and too small to move a float32 weight
