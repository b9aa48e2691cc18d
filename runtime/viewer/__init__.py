"""Results in a browser: a small local server, and a page of plain modules around OpenSeadragon.

``histo-infer view`` serves folders of results on this machine only. Pixels of slides come from
large-image, labels from ``labels.tif`` or, while a run is writing, from its journal.
"""
