"""APMA-Net."""
