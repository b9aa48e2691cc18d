"""Scores of trained models on annotated images."""
