"""The rules: each names one mistake of training loops. A rule is a function over a `View`; its docstring is the catalogue's.

    entry.py               `Rule`, and the decorator `@rule`
    table.py               `RULES` and `PROBES` of all groups
    weights.py             A: the optimizer, its states, averages of weights
    scale.py               B: loss scale, unscaling, clipping
    sums.py                C: sums of gradients, over micro-batches, uses and ranks
    operations.py          D12, D13, D19 to D22: casts, gradients that they cut off, sums over steps
    chains.py              D1 to D3: softmax, losses and norms of several 16-bit operations
    positions.py           D4 to D6, D23, D24: numbers that 16 bits cannot tell apart
    overflow.py            D7 to D11: where Inf and NaN come from
    kernels.py             D14 to D18: kernels, by the verdicts of the judge
    flow.py                `Flow`: which operation made the values that another one reads
"""
