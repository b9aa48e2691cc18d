"""Slide readers, one per file; `histostream.wsi.reader.open_slide` picks one."""
