"""Tiles over a slide, the strips of pixels that they are cut from, and the tissue they cover."""
