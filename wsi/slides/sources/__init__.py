"""Where slides come from, one kind of place per file; `histostream.wsi.slides.staging` picks one.

Each module offers ``find_parts(source) -> list[SlidePart]``, the files that make the slide, and
``read_part(part, chunk_bytes)``, which yields the content of one.
"""
