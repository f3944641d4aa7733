"""The CUDA sources: `kernels.cu`, every kernel, and `cast.cuh`, their conversions. `backends.cupy.launch` compiles them."""
