"""Annotated images and a method in, a checkpoint out. Needs torch."""
