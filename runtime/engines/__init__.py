"""Inference libraries behind the `Engine` protocol, one file each."""
