"""``report.html`` of a training run: curves, samples and the record, in one file that loads nothing.

::

    log.csv, samples/, best/  ->  run.write_report  ->  RUN/report.html
"""
