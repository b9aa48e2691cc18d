"""A dense CRF sharpens the probabilities of a network along what the image shows."""
