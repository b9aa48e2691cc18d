"""HTML reports that a run writes: ``report.html`` of a slide and of a cohort, one file each.

::

    run.json, summary.json, overview.png  ->  slide.slide_report   ->  OUT/slide/report.html
    outcomes of the slides, overviews     ->  cohort.CohortReport  ->  OUT/report.html

A page has no script and loads no other file: pictures are data URIs, plots are SVG and CSS. Every text is
escaped; see `page`.
"""

REPORT = "report.html"
