"""Segment a slide with FAST (pyfast); run by an interpreter that has it, not by ours.

python fast_pipeline.py SLIDE MODEL OUT TILE_PX OVERLAP_SHARE prints the seconds it took.
"""

from __future__ import annotations

import sys
import time
from typing import Any


def main(slide: str, model: str, out: str, tile_px: str, overlap: str) -> None:
    """Tile level 0, run the network in OpenVINO, stitch, write a TIFF pyramid."""
    import fast  # type: ignore[import-not-found]

    toolkit: Any = fast
    toolkit.Reporter.setGlobalReportMethod(toolkit.Reporter.NONE)
    start = time.perf_counter()
    reader = toolkit.WholeSlideImageImporter.create(slide)
    side = int(tile_px)
    tiles = toolkit.PatchGenerator.create(side, side, overlapPercent=float(overlap), level=0)
    tiles.connect(reader)
    network = toolkit.SegmentationNetwork.create(
        model, scaleFactor=1 / 255, inferenceEngine="OpenVINO"
    ).connect(tiles)
    stitched = toolkit.RunUntilFinished.create().connect(
        toolkit.PatchStitcher.create().connect(network)
    )
    toolkit.TIFFImagePyramidExporter.create(out).connect(stitched).run()
    print(f"\nseconds {time.perf_counter() - start:.3f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
