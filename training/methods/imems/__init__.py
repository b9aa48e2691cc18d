"""iMEMS."""
