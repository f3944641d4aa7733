"""Toy experiments, each with a table, a picture and a conclusion."""
