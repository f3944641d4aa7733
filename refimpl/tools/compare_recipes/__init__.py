"""Comparison of recipes: the same training under each, as a table and an HTML page."""
