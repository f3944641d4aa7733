"""NumPy, fast: what `train.py` runs by default. Each operation here has its definition in `nn/`, and is tested against it.

    table.py         the explicit table: name of a definition -> its fast version
    backend.py       NumPyBackend: conversions and products on several threads
    blocks.py        operations in blocks that fit a cache
    linear.py        products whose rows are rounded by the thread that computed them
    attention.py     causal attention in blocks of queries, without the keys that they do not see
    rope.py          rotary position embedding, all heads at once
    elementwise.py   add, relu, silu, swiglu, gelu, in place
    norm.py          layer norm and Llama's norm, in place
    loss.py          cross-entropy in blocks of rows, without more arrays of the size of the logits
    embedding.py     the gradient of an embedding, by sorted tokens
    passes.py        the updates of AdamW and SGD, in place
    reductions.py    sums of rows
    threads.py       threads over parts that depend on shapes alone
    malloc.py        keep freed memory in the process
"""
