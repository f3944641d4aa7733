"""Recipes side by side: a table and a page."""
