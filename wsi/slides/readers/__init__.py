"""Slide readers, one per file; `histostream.wsi.slides.reader.open_slide` picks one."""
