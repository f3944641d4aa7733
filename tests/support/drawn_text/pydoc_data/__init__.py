"""The drawn text, under the name of Python's manual."""
