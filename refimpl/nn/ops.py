"""All operations, in one table by name: forward/backward pairs of plain functions, see `ops.op`.

`fused_attention` is no other operation: it runs in the place of `attention` where a policy says so.

The models here use some of them; the others (matmul, rmsnorm, silu, ...) are for yours. `fan_in` adds gradients for the tape.
"""

from __future__ import annotations

from refimpl.nn.attention import attention
from refimpl.nn.elementwise import add, fan_in, gelu_erf, gelu_tanh, relu, silu
from refimpl.nn.embedding import embedding
from refimpl.nn.fused_attention import fused_attention
from refimpl.nn.linear import linear, matmul
from refimpl.nn.loss import cross_entropy
from refimpl.nn.norm import layernorm, rmsnorm, softmax_op
from refimpl.nn.op import Op
from refimpl.nn.shape import cast_parameter, reshape, split, transpose

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        linear,
        matmul,
        attention,
        add,
        relu,
        silu,
        gelu_tanh,
        gelu_erf,
        layernorm,
        rmsnorm,
        softmax_op,
        embedding,
        cross_entropy,
        reshape,
        transpose,
        split,
        cast_parameter,
    )
}

__all__ = [
    "OPS", "Op", "add", "attention", "cast_parameter", "cross_entropy", "embedding", "fan_in", "fused_attention",
    "gelu_erf", "gelu_tanh", "layernorm", "linear", "matmul", "relu", "reshape", "rmsnorm", "silu", "softmax_op",
    "split", "transpose",
]
