"""Figures regenerated: the table of papermill runs, which of them are due, the gallery, tables in Markdown."""
