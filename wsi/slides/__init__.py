"""Open slides: readers, sources, checks of untrusted files, and views at a resolution."""
