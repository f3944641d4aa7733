"""Where arrays are and what computes them: NumPy on the host and CuPy on an NVIDIA GPU, side by side in one process.

    base.py         Backend, the primitives in their readable form; NumPyBackend, which shares work among threads
    numpy_ops.py    fast versions of operations for the host
    numpy_passes.py fast versions of AdamW and SGD for the host
    threads.py      worker threads; how work is cut depends on shapes alone
    malloc.py       keeps freed memory for the next step
    cupy/           the backend for a GPU
"""
