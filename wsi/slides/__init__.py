"""Slides in: readers, what is checked before one is opened, and the slide at a resolution."""
