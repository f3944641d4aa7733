"""The rules: each names one mistake of training loops. A rule is a function over a `View`; its docstring is the catalogue's.

    entry.py               `Rule`, and the decorator `@rule`
    table.py               `RULES` and `PROBES` of all groups
    masters.py             A1 to A3, A14: updates that leave weights as they were
    moments.py             A4, A5, A12: eps, g^2 and states in 16 bits
    formulas.py            A10: which formula an Adam follows
    weights.py             A6 to A9, A11, A13: the optimizer, its states, averages of weights
    updates.py             what an operation of an update overwrites; update_probes.py: what is measured of it
    scale.py               B: loss scale, unscaling, clipping
    sums.py                C: sums of gradients, over micro-batches, uses and ranks
    operations.py          D12, D13, D19 to D22: casts, gradients that they cut off, sums over steps
    chains.py              D1 to D3: softmax, losses and norms of several 16-bit operations
    positions.py           D4 to D6, D23, D24: numbers that 16 bits cannot tell apart
    overflow.py            D7 to D11: where Inf and NaN come from
    kernels.py             D14 to D18: kernels, by the verdicts of the judge
    flow.py                `Flow`: which operation made the values that another one reads
"""
