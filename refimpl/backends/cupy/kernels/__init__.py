"""The CUDA sources: `cast.cuh`, the twin of cast.py, and `kernels.cu`, every kernel. `backends.launch` compiles them."""
