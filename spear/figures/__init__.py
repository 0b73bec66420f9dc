"""Figures regenerated, in reading order: `table` (the papermill runs), `schedule` (those that are due, side by side).

A run is an `attempt`; `ingredients` says what it is made of, by `imports`: modules that its `notebook` reaches.
`gallery` writes the page of figures, `markdown` the tables of pages.
"""
