"""Unsupervised domain adaptation with self-ensembling."""
