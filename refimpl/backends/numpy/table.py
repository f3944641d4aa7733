"""The fast versions for the host, by the name of the definition that each replaces: operations of `nn/`, updates of `optim/`.

The roundings are those of the definition. So are the bits, except where a sum has another order: products in blocks of rows
(`linear`), or of queries (`attention`, where dk and dv are summed over the blocks); sums over the last axis by einsum
(`layernorm`, `llama_rmsnorm`, and the softmax of `attention` and `fused_attention`, with groups or without); the gradient of
`embedding`, added pairwise per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from refimpl.backends.numpy import attention, elementwise, embedding, linear, loss, norm, passes, rope
from refimpl.nn import ops
from refimpl.nn.op import Op

OPS: Mapping[str, Op] = {
    "linear": replace(ops.linear, forward=linear.linear_forward, backward=linear.linear_backward),
    "attention": replace(ops.attention, forward=attention.attention_forward, backward=attention.attention_backward),
    "fused_attention": replace(
        ops.fused_attention, forward=attention.fused_attention_forward, backward=attention.fused_attention_backward
    ),
    "grouped_attention": replace(
        ops.grouped_attention, forward=attention.grouped_attention_forward, backward=attention.grouped_attention_backward
    ),
    "fused_grouped_attention": replace(
        ops.fused_grouped_attention,
        forward=attention.fused_grouped_attention_forward,
        backward=attention.fused_grouped_attention_backward,
    ),
    "rope": replace(ops.rope, forward=rope.rope_forward, backward=rope.rope_backward),
    "add": replace(ops.add, forward=elementwise.add_forward),
    "fan_in": replace(ops.fan_in, forward=elementwise.fan_in_forward),
    "relu": replace(ops.relu, forward=elementwise.relu_forward, backward=elementwise.relu_backward),
    "silu": replace(ops.silu, forward=elementwise.silu_forward, backward=elementwise.silu_backward),
    "swiglu": replace(ops.swiglu, forward=elementwise.swiglu_forward, backward=elementwise.swiglu_backward),
    "gelu_tanh": replace(ops.gelu_tanh, forward=elementwise.gelu_tanh_forward, backward=elementwise.gelu_tanh_backward),
    "layernorm": replace(ops.layernorm, forward=norm.layernorm_forward, backward=norm.layernorm_backward),
    "llama_rmsnorm": replace(ops.llama_rmsnorm, forward=norm.llama_rmsnorm_forward, backward=norm.llama_rmsnorm_backward),
    "cross_entropy": replace(ops.cross_entropy, forward=loss.cross_entropy_forward, backward=loss.cross_entropy_backward),
    "embedding": replace(ops.embedding, backward=embedding.embedding_backward),
}

PASSES: Mapping[str, Callable[..., Any]] = {"adamw": passes.adamw, "sgd": passes.sgd}
