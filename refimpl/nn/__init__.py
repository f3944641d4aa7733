"""Autograd, operations and models.

    autograd.py     the tape: it records operations and replays them backwards; it does no arithmetic
    checkpointing.py
                    blocks that are computed again in backward instead of stored
    op.py           what an operation is: a pair of plain functions
    ops.py          the table of operations by name
    linear.py, attention.py, grouped_attention.py, rope.py, norm.py, softmax.py, elementwise.py, embedding.py, loss.py, shape.py
                    the operations, forward beside backward
    rope_scaling.py the angles of rotary position embeddings
    quantized_linear.py, fused_attention.py
                    what a policy can select in place of linear and attention
    kv_cache.py     attention that keeps keys and values, so that a text is continued token by token
    indices.py      checks of tokens and targets
    names.py        names of parameters in other programs, mapped to ours
    models/         GPT-2, Llama and an MLP, one line per operation
"""
