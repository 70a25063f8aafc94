"""Jinja templates of the report: ``report.html.jinja`` renders any page, ``style.css.jinja`` is its look."""
