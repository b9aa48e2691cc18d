"""A viewer of results in a browser: a local HTTP server, and a page of JavaScript modules with OpenSeadragon.

``histo-infer view`` serves folders of results to this machine only. Pixels of slides are read by
large-image, labels from ``labels.tif`` or, during a run, from its journal.
"""
