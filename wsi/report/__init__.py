"""What the HTML reports of slides, cohorts and training runs share: the page, its style, and numbers as text.

A page has no script and loads no other file: pictures are data URIs, plots are SVG and CSS. Every text is
escaped; see `page`.
"""
