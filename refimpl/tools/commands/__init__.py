"""The commands: each module has the flags of one command and calls the code behind it.

`python -m refimpl NAME` runs a command, and so does `python scripts/NAME.py` in a clone.
"""
