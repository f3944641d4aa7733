"""The CuPy backend: one cuBLAS call per product, one CUDA kernel per pass over memory.

    backend.py      the Backend
    ops.py          operations, each a kernel or two, in one table
    llama_ops.py    those of Llama
    dispatch.py     when a kernel runs and when the definition
    passes.py       passes over the flat buffers: gradient norm and check, AdamW
    cublas.py       16-bit products with FP32 sums
    launch.py       compiles and launches the kernels
    kernels/        CUDA sources: kernels.cu, and cast.cuh, which converts between formats as numerics/casts.py does
"""
