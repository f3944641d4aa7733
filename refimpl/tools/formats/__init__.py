"""The number formats as tables and pictures, and how each stores a number.

    report.py    the `formats` command: facts of the formats, numbers as stored
    explain.py   one rounding, step by step
    numbers.py   numbers as users write them, and values as text
    plot.py      the picture
"""
