"""Where arrays are and what computes them. Several backends work side by side in one process.

    base.py      Backend: the primitives in their readable form; REFERENCE, the definitions on NumPy
    numpy/       the fast backend for the host, with a table of the definitions that it replaces
    cupy/        the backend for an NVIDIA GPU
    choose.py    backends by name
"""
