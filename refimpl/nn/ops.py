"""The operations that models are made of, in one table by name. Each is a forward/backward pair of plain functions: `op.py`.

The models here use some of them; the others (matmul, rmsnorm, silu, ...) are for your own. Not in the table are `fan_in`, with
which the tape adds gradients, and what a policy can select: `quantized_linear` for `linear`, `fused_attention` for `attention`,
`fused_grouped_attention` for `grouped_attention`.
"""

from __future__ import annotations

from refimpl.nn.attention import attention_backward, attention_forward
from refimpl.nn.elementwise import (
    add_backward,
    add_forward,
    fan_in_forward,
    gelu_erf_backward,
    gelu_erf_forward,
    gelu_new_backward,
    gelu_new_forward,
    gelu_tanh_backward,
    gelu_tanh_forward,
    relu_backward,
    relu_forward,
    silu_backward,
    silu_forward,
    swiglu_backward,
    swiglu_forward,
)
from refimpl.nn.embedding import embedding_backward, embedding_forward
from refimpl.nn.fused_attention import fused_attention_backward, fused_attention_forward
from refimpl.nn.grouped_attention import (
    fused_grouped_attention_backward,
    fused_grouped_attention_forward,
    grouped_attention_backward,
    grouped_attention_forward,
)
from refimpl.nn.linear import linear_backward, linear_forward, matmul_backward, matmul_forward
from refimpl.nn.loss import cross_entropy_backward, cross_entropy_forward
from refimpl.nn.norm import (
    layernorm_backward,
    layernorm_forward,
    llama_rmsnorm_backward,
    llama_rmsnorm_forward,
    rmsnorm_backward,
    rmsnorm_forward,
)
from refimpl.nn.op import Op
from refimpl.nn.quantized_linear import quantized_linear_backward, quantized_linear_forward
from refimpl.nn.rope import rope_backward, rope_forward
from refimpl.nn.shape import (
    cast_backward,
    cast_forward,
    reshape_backward,
    reshape_forward,
    split_backward,
    split_forward,
    transpose_backward,
    transpose_forward,
)
from refimpl.nn.softmax import softmax_backward, softmax_forward

linear = Op("linear", linear_forward, linear_backward, params=(("weight", "w"), ("bias", "b")))
quantized_linear = Op("quantized_linear", quantized_linear_forward, quantized_linear_backward, linear.params, key="linear")
matmul = Op("matmul", matmul_forward, matmul_backward)
attention = Op("attention", attention_forward, attention_backward)
fused_attention = Op("fused_attention", fused_attention_forward, fused_attention_backward, key="attention")
grouped_attention = Op("grouped_attention", grouped_attention_forward, grouped_attention_backward, key="attention")
fused_grouped_attention = Op(
    "fused_grouped_attention", fused_grouped_attention_forward, fused_grouped_attention_backward, key="attention"
)
rope = Op("rope", rope_forward, rope_backward)
layernorm = Op("layernorm", layernorm_forward, layernorm_backward, params=(("weight", "w"), ("bias", "b")))
rmsnorm = Op("rmsnorm", rmsnorm_forward, rmsnorm_backward, params=(("weight", "w"),))
llama_rmsnorm = Op("llama_rmsnorm", llama_rmsnorm_forward, llama_rmsnorm_backward, params=(("weight", "w"),))
softmax_op = Op("softmax", softmax_forward, softmax_backward)
add = Op("add", add_forward, add_backward)
fan_in = Op("fan_in", fan_in_forward)
relu = Op("relu", relu_forward, relu_backward)
silu = Op("silu", silu_forward, silu_backward)
swiglu = Op("swiglu", swiglu_forward, swiglu_backward)
gelu_tanh = Op("gelu_tanh", gelu_tanh_forward, gelu_tanh_backward)
gelu_new = Op("gelu_new", gelu_new_forward, gelu_new_backward)
gelu_erf = Op("gelu_erf", gelu_erf_forward, gelu_erf_backward)
embedding = Op("embedding", embedding_forward, embedding_backward, params=(("weight", "w"),))
cross_entropy = Op("cross_entropy", cross_entropy_forward, cross_entropy_backward)
reshape = Op("reshape", reshape_forward, reshape_backward)
transpose = Op("transpose", transpose_forward, transpose_backward)
split = Op("split", split_forward, split_backward)
cast_parameter = Op("cast", cast_forward, cast_backward)

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        linear,
        matmul,
        attention,
        grouped_attention,
        rope,
        add,
        relu,
        silu,
        swiglu,
        gelu_tanh,
        gelu_new,
        gelu_erf,
        layernorm,
        rmsnorm,
        llama_rmsnorm,
        softmax_op,
        embedding,
        cross_entropy,
        reshape,
        transpose,
        split,
        cast_parameter,
    )
}
"""Name -> operation."""

GELUS: dict[str, Op] = {op.name: op for op in (gelu_tanh, gelu_new)}
"""Name -> operation that GPT-2 may have as its activation: equal in FP32, and rounded once or at every step in 16 bits."""

SELECTED: dict[str, Op] = {op.name: op for op in (quantized_linear, fused_attention, fused_grouped_attention)}
"""Name -> operation that a policy can select in place of one in OPS."""
