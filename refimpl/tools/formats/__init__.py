"""The number formats as tables and pictures, and how each stores a number."""
