"""Pyramid GAN."""
