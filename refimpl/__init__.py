"""refimpl: mixed-precision training of language models, written out in NumPy.

Read `refimpl.step` first: it is the algorithm on one page.
"""

__version__ = "0.1.0"
