"""HTML reports that a run writes: ``report.html`` of a slide and of a cohort, one file each.

::

    run.json, summary.json, overview.png  ->  slide.slide_report   ->  OUT/slide/report.html
    outcomes of the slides, overviews     ->  cohort.CohortReport  ->  OUT/report.html

The page itself is `histostream.wsi.report`.
"""

REPORT = "report.html"
