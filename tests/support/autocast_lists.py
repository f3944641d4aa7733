"""The op lists of torch.autocast (PyTorch 2.13, aten/src/ATen/autocast_mode.h), as far as there are operations here.

What is in no list runs in the format of its inputs.
"""

LOW_PRECISION = {"linear", "matmul"}
"""In 16 bits on CUDA and on CPU; attention's two products are calls of matmul."""
FP32_ON_CUDA = {"layernorm", "rmsnorm", "softmax", "cross_entropy"}
FP32_INSIDE_ON_CUDA = {"gelu_new"}
"""One of its steps is in the list (pow), so that its result is FP32 without a cast of its operand."""
FP32_ON_CPU = {"cross_entropy"}
