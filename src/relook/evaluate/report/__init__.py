"""A report as one HTML page with everything in it: tables, figures, and a browser of the records.

    page      the whole, through report.html.jinja, report.css and report.js
    charts    figures as SVG                 places    where looks and annotated boxes lie on the page
    browse    records as data for report.js  pictures  their images, small

The page fetches nothing, and its own policy forbids it to. Text of records reaches it escaped by the template, or as
JSON that report.js puts into text nodes; the only script that may run is report.js, by its hash. Without JavaScript,
tables and figures stand and the browser of records says what it lacks.
"""

from relook.evaluate.report.page import IMAGES, page_html

__all__ = ["IMAGES", "page_html"]
