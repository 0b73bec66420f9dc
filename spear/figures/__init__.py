"""Figures regenerated, in reading order: `table` (the papermill runs), `schedule` (those that are due, side by side).

A run is an `attempt`; `ingredients` says what it is made of, by `imports`: modules that its `notebook` reaches.
`gallery` and `readme` write the pages.
"""
