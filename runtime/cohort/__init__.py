"""Many slides: find them, and run them in one process, several, or on a Ray cluster."""
