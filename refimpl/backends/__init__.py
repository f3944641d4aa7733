"""What computes the arrays: NumPy on the host, CuPy on an NVIDIA GPU, side by side in one process.

    base.py         Backend, the primitives in their readable form; NumPyBackend, with work shared among threads
    numpy_ops.py    fast versions of operations for the host
    threads.py      worker threads over blocks that shapes alone decide
    malloc.py       keeps freed memory for the next step
    cupy/           the same for a GPU
"""
