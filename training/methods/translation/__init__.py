"""Semi-supervised image-to-image translation."""
