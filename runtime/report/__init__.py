"""What people look at after a run: ``report.html`` of a slide and of a cohort, one file each.

::

    run.json, summary.json, overview.png  ->  slide.slide_report   ->  OUT/slide/report.html
    outcomes of the slides, overviews     ->  cohort.CohortReport  ->  OUT/report.html

A page has no script and loads nothing: pictures are data URIs, plots are SVG and CSS made of the
numbers. Whatever a file says is text, and is escaped; see `page`.
"""

REPORT = "report.html"
